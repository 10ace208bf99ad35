"""What a weight is worth at initialisation: one function a method, higher = kept.

Every function takes the model, the masks so far and ``batches`` and returns a dict of scores; weights that are pruned
already get ``-inf``, so that a later round cannot bring them back.  Scoring runs on detached copies of the
parameters and buffers: the model, its train/eval flags, its running statistics and the global random state are left
bit-identical.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fsp.masks import Masks

Scores = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


def random(model: nn.Module, masks: Masks, *, generator: torch.Generator) -> Scores:
    """Independent standard normal scores: the topology of a uniformly random mask.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
    generator : torch.Generator on the CPU

    Returns
    -------
    dict of name to Tensor
        Drawn on the CPU, moved to the masks' devices.
    """
    return _alive({name: torch.randn(m.shape, generator=generator).to(m.device) for name, m in masks.items()}, masks)


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
    parameters = dict(model.named_parameters())
    return _alive({name: parameters[name].detach().abs() for name in masks}, masks)


def snip(
    model: nn.Module,
    masks: Masks,
    *,
    batches: Batches,
    training: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Scores:
    r"""SNIP: how strongly the loss reacts to the removal of a weight.

    .. math:: s = \bigl| \theta \odot \partial L / \partial \theta \bigr|

    with L the mean cross entropy over all examples of `batches` together, at the masked weights.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.
    masks : Masks
    batches : sequence of (inputs, labels)
        On the model's device; see `fsp.batches.scoring_batches`.
    training : bool
        Whether norm and dropout layers are in train mode; the Synaptic-Flow repository scores in eval mode.
    dtype : torch.dtype, optional
        Precision of the computation; default that of the model.
    generator : torch.Generator on the CPU, optional
        Seeds dropout.

    Returns
    -------
    dict of name to Tensor, >= 0

    References
    ----------
    Lee, Ajanthan, Torr: SNIP: single-shot network pruning based on connection sensitivity. ICLR 2019, equations 4-6.
    """
    batches = list(batches or [])
    weights, state = _copies(model, masks, dtype)
    gradients = _gradients(model, weights, state, batches, training, 1.0, _seed(generator))
    return _alive({name: (weights[name] * g).detach().abs() for name, g in gradients.items()}, masks)


def grasp(
    model: nn.Module,
    masks: Masks,
    *,
    batches: Batches,
    temperature: float = 200.0,
    training: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Scores:
    r"""GraSP: keep the weights whose removal would reduce the gradient flow most.

    .. math:: s = \theta \odot H g, \qquad g = \partial L / \partial \theta,

    signed, with H the Hessian of L at the masked weights and L the mean cross entropy of the logits divided by
    the temperature.  Removing weight i changes :math:`g^\top g / 2` by :math:`-\theta_i (Hg)_i` to first order.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.
    masks : Masks
    batches : sequence of (inputs, labels)
        Used twice, in the same order, with the same dropout.
    temperature : float, > 0
    training : bool
        Whether norm and dropout layers are in train mode.
    dtype : torch.dtype, optional
        Precision of the computation; default that of the model.
    generator : torch.Generator on the CPU, optional
        Seeds dropout.

    Returns
    -------
    dict of name to Tensor

    Notes
    -----
    The temperature divides the logits, as in the original code; the ICLR'23 benchmark divides log-probabilities,
    which only rescales the score (D19).

    References
    ----------
    Wang, Zhang, Grosse: Picking winning tickets before training by preserving gradient flow. ICLR 2020, equation 8.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    batches = list(batches or [])
    weights, state = _copies(model, masks, dtype)
    seed = _seed(generator)
    flow = _gradients(model, weights, state, batches, training, temperature, seed)
    state = _copies(model, masks, dtype)[1]  # running statistics as they were before the first pass
    product = {name: torch.zeros_like(w) for name, w in weights.items()}
    for gradients in _batch_gradients(model, weights, state, batches, training, temperature, seed, graph=True):
        dot = sum((flow[name] * g).sum() for name, g in zip(weights, gradients, strict=True))
        parts = torch.autograd.grad(dot, list(weights.values()), materialize_grads=True)
        for name, part in zip(weights, parts, strict=True):
            product[name] += part
    return _alive({name: (weights[name] * hg).detach() for name, hg in product.items()}, masks)


