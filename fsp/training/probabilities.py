"""What class probabilities are worth: right, likely, calibrated; and how much the members of an ensemble differ.

References
----------
.. [1] Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks.  ICML 2017.
.. [2] Liu, Chen, Atashgahi, Chen, Sokar, Mocanu, Pechenizkiy, Wang, Mocanu: Deep ensembling with no overhead for either
   training or testing: the all-round blessings of dynamic sparsity.  ICLR 2022.
"""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from fsp.checks import check_count, check_tensors, plain_settings
from fsp.training.settings import is_number

TEMPERATURES = (0.01, 100.0)  # between which one is looked for
MOST_BINS = 10_000  # of the calibration error


@plain_settings()
def quality(
    probabilities: Tensor, labels: Tensor, *, bins: int = 15, validation: tuple[Tensor, Tensor] | None = None
) -> dict[str, float]:
    r"""Accuracy, negative log-likelihood, Brier score and calibration error.

    Parameters
    ----------
    probabilities : Tensor, shape (N, classes)
        Floating point; each row sums to 1.
    labels : Tensor, int64, shape (N,)
    bins : int, from 1 to 10,000
        Of the calibration error.
    validation : (probabilities, labels), optional
        Of other examples: adds the temperature fitted to them, and the calibration error at that temperature.

    Returns
    -------
    dict
        ``accuracy`` in [0, 1]; ``nll``, :math:`-\frac 1 N \sum_n \log p_{n, y_n}` in nats; ``brier``,
        :math:`\frac 1 N \sum_n \sum_k (p_{nk} - [k = y_n])^2` in [0, 2]; ``ece`` in [0, 1], see `calibration_error`;
        with `validation`, ``temperature`` and ``ece_tempered``.

    Raises
    ------
    ValueError
        If the probabilities are none, or labels do not fit them.

    Examples
    --------
    >>> found = quality(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
    >>> {name: round(value, 3) for name, value in found.items()}
    {'accuracy': 0.5, 'nll': 1.04, 'brier': 0.812, 'ece': 0.625}

    Notes
    -----
    A probability that rounding has made 0 counts as the smallest normal number of its type (87 nats in float32), so
    that one example does not make the likelihood infinite.
    """
    _check(probabilities, labels)
    right = F.one_hot(labels, probabilities.shape[1]).to(probabilities)
    found = {
        "accuracy": (probabilities.argmax(1) == labels).double().mean().item(),
        "nll": F.nll_loss(_log(probabilities), labels).item(),
        "brier": (probabilities - right).double().square().sum(1).mean().item(),
        "ece": calibration_error(probabilities, labels, bins=bins),
    }
    if validation is not None:
        found["temperature"] = temperature(*validation)
        found["ece_tempered"] = calibration_error(tempered(probabilities, found["temperature"]), labels, bins=bins)
    return found


@plain_settings()
def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    r"""Expected calibration error: how far confidence and accuracy are apart, on average over bins of confidence.

    .. math:: ECE = \sum_b \frac{n_b}{N} \left|\mathrm{accuracy}_b - \mathrm{confidence}_b\right|

    Parameters
    ----------
    probabilities, labels
        As for `quality`, and so are the errors.
    bins : int, from 1 to 10,000
        Of equal width over (0, 1], each without its lower and with its upper end.  The confidence of a prediction is
        its largest probability.

    Returns
    -------
    float
        In [0, 1].

    References
    ----------
    [1]_, equation 3.
    """
    check_count("bins", bins, 1)
    if bins > MOST_BINS:
        raise ValueError(f"bins={bins!r}: expected at most {MOST_BINS}")
    _check(probabilities, labels)
    confidence, predicted = probabilities.max(1)
    ends = torch.arange(1, bins, dtype=probabilities.dtype, device=probabilities.device) / bins
    place = torch.bucketize(confidence, ends)
    gap = (predicted == labels).double() - confidence.double()
    return torch.bincount(place, weights=gap, minlength=bins).abs().sum().item() / len(labels)


