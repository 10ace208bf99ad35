"""How a score runs a model: gradients at masked weights, with the model left bit-identical.

Everything is computed on detached copies of the parameters and buffers.  The model's train/eval flags, its running
statistics, the plain attributes of its modules and the global random state are put back.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, hardsigmoid, relu6
from torch.overrides import TorchFunctionMode

from fsp.checks import given_or_seed_0
from fsp.data.batching import batch_size, explained
from fsp.masks import Masks

Batches = Sequence[tuple[Tensor, Tensor]]
Forward = Callable[[nn.Module, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class FlowRun(TypedDict, total=False):
    """How a score without data runs the model."""

    training: bool
    dtype: torch.dtype | None
    forward: Forward


class LossRun(FlowRun, total=False):
    """How a score on data runs the model."""

    loss: Loss


def call(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return ``model(inputs)``: how a model is run unless a score is told otherwise."""
    return model(inputs)


def loss_gradients(
    model: nn.Module,
    masks: Masks,
    batches: Batches | None,
    *,
    seed: int,
    average: bool = True,
    hessian_times: Mapping[str, Tensor] | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    forward: Forward = call,
    loss: Loss = cross_entropy,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Masked weights, and the gradient of the loss there, which is not masked.

    .. math:: g = \sum_b \frac{n_b}{n} \frac{\partial L_b}{\partial w}, \qquad w = \theta \odot m

    with :math:`L_b` the mean loss of batch b, of :math:`n_b` examples of n.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
    batches : sequence of (inputs, labels)
        Of whatever `forward` and `loss` take; `fsp.data.batching.batch_size` counts the examples.
    seed : int
        Of dropout.
    average : bool
        False leaves out the factor n_b / n.
    hessian_times : dict of name to Tensor, optional
        A vector v; instead of the gradient the Hessian of the loss times v is returned.
    training : bool
        Mode of the model.
    dtype : torch.dtype or None
        Precision; None is that of the model.
    forward : callable
        (model, inputs) -> outputs.
    loss : callable
        (outputs, labels) -> scalar, the mean over the examples.

    Returns
    -------
    weights, gradients : dict of name to Tensor

    Raises
    ------
    ValueError
        Without batches; if a batch has no example, or one that batch norm cannot normalise in train mode; if the loss
        is no scalar.
    TypeError
        If a batch is no pair, its labels are None, or the outputs are no tensor.
    """
    batches = list(batches or [])
    if not batches:
        raise ValueError("this method scores on data: pass batches, see fsp.data.scoring_batches")
    sizes = [batch_size(batch) for batch in batches]
    weights, rest = _weights(model, masks, dtype), _rest(model, masks, dtype)
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    with undisturbed(model, training=training, seed=seed):
        for batch, size in zip(batches, sizes, strict=True):
            share = size / sum(sizes) if average else 1.0
            batch_loss = partial(_loss, share, model, rest | weights, batch, forward, loss)
            with explained(batch):
                if hessian_times is None:
                    parts = torch.autograd.grad(batch_loss(), list(weights.values()), materialize_grads=True)
                else:
                    parts = _hessian_times(hessian_times, batch_loss, weights)
            for name, part in zip(weights, parts, strict=True):
                total[name] += part
    return {name: w.detach() for name, w in weights.items()}, total


def _hessian_times(
    vector: Mapping[str, Tensor], loss: Callable[[], Tensor], weights: dict[str, Tensor]
) -> Sequence[Tensor]:
    """Hessian of the loss of one batch times a vector; a function, so that the graph is freed before the next batch."""
    leaves = list(weights.values())
    with sdpa_kernel(SDPBackend.MATH), _Composed():  # fused attention has no second derivative
        value = loss()
    gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    dot = sum((vector[name] * g).sum() for name, g in zip(weights, gradients, strict=True))
    return torch.autograd.grad(dot, leaves, materialize_grads=True)


def flow_gradients(
    model: nn.Module,
    masks: Masks,
    shape: Sequence[int],
    *,
    of: Callable[[Tensor], Tensor],
    seed: int,
    training: bool = False,
    dtype: torch.dtype = torch.float64,
    forward: Forward = call,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Non-negative weights, and the gradient there of the sum of the outputs for one input of ones.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
    shape : sequence of int
        Of one input.
    of : callable
        Makes parameters non-negative: ``torch.abs`` or ``torch.square``.  Buffers are taken by absolute value.
    seed, training, dtype, forward
        As for `loss_gradients`.

    Returns
    -------
    weights, gradients : dict of name to Tensor

    Warns
    -----
    UserWarning
        Where nothing is pruned yet (in the first round, that is) and a module is not positively homogeneous.
    """
    if all(bool(m.all()) for m in masks.values()):
        _warn_of_lost_flow(model)
    weights = _weights(model, masks, dtype, of)
    buffers = dict(model.named_buffers())
    rest = {
        name: (t.abs() if name in buffers else of(t)) if t.is_floating_point() else t
        for name, t in _rest(model, masks, dtype).items()
    }
    ones = torch.ones((1, *shape), dtype=dtype, device=next(iter(weights.values())).device)
    with undisturbed(model, training=training, seed=seed):
        flow = _outputs(model, rest | weights, ones, forward).sum()
        gradients = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    return {name: w.detach() for name, w in weights.items()}, dict(zip(weights, gradients, strict=True))


def input_shape(shape: Sequence[int] | None, batches: Batches | None) -> Sequence[int]:
    """Shape of one input, given or read from the first batch."""
    if shape is not None:
        return shape
    if not batches:
        raise ValueError("the shape of an input is missing: pass shape=(channels, height, width) or batches")
    return batches[0][0].shape[1:]


def seed_of(generator: torch.Generator | None) -> int:
    """A seed drawn from the generator, 0 without one."""
    return 0 if generator is None else int(torch.randint(2**62, (), generator=given_or_seed_0(generator)))


# ---- one run of the model ----------------------------------------------------------------------------------------


class _Composed(TorchFunctionMode):
    """Composes hard sigmoids of operations that have a second derivative: the fused one lacks it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is hardsigmoid:
            return relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


class _Run(nn.Module):
    """A model inside a module whose forward is a given function of model and inputs."""

    def __init__(self, model: nn.Module, forward: Forward):
        super().__init__()
        self.model = model
        self.run = forward

    def forward(self, inputs):
        return self.run(self.model, inputs)


def _outputs(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor, forward: Forward) -> Tensor:
    """Outputs of the model with the given parameters and buffers instead of its own."""
    first = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    # Every place that holds a tensor is named exactly once.  functional_call ties by name: in a module that is used
    # twice it would replace a tensor twice, and put the replacement back at the end.
    placed = {
        f"model.{name}": tensors[first[id(t)]]
        for prefix, module in model.named_modules()
        for own in (module.named_parameters, module.named_buffers)
        for name, t in own(prefix, recurse=False, remove_duplicate=False)
    }
    outputs = functional_call(_Run(model, forward), placed, (inputs,), tie_weights=False)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returns {type(outputs).__name__}, not a tensor: say which of its outputs counts, such as "
            "forward=lambda model, inputs: model(inputs)[0]"
        )
    return outputs


def _loss(
    share: float, model: nn.Module, tensors: dict[str, Tensor], batch: tuple, forward: Forward, loss: Loss
) -> Tensor:
    """Mean loss of one batch times its share, inputs and targets in the precision of the weights."""
    dtype = next(reversed(tensors.values())).dtype  # masked weights come last
    inputs, labels = (t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in batch)
    value = loss(_outputs(model, tensors, inputs, forward), labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss gives {found}: expected one number, the mean over the examples of a batch")
    return share * value.reshape(())


# ---- how scoring leaves the model alone --------------------------------------------------------------------------


def _weights(
    model: nn.Module, masks: Masks, dtype: torch.dtype | None, of: Callable[[Tensor], Tensor] = lambda t: t
) -> dict[str, Tensor]:
    """Masked weights, or a function of them, as new leaves."""
    parameters = dict(model.named_parameters())
    return {
        name: of(parameters[name].detach().to(dtype)).masked_fill(~mask, 0).requires_grad_()
        for name, mask in masks.items()
    }


def _rest(model: nn.Module, masks: Masks, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of everything else that the model holds."""
    return {
        name: t.detach().to(dtype if t.is_floating_point() else None, copy=True)
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if name not in masks
    }


@contextmanager
def undisturbed(model: nn.Module, *, training: bool, seed: int = 0) -> Iterator[None]:
    """Train or eval mode, gradients on, random numbers from `seed`; on leaving, model and random state are restored.

    That includes the plain attributes of modules, such as the weight that a pruned layer of torch computes in a hook.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for index in devices:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        try:
            model.train(training)
            yield
        finally:
            for module, attributes in before:
                vars(module).update(attributes)


# ---- where flow is lost ------------------------------------------------------------------------------------------

# f(a x) = a f(x) for a > 0 fails in these; ReLU, LeakyReLU, PReLU and every pooling pass
NOT_HOMOGENEOUS = (
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.GLU, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Tanhshrink),  # ReLU6 is a Hardtanh
    *(nn.Softshrink, nn.Hardshrink, nn.Threshold),
    *(nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d),
    *(nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase),
)


def _warn_of_lost_flow(model: nn.Module) -> None:
    """One warning that names the modules through which synaptic flow is not conserved."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is None
        if norm or isinstance(module, NOT_HOMOGENEOUS):
            found.setdefault(type(module).__name__, []).append(name or "the model itself")
    if found:
        listed = "; ".join(
            f"{kind} ({', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
            for kind, names in found.items()
        )
        warnings.warn(
            f"synaptic flow is not conserved through modules that are not positively homogeneous: {listed}; the scores "
            "are defined, but without the guarantee against layer collapse",
            UserWarning,
            stacklevel=4,  # who asked for the scores
        )
