"""Ghosts: soft activations and extra branches that a network has while it trains and loses at the end.

A `Ghosted` network is the given model with two additions that hold until `strip_` takes them off: each ReLU is a
`SoftReLU`, and a `Branch` runs around convolutions.  The additions are switched by numbers, not built anew, so that
optimiser, checkpoints and copies of the weights see one and the same network from the first step to the last.

The model is traced once with `torch.fx`, to find what each convolution is followed by and where residual blocks begin
and end.  The trace is only read: the model runs its own code.

References
----------
.. [1] Jaiswal, Ma, Chen, Ding, Wang: Training your sparse neural network better with any mask. ICML 2022.
"""

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fsp.checks import check_choice, check_shape, plain_settings

ACTIVATIONS = ("swish", "mish", None)
BETA_END = 50.0  # of swish, at the end of the annealing
BRANCH_WEIGHT = 1e-4  # constant start of a branch's convolution
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # the first: the only common base of batch and instance norms
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


class SoftReLU(nn.Module):
    r"""A ReLU that begins as a smooth function and ends as itself.

    With :math:`w` the fraction of the annealing that is over,

    .. math:: x\,\sigma(\beta x),\ \beta = 50^w \quad\text{("swish")}, \qquad
        (1 - w)\,x\tanh(\log(1 + e^x)) + w \max(x, 0) \quad\text{("mish")}.

    Parameters
    ----------
    relu : nn.ReLU
        Called in its place when the annealing is over.
    kind : {"swish", "mish"}

    Attributes
    ----------
    over : float, in [0, 1]
        :math:`w`; 1 is the exact ReLU.

    Examples
    --------
    >>> soft, x = SoftReLU(nn.ReLU(), "swish"), torch.tensor([-1.0, 1.0])
    >>> for soft.over in (0.0, 0.5, 1.0):
    ...     print([round(value, 4) for value in soft(x).tolist()])
    [-0.2689, 0.7311]
    [-0.0008, 0.9992]
    [0.0, 1.0]
    """

    def __init__(self, relu: nn.ReLU, kind: str):
        super().__init__()
        self.relu, self.kind, self.over = relu, kind, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        if self.over >= 1:
            return self.relu(x)
        if self.kind == "mish":
            return (1 - self.over) * F.mish(x) + self.over * F.relu(x)
        beta = BETA_END**self.over
        return x * torch.sigmoid(beta * x)


