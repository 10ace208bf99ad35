r"""Layer-wise re-scaled initialisation (LRsI): one factor a weight tensor, learned before training, under the mask.

With :math:`W_t(s) = s_t W_t^0` and the gradient :math:`g = \nabla_W L(S; W(s))` on some batches S, the factors
minimise the loss after one step of normalised gradient descent on other batches S',

.. math:: \min_s L\big(S';\, W(s) - \eta\, g / \lVert g \rVert_2\big)
    \quad\text{subject to}\quad \lVert g \rVert_2 \leq \gamma .

An iteration that breaks the constraint takes a step on :math:`\lVert g \rVert_2` instead.

References
----------
.. [1] Jaiswal, Ma, Chen, Ding, Wang: Training your sparse neural network better with any mask. ICML 2022.
.. [2] Zhu, Ni, Xu, Kong, Huang, Goldstein: GradInit: learning to initialize neural networks for stable and efficient
   training. NeurIPS 2021.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fsp.checks import check_generator, plain_precision
from fsp.data import Data, augment, batches, is_count
from fsp.masks import PRUNABLE, Masks, check_masks
from fsp.training.settings import check_settings, is_number

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
BETAS = (0.9, 0.999)  # of the two running means of Adam
EPSILON = 1e-8


@dataclass(frozen=True)
class Rescaling:
    """Settings of `rescale_`; by default those of the authors' published command.

    Attributes
    ----------
    eta : float
        Length of the look-ahead step.
    gamma : float
        Bound on the norm of the gradient.
    lr : float
        Learning rate of the factors, whose optimiser is Adam.
    iterations : int
    floor : float
        Least factor.
    clip : float
        Bound on the derivative by one factor.
    batch_size : int
        Examples of each of the three batches of an iteration.
    mask_lookahead : bool
        Gradients under the mask only, in the norm and in the look-ahead step.  False: those of pruned weights, too,
        which are then not 0 after the look-ahead step, as in the authors' code (D57).
    """

    eta: float = 0.1
    gamma: float = 1.0
    lr: float = 1e-2
    iterations: int = 180
    floor: float = 0.01
    clip: float = 1.0
    batch_size: int = 128
    mask_lookahead: bool = True

    def __post_init__(self):
        rules = [(name, _is_positive(getattr(self, name)), "a number > 0") for name in ("eta", "gamma", "lr", "clip")]
        rules += [
            ("iterations", is_count(self.iterations, 1), "a whole number >= 1"),
            ("floor", is_number(self.floor) and 0 <= self.floor <= 1, "in [0, 1]"),
            ("batch_size", is_count(self.batch_size, 1), "a whole number >= 1"),
            ("mask_lookahead", isinstance(self.mask_lookahead, bool), "True or False"),
        ]
        check_settings(self, rules)


def _is_positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and value > 0  # type: ignore[operator]  # a number by now


def rescale_(
    model: nn.Module,
    data: Data,
    *,
    masks: Masks | None = None,
    settings: Rescaling | None = None,
    augmented: bool | None = None,
    generator: torch.Generator,
) -> dict[str, float]:
    """Multiply each weight tensor of a model by a factor that is learned on training data, in place.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.  Nothing but weights of convolutions, linear layers and norms changes: biases, running
        statistics and modes stay (D58).
    data : fsp.data.Data
        On the model's device; the training split is used.
    masks : Masks, optional
        Pruned weights are 0 from the start, and at the end.
    settings : Rescaling, optional
    augmented : bool, optional
        Random crop and flip; default what the data set's standard recipe says.
    generator : torch.Generator on the CPU
        Draws the batches.

    Returns
    -------
    dict of parameter name to float
        The factors; 1 for a tensor whose weights are all pruned.

    Raises
    ------
    ValueError
        If a mask fits no parameter, the model has no weight of such a layer, or a gradient is not finite; the model is
        as it was then.

    Notes
    -----
    Batch norm uses the statistics of the batch, everything else is in eval mode.  The two batches of S and the third,
    which with the first makes S', are drawn anew in each iteration.

    References
    ----------
    Jaiswal et al., ICML 2022, section 3 (LRsI); Zhu et al., NeurIPS 2021, algorithm 1.

    Examples
    --------
    >>> from fsp.data import load
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    >>> before = model[1].weight.detach().clone()
    >>> factors = rescale_(
    ...     model, load("digits"), settings=Rescaling(iterations=2), generator=torch.Generator().manual_seed(0)
    ... )
    >>> list(factors), torch.equal(model[1].weight, factors["1.weight"] * before)
    (['1.weight'], True)
    """
    check_generator(generator)
    settings = settings or Rescaling()
    masks = masks or {}
    masked = {id(p): masks[name] for name, p in check_masks(model, masks).items()}
    parameters = dict(model.named_parameters())
    pruned = {name: ~masked[id(p)].to(p.device) for name, p in parameters.items() if id(p) in masked}
    names = scaled_names(model)
    with torch.inference_mode(False), torch.enable_grad(), plain_precision():
        start = {name: p.detach().clone() for name, p in parameters.items()}
        for name, gone in pruned.items():
            start[name].masked_fill_(gone, 0)
        drawn = _drawn(data, settings.batch_size, data.augmented if augmented is None else augmented, generator)
        factors = torch.ones(len(names), dtype=torch.float32, device=start[names[0]].device)
        with _modes_for_rescaling(model):
            objective = _Objective(model, start, names, pruned if settings.mask_lookahead else {}, settings)
            factors = _minimised(objective, factors, drawn, settings)
    found = dict(zip(names, factors.tolist(), strict=True))
    with torch.no_grad():
        for name, factor in found.items():
            parameters[name].copy_(factor * start[name])
    return found


def scaled_names(model: nn.Module) -> list[str]:
    """Names of the weights of convolutions, linear layers and norms; a ValueError if there are none."""
    own = {id(p) for m in model.modules() if isinstance(m, PRUNABLE) for p in m.parameters() if p.ndim > 1}
    own |= {id(m.weight) for m in model.modules() if isinstance(m, NORMS) and m.weight is not None}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in own]
    if not names:
        raise ValueError(f"{type(model).__name__} has no weight of a convolution, linear layer or norm to rescale")
    return names


def _minimised(objective: "_Objective", factors: Tensor, drawn: Iterator, settings: Rescaling) -> Tensor:
    """The factors after all iterations: Adam with one first moment for each of the two kinds of steps."""
    first = {kind: torch.zeros_like(factors) for kind in ("loss", "norm")}
    times = dict.fromkeys(first, 0)
    second = torch.zeros_like(factors)
    for iteration in range(1, settings.iterations + 1):
        kind, derivative = objective.derivative(factors, [next(drawn) for _ in range(3)])
        if not derivative.isfinite().all():
            raise ValueError(
                f"rescaling: at iteration {iteration} the derivative of the {kind} is not finite; the weights are too "
                "large or the network too deep for this precision: start from other weights, or without rescaling"
            )
        derivative = derivative.clamp(-settings.clip, settings.clip)
        times[kind] += 1
        first[kind].lerp_(derivative, 1 - BETAS[0])
        second.lerp_(derivative.square(), 1 - BETAS[1])
        mean = first[kind] / (1 - BETAS[0] ** times[kind])
        square = second / (1 - BETAS[1] ** iteration)
        factors = (factors - settings.lr * mean / (square.sqrt() + EPSILON)).clamp(min=settings.floor)
    return factors


class _Objective:
    """What the factors minimise, on given batches."""

    def __init__(
        self, model: nn.Module, start: dict[str, Tensor], names: list[str], pruned: Masks, settings: Rescaling
    ):
        self.model, self.start, self.names, self.pruned, self.settings = model, start, names, pruned, settings

    def derivative(self, factors: Tensor, three: list[tuple[Tensor, Tensor]]) -> tuple[str, Tensor]:
        """Which of the two is to fall, the loss after the look-ahead step or the norm, and its derivative."""
        factors = factors.detach().requires_grad_()
        scaled = dict(zip(self.names, factors, strict=True))
        start = {name: tensor.detach().requires_grad_() for name, tensor in self.start.items()}
        weights = {name: scaled[name] * tensor if name in scaled else tensor for name, tensor in start.items()}
        loss = self._loss(weights, *_joined(three[0], three[1]))
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        step = dict(zip(weights, gradients, strict=True))
        for name, gone in self.pruned.items():
            step[name] = step[name].masked_fill(gone, 0)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in step.values()]))
        if norm > self.settings.gamma:
            return "norm", torch.autograd.grad(norm, factors, materialize_grads=True)[0]
        length = self.settings.eta / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        ahead = {name: tensor - length * step[name] for name, tensor in weights.items()}
        loss = self._loss(ahead, *_joined(three[0], three[2])) / self.settings.eta
        return "loss", torch.autograd.grad(loss, factors, materialize_grads=True)[0]

    def _loss(self, weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy with these weights; copies of the buffers take the statistics of the batch."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return cross_entropy(functional_call(self.model, {**weights, **buffers}, (inputs,)), labels)


def _joined(*of: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Inputs and labels of several batches, one after the other."""
    return [torch.cat(parts) for parts in zip(*of, strict=True)]


def _drawn(data: Data, size: int, augmented: bool, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches without end, in a new order in each pass; smaller ones are left out if there are others."""
    for _ in itertools.count():
        for images, labels in batches(data.train, size, generator=generator, drop_last=len(data.train.labels) >= size):
            if augmented:
                images = augment(images, generator=generator)
            yield data.normalise(images), labels


@contextmanager
def _modes_for_rescaling(model: nn.Module) -> Iterator[None]:
    """Eval mode except for batch norm, and the modes of all modules as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
