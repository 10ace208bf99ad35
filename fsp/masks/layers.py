"""The convolutions and linear layers of a model, and what the weight of each is computed from.

A weight is a parameter, or torch computes it from one: under `torch.nn.utils.prune` and under parametrisations.  A mask
is a mask of that parameter.  It is one of the weight too if the computation works entry by entry and leaves 0 at 0,
so that masking before it is masking after it; layers for which this is not so are refused by name.
"""

import copy
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from fsp.checks import plain_settings

PRUNABLE = (nn.Linear, nn.modules.conv._ConvNd)  # _ConvNd is the only common base of the Conv* modules
NAMES = ("weight", "weight_orig", "parametrizations.weight.original")  # the last two: pruned by torch, parametrised
LAYER_FUNCTIONS = {
    "linear",
    *(f"conv{d}d" for d in (1, 2, 3)),
    *(f"conv_transpose{d}d" for d in (1, 2, 3)),
}


class Layer(NamedTuple):
    """A convolution or linear layer, and the parameter that its weight is or is computed from."""

    name: str  # of the module
    module: nn.Module
    key: str  # of the parameter in the module, one of `NAMES`
    parameter: nn.Parameter

    @property
    def computed(self) -> bool:
        """Whether torch computes the weight from the parameter, by pruning or a parametrisation."""
        return self.key == NAMES[2] or _pruned_by_torch(self.module)

    @property
    def plain(self) -> bool:
        """Whether the parameter is the weight itself, as far as can be seen without running the layer."""
        torchs_own = type(self.module).forward.__module__.startswith("torch.nn.modules.")
        return self.key == "weight" and torchs_own and "forward" not in vars(self.module)


def layers_of(model: nn.Module, *, excluded: Iterable[str] = (), only: Container[int] | None = None) -> list[Layer]:
    """Convolutions and linear layers of a model.

    Parameters
    ----------
    model : nn.Module
    excluded : iterable of str
        Names of modules, with all inside them, or of weights, to leave out.
    only : container of int, optional
        Identities of parameters; layers of others are left out.

    Returns
    -------
    list of Layer

    Raises
    ------
    ValueError
        Naming a layer whose weight no mask can follow: computed in another way than entry by entry, not initialised
        yet, quantised, sparse or spread over processes.
    """
    excluded, found = tuple(excluded), []
    for name, module in model.named_modules():
        path = f"{name}.weight.".lstrip(".")
        if not isinstance(module, PRUNABLE) or any(path.startswith(f"{e}.") for e in excluded):
            continue
        own = dict(module.named_parameters())
        key = next((key for key in NAMES if key in own), None)
        if only is not None and (key is None or id(own[key]) not in only):
            continue
        if key is None:
            raise _refusal(name, module)
        layer = Layer(name, module, key, own[key])
        if isinstance(own[key], nn.parameter.UninitializedParameter):
            raise ValueError(f"the weight of {name!r} has no shape yet: the layer is lazy, run one batch first")
        _check_kind(layer)
        if not layer.plain:
            _check_follows(layer)
        found.append(layer)
    return found


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a convolution or linear layer uses in its forward pass, detached; the layer is not changed."""
    own = dict(module.named_parameters())
    key = next((key for key in NAMES if key in own), "")
    if Layer("", module, key, own.get(key)).plain:
        return own[key].detach()
    with _copied(module) as (copied, tensors):
        return _weight_in_forward(module, copied, tensors.get(id(own.get(key))))


def unpruned(layer: Layer) -> Tensor:
    """True where the weight can differ from 0: not where torch has pruned it, but where a parameter is 0 by chance."""
    if layer.plain:
        return torch.ones_like(layer.parameter, dtype=torch.bool)
    with _copied(layer.module) as (module, tensors):
        parameter = tensors[id(layer.parameter)]
        kept = _weight_in_forward(layer.module, module, parameter) != 0
        parameter.fill_(1)
        return kept | (_weight_in_forward(layer.module, module, parameter) != 0)


def put_weight(layer: Layer, weight: Tensor) -> None:
    """Make a layer that computes its weight use this tensor; what is changed lies in ``vars`` of its modules."""
    module = layer.module
    if layer.key == NAMES[2]:
        vars(module.parametrizations["weight"])["forward"] = lambda: weight
    elif _pruned_by_torch(module):
        for number in [number for number, hook in module._forward_pre_hooks.items() if _prunes(hook)]:
            del module._forward_pre_hooks[number]
        vars(module)["weight"] = weight


# ---- how a weight is computed ------------------------------------------------------------------------------------


class _Weights(TorchFunctionMode):
    """Keeps the weights that convolutions and linear layers are called with."""

    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in LAYER_FUNCTIONS:
            self.seen.append(args[1] if len(args) > 1 else kwargs["weight"])
        return function(*args, **(kwargs or {}))


@contextmanager
def _copied(module: nn.Module) -> Iterator[tuple[nn.Module, dict[int, Tensor]]]:
    """A copy of a layer in eval mode, and its tensors by the identities of the layer's own."""
    held = [t for m in module.modules() for d in (m._parameters, m._buffers, vars(m)) for t in d.values()]
    with plain_settings(), torch.random.fork_rng([]):
        # clones stand in for tensors: a weight with a history cannot be copied otherwise
        clones = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor)}
        yield copy.deepcopy(module, dict(clones)).eval(), clones


