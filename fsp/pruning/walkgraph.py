"""The graph that walks step through: units of layers, and which of them are units of the next.

Its nodes are a model's input, its convolutions and linear layers, the places where tensors are added or concatenated,
and its output.  An edge says which units (channels, or features) of one node are which units of the next.  `torch.fx`
traces the model; operations that do not keep channels apart are refused by name.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from fsp.masks import NAMES, PRUNABLE, prunable, weight_of

FULL = 2**31 - 1  # cumulative probabilities are int32 fractions of this: half the memory of float64, and exact sums
BLOCK = 2**22  # weights handled at once in float64


class Edge(NamedTuple):
    """Unit u of the source is the units ``u * repeat + offset + p`` of the target, for every p in range(repeat)."""

    source: int
    target: int
    repeat: int
    offset: int


class _Layer:
    """A weight as (groups, outputs, inputs, positions), and the tables that steps are drawn from."""

    def __init__(self, name: str, weight: Tensor, groups: int, first: int, kernels: bool):
        self.weight = weight.detach().cpu().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        self.groups, self.outputs, self.inputs, self.positions = self.weight.shape
        self.size = self.positions if kernels else 1  # weights in an item, which a walk keeps or not
        self.items = slice(first, first + weight.numel() // self.size)
        self.forward, self.sums = _table(name, self.weight.transpose(1, 2).flatten(0, 1))  # sums of |w|, by input
        self.backward, _ = _table(name, self.weight.flatten(0, 1))

    def item(self, output: Tensor, local_input: Tensor, position: Tensor) -> Tensor:
        """Number of the item at an output, an input counted inside its group, and a kernel position."""
        return self.items.start + ((output * self.inputs + local_input) * self.positions + position) // self.size

    def step(self, unit: Tensor, forward: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random next units, forward from inputs or backward from outputs, and the items passed."""
        found = _draw(self.forward if forward else self.backward, unit, generator)
        here, there = (self.inputs, self.outputs) if forward else (self.outputs, self.inputs)
        local, position = found // self.positions, found % self.positions
        following = unit // here * there + local  # in the same group
        if forward:
            return following, self.item(following, unit % here, position)
        return following, self.item(unit, local, position)

    def before(self, after: Tensor, kept: Tensor) -> Tensor:
        """From the chances (outputs, j) of adding j new weights after this layer: the chances (inputs, j) before it."""
        later = torch.zeros_like(after)  # a new item leaves fewer for the rest of the walk
        later[:, self.size :] = after[:, : -self.size]
        after, later = (t.view(self.groups, self.outputs, -1) for t in (after, later))
        old = kept[self.items].view(*self.weight.shape[:3], -1)
        sums = self.sums.view(self.groups, self.inputs, 1)
        chances = torch.zeros(self.groups, self.inputs, after.shape[2], dtype=torch.float64, device="cpu")
        for rows in torch.arange(self.outputs, device="cpu").split(max(1, BLOCK * self.outputs // self.weight.numel())):
            block = _alive(self.weight[:, rows].double(), sums[:, None])
            chances += torch.einsum("goi,goj->gij", (block * old[:, rows]).sum(3), after[:, rows])
            chances += torch.einsum("goi,goj->gij", (block * ~old[:, rows]).sum(3), later[:, rows])
        return (chances / torch.where(sums == 0, self.outputs * self.positions, sums)).flatten(0, 1)

    def close(
        self, unit: int, budget: int, after: Tensor, kept: Tensor, generator: torch.Generator
    ) -> tuple[int, int, int]:
        """One step of a walk that adds exactly `budget` from here on: next unit, what is left of it, the item."""
        group, local = divmod(unit, self.inputs)
        weight = _alive(self.weight[group, :, local].double(), self.sums[unit])
        output = torch.arange(self.outputs, device="cpu")[:, None] + group * self.outputs
        items = self.item(output, local, torch.arange(self.positions, device="cpu"))
        affordable = after[output, budget - self.size] if budget >= self.size else after.new_zeros(output.shape)
        chosen = pick(weight * torch.where(kept[items], after[output, budget], affordable), generator)
        item = int(items.view(-1)[chosen])
        return int(output[chosen // self.positions]), budget - (0 if kept[item] else self.size), item


def _table(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """For (rows, edges, positions): cumulative probabilities of each row, int32 in [0, FULL], and its sum of |w|."""
    table = torch.empty(len(weight), weight[0].numel(), dtype=torch.int32, device="cpu")
    totals = torch.empty(len(weight), dtype=torch.float64, device="cpu")
    rows = max(1, BLOCK // table.shape[1])
    for block, to, total in zip(weight.split(rows), table.split(rows), totals.split(rows), strict=True):
        sums = block.flatten(1).double().abs_().cumsum(1)
        total.copy_(sums[:, -1])
        sums[total == 0] = torch.arange(1.0, table.shape[1] + 1, dtype=torch.float64, device="cpu")
        to.copy_(sums.div_(sums[:, -1:].clone()).mul_(FULL).round_())
    if not totals.isfinite().all():
        raise ValueError(f"the weight of {name!r} holds nan or inf, so no step can be drawn: check the weights")
    return table, totals


def _alive(weight: Tensor, total: Tensor) -> Tensor:
    """Magnitudes, with ones where they are 0 in total: there every step is as likely."""
    magnitude = weight.abs()
    return torch.where(total == 0, 1.0, magnitude) if (total == 0).any() else magnitude


def _draw(table: Tensor, row: Tensor, generator: torch.Generator) -> Tensor:
    """A random column for each row: the first whose cumulative probability exceeds a uniform number."""
    columns, flat = table.shape[1], table.view(-1)
    uniform = torch.randint(FULL, row.shape, generator=generator, dtype=torch.int32, device="cpu")
    before = row * columns - 1
    found = torch.zeros_like(row)
    for bit in reversed(range(columns.bit_length())):  # binary search, a bit at a time for all rows
        probe = (found + (1 << bit)).clamp_(max=columns)
        found += (flat.take(before + probe) <= uniform) * (1 << bit)
    return found


def pick(odds: Tensor, generator: torch.Generator) -> int:
    """A flat index, with probability in proportion to its odds."""
    return int(torch.multinomial((odds / odds.max()).flatten(), 1, generator=generator))


@dataclass
class Graph:
    """Nodes in topological order, 0 the input and the last the output; a node is a layer, a junction or an end."""

    width: list[int] = field(default_factory=list)  # units that enter a node
    units: list[int] = field(default_factory=list)  # units that leave it
    edges: list[Edge] = field(default_factory=list)
    layers: dict[int, _Layer] = field(default_factory=dict)  # by node
    by_weight: dict[int, _Layer] = field(default_factory=dict)  # by id of the parameter, which two nodes may share
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool, device="cpu"))  # one entry an item

    def add(self, width: int, units: int, *sources: tuple[int, int, int]) -> tuple[int, int, int]:
        """A new node behind the sources (node, repeat, offset); returns it as a source."""
        node = len(self.units)
        self.width.append(width)
        self.units.append(units)
        self.edges += [Edge(source, node, repeat, offset) for source, repeat, offset in sources]
        return node, 1, 0

    def out_of(self, node: int) -> list[Edge]:
        """Edges that leave a node."""
        return [edge for edge in self.edges if edge.source == node]

    def into(self, node: int) -> list[Edge]:
        """Edges that enter a node."""
        return [edge for edge in self.edges if edge.target == node]

    def add_weights(self, calls: dict[int, tuple[str, nn.Module]], free: set[int], kernels: bool) -> None:
        """Layers of the nodes on paths; those that are not free count as kept."""
        for node, (name, module) in calls.items():
            if not self.out_of(node):
                continue
            own = [p for n, p in module.named_parameters() if n in NAMES]
            key = id(own[0]) if own else id(module)
            if key not in self.by_weight:
                weight = weight_of(module)
                layer = _Layer(name, weight, getattr(module, "groups", 1), len(self.kept), kernels)
                self.by_weight[key] = layer
                new = torch.full((layer.items.stop - layer.items.start,), key not in free, device="cpu")
                self.kept = torch.cat([self.kept, new])
            self.layers[node] = self.by_weight[key]

    def free(self) -> int:
        """Weights on paths that are not kept."""
        return sum(layer.size * int((~self.kept[layer.items]).count_nonzero()) for layer in self.by_weight.values())

    def shortest(self) -> int:
        """Smallest number of weights that a complete path adds to empty masks."""
        length = {0: 0}
        for node, layer in ((n, self.layers.get(n)) for n in range(1, len(self.units))):
            if sources := [length[edge.source] for edge in self.into(node)]:
                own = 0 if layer is None or self.kept[layer.items].all() else layer.size
                length[node] = min(sources) + own
        return length[len(self.units) - 1]

    def mask(self, weight: Tensor) -> Tensor:
        """Mask of a prunable weight; nothing is kept where no path passes."""
        if id(weight) not in self.by_weight:
            return torch.zeros_like(weight, dtype=torch.bool)
        layer = self.by_weight[id(weight)]
        return self.kept[layer.items].repeat_interleave(layer.size).view(weight.shape).to(weight.device)


# ---- from a module to its graph ----------------------------------------------------------------------------------

# What leaves every channel in its place, whatever it does to its map: modules by defining file, functions by name
SAME_MODULES = ("activation", "batchnorm", "dropout", "instancenorm", "linear", "normalization", "padding", "pooling")
SAME_MODULES = {f"torch.nn.modules.{name}" for name in (*SAME_MODULES, "upsampling")}
ELEMENTWISE = {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "selu", "celu", "gelu", "silu", "mish"}
ELEMENTWISE |= {"hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign", "logsigmoid"}
ELEMENTWISE |= {"softmax", "log_softmax", "clamp", "neg", "abs", "exp", "sqrt", "pow", "square", "mul", "mul_", "imul"}
ELEMENTWISE |= {"div", "div_", "truediv", "contiguous", "clone", "detach", "float", "double", "half", "to"}
PER_CHANNEL = {"dropout", "alpha_dropout", "batch_norm", "instance_norm", "group_norm", "layer_norm", "interpolate"}
PER_CHANNEL |= {"local_response_norm", *(f"dropout{d}d" for d in (1, 2, 3))}
PER_CHANNEL |= {f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg", "adaptive_max", "adaptive_avg")}
SUMS = {"add", "add_", "iadd", "sub", "sub_", "isub"}
REDUCTIONS = {"mean", "sum", "amax"}
RESHAPES = {"Flatten", "flatten", "view", "reshape", "squeeze", "unsqueeze"}
CONCATENATIONS = {"cat", "concat", "concatenate"}


class _Tracer(fx.Tracer):
    """Subclasses of prunable layers are leaves too, wherever they are defined."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PRUNABLE) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Keeps the value of every node, a tensor with a shape and no data."""

    def run_node(self, n: fx.Node) -> object:
        n.meta["value"] = super().run_node(n)
        return n.meta["value"]


def _traced(model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """The fx graph of a copy in eval mode, with the shapes that two examples of `shape` take on their way."""
    try:
        held = [t for m in model.modules() for d in (m._parameters, m._buffers, vars(m)) for t in d.values()]
        empty = {id(t): t.detach().to("meta") for t in held if isinstance(t, Tensor)}
        bare = copy.deepcopy(model, empty).eval()  # the memo stands in for the tensors: no data is copied
        traced = fx.GraphModule(bare, _Tracer().trace(bare))
        example = torch.empty((2, *shape), dtype=next(iter(prunable(model).values())).dtype, device="meta")
        with torch.no_grad():
            _Shapes(traced).run(example)
    except Exception as error:  # forward is anyone's code: anything may come
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"PHEW cannot trace {type(model).__name__} with torch.fx for inputs of shape {shape} ({reason}): "
            "check the shape, or use another method"
        ) from error
    return traced


def graph_of(
    model: nn.Module, weights: dict[str, nn.Parameter], shape: tuple[int, ...], identity: str, kernels: bool
) -> Graph:
    """The graph that walks take, with nothing kept but excluded layers."""
    traced = _traced(model, shape)
    graph = Graph()
    calls: dict[int, tuple[str, nn.Module]] = {}
    sums: list[int] = []
    origin: dict[fx.Node, tuple[int, int, int]] = {}  # of a tensor: (node, repeat, offset) as in an edge
    for n in traced.graph.nodes:
        value, sources = n.meta["value"], [a for a in n.all_input_nodes if a in origin]
        if n.op == "placeholder":
            if not graph.units:
                origin[n] = graph.add(shape[0], shape[0])
        elif n.op == "output":
            if not isinstance(value, Tensor) or not sources:
                raise ValueError(
                    "PHEW cannot trace a model whose output is not one tensor made from its input: use another method"
                )
            graph.add(value.shape[1], value.shape[1], origin[sources[0]])
        elif sources and not _is_number(value):
            module = model.get_submodule(n.target) if n.op == "call_module" else None
            kind, offsets = _relate(n, module, sources)
            before = [
                (node, r, o + offset) for (node, r, o), offset in zip(map(origin.get, sources), offsets, strict=True)
            ]
            if kind == "same":
                origin[n] = before[0]
            elif kind == "spread":
                (node, repeat, offset), spread = before[0], value.shape[1] // sources[0].meta["value"].shape[1]
                origin[n] = node, repeat * spread, offset * spread
            else:
                width = sources[0].meta["value"].shape[1] if kind == "layer" else value.shape[1]
                origin[n] = graph.add(width, value.shape[1], *before)
                if kind == "layer":
                    calls[origin[n][0]] = n.target, module
                elif kind == "sum":
                    sums.append(origin[n][0])
    if identity == "residual":
        _drop_identities(graph, sums)
    _tidy(graph)
    graph.add_weights(calls, {id(w) for w in weights.values()}, kernels)
    return graph


def _is_number(value: object) -> bool:
    """Whether a traced value is no tensor nor a collection of them, such as a size."""
    return not any(isinstance(v, Tensor) for v in (value if isinstance(value, list | tuple) else [value]))


def _relate(n: fx.Node, module: nn.Module | None, sources: list[fx.Node]) -> tuple[str, list[int]]:
    """What a traced operation does to units, and where in its result the units of each source begin."""
    value, shapes = n.meta["value"], [s.meta["value"].shape for s in sources]
    name = type(module).__name__ if module is not None else getattr(n.target, "__name__", n.target)
    plain = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == shapes[0][0]
    kept = plain and value.shape[1] == shapes[0][1]
    if isinstance(module, PRUNABLE):
        if plain and (value.ndim == 2 if isinstance(module, nn.Linear) else not module.transposed):
            return "layer", [0]
    elif plain and name in CONCATENATIONS:
        if _dims(n, value.ndim, 0) == {1} and sum(s[1] for s in shapes) == value.shape[1]:
            return "cat", [sum(s[1] for s in shapes[:i]) for i in range(len(shapes))]
    elif plain and len(sources) > 1:
        if name in SUMS and all(len(s) == value.ndim and s[:2] == value.shape[:2] for s in shapes):
            return "sum", [0] * len(sources)
    elif plain and name in RESHAPES and value.ndim == 2 and value.shape[1] == math.prod(shapes[0][1:]):
        return "spread", [0]
    elif plain and name == "pad":
        sides = (*_argument(n, 1, "pad", ()), *[0] * 2 * value.ndim)[2 * value.ndim - 4 :][:2]  # of dimension 1
        if sides == (0, 0) or (min(sides) >= 0 and _argument(n, 2, "mode", "constant") == "constant"):
            return "same", [sides[0]]
    elif kept and (
        name in ELEMENTWISE | PER_CHANNEL | RESHAPES | SUMS
        or any(cls.__module__ in SAME_MODULES for cls in type(module).__mro__)
        or (name in REDUCTIONS and not _dims(n, len(shapes[0]), None) & {0, 1})
        or (name == "getitem" and isinstance(n.args[1], tuple) and n.args[1][:2] == (slice(None),) * 2)
    ):
        return "same", [0]
    raise ValueError(
        f"PHEW cannot trace the operation {name} ({n.name}, from {' and '.join(str(tuple(s)) for s in shapes)}): its "
        "walks have to know which channel goes where. Use another method"
    )


def _argument(n: fx.Node, position: int, name: str, default: object) -> object:
    """An argument of a traced call, given by position or by name."""
    return n.args[position] if len(n.args) > position else n.kwargs.get(name, default)


def _dims(n: fx.Node, ndim: int, default: int | None) -> set[int]:
    """Dimensions that a traced call names, counted from the front; all where it names none."""
    dims = _argument(n, 1, "dim", default)
    dims = range(ndim) if dims is None else dims
    return {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}


def _drop_identities(graph: Graph, sums: list[int]) -> None:
    """Remove the edge of an addend that the other one is computed from: walks take the residual branch."""
    ancestors: list[set[int]] = []
    for node in range(len(graph.units)):
        ancestors.append(set().union(*({e.source} | ancestors[e.source] for e in graph.into(node))))
    for node in sums:
        edges = graph.into(node)
        identities = {e for e in edges if any(e.source in ancestors[other.source] for other in edges)}
        graph.edges = [e for e in graph.edges if e not in identities]


def _tidy(graph: Graph) -> None:
    """Keep only edges that lead to the output; units of an input that is flattened first are its features.

    Raises if a unit of a node comes from no other node.
    """
    alive = {len(graph.units) - 1}
    for edge in sorted(graph.edges, key=lambda e: -e.target):
        alive |= {edge.source} if edge.target in alive else set()
    graph.edges = [e for e in graph.edges if e.target in alive]
    repeats = {e.repeat for e in graph.out_of(0)}
    if len(repeats) == 1 and not any(e.offset for e in graph.out_of(0)):
        graph.width[0] = graph.units[0] = graph.units[0] * repeats.pop()
        graph.edges = [e._replace(repeat=1) if e.source == 0 else e for e in graph.edges]
    for node in sorted(alive - {0}):
        fed = torch.zeros(graph.width[node], dtype=torch.bool, device="cpu")
        for e in graph.into(node):
            fed[e.offset : e.offset + graph.units[e.source] * e.repeat] = True
        if not fed.all():
            raise ValueError(
                f"PHEW cannot trace a pad of channels with zeros outside of an identity shortcut: {int((~fed).sum())} "
                "channels come from nowhere, and no walk can reach the input from them. Use another method"
            )