def synflow(
    model: nn.Module,
    masks: Masks,
    *,
    batches: Batches | None = None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
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
    dtype : torch.dtype
        float64: float32 overflows on a ResNet-34.

    Returns
    -------
    dict of name to Tensor, >= 0

    Raises
    ------
    ValueError
        If neither `batches` nor `shape` tells the input shape.

    Notes
    -----
    Raw outputs, not the log-softmax of the ICLR'23 benchmark (D11).

    References
    ----------
    Tanaka, Kunin, Yamins, Ganguli: Pruning neural networks without any data by iteratively conserving synaptic flow.
    NeurIPS 2020, equation 3 and algorithm 1.
    """
    if shape is None:
        if not batches:
            raise ValueError("SynFlow needs the shape of an input: pass shape=(channels, height, width) or batches")
        shape = batches[0][0].shape[1:]
    weights, state = _copies(model, masks, dtype)
    state = {name: value.abs() for name, value in state.items()}
    weights = {name: w.detach().abs().requires_grad_() for name, w in weights.items()}
    ones = torch.ones((1, *shape), dtype=dtype, device=next(iter(weights.values())).device)
    with _undisturbed(model, training=False, seed=0):
        flow = functional_call(model, state | weights, (ones,)).sum()
        gradients = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    return _alive(
        {name: (w * g).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}, masks
    )


SCORES: dict[str, Callable[..., Scores]] = {
    "random": random,
    "magnitude": magnitude,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
}


# ---- how scoring leaves the model alone --------------------------------------------------------------------------


def _copies(model: nn.Module, masks: Masks, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masked weights as new leaves, and copies of everything else the model holds."""
    state = {
        name: t.detach().to(dtype if t.is_floating_point() else None, copy=True)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    weights = {name: (state.pop(name) * mask).requires_grad_() for name, mask in masks.items()}
    return weights, state


@contextmanager
def _undisturbed(model: nn.Module, *, training: bool, seed: int) -> Iterator[None]:
    """Put the model in train or eval mode with random numbers from `seed`; flags and random state come back."""
    flags = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for index in devices:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        try:
            model.train(training)
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def _batch_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    batches: Batches,
    training: bool,
    temperature: float,
    seed: int,
    *,
    graph: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """Each batch's share of the gradient of the mean cross entropy over all examples."""
    if not batches:
        raise ValueError("this method scores on data: pass batches, see fsp.batches.scoring_batches")
    examples = sum(len(labels) for _, labels in batches)
    dtype = next(iter(weights.values())).dtype
    with _undisturbed(model, training=training, seed=seed):
        for inputs, labels in batches:
            inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs  # tokens stay whole numbers
            logits = functional_call(model, {**state, **weights}, (inputs,))
            loss = cross_entropy(logits / temperature, labels, reduction="sum") / examples
            yield torch.autograd.grad(loss, list(weights.values()), create_graph=graph, materialize_grads=True)


def _gradients(model, weights, state, batches, training, temperature, seed) -> dict[str, Tensor]:
    """Gradient of the mean cross entropy over all examples of all batches."""
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for gradients in _batch_gradients(model, weights, state, batches, training, temperature, seed):
        for name, g in zip(weights, gradients, strict=True):
            total[name] += g
    return total


def _alive(scores: Scores, masks: Masks) -> Scores:
    """Scores with -inf where the masks prune already."""
    return {name: s.masked_fill(~masks[name], -torch.inf) for name, s in scores.items()}


def _seed(generator: torch.Generator | None) -> int:
    """A seed drawn from the generator, 0 without one."""
    return 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