def _weight_in_forward(module: nn.Module, copied: nn.Module, parameter: Tensor | None) -> Tensor:
    """The weight that the forward pass of a layer's copy uses; `parameter` is what it is computed from, if known."""
    if hasattr(copied, "parametrizations") and "weight" in copied.parametrizations:
        return copied.weight.clone()
    if isinstance(copied, nn.Linear):
        shape = (1, copied.in_features)
    else:
        extents = ((k - 1) * d + 1 for k, d in zip(copied.kernel_size, copied.dilation, strict=True))
        shape = (1, copied.in_channels, *extents)
    weights = _Weights()
    like = next(copied.parameters(), copied.weight) if parameter is None else parameter
    try:
        with weights:
            copied(torch.zeros(shape, dtype=like.dtype, device=like.device))
    except Exception:
        if parameter is None:
            raise
        return parameter.clone()  # a forward of one's own may want other inputs
    if parameter is None:
        return weights.seen[0].clone()
    own = {t.data_ptr() for t in (parameter, *module.parameters())}
    alike = [w for w in weights.seen if w.shape == parameter.shape]
    if not alike or any(w.data_ptr() in own for w in alike):
        return parameter.clone()  # seen through a view, or not at all
    return alike[0].clone()


def _check_follows(layer: Layer) -> None:
    """Raise unless masking the parameter is masking the weight, and nothing else."""
    if layer.parameter.is_meta:
        return
    with _copied(layer.module) as (module, tensors):
        parameter = tensors[id(layer.parameter)]
        value = parameter.clone()
        dense = _weight_in_forward(layer.module, module, parameter)
        half = torch.rand(value.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu") < 0.5
        for kept in (half.to(value.device), ~half.to(value.device)):
            parameter.copy_(value.masked_fill(~kept, 0))
            masked = _weight_in_forward(layer.module, module, parameter)
            if dense.shape != value.shape or not torch.equal(masked, dense.masked_fill(~kept, 0)):
                raise _refusal(layer.name, layer.module)
        if not layer.computed and not torch.equal(dense, value.where(dense != 0, 0)):
            raise _refusal(layer.name, layer.module)


def _prunes(hook: object) -> bool:
    """Whether a hook is torch's way to prune a weight."""
    return isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight"


def _pruned_by_torch(module: nn.Module) -> bool:
    """Whether `torch.nn.utils.prune` prunes the weight of a module."""
    return any(_prunes(hook) for hook in module._forward_pre_hooks.values())


def _refusal(name: str, module: nn.Module) -> ValueError:
    """The error for a layer whose weight is computed in a way that masks cannot follow."""
    if hasattr(module, "parametrizations") and "weight" in module.parametrizations:
        kinds = ", ".join(type(p).__name__.strip("_") for p in module.parametrizations["weight"])
        by, remedy = f"the parametrisation {kinds}", "torch.nn.utils.parametrize.remove_parametrizations"
    elif "weight" in module._parameters:
        by = f"the forward of {type(module).__name__}"
        remedy = "putting the weight that is used into a plain layer, or computing it in a parametrisation"
    else:
        hooks = [h for h in module._forward_pre_hooks.values() if getattr(h, "name", None) == "weight"]
        by = f"{type(hooks[0]).__name__} in a hook" if hooks else "something that is no parameter of the layer"
        remedy = "torch.nn.utils.remove_weight_norm, remove_spectral_norm or whatever made it so"
    dense = f", or leave the layer dense with exclude=[{name!r}]" if name else ""
    return ValueError(
        f"the weight of {name or type(module).__name__!r} is computed by {by}, so masking what it is computed from "
        f"would not just set entries of it to 0: make it plain first, with {remedy}{dense}"
    )


def _check_kind(layer: Layer) -> None:
    """Raise unless the parameter is an ordinary tensor of numbers."""
    parameter, name = layer.parameter, f"{layer.name}.{layer.key}".lstrip(".")
    if hasattr(parameter, "to_local"):
        raise ValueError(f"{name!r} is spread over processes: expected a whole tensor, such as its full_tensor()")
    if parameter.layout != torch.strided:
        raise ValueError(f"{name!r} has the layout {parameter.layout}: expected a dense tensor, such as its to_dense()")
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(f"{name!r} is {parameter.dtype}: expected floating-point weights, so prune before quantising")