class Branch(nn.Module):
    """A way around one convolution: 1×1 convolution of the same stride, batch norm, times `alpha`.

    Parameters
    ----------
    conv : nn.Conv2d
        The branch has its channels, stride, device and dtype; its weights begin at 1e-4.

    Attributes
    ----------
    alpha : float
        At 0 the branch is not computed.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        place = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        # skip_init, for the usual initialisation would draw from torch's global generator
        self.conv = nn.utils.skip_init(
            nn.Conv2d, conv.in_channels, conv.out_channels, 1, stride=conv.stride, bias=False, **place
        )
        self.norm = nn.BatchNorm2d(conv.out_channels, **place)
        self.alpha = 1.0
        self._held: Tensor | None = None
        nn.init.constant_(self.conv.weight, BRANCH_WEIGHT)

    def forward(self, x: Tensor) -> Tensor:
        """From the input of the convolution to the shape of its output."""
        return self.alpha * self.norm(self.conv(x))

    def leave(self, conv: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of the convolution: the branch has the same input."""
        self._held = self(args[0]) if self.alpha else None

    def join(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Forward hook of the module before the sum: the branch's output is added."""
        held, self._held = self._held, None
        return output if held is None else output + held


class Ghosted(nn.Module):
    """A model with soft activations and ghost branches.

    Parameters
    ----------
    model : nn.Module
        Changed in place until `strip_`: its ReLUs are exchanged, and hooks on its modules add the branches.
    places : Places
        From `places_of`.
    activation : {"swish", "mish", None}
        None leaves the ReLUs.

    Attributes
    ----------
    module : nn.Module
        The model.  Its ``state_dict`` stays what it is without ghosts; masks have its names.
    ghosts : nn.ModuleList of Branch
        With all that is trained beside the model.
    """

    def __init__(self, model: nn.Module, places: "Places", activation: str | None):
        super().__init__()
        self.module, self.places = model, places
        branches = [Branch(model.get_submodule(around.conv)) for around in places.branches]
        self.ghosts = nn.ModuleList(branches)
        for around, branch in zip(places.branches, branches, strict=True):
            model.get_submodule(around.conv).register_forward_hook(branch.leave)
            model.get_submodule(around.end).register_forward_hook(branch.join)
        self._soft: dict[nn.Module, SoftReLU] = {}
        for name in places.relus if activation else ():
            relu = model.get_submodule(name)
            if relu not in self._soft:  # one ReLU may have several names
                self._soft[relu] = SoftReLU(relu, activation)
            model.set_submodule(name, self._soft[relu])
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """The model's, ghosts included."""
        return self.module(x)

    def keep_(self) -> None:
        """Make each branch the module ``ghost`` of its convolution, part of the model and of its ``state_dict``."""
        for around, branch in zip(self.places.branches, self.ghosts, strict=True):
            # a container may run all its modules, as nn.Sequential does; a convolution runs none
            self.module.get_submodule(around.conv).ghost = branch

    def set_(self, *, alpha: float, over: float) -> None:
        """Weight of the branches, and how much of the annealing of the activations is over."""
        for branch in self.ghosts:
            branch.alpha = alpha
        for soft in self._soft.values():
            soft.over = over


def strip(model: nn.Module) -> nn.Module:
    """Copy of a model without ghosts: its own ReLUs, no branches.

    Parameters
    ----------
    model : nn.Module
        Such as `fsp.training.tost.fit` leaves it where nothing is annealed.  It stays as it is.

    Returns
    -------
    nn.Module
        Has the names, parameters and buffers of the network before it got ghosts.
    """
    stripped = copy.deepcopy(model)
    strip_(stripped)
    return stripped


def strip_(model: nn.Module) -> None:
    """Take the ghosts off a model, in place; one without any stays as it is.

    Parameters
    ----------
    model : nn.Module
        Not the `Ghosted` around it.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SoftReLU):
            model.set_submodule(name, module.relu)
        hooks = module._forward_hooks  # torch has no public list of them, and a copy of a model has no handles
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Branch)]:
            del hooks[key]
        if isinstance(getattr(module, "ghost", None), Branch):
            del module.ghost


# ---- where ghosts go ---------------------------------------------------------------------------------------------


class Around(NamedTuple):
    """Where a branch leaves and joins, by name of the modules: a convolution, and the last one before the sum."""

    conv: str
    end: str


class Places(NamedTuple):
    """Where a model takes ghosts: branches around convolutions, and ReLUs by all their names."""

    branches: list[Around]
    relus: list[str]


def places_of(model: nn.Module, shape: tuple[int, int, int], *, activation: str | None, skips: bool) -> Places:
    """Find where a model takes ghosts.

    Parameters
    ----------
    model : nn.Module
        Left as it is; it sees one image of zeros, in eval mode.
    shape : (channels, height, width)
        Of one input.
    activation : {"swish", "mish", None}
    skips : bool

    Returns
    -------
    Places
        Branches go around each convolution whose output map is as large as its input map divided by the stride,
        rounded up.  In a network with residual blocks these are the convolutions of the blocks' main paths, neither
        the stem nor projections (D56).  They join after the convolution's norm if that alone uses its output, else
        after the convolution.

    Raises
    ------
    ValueError
        If the model cannot be traced or does not take such an image, has ghosts already, calls a ReLU that is no
        module (or has none to soften), or a convolution with a branch, or its norm, is called more than once.
    """
    check_shape(shape)
    check_choice("activation", activation, ACTIVATIONS)
    kind = type(model).__name__
    if any(isinstance(module, SoftReLU | Branch) for module in model.modules()):
        raise ValueError(f"{kind} has ghosts already: pass fsp.training.ghosts.strip(model)")
    relus = [name for name, m in model.named_modules(remove_duplicate=False) if name and isinstance(m, nn.ReLU)]
    if not (activation or skips):
        return Places([], relus)
    with _in_eval_mode(model):
        graph = _traced(model)
        sizes = _map_sizes(model, shape) if skips else {}
    called = [node.name for node in graph.nodes if _calls(node, RELUS)]
    if activation and called:
        raise ValueError(
            f"{kind} calls ReLU as a function, in {', '.join(called)} of its trace: make each an nn.ReLU of its own, "
            "or set activation=None in the recipe"
        )
    if activation and not relus:
        raise ValueError(f"{kind} has no nn.ReLU that could begin as {activation}: set activation=None in the recipe")
    return Places(_branches(model, graph, sizes) if skips else [], relus)


def _branches(model: nn.Module, graph: fx.Graph, sizes: dict[nn.Module, tuple]) -> list[Around]:
    """Where branches leave and join, in the order of the forward pass."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(modules[node.target] for node in calls)
    convs = [node for node in calls if isinstance(modules[node.target], nn.Conv2d)]
    inside = _on_main_paths(graph, set(convs))
    found = []
    for node in convs:
        conv = modules[node.target]
        if (inside and node not in inside) or not _differs_by_stride(conv, *sizes[conv]):
            continue
        (user, *others) = node.users
        followed = not others and user.op == "call_module" and isinstance(modules[user.target], NORMS)
        around = Around(node.target, user.target if followed else node.target)
        for name in around:
            if times[modules[name]] > 1:
                raise ValueError(
                    f"{name!r} is called {times[modules[name]]} times in a forward pass, so no branch can go around "
                    "it: use a module for each call, or set skips=False in the recipe"
                )
        found.append(around)
    return found


def _differs_by_stride(conv: nn.Conv2d, before: torch.Size, after: torch.Size) -> bool:
    """Whether the output map is the input map divided by the stride, rounded up: that of a 1×1 convolution."""
    strided = zip(before[2:], after[2:], conv.stride, strict=True)
    return all(side_after == -(-side_before // stride) for side_before, side_after, stride in strided)


def _on_main_paths(graph: fx.Graph, convs: set[fx.Node]) -> set[fx.Node]:
    """Convolutions of residual blocks: where two paths fork and are added, those of the path with more of them."""
    before: dict[fx.Node, set[fx.Node]] = {}  # of each node, all that it is computed from, itself included
    found: set[fx.Node] = set()
    for node in graph.nodes:
        before[node] = {node}.union(*(before[given] for given in node.all_input_nodes))
        if not _calls(node, ADDITIONS) or len(node.all_input_nodes) != 2:
            continue
        one, other = (before[given] for given in node.all_input_nodes)
        if one & other:
            paths = (one - other) & convs, (other - one) & convs
            most = max(map(len, paths))
            found = found.union(*(path for path in paths if len(path) == most))
    return found


def _calls(node: fx.Node, functions: set) -> bool:
    """Whether a node is a call of one of these functions or methods; modules may have the same names."""
    return node.op in ("call_function", "call_method") and node.target in functions


def _traced(model: nn.Module) -> fx.Graph:
    """Graph of the model's forward pass; a ValueError if it has none."""
    try:
        return fx.Tracer().trace(model)
    except Exception as error:  # whatever a model raises
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {error}), so where ghosts "
            "belong is unknown: give the model without wrapper, whose forward does not branch on values, or a recipe "
            "with activation=None and skips=False"
        ) from error


def _map_sizes(model: nn.Module, shape: tuple[int, int, int]) -> dict[nn.Module, tuple[torch.Size, torch.Size]]:
    """Shapes of input and output of each convolution, for one image."""
    sizes, handles = {}, []

    def note(module, args, output):
        sizes[module] = args[0].shape, output.shape

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(note))
    parameter = next(model.parameters())
    try:
        with plain_settings():
            model(torch.zeros((1, *shape), dtype=parameter.dtype, device=parameter.device))
    except Exception as error:  # whatever a model raises
        raise ValueError(f"{type(model).__name__} does not take an image of shape {tuple(shape)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return sizes


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the modes of all modules as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