@plain_settings()
def temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature at which probabilities are most likely; above 1 where they were too sure.

    Parameters
    ----------
    probabilities, labels
        As for `quality`, and so are the errors; of validation examples.

    Returns
    -------
    float
        From .01 to 100; close to an end where the likelihood has no maximum in between, as without any mistake.

    References
    ----------
    [1]_, section 4.2.
    """
    _check(probabilities, labels)
    logits = _log(probabilities)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / math.exp(log_temperature), labels).item()

    bounds = tuple(map(math.log, TEMPERATURES))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


@plain_settings()
def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    r"""Probabilities at another temperature, :math:`p_k^{1/T} / \sum_j p_j^{1/T}`.

    Parameters
    ----------
    probabilities : Tensor, shape (N, classes)
    temperature : float, above 0
        1 changes nothing; a high one makes all classes equal.

    Returns
    -------
    Tensor, float64, shape (N, classes)

    Raises
    ------
    ValueError
        If the probabilities are none, or the temperature is not above 0.
    """
    _check(probabilities)
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature!r}: expected a finite number above 0, such as 1.5")
    return (_log(probabilities) / float(temperature)).softmax(1)


@plain_settings()
def diversity(members: Tensor) -> dict[str, float]:
    r"""How much the members of an ensemble differ in what they predict, over all pairs of members.

    Parameters
    ----------
    members : Tensor, shape (members, N, classes)
        Probabilities of two members or more.

    Returns
    -------
    dict
        ``disagreement``: the fraction of examples for which two members predict different classes.  ``kl``: the mean
        of :math:`KL(p_i \| p_j) = \sum_k p_{ik} \log (p_{ik} / p_{jk})` over examples, in nats.

    Raises
    ------
    ValueError
        If there are fewer than two members, or what they give are no probabilities.

    Examples
    --------
    >>> diversity(torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.9, 0.1], [0.4, 0.6]]]))["disagreement"]
    0.5

    References
    ----------
    [2]_, prediction disagreement and KL divergence.
    """
    check_tensors("argument", {"members": members})
    if members.ndim != 3 or len(members) < 2:
        raise ValueError(
            f"members has shape {tuple(members.shape)}: expected (members, N, classes), two members or more"
        )
    for member in members:
        _check(member)
    count, n, _ = members.shape
    pairs = count * (count - 1)
    predicted = members.argmax(-1)
    differ = sum((predicted != own).sum().item() for own in predicted)
    cross = torch.einsum("ink,jnk->ij", members.double(), _log(members)) / n  # of log p_j under p_i
    kl = (cross.diagonal()[:, None] - cross).sum().item() / pairs
    return {"disagreement": differ / (pairs * n), "kl": max(0.0, kl)}  # of equal members rounding leaves -1e-17


def _log(probabilities: Tensor) -> Tensor:
    """Logarithm in float64, of 0 that of the smallest normal number of the type."""
    return probabilities.double().clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def _check(probabilities: Tensor, labels: Tensor | None = None) -> None:
    """Raise a ValueError unless these are probabilities of at least one example, and labels of the same."""
    check_tensors("argument", {"probabilities": probabilities})
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or probabilities.numel() == 0:
        raise ValueError(
            f"probabilities are {probabilities.dtype} of shape {tuple(probabilities.shape)}: expected floating point, "
            "(N, classes), of at least one example"
        )
    sums = probabilities.double().sum(1)
    if not (probabilities >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError("probabilities are negative or nan, or do not sum to 1: expected softmax(1) of the logits")
    if labels is None:
        return
    check_tensors("argument", {"labels": labels})
    n, classes = probabilities.shape
    if labels.dtype != torch.int64 or labels.shape != (n,):
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: expected int64 of shape ({n},), from 0 to "
            f"{classes - 1}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels are from {labels.min()} to {labels.max()}: expected them from 0 to {classes - 1}")
