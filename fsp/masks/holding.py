"""How a model gets its masks, and how its pruned weights stay pruned while it trains."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim
from torch.utils.weak import WeakTensorKeyDictionary

from fsp.masks.algebra import Masks, check_masks

# What they do to one weight depends on no other weight, so a gradient at a pruned weight harms nothing.
ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.Adagrad, optim.Adadelta, optim.ASGD, optim.RMSprop, optim.Rprop),
)


@torch.no_grad()
def apply_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of the model to 0, in place.

    Parameters
    ----------
    model : nn.Module
        Also compiled, in ``DataParallel`` or ``DistributedDataParallel``, or averaged by ``AveragedModel``: the
        ``_orig_mod.`` and ``module.`` of such wrappers in the names of parameters or masks do not count.
    masks : Masks
        On any device.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter.

    Notes
    -----
    A copy of the model (``deepcopy``, ``pickle``, an average) is another model: it has the zeros of the moment.
    """
    kept = _Kept()
    for name, parameter in _masked(model, masks).items():
        kept.zero_pruned_(parameter, name, masks[name])


def hold_(optimizer: optim.Optimizer, model: nn.Module, masks: Masks, *, dense_gradients: bool = False) -> "Handle":
    """Keep pruned weights at exactly 0 while `optimizer` trains the model, momentum and weight decay included.

    Applies the masks now and again after every optimiser step, to the weights and to every optimiser state of a
    weight's shape (momentum buffers), so that a weight that is grown later starts without momentum.  Gradients are
    masked as soon as a backward pass has made them.  So the training is that of a network which multiplies its weights
    by the masks in every forward pass.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any of torch, and others whose states of a weight's shape belong to the weights one by one.  That includes
        those that mix weights (Adafactor, Muon), those that are given a closure (LBFGS), and clipping of gradients
        between the backward pass and the step.  Where several optimisers train one model, hold each.
    model : nn.Module
        May be in a wrapper, see `apply_`.
    masks : Masks
        Read anew at every step: replacing an entry (dynamic sparse training) takes effect at the next one.
    dense_gradients : bool
        Leave the gradients of pruned weights where they are, for growth that ranks them.  What the optimiser sees is
        masked all the same.  Clipping by norm then counts them.

    Returns
    -------
    handle
        ``handle.remove()`` lets go, and so does the end of the optimiser.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter, or the optimiser trains no parameter of the model.  At a step: if
        the model has other parameters by now (``load_state_dict(assign=True)``), a later call has given a weight
        another mask, or LBFGS remembers directions at pruned weights (it had made steps before, or a mask was
        replaced).

    Notes
    -----
    Copies of model and optimiser (``deepcopy``, ``pickle``, a new optimiser with the old ``state_dict``) are not held:
    call `hold_` again.  Averages of the weights (``AveragedModel``) are 0 where the masks never kept a weight.

    What this needs of a mask is kept from step to step: replace an entry, or change it in place by an operation of
    torch, not through its ``data``.  On CUDA the weights of all layers are masked together, in two kernels.

    A gradient that is sparse itself is not masked.  Where two calls hold the same weight, the newer one decides
    whether and how its gradient is masked.
    """
    parameters = _masked(model, masks)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if parameters and trained.isdisjoint(map(id, model.parameters())):
        raise ValueError("the optimizer trains no parameter of this model: make it from this model's parameters()")
    places = {id(p): (module, key) for module in model.modules() for key, p in module.named_parameters(recurse=False)}
    left_out = dense_gradients and type(optimizer) in ELEMENTWISE  # of masking: it would change nothing
    dense: dict[str, Tensor] = {}  # gradients during a step

    @torch.no_grad()
    def zero_pruned(optimizer, *_):
        for name, parameter in parameters.items():
            for tensor in (parameter, *_states(optimizer, parameter)):
                kept.zero_pruned_(tensor, name, masks[name])

    kept = _Kept()

    @torch.no_grad()
    def zero_together(optimizer):
        found = [(name, t) for name, p in parameters.items() for t in (p, *_states(optimizer, p))]
        tensors = [tensor for _, tensor in found]
        # a nan at a pruned weight stays; the dense products that made it have spread it to kept ones
        for clamp_, infinity in ((torch._foreach_clamp_min_, -torch.inf), (torch._foreach_clamp_max_, torch.inf)):
            clamp_(tensors, [kept.bound(tensor, name, masks[name], infinity) for name, tensor in found])

    def mask_gradients():
        for name, parameter in parameters.items():
            if dense_gradients and parameter.grad is not None:
                dense[name], parameter.grad = parameter.grad, parameter.grad.clone()
            _mask_gradient(parameter, masks[name])

    def before_step(optimizer, args, options):
        for name, parameter in parameters.items():
            _check_still_held(name, parameter, model, places[id(parameter)], weights[name])
        if isinstance(optimizer, optim.LBFGS):
            _check_directions(optimizer, {id(p): masks[name] for name, p in parameters.items()})
        if left_out:
            return None
        mask_gradients()  # of a closure's last call, or set by hand
        options = {key: _then(value, mask_gradients) for key, value in options.items()}
        return tuple(_then(value, mask_gradients) for value in args), options

    def after_step(optimizer, *_):
        few_kernels = parameters and all(_in_few_kernels(optimizer, p) for p in parameters.values())
        (zero_together if few_kernels else zero_pruned)(optimizer)
        for name, gradient in dense.items():
            parameters[name].grad = gradient
        dense.clear()

    handle = Handle()
    weights = {name: _Held(masks, name, dense_gradients) for name in parameters}
    for name, parameter in parameters.items():
        holds = _HOLDS.setdefault(parameter, [])
        holds.append(weights[name])
        handle.callback(holds.remove, weights[name])
        if not dense_gradients:
            handle.callback(_at_gradients(parameter, weights[name]).remove)
    zero_pruned(optimizer)
    for register, hook in (
        (optimizer.register_step_pre_hook, before_step),
        (optimizer.register_step_post_hook, after_step),
        (optimizer.register_load_state_dict_post_hook, zero_pruned),
    ):
        handle.callback(register(hook).remove)  # type: ignore[arg-type]  # each hook takes what it is handed
    weakref.finalize(optimizer, handle.close).atexit = False
    return handle


