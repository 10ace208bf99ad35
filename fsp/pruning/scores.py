"""Scores of weights at initialisation: one function a method, higher = kept.

Every function takes the model and the masks so far, and ``batches`` and ``generator`` if it needs them, and returns a
dict of scores.  Weights that are pruned
already get ``-inf``, so that a later round cannot bring them back; `force` alone scores them too.  The model, its
train/eval flags, its running statistics and the global random state are left bit-identical: `fsp.pruning.gradients`.

The methods that run the model share these options.

training : bool
    Whether norm and dropout layers are in train mode.
dtype : torch.dtype, optional
    Precision of the computation; default that of the model, float64 for synaptic flow.
generator : torch.Generator on the CPU, optional
    Seeds dropout.
forward : callable
    (model, inputs) -> outputs, a tensor; default ``model(inputs)``.  For a model with several outputs, for instance
    ``lambda model, inputs: model(inputs)["out"]``.  Inputs other than floating-point tensors are passed on as they are.
loss : callable
    (outputs, labels) -> scalar, the *mean* over the examples of a batch; default cross entropy.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from fsp.masks import Masks, used_weights
from fsp.pruning.gradients import Batches, FlowRun, LossRun, flow_gradients, input_shape, loss_gradients, seed_of
from fsp.training.settings import is_number

Scores = dict[str, Tensor]


def magnitude(model: nn.Module, masks: Masks) -> Scores:
    r"""Magnitude, :math:`s = |\theta|`.

    Parameters
    ----------
    model : nn.Module
    masks : Masks

    Returns
    -------
    dict of name to Tensor
    """
    return _alive({name: weight.abs() for name, weight in used_weights(model, masks).items()}, masks)


def snip(
    model: nn.Module, masks: Masks, *, batches: Batches, generator: Generator | None = None, **run: Unpack[LossRun]
) -> Scores:
    r"""SNIP: how strongly the loss reacts to the removal of a weight.

    .. math:: s = \bigl| \theta \odot \partial L / \partial \theta \bigr|

    with L the mean loss over all examples of `batches` together, at the masked weights.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.
    masks : Masks
    batches : sequence of (inputs, labels)
        On the model's device; see `fsp.data.scoring_batches`.
    generator, training, dtype, forward, loss
        See the head of this module.  The Synaptic-Flow repository scores in eval mode.

    Returns
    -------
    dict of name to Tensor, >= 0

    Raises
    ------
    ValueError
        Without batches, or if the loss is no scalar.
    TypeError
        If a batch is no pair, or the outputs are no tensor.

    References
    ----------
    Lee, Ajanthan, Torr: SNIP: single-shot network pruning based on connection sensitivity. ICLR 2019, equations 4-6.
    """
    weights, gradients = loss_gradients(model, masks, batches, seed=seed_of(generator), **run)
    return _alive({name: (weights[name] * g).abs() for name, g in gradients.items()}, masks)


def taylor(
    model: nn.Module, masks: Masks, *, batches: Batches, generator: Generator | None = None, **run: Unpack[LossRun]
) -> Scores:
    r"""First-order Taylor score of the ICLR'23 benchmark (Taylor1ScorerAbs).

    .. math:: s = \Bigl| \sum_b \theta \odot \partial L_b / \partial \theta \Bigr|

    with :math:`L_b` the mean loss of batch b alone.  It is `snip` but for the weight of a batch: SNIP counts every
    example alike, this every batch.  With B batches of one size it is B times SNIP, so the masks are the same; with a
    smaller last batch they differ.

    Parameters
    ----------
    model, masks, batches, generator, training, dtype, forward, loss
        As for `snip`, and so are the errors.

    Returns
    -------
    dict of name to Tensor, >= 0

    References
    ----------
    Hoang, Liu, Marculescu, Wang: Revisiting pruning at initialization through the lens of Ramanujan graph. ICLR 2023,
    code.
    """
    weights, gradients = loss_gradients(model, masks, batches, average=False, seed=seed_of(generator), **run)
    return _alive({name: (weights[name] * g).abs() for name, g in gradients.items()}, masks)


def force(
    model: nn.Module, masks: Masks, *, batches: Batches, generator: Generator | None = None, **run: Unpack[LossRun]
) -> Scores:
    r"""FORCE: the SNIP score that a weight, pruned or not, has in the pruned network.

    .. math:: s = \left| \theta_0 \odot \frac{\partial L(\theta)}{\partial \theta}
              \right|_{\theta = \theta_0 \odot c}

    with c the masks: the forward pass uses the pruned network, the gradient is not masked and :math:`\theta_0` is
    dense.  Scores of pruned weights are not ``-inf``, so that a later round may bring a weight back.  Where nothing is
    pruned this is SNIP.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.  Its own weights are :math:`\theta_0`: dense, not masked.
    masks, batches, generator, training, dtype, forward, loss
        As for `snip`, and so are the errors.

    Returns
    -------
    dict of name to Tensor, >= 0

    References
    ----------
    de Jorge et al.: Progressive skeletonization: trimming more fat from a network at initialization. ICLR 2021.
    """
    _, gradients = loss_gradients(model, masks, batches, seed=seed_of(generator), **run)
    dense = used_weights(model, masks)
    return {name: (dense[name].to(g.dtype) * g).abs() for name, g in gradients.items()}


def grasp(
    model: nn.Module,
    masks: Masks,
    *,
    batches: Batches,
    temperature: float = 200.0,
    generator: Generator | None = None,
    **run: Unpack[LossRun],
) -> Scores:
    r"""GraSP: keep the weights whose removal would reduce the gradient flow most.

    .. math:: s = \theta \odot H g, \qquad g = \partial L / \partial \theta,

    signed, with H the Hessian of L at the masked weights and L the mean loss of the outputs divided by the temperature.
    Removing weight i changes :math:`g^\top g / 2` by :math:`-\theta_i (Hg)_i` to first order.

    Parameters
    ----------
    model, masks, generator, training, dtype, forward, loss
        As for `snip`, and so are the errors.
    batches : sequence of (inputs, labels)
        Used twice, in the same order, with the same dropout.
    temperature : float, > 0

    Returns
    -------
    dict of name to Tensor

    Raises
    ------
    ValueError
        If the temperature is not positive and finite.

    Notes
    -----
    The temperature divides the logits, as in the original code; the ICLR'23 benchmark divides log-probabilities,
    which only rescales the score (D19).

    References
    ----------
    Wang, Zhang, Grosse: Picking winning tickets before training by preserving gradient flow. ICLR 2020, equation 8.
    """
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature!r} is not positive and finite")
    temperature = float(temperature)
    batches, seed = list(batches or []), seed_of(generator)
    loss = run.get("loss", cross_entropy)
    run["loss"] = lambda outputs, labels: loss(outputs / temperature, labels)
    weights, gradient = loss_gradients(model, masks, batches, seed=seed, **run)
    _, product = loss_gradients(model, masks, batches, hessian_times=gradient, seed=seed, **run)
    return _alive({name: weights[name] * hg for name, hg in product.items()}, masks)


def synflow(
    model: nn.Module,
    masks: Masks,
    *,
    batches: Batches | None = None,
    shape: Sequence[int] | None = None,
    generator: Generator | None = None,
    **run: Unpack[FlowRun],
) -> Scores:
    r"""SynFlow: the flow of synaptic strength through a weight, without data.

    .. math:: s = \left| \frac{\partial R}{\partial |\theta|} \odot |\theta| \right|, \qquad
              R = \mathbf 1^\top f_{|\theta|}(\mathbf 1)

    where every parameter and buffer is replaced by its absolute value, the model is in eval mode, the input is all
    ones and R is the sum of the outputs.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
    batches : sequence of (inputs, labels), optional
        Only the shape of the first input is used.
    shape : sequence of int, optional
        Shape of one input, (channels, height, width); instead of `batches`.
    generator, training, dtype, forward
        See the head of this module.  In train mode batch norm normalises the one input, as in an example of the
        ICLR'23 authors; that takes maps larger than 1 x 1.  float32 overflows on a ResNet-34.

    Returns
    -------
    dict of name to Tensor, >= 0

    Raises
    ------
    ValueError
        If neither `batches` nor `shape` gives the input shape.
    TypeError
        If the outputs are no tensor.

    Warns
    -----
    UserWarning
        In the first round, naming modules that are not positively homogeneous (GELU, SiLU, sigmoid, softmax, layer
        norm, attention and their like).  Flow is conserved, and layers saved from collapse, only where scaling the
        input of every activation scales its output; functions called in a ``forward`` are not seen.

    Notes
    -----
    Raw outputs, not the log-softmax of the ICLR'23 benchmark (D11), which is
    ``forward=lambda model, inputs: model(inputs).log_softmax(1)``.

    References
    ----------
    Tanaka, Kunin, Yamins, Ganguli: Pruning neural networks without any data by iteratively conserving synaptic flow.
    NeurIPS 2020, equation 3 and algorithm 1.
    """
    shape, seed = input_shape(shape, batches), seed_of(generator)
    weights, gradients = flow_gradients(model, masks, shape, of=torch.abs, seed=seed, **run)
    return _alive({name: (weights[name] * g).abs() for name, g in gradients.items()}, masks)


def synflow_l2(
    model: nn.Module,
    masks: Masks,
    *,
    batches: Batches | None = None,
    shape: Sequence[int] | None = None,
    generator: Generator | None = None,
    **run: Unpack[FlowRun],
) -> Scores:
    r"""SynFlow-L2: synaptic flow of the squared weights.

    .. math:: s = \left| \frac{\partial R}{\partial \theta^2} \right| \odot |\theta|, \qquad
              R = \mathbf 1^\top f_{\theta^2}(\mathbf 1)

    Parameters and buffers of the network are replaced by :math:`\theta^2` and by absolute values.

    Parameters
    ----------
    model, masks, batches, shape, generator, training, dtype, forward
        As for `synflow`, and so are errors and warnings.

    Returns
    -------
    dict of name to Tensor, >= 0

    Notes
    -----
    The factor is :math:`|\theta|`, not :math:`\theta^2`: these scores are not a flow and do not add up to R.

    References
    ----------
    Gebhart, Saxena, Schrater: A unified paths perspective for pruning at initialization. 2021.
    Patil, Dovrolis: PHEW: constructing sparse networks that learn fast and generalize well without training data.
    ICML 2021.
    """
    shape, seed = input_shape(shape, batches), seed_of(generator)
    _, gradients = flow_gradients(model, masks, shape, of=torch.square, seed=seed, **run)
    dense = used_weights(model, masks)
    return _alive({name: dense[name].to(g.dtype).abs() * g.abs() for name, g in gradients.items()}, masks)


def _alive(scores: Scores, masks: Masks) -> Scores:
    """Scores with -inf where the masks prune already."""
    return {name: s.masked_fill(~masks[name], -torch.inf) for name, s in scores.items()}
