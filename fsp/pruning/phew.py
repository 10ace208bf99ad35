r"""PHEW: masks made of biased random walks through the network at its initial weights, without data.

Walks step from unit to unit (channels, or features) of the graph of `fsp.pruning.walkgraph`; every weight they pass is
kept, so each kept weight lies on a kept path.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fsp.checks import check_choice, check_generator
from fsp.masks import Masks, all_kept, check_density, kept_count, prunable
from fsp.pruning.gradients import Batches, input_shape
from fsp.pruning.walkgraph import Edge, Graph, graph_of, pick

MOST = 2**17  # walks drawn at once
USEFUL = 0.01  # of a batch of MOST walks, or of what is missing: a batch that adds fewer weights is the last


def phew(
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: Batches | None = None,
    shape: Sequence[int] | None = None,
    exclude: Iterable[str] = (),
    identity: str = "residual",
    kernels: bool = False,
) -> Masks:
    r"""PHEW: keep what biased random walks between input and output pass, until the count is met exactly.

    Forward walks start at the input channels in turn (the features, where the input is flattened first), backward
    walks at the outputs in turn; the two kinds alternate.  A walk at input unit i of a layer with weight
    :math:`\theta_{oik}` (output o, input i, kernel position k) takes the edge (o, k) with probability

    .. math:: p(o, k \mid i) = \frac{|\theta_{oik}|}{\sum_{o'k'} |\theta_{o'ik'}|}, \qquad
              p(i, k \mid o) = \frac{|\theta_{oik}|}{\sum_{i'k'} |\theta_{oi'k'}|}

    the latter backwards.  Where all these weights are 0 every edge is as likely.

    Parameters
    ----------
    model : nn.Module
        One tensor in, one tensor out, and traceable by ``torch.fx``.  It is left bit-identical.
    density : float, in (0, 1]
    generator : torch.Generator on the CPU
    batches : sequence of (inputs, labels), or callable, optional
        Only the shape of the first input is used; a callable is asked for those of round 1.
    shape : sequence of int, optional
        Shape of one input, (channels, height, width); instead of `batches`.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks; walks pass through them.
    identity : {"residual", "coin"}
        At an addition with an identity shortcut (no convolution on it), pass the residual branch always, or either
        with probability 1/2.  Where the shortcut is a convolution a fair coin decides in both cases.
    kernels : bool
        Keep the whole kernel :math:`\theta_{oi\cdot}` of every edge passed.

    Returns
    -------
    Masks
        On the devices of the parameters.  At density 1 everything is kept.

    Raises
    ------
    ValueError
        If neither `batches` nor `shape` gives the input shape; `density`, `identity`, `kernels`, `generator` or a
        weight is not valid; the count is smaller than one complete path or larger than the number of weights on
        paths; the model cannot be traced or does something to channels that walks cannot follow (named in the message).
    RuntimeError
        If walks no longer add weights at a useful rate, or no complete walk adds few enough to meet the count.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> masks = phew(model, 0.25, shape=(4,), generator=torch.Generator().manual_seed(0))
    >>> sum(int(mask.sum()) for mask in masks.values())
    12

    Notes
    -----
    *Exact count.*  Walks are accepted in order while they fit.  When r weights are missing and the next walk adds more,
    the rule "draw on, accept a walk that adds 1 to r new weights" would take for ever in a deep sparse network.  Such
    walks are drawn directly instead, from the law of a forward walk given that it adds 1 to r: a pass over the network
    gives the probability that a walk from a unit adds j new weights, for each unit and j.

    *High densities.*  Weights near 0 are hardly ever passed, so walks saturate: after a batch of 131,072 that adds
    fewer than 1% of its number, or of what is missing if that is less, a RuntimeError says how many are missing.
    On one core a ResNet-20 reaches .99 in seconds and VGG-16 .9 in less than a minute; nearer to 1 expect the error.

    *Paths are paths of channels.*  A kernel position that only ever sees padding counts like any other.  The draw of
    a unit followed by that of a position in its kernel, as published, is the one draw above.

    With more than two ways at a fork or an addition, each is as likely.

    References
    ----------
    Patil and Dovrolis: PHEW: constructing sparse networks that learn fast and generalize well without training data.
    ICML 2021, section 4.
    """
    check_density(density)
    check_choice("identity", identity, ("residual", "coin"))
    check_choice("kernels", kernels, (True, False))
    check_generator(generator)
    if callable(batches):
        batches = list(batches(1))  # there are no rounds, and only their shape is used
    shape = input_shape(shape, batches)
    weights = prunable(model, exclude=exclude)
    for name, mask in all_kept(model, exclude=exclude).items():
        if not mask.all():
            raise ValueError(
                f"torch prunes {name!r} already, and walks know nothing of it: make it plain first, with "
                "torch.nn.utils.prune.remove, or use another method"
            )
    total = sum(w.numel() for w in weights.values())
    wanted = kept_count(total, density)
    if wanted == total:
        return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    graph = graph_of(model, weights, tuple(shape), identity, kernels)
    asked = f"density {density} keeps {wanted} of {total} weights"
    if wanted < graph.shortest():
        raise ValueError(f"{asked}, but one complete path has {graph.shortest()}: use a higher density")
    if wanted > graph.free():
        raise ValueError(f"{asked}, but only {graph.free()} lie on a path from input to output: use a lower density")
    missing = _collect(graph, wanted, generator, asked)
    while missing:
        missing -= _close(graph, missing, generator, asked)
    return {name: graph.mask(w) for name, w in weights.items()}


# ---- walks -------------------------------------------------------------------------------------------------------


def _walks(graph: Graph, starts: Tensor, forward: bool, generator: torch.Generator) -> Tensor:
    """Items (layers, walks) that walks from the given units pass, -1 where a walk goes around a layer."""
    passed = torch.full((len(graph.layers), len(starts)), -1, device="cpu")
    row = {node: i for i, node in enumerate(graph.layers)}
    order = range(len(graph.units)) if forward else range(len(graph.units) - 1, -1, -1)
    arrived = {order[0]: [(torch.arange(len(starts), device="cpu"), starts)]}
    for node in order:
        if node not in arrived:
            continue
        walk, unit = (torch.cat(parts) for parts in zip(*arrived.pop(node), strict=True))
        if node in graph.layers:
            unit, passed[row[node], walk] = graph.layers[node].step(unit, forward, generator)
        edges = graph.out_of(node) if forward else graph.into(node)
        for edge, chosen in zip(edges, _ways(graph, edges, unit, forward, generator), strict=True):
            there = unit[chosen]
            if forward:
                position: Tensor | int = 0
                if edge.repeat > 1:
                    position = torch.randint(edge.repeat, there.shape, generator=generator, device="cpu")
                there = there * edge.repeat + edge.offset + position
            else:
                there = (there - edge.offset) // edge.repeat
            arrived.setdefault(edge.target if forward else edge.source, []).append((walk[chosen], there))
    return passed


def _ways(
    graph: Graph, edges: list[Edge], unit: Tensor, forward: bool, generator: torch.Generator
) -> Sequence[slice] | Tensor:
    """Which walks take which edge: each of those that lead on from its unit with the same probability."""
    if len(edges) < 2:
        return [slice(None)] * len(edges)
    if forward:
        possible = torch.ones(len(edges), len(unit), dtype=torch.bool, device="cpu")
    else:
        ends = [(e.offset, e.offset + graph.units[e.source] * e.repeat) for e in edges]
        possible = torch.stack([(unit >= start) & (unit < stop) for start, stop in ends])
    rank = (torch.rand(unit.shape, generator=generator, dtype=torch.float64, device="cpu") * possible.sum(0)).long()
    return possible & (possible.cumsum(0) == rank + 1)


def _collect(graph: Graph, missing: int, generator: torch.Generator, asked: str) -> int:
    """Accept walks in order while they fit; returns how many weights are missing when the first does not."""
    ends = graph.units[0], graph.units[-1]
    sizes = np.array([layer.size for layer in graph.layers.values()])
    done, pairs = 0, 512
    while missing:
        starts = torch.arange(done, done + pairs, device="cpu")
        both = [_walks(graph, starts % n, forward, generator) for n, forward in zip(ends, (True, False), strict=True)]
        items = torch.stack(both, 2).flatten(1)  # (layers, walks): forward, backward, forward ...
        added, accepted = _accept(graph.kept, items, sizes, missing)
        missing, done = missing - added, done + pairs
        if accepted < 2 * pairs:
            break
        if missing and 2 * pairs == MOST and added < USEFUL * min(MOST, missing + added):
            raise RuntimeError(
                f"{asked}, but walks have saturated: {2 * done} of them leave {missing} missing, and the last {MOST} "
                f"added {added}. Use a lower density"
            )
        pairs = max(512, min(MOST // 2, pairs * missing // added if added else MOST))
    return missing


def _accept(kept: Tensor, items: Tensor, sizes: np.ndarray, missing: int) -> tuple[int, int]:
    """Keep what the first walks pass, as many of them as fit; how many weights and how many walks that is."""
    flat = items.T.flatten()  # walk by walk
    fresh = ((flat >= 0) & ~kept[flat]).nonzero()[:, 0]  # -1 reads the last item, harmlessly
    new, first = np.unique(flat[fresh].numpy(), return_index=True)
    walk, layer = np.divmod(fresh.numpy()[first], len(sizes))
    total = np.bincount(walk, weights=sizes[layer], minlength=items.shape[1]).cumsum()
    accepted = int(np.searchsorted(total, missing, side="right"))
    kept[torch.from_numpy(new[walk < accepted])] = True
    return int(total[accepted - 1]) if accepted else 0, accepted


def _close(graph: Graph, missing: int, generator: torch.Generator, asked: str) -> int:
    """Accept one forward walk that adds 1 to `missing` weights, from the law of such walks; how many it adds."""
    last = len(graph.units) - 1
    # chances (units, j) to add exactly j new weights on the rest of the way, before a node and after it; those before
    # are divided by exp(scale), because in deep networks they underflow
    ending = torch.eye(1, missing + 1, dtype=torch.float64, device="cpu")
    before, after, scale = {last: ending.expand(graph.width[last], -1)}, {}, {last: 0.0}
    for node in range(last - 1, -1, -1):
        if not (edges := graph.out_of(node)):
            continue
        ways = [_spread(before[edge.target], edge, graph.units[node]).mean(1) for edge in edges]
        after[node] = sum(share * way for share, way in zip(_shares(scale, edges), ways, strict=True)) / len(edges)
        layer = graph.layers.get(node)
        before[node] = after[node] if layer is None else layer.before(after[node], graph.kept)
        scale[node] = -math.inf
        if largest := float(before[node].max()):
            scale[node] = max(scale[edge.target] for edge in edges) + math.log(largest)
            before[node] = before[node] / largest
    if not before[0][:, 1:].any():
        raise RuntimeError(
            f"{asked}: {missing} are missing, and no complete walk adds so few. Try a density next to it"
        )
    node, (unit, budget) = 0, divmod(pick(before[0][:, 1:], generator), missing)
    budget += 1  # column 0 was left out
    passed = {}
    while node != last:
        if node in graph.layers:
            layer = graph.layers[node]
            unit, budget, item = layer.close(unit, budget, after[node], graph.kept, generator)
            passed[item] = layer.size
        edges = graph.out_of(node)
        ends = [_spread(before[edge.target], edge, graph.units[node])[unit, :, budget] for edge in edges]
        odds = [share * end.mean() for share, end in zip(_shares(scale, edges), ends, strict=True)]
        way = pick(torch.stack(odds), generator)
        unit = unit * edges[way].repeat + edges[way].offset + pick(ends[way], generator)
        node = edges[way].target
    added = sum(size for item, size in passed.items() if not graph.kept[item])
    graph.kept[list(passed)] = True
    return added


def _shares(scale: dict[int, float], edges: list[Edge]) -> list[float]:
    """Factors that bring chances at the targets of edges to one scale; 0 where there is no chance at all."""
    scales = [scale[edge.target] for edge in edges]
    return [0.0 if s == -math.inf else math.exp(s - max(scales)) for s in scales]


def _spread(before: Tensor, edge: Edge, units: int) -> Tensor:
    """Chances (units, repeat, j) at the target of an edge, by units of its source."""
    return before[edge.offset : edge.offset + units * edge.repeat].view(units, edge.repeat, -1)
