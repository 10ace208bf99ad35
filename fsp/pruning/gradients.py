"""How a score runs a model: gradients at masked weights, with the model left bit-identical.

Everything is computed on detached copies of the parameters and buffers.  The model's train/eval flags, its running
statistics, the plain attributes of its modules and the global random state are put back.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypedDict
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, hardsigmoid, relu6
from torch.overrides import TorchFunctionMode

from fsp.checks import given_or_seed_0, is_count, plain_precision
from fsp.data.batching import batch_size, explained
from fsp.masks import Masks, check_masks, layers_of, put_weight, used_weights

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
    with undisturbed(model, training=training, seed=seed):
        weights = _weights(model, masks, dtype)
        tensors = _others(model, masks, dtype) | put_weights(model, masks, weights)
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        for batch, size in zip(batches, sizes, strict=True):
            share = size / sum(sizes) if average else 1.0
            batch_loss = partial(_loss, share, batch, weights, forward, loss)
            with explained(batch):
                parts = with_tensors(model, tensors, partial(_derivatives, batch_loss, weights, hessian_times))
            for name, part in zip(weights, parts, strict=True):
                total[name] += part
    return {name: w.detach() for name, w in weights.items()}, total


def _derivatives(
    loss: Callable[[nn.Module], Tensor],
    weights: dict[str, Tensor],
    vector: Mapping[str, Tensor] | None,
    model: nn.Module,
) -> Sequence[Tensor]:
    """Gradient of the loss of one batch, or its Hessian times a vector.

    Everything happens while the model holds the given tensors: activations may be computed again on the way back.
    """
    leaves = list(weights.values())
    if vector is None:
        return torch.autograd.grad(loss(model), leaves, materialize_grads=True)
    with sdpa_kernel(SDPBackend.MATH), _Composed():  # fused attention has no second derivative
        gradients = torch.autograd.grad(loss(model), leaves, create_graph=True, materialize_grads=True)
        dot = sum((vector[name] * g).sum() for name, g in zip(weights, gradients, strict=True))
        return torch.autograd.grad(dot, leaves, materialize_grads=True)  # type: ignore[arg-type]  # a tensor: there are weights


def flow_gradients(
    model: nn.Module,
    masks: Masks,
    shape: Sequence[int],
    *,
    of: Callable[[Tensor], Tensor],
    seed: int,
    training: bool = False,
    dtype: torch.dtype | None = torch.float64,
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
    with undisturbed(model, training=training, seed=seed):
        weights = _weights(model, masks, dtype, of)
        tensors = _others(model, masks, dtype, of) | put_weights(model, masks, weights)
        first = next(iter(weights.values()))
        ones = torch.ones((1, *shape), dtype=first.dtype, device=first.device)

        def gradients_of_flow(model: nn.Module) -> Sequence[Tensor]:
            flow = _outputs(model, ones, dtype, forward).sum()
            return torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)

        gradients = with_tensors(model, tensors, gradients_of_flow)
    return {name: w.detach() for name, w in weights.items()}, dict(zip(weights, gradients, strict=True))


def input_shape(shape: Sequence[int] | None, batches: Batches | None) -> Sequence[int]:
    """Shape of one input, given or read from the first batch."""
    if shape is not None:
        if not isinstance(shape, Sequence) or not all(is_count(side, 1) for side in shape):
            raise ValueError(f"shape={shape!r}: expected that of one input, such as (channels, height, width)")
        return shape
    if not batches:
        raise ValueError("the shape of an input is missing: pass shape=(channels, height, width) or batches")
    batch_size(batches[0])
    inputs = batches[0][0]
    if not isinstance(inputs, Tensor):
        raise ValueError(f"the inputs of a batch are {type(inputs).__name__}, not one tensor: pass shape= of one input")
    return inputs.shape[1:]


def seed_of(generator: torch.Generator | None) -> int:
    """A seed drawn from the generator, 0 without one."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=given_or_seed_0(generator), dtype=torch.int64, device="cpu"))


# ---- one run of the model ----------------------------------------------------------------------------------------


class _Composed(TorchFunctionMode):
    """Composes hard sigmoids of operations that have a second derivative: the fused one lacks it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is hardsigmoid:
            return relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


class _Run(nn.Module):
    """A model inside a module whose forward is a given function of the model."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Any]):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self):
        return self.function(self.model)


class _Straight:
    """Runs what a reentrant checkpoint would run, and keeps the activations."""

    @staticmethod
    def apply(function, preserve_rng_state, *inputs):
        return function(*inputs)