def gradients_are_masked(parameter: nn.Parameter) -> bool:
    """Whether `hold_` sets the gradients of pruned weights of a parameter to 0, so that growth cannot rank them."""
    holds = _HOLDS.get(parameter, [])
    return bool(holds) and not holds[-1].dense_gradients


class Handle(ExitStack):
    """What `hold_` returns; the end of a ``with`` block lets go, too."""

    remove = ExitStack.close


# ---- names -------------------------------------------------------------------------------------------------------


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The masked parameters by the names of their masks; a ValueError if one fits none."""
    names = [name for name, _ in model.named_parameters()]
    if masks.keys() <= set(names):
        return check_masks(model, masks)
    often = Counter(map(_without_wrappers, names))
    own = {_without_wrappers(name): name for name in names if often[_without_wrappers(name)] == 1}
    renamed = {own.get(_without_wrappers(name), name): mask for name, mask in masks.items()}
    if len(renamed) < len(masks):
        return check_masks(model, masks)
    return dict(zip(masks, check_masks(model, renamed).values(), strict=True))


def _without_wrappers(name: str) -> str:
    """Name of a parameter without what torch.compile and parallel or averaged models put before it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[0] == "module":
        del parts[0]
    return ".".join(parts)


# ---- weights -----------------------------------------------------------------------------------------------------


