"""Derivatives at masked weights, taken without a trace: what the scores of `fsp.pruning.scores` are made of.

Everything is computed on detached copies of the parameters and buffers, so that the model, its train/eval flags, its
running statistics and the global random state are left bit-identical.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import hardsigmoid, relu6
from torch.overrides import TorchFunctionMode

from fsp.masks import Masks

Batches = Sequence[tuple[Tensor, Tensor]]
Forward = Callable[[nn.Module, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def call(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return ``model(inputs)``: how a model is run unless a score is told otherwise."""
    return model(inputs)


def loss_gradients(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    *,
    training: bool,
    dtype: torch.dtype | None,
    seed: int,
    forward: Forward,
    loss: Loss,
    average: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Masked weights and the gradient of the loss there, which is not masked.

    .. math:: g = \sum_b \frac{n_b}{n} \frac{\partial L_b}{\partial w}, \qquad w = \theta \odot m

    with :math:`L_b` the mean loss of batch b, of :math:`n_b` examples of n.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
    batches : sequence of (inputs, labels)
    training : bool
        Mode of the model.
    dtype : torch.dtype or None
        Precision; None is that of the model.
    seed : int
        Of dropout.
    forward : callable
        (model, inputs) -> outputs.
    loss : callable
        (outputs, labels) -> scalar, the mean over the examples.
    average : bool
        False leaves out the factor n_b / n.

    Returns
    -------
    weights, gradients : dict of name to Tensor

    Raises
    ------
    ValueError
        Without batches, or if the loss is no scalar.
    TypeError
        If a batch is no pair, or the outputs are no tensor.
    """
    shares = _shares(batches) if average else [1.0] * len(_checked(batches))
    weights, state = _weights(model, masks, dtype), _rest(model, masks, dtype)
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    with _undisturbed(model, training=training, seed=seed):
        for batch, share in zip(batches, shares, strict=True):
            value = share * _loss(model, state | weights, batch, forward, loss)
            parts = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
            for name, part in zip(weights, parts, strict=True):
                total[name] += part
    return {name: w.detach() for name, w in weights.items()}, total


def hessian_times(
    vector: Mapping[str, Tensor],
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    *,
    training: bool,
    dtype: torch.dtype | None,
    seed: int,
    forward: Forward,
    loss: Loss,
) -> dict[str, Tensor]:
    """Hessian of the loss at the masked weights times a vector; the other parameters are as for `loss_gradients`.

    Batch by batch, so that only one batch's second-order graph is held at a time.
    """
    shares = _shares(batches)
    weights, state = _weights(model, masks, dtype), _rest(model, masks, dtype)
    product = {name: torch.zeros_like(w) for name, w in weights.items()}
    leaves = list(weights.values())
    with _undisturbed(model, training=training, seed=seed):
        for batch, share in zip(batches, shares, strict=True):
            with sdpa_kernel(SDPBackend.MATH), _Composed():  # fused attention has no second derivative
                value = share * _loss(model, state | weights, batch, forward, loss)
            gradients = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            dot = sum((vector[name] * g).sum() for name, g in zip(weights, gradients, strict=True))
            parts = torch.autograd.grad(dot, leaves, materialize_grads=True)
            del value, gradients, dot  # or this batch's graph would live until the next one's is built
            for name, part in zip(weights, parts, strict=True):
                product[name] += part
    return product


def flow_gradients(
    model: nn.Module,
    masks: Masks,
    shape: Sequence[int],
    *,
    of: Callable[[Tensor], Tensor],
    training: bool,
    dtype: torch.dtype,
    seed: int,
    forward: Forward,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Non-negative weights and the gradient there of the sum of the outputs for one input of ones.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
    shape : sequence of int
        Of one input.
    of : callable
        Makes parameters non-negative: ``torch.abs`` or ``torch.square``.  Buffers are taken by absolute value.
    training, dtype, seed, forward
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
    state = _rest(model, masks, dtype)
    buffers = dict(model.named_buffers())
    state = {name: (t.abs() if name in buffers else of(t)) if t.is_floating_point() else t for name, t in state.items()}
    ones = torch.ones((1, *shape), dtype=dtype, device=next(iter(weights.values())).device)
    with _undisturbed(model, training=training, seed=seed):
        flow = _outputs(model, state | weights, ones, forward).sum()
        gradients = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    return {name: w.detach() for name, w in weights.items()}, dict(zip(weights, gradients, strict=True))


def seed_of(generator: torch.Generator | None) -> int:
    """A seed drawn from the generator, 0 without one."""
    return 0 if generator is None else int(torch.randint(2**62, (), generator=generator))


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
    """Outputs of the model with other parameters and buffers in the place of its own."""
    first = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    # Each place that holds a tensor is named once: functional_call ties by name, which would put a tensor into a module
    # used twice two times over and leave it there.
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


def _loss(model: nn.Module, tensors: dict[str, Tensor], batch: tuple, forward: Forward, loss: Loss) -> Tensor:
    """Mean loss of one batch, inputs and targets in the precision of the weights."""
    dtype = next(reversed(tensors.values())).dtype  # masked weights come last
    inputs, labels = (t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in batch)
    value = loss(_outputs(model, tensors, inputs, forward), labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss gives {found}: expected one number, the mean over the examples of a batch")
    return value.reshape(())


def _checked(batches: Batches) -> Batches:
    """The batches; raises unless there are some, and pairs."""
    if not batches:
        raise ValueError("this method scores on data: pass batches, see fsp.data.scoring_batches")
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"a batch is {type(batch).__name__}: expected batches=[(inputs, labels), ...]")
    return batches


def _shares(batches: Batches) -> list[float]:
    """Each batch's share of all examples."""
    sizes = [len(labels) for _, labels in _checked(batches)]
    return [size / sum(sizes) for size in sizes]


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