def put_weights(model: nn.Module, masks: Masks, weights: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Weights by the identities of the masked parameters, for `with_tensors`.

    Layers that compute their weights are made to use these, so this happens inside of `undisturbed`, and once.
    """
    given = {id(parameter): weights[name] for name, parameter in check_masks(model, masks).items()}
    for layer in layers_of(model, only=given):
        put_weight(layer, given[id(layer.parameter)])
    return given


def with_tensors(model: nn.Module, tensors: Mapping[int, Tensor], function: Callable[[nn.Module], Any]) -> Any:
    """``function(model)`` while the model holds other tensors; inside of `undisturbed`.

    Parameters
    ----------
    model : nn.Module
    tensors : dict of int to Tensor
        For all parameters and buffers, by their identities.
    function : callable
        Takes gradients too: a model with activation checkpointing is run again for them.

    Returns
    -------
    object
        What the function returns.
    """
    # Every place that holds a tensor is named exactly once.  functional_call ties by name: in a module that is used
    # twice it would replace a tensor twice, and put the replacement back at the end.
    placed = {
        f"model.{name}": tensors[id(t)]
        for prefix, module in model.named_modules()
        for own in (module.named_parameters, module.named_buffers)
        for name, t in own(prefix, recurse=False, remove_duplicate=False)
    }
    # autograd.grad cannot go back through a reentrant checkpoint, nor a second derivative
    with patch.object(torch.utils.checkpoint, "CheckpointFunction", _Straight):
        try:
            return functional_call(_Run(model, function), placed, (), tie_weights=False)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            raise ValueError(
                "the model computes activations again on the way back in a form that scores cannot follow: switch its "
                f"activation checkpointing off, or use torch.utils.checkpoint ({str(error).splitlines()[0]})"
            ) from error


def _outputs(model: nn.Module, inputs: Tensor, dtype: torch.dtype | None, forward: Forward) -> Tensor:
    """Outputs of the model, which must be a tensor."""
    try:
        outputs = forward(model, inputs)
    except (RuntimeError, ValueError) as error:
        if "more than 1 value per channel" in str(error):
            raise ValueError(
                "a batch of one example has no statistics for batch norm: join it with another batch, leave it out, or "
                "score with training=False"
            ) from error
        if dtype is None or "dtype" not in str(error):
            raise
        raise ValueError(
            f"the model does not run with all its tensors in {dtype} ({str(error).splitlines()[0]}): pass dtype=None "
            "for those it has, or another forward="
        ) from error
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returns {type(outputs).__name__}, not a tensor: say which of its outputs counts, such as "
            "forward=lambda model, inputs: model(inputs)[0]"
        )
    return outputs


def _loss(
    share: float, batch: tuple, weights: Mapping[str, Tensor], forward: Forward, loss: Loss, model: nn.Module
) -> Tensor:
    """Mean loss of one batch times its share, inputs and targets in the precision of the weights if they have one."""
    dtypes = {weight.dtype for weight in weights.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    inputs, labels = (_as_plain(part, dtype) for part in batch)
    outputs = _outputs(model, inputs, dtype, forward)
    try:
        value = loss(outputs, labels)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(labels, Tensor):
            if outputs.shape[:1] == labels.shape[:1]:
                raise
            found = f"of shape {tuple(labels.shape)}"
        elif labels is None:
            found = "None"
        else:
            raise
        raise ValueError(
            f"the loss takes no outputs of shape {tuple(outputs.shape)} with labels {found} "
            f"({str(error).splitlines()[0]}): expected inputs (N, ...) and one label an example, or loss=, a function "
            "(outputs, labels) -> mean over the examples"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss gives {given}: expected one number, the mean over the examples of a batch")
    return share * value.reshape(())


def _as_plain(part: Any, dtype: torch.dtype | None) -> Any:
    """Inputs or labels: a tensor of another precision converted, one of inference mode copied."""
    if not isinstance(part, Tensor):
        return part
    if part.is_inference():
        part = part.clone()
    return part.to(dtype) if part.is_floating_point() else part


# ---- how scoring leaves the model alone --------------------------------------------------------------------------


def _weights(
    model: nn.Module, masks: Masks, dtype: torch.dtype | None, of: Callable[[Tensor], Tensor] = lambda t: t
) -> dict[str, Tensor]:
    """Masked weights, or a function of them, as new leaves."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: expected a floating-point type such as torch.float64, or None")
    check_masks(model, masks)
    with torch.no_grad():
        return {
            name: of(weight.to(dtype)).masked_fill(~masks[name], 0).requires_grad_()
            for name, weight in used_weights(model, masks).items()
        }


def _others(
    model: nn.Module, masks: Masks, dtype: torch.dtype | None, of: Callable[[Tensor], Tensor] | None = None
) -> dict[int, Tensor]:
    """Copies of everything else that the model holds, by identity, or functions of them: absolute values of buffers."""
    masked = {id(parameter) for parameter in check_masks(model, masks).values()}
    found = {}
    for function, tensors in ((of, model.parameters()), (of and torch.abs, model.buffers())):
        for t in tensors:
            if id(t) in masked:
                continue
            found[id(t)] = t.detach().to(dtype if t.is_floating_point() else None, copy=True)
            if function is not None and t.is_floating_point():
                found[id(t)] = function(found[id(t)])
    return found


@contextmanager
def undisturbed(model: nn.Module, *, training: bool, seed: int = 0) -> Iterator[None]:
    """Train or eval mode, gradients on, random numbers from `seed`; on leaving, model and random state are restored.

    That includes the plain attributes of modules, such as the weight that a pruned layer of torch computes in a hook,
    lists and dicts among them.  Autocast, inference mode and compiled code are off, and wrappers that spread a model
    over devices pass their input on.
    """
    with ExitStack() as stack:
        stack.enter_context(_attributes_kept(model.modules()))
        cuda = sorted({p.device.index for p in model.parameters() if p.is_cuda})
        stack.enter_context(torch.random.fork_rng(cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(plain_precision())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.default_generator.manual_seed(seed)
        for index in cuda:  # pragma: no cover - needs CUDA
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
                vars(module)["forward"] = module.module
        yield


@contextmanager
def _attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On leaving, ``vars`` of modules are as before: the same objects, lists, dicts and sets with the same content."""
    before = []
    for module in modules:
        attributes = dict(vars(module))
        contents = [(a, copy.copy(a)) for a in attributes.values() if isinstance(a, list | dict | set)]
        tensors = [(a, a.detach().clone()) for a in attributes.values() if isinstance(a, Tensor)]
        before.append((module, attributes, contents, tensors))
    try:
        yield
    finally:
        for module, attributes, contents, tensors in before:
            for added in vars(module).keys() - attributes.keys():
                del vars(module)[added]
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
            for tensor, value in tensors:
                if not torch.equal(tensor, value):
                    tensor.detach().copy_(value)


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