def _states(optimizer: optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The optimiser's states that belong to the weights one by one."""
    states = optimizer.state.get(parameter, {}).values()
    return [state for state in states if isinstance(state, Tensor) and state.shape == parameter.shape]


def _in_few_kernels(optimizer: optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Whether weights are masked all layers together: on CUDA, where the start of a kernel costs more than its work."""
    return parameter.is_cuda and all(t.is_floating_point() for t in (parameter, *_states(optimizer, parameter)))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class _Kept:
    """What masking a weight needs of its mask, made anew when the mask is another."""

    def __init__(self):
        self.known: dict[tuple, tuple[Tensor, int, Tensor]] = {}

    def zero_pruned_(self, weight: Tensor, name: str, mask: Tensor) -> None:
        """Set the pruned entries of a weight, or of an optimiser's state of its shape, to 0, whatever they are."""
        integers = _INTEGERS.get(weight.element_size())
        if integers is None or weight.device.type != "cpu":
            weight.masked_fill_(~mask.to(weight.device), 0)
            return
        # all bits or none; a product would turn inf and nan into nan, and masked_fill_ takes ten times as long
        bits = self._of(weight, name, mask, integers, lambda kept: -kept.to(integers))
        weight.view(integers).bitwise_and_(bits)

    def bound(self, weight: Tensor, name: str, mask: Tensor, infinity: float) -> Tensor:
        """A lower or upper bound of a weight: 0 where it is pruned, the infinity elsewhere."""
        return self._of(
            weight, name, mask, infinity, lambda kept: torch.full_like(weight, infinity).masked_fill_(~kept, 0)
        )

    def _of(self, weight: Tensor, name: str, mask: Tensor, what: object, made: Callable[[Tensor], Tensor]) -> Tensor:
        """What was made of the mask for a weight of this type and memory format."""
        version = -1 if mask.is_inference() else mask._version  # counts changes in place
        place = (name, what, weight.dtype, weight.device, weight.stride())
        known = self.known.get(place)
        if known is None or known[0] is not mask or known[1] != version or version < 0:
            kept = torch.empty_like(weight, dtype=torch.bool).copy_(mask)  # in the weight's memory format
            self.known[place] = known = (mask, version, made(kept))
        return known[2]


# ---- gradients ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Held:
    """One weight in one call of `hold_`."""

    masks: Masks
    name: str
    dense_gradients: bool


_HOLDS: MutableMapping[Tensor, list[_Held]] = WeakTensorKeyDictionary()  # of each weight, the newest last


def _at_gradients(parameter: nn.Parameter, held: _Held):
    """Mask each gradient that a backward pass accumulates; returns the handle of this hook."""

    def mask_gradient(parameter):
        if _HOLDS[parameter][-1] is held:
            _mask_gradient(parameter, held.masks[held.name])

    asked = parameter.requires_grad
    parameter.requires_grad_(True)  # torch gives no hook to a frozen weight, which may be trained later
    handle = parameter.register_post_accumulate_grad_hook(mask_gradient)
    parameter.requires_grad_(asked)
    return handle


def _mask_gradient(parameter: nn.Parameter, mask: Tensor) -> None:
    """Set the gradient of pruned weights to 0."""
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse:
        return
    pruned = ~mask.to(parameter.device)
    if gradient.requires_grad:  # of backward(create_graph=True), which needs the value before
        parameter.grad = gradient.masked_fill(pruned, 0)
    else:
        gradient.masked_fill_(pruned, 0)


def _then(value: object, follow: Callable[[], None]) -> object:
    """A function that calls another one at its end; anything but a function as it is."""
    if not callable(value):
        return value

    def both():
        result = value()
        follow()
        return result

    return both


# ---- what would go wrong without a word --------------------------------------------------------------------------


def _check_still_held(
    name: str, parameter: nn.Parameter, model: nn.Module, place: tuple[nn.Module, str], held: _Held
) -> None:
    """Raise a ValueError if an optimiser's weight is no longer the model's, or has other masks by a later `hold_`."""
    module, key = place
    if getattr(module, key, None) is not parameter and all(p is not parameter for p in model.parameters()):
        raise ValueError(
            f"{name!r} is no longer the weight that this optimizer trains: the model was given another one, by "
            "load_state_dict(assign=True) for example. Make a new optimizer, and hold it"
        )
    newest = _HOLDS[parameter][-1]
    if newest is held:
        return
    mask = held.masks[name]
    if not torch.equal(newest.masks[newest.name].to(mask.device), mask):
        raise ValueError(
            f"{name!r} is held with other masks by a later optimiser, which took its gradients: remove() that handle "
            "before this optimizer goes on"
        )


def _check_directions(optimizer: optim.LBFGS, masks: Mapping[int, Tensor]) -> None:
    """Raise a ValueError if the next step of LBFGS would move pruned weights; `masks` by id of the parameter."""
    parameters = optimizer.param_groups[0]["params"]
    direction = optimizer.state.get(parameters[0], {}).get("d")
    if direction is None:
        return
    for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
        mask = masks.get(id(parameter))
        if mask is not None and part[~mask.flatten().to(part.device)].any():
            raise ValueError(
                "LBFGS remembers directions at pruned weights, because it had made steps before they were held, or "
                "masks were replaced: make a new optimiser"
            )
