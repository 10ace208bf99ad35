r"""Spectra of the bipartite graphs behind pruning masks: the full-spectrum coordinate and its parts.

A layer's mask is a bipartite graph: left vertices are the unrolled inputs (one per input channel and kernel
position), right vertices the output channels, an edge is a kept weight.  `B`, shape (n_left, n_right), is its
biadjacency matrix.  The adjacency matrix

.. math:: A = \begin{pmatrix} 0 & B \\ B^\top & 0 \end{pmatrix}

has the eigenvalues :math:`\pm\sigma_i(B)` and zeros, so the "third largest \|eigenvalue\|" that the published
code asks for is :math:`\sigma_2(B)`.  All spectra are float64.  What is undefined is ``nan``; only the norm of a
coordinate counts it as 0, as published, and `coverage` says how often that happened.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
.. [2] Hoang, Liu, Marculescu, Wang: Revisiting pruning at initialization through the lens of Ramanujan graph.
   ICLR 2023.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rules:
    """What counts as a valid graph and how nested subgraphs are averaged: the two papers differ (D25).

    A graph is valid if its mean left degree reaches `left_degree` and its mean right degree reaches
    `right_degree` (exceeds it, where `right_strict`), isolated vertices dropped.

    Attributes
    ----------
    group_size : int
        Fewest left vertices of equal degree that make a nested subgraph.
    left_degree, right_degree : float
        Thresholds on the mean degrees.
    right_strict : bool
        Whether the mean right degree has to exceed its threshold.
    cheeger : bool
        Whether a subgraph's value is multiplied by max(n_left, n_right) / (n_left + n_right - 1).
    whole_left : {"inputs", "outputs"}
        Which side is called left where the *whole* layer is tested for validity; of the values only NaRC's depends on
        it (D1).
    zero_weights : {"drop", "published"}
        For IMSG, a subgraph valid by its mask whose non-zero weights are no valid graph is dropped from the mean,
        or makes the layer undefined as in the published code (D7).
    """

    group_size: int
    left_degree: float
    right_degree: float
    right_strict: bool
    cheeger: bool
    whole_left: str
    zero_weights: str

    def __post_init__(self):
        if self.whole_left not in ("inputs", "outputs"):
            raise ValueError(f'Rules: whole_left is "inputs" or "outputs", not {self.whole_left!r}')
        if self.zero_weights not in ("drop", "published"):
            raise ValueError(f'Rules: zero_weights is "drop" or "published", not {self.zero_weights!r}')


RULES = {
    "iclr2023": Rules(3, 3, 3, False, False, "inputs", "drop"),
    "fsp2023": Rules(2, 3, 1, True, True, "outputs", "drop"),
}


class Coordinate(NamedTuple):
    r"""The full-spectrum coordinate of one layer, :math:`v = (\Delta_r, \lambda, IMDB, IMSG)`.

    Each entry is ``nan`` where it is undefined.
    """

    ramanujan_gap: float
    weighted_gap: float
    imdb: float
    imsg: float

    @property
    def norm(self) -> float:
        """L2 norm, an undefined entry counted as 0, as published."""
        return math.hypot(*_zeroed(self))


# ---- the graph of a layer ----------------------------------------------------------------------------------------


def biadjacency(tensor: Tensor) -> Tensor:
    """Biadjacency matrix of a layer: rows are unrolled inputs, columns are outputs.

    Parameters
    ----------
    tensor : Tensor, shape (C_out, C_in, *kernel) or (out, in)
        Mask (bool or 0/1) or weights.

    Returns
    -------
    Tensor, shape (C_in * prod(kernel), C_out), float64
        Rows run over input channels slowest, kernel positions fastest.  Isolated vertices (zero rows and columns)
        are kept.

    Raises
    ------
    ValueError
        For a tensor of fewer than two dimensions or without entries.

    Examples
    --------
    >>> biadjacency(torch.tensor([[True, False, True]])).T
    tensor([[1., 0., 1.]], dtype=torch.float64)
    """
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(
            f"a layer's tensor has shape (outputs, inputs, ...) and entries, this has {tuple(tensor.shape)}"
        )
    return tensor.detach().flatten(1).T.to(torch.float64)  # (n_left, n_right)


def singular_values(B: Tensor, k: int = 2) -> Tensor:
    r"""The `k` largest singular values, from the Gram matrix of the smaller side.

    Squaring costs accuracy where :math:`\sigma_k \ll \sigma_1`: there (a ratio below 1e-3, such as the rank-one
    graph of a dense layer) the values come from the singular value decomposition of `B` itself.

    Parameters
    ----------
    B : Tensor, shape (n_left, n_right), float64
    k : int, >= 1

    Returns
    -------
    Tensor, shape (k,), float64
        Descending; zeros where the smaller side has fewer than `k` vertices.

    Examples
    --------
    K(4, 4) has the singular values 4, 0, 0, 0:

    >>> singular_values(torch.ones(4, 4, dtype=torch.float64)).round(decimals=9)
    tensor([4., 0.], dtype=torch.float64)
    """
    B = B.to(torch.float64)
    values = B.new_zeros(k)
    if B.numel() == 0:
        return values
    gram = B @ B.T if B.shape[0] <= B.shape[1] else B.T @ B
    squares = torch.linalg.eigvalsh(gram).flip(0)[:k].clamp(min=0)
    if squares[-1] < 1e-6 * squares[0]:
        found = torch.linalg.svdvals(B)[:k]
    else:
        found = squares.sqrt()
    values[: len(found)] = found
    return values


def _without_isolated(B: Tensor) -> Tensor:
    """`B` without zero rows and zero columns."""
    edges = B != 0
    return B[edges.any(1)][:, edges.any(0)]


def _valid(B: Tensor, rules: Rules, *, left: str = "inputs") -> bool:
    """Whether the graph of non-zero entries of `B` (no isolated vertices) is dense enough for `rules`."""
    edges = int(torch.count_nonzero(B))
    n_left, n_right = B.shape if left == "inputs" else B.shape[::-1]
    # mean degrees compared as edge counts: exact where degree thresholds are whole numbers
    enough_right = edges > rules.right_degree * n_right if rules.right_strict else edges >= rules.right_degree * n_right
    return edges > 0 and edges >= rules.left_degree * n_left and enough_right


def _bound(B: Tensor) -> float:
    """Ramanujan bound sqrt(d_left - 1) + sqrt(d_right - 1) of a graph without isolated vertices."""
    edges = int(torch.count_nonzero(B))
    n_left, n_right = B.shape
    return math.sqrt(edges / n_left - 1) + math.sqrt(edges / n_right - 1)


def nested_subgraphs(B: Tensor, rules: Rules) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Valid d-left-regular subgraphs: left vertices of one degree with all the outputs they touch.

    Yields
    ------
    rows : Tensor of int64
        The left vertices, in order.
    K : Tensor, shape (len(rows), touched outputs)
    factor : float
        Cheeger-type factor max(n_left, n_right) / (n_left + n_right - 1), or 1 by `rules`.
    """
    degrees = torch.count_nonzero(B, dim=1)
    for degree in degrees[degrees > 0].unique():
        rows = (degrees == degree).nonzero()[:, 0]
        if len(rows) < rules.group_size:
            continue
        K = _without_isolated(B[rows])
        if _valid(K, rules):
            n_left, n_right = K.shape
            yield rows, K, max(n_left, n_right) / (n_left + n_right - 1) if rules.cheeger else 1.0


# ---- quantities of one graph -------------------------------------------------------------------------------------


def ramanujan_gap(B: Tensor, *, rules: str | Rules | None = None) -> float:
    r"""Ramanujan gap (difference of bound): how far the second singular value lies below the Ramanujan bound.

    .. math:: \Delta_r = \sqrt{\bar d_l - 1} + \sqrt{\bar d_r - 1} - \sigma_2(B)

    with mean degrees over the vertices that have an edge.  Positive: inside the bound.

    Parameters
    ----------
    B : Tensor, shape (n_left, n_right), entries 0 or 1
    rules : {"iclr2023", "fsp2023"} or Rules, optional
        Undefined where the whole-layer validity test fails.  Default: no test.

    Returns
    -------
    float
        Dimensionless; ``nan`` for a graph without edges or not valid by `rules`.

    Examples
    --------
    K(4, 4), bound :math:`2\sqrt 3`, second singular value 0:

    >>> round(ramanujan_gap(torch.ones(4, 4, dtype=torch.float64)), 4)
    3.4641

    References
    ----------
    [2]_, definition of Ramanujan graphs for irregular bipartite graphs; [1]_, first coordinate.
    """
    B = _checked_whole(B, rules)
    if B is None:
        return math.nan
    return _bound(B) - singular_values(B)[1].item()


def weighted_gap(W: Tensor, *, rules: str | Rules | None = None) -> float:
    r"""Weighted spectral gap :math:`\lambda = \sigma_1(|W|) - \sigma_2(|W|)`.

    Parameters
    ----------
    W : Tensor, shape (n_left, n_right)
        Weights, zero where pruned.  Unit: that of the weights.
    rules : {"iclr2023", "fsp2023"} or Rules, optional
        Undefined where the graph of non-zero weights fails the whole-layer validity test.  Default: no test.

    Returns
    -------
    float
        Not negative; ``nan`` for a matrix of zeros or not valid by `rules`.

    Examples
    --------
    >>> weighted_gap(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
    2.0

    References
    ----------
    [1]_, second coordinate.
    """
    W = _checked_whole(W, rules)
    if W is None:
        return math.nan
    sigma = singular_values(W.abs())
    return (sigma[0] - sigma[1]).item()


def imdb(B: Tensor, *, rules: str | Rules = "fsp2023") -> float:
    r"""Iterative mean difference of bound: mean Ramanujan gap of the nested d-left-regular subgraphs.

    .. math:: \mathrm{IMDB} = \frac1{|\mathcal K|} \sum_{K \in \mathcal K} c_K\, \Delta_r(K)

    over the valid subgraphs, each counted once whatever its size; :math:`c_K = 1` for "iclr2023".

    Parameters
    ----------
    B : Tensor, shape (n_left, n_right), entries 0 or 1
    rules : {"iclr2023", "fsp2023"} or Rules

    Returns
    -------
    float
        ``nan`` if no subgraph is valid (the published codes say null and 0).

    References
    ----------
    [2]_, iterative mean difference of bound; [1]_, third coordinate.
    """
    return _mean([c * (_bound(K) - singular_values(K)[1].item()) for _, K, c in nested_subgraphs(B, _rules(rules))])


def imsg(B: Tensor, W: Tensor, *, rules: str | Rules = "fsp2023") -> float:
    r"""Iterative mean weighted spectral gap of the nested subgraphs.

    .. math:: \mathrm{IMSG} = \frac1{|\mathcal K|} \sum_{K \in \mathcal K}
              c_K\, \bigl(\sigma_1(|W_K|) - \sigma_2(|W_K|)\bigr)

    with :math:`W_K` the weights on the edges of the subgraph K.  Subgraphs, their validity and :math:`c_K` come from
    the mask `B`; ``rules.zero_weights`` says what a zero weight under the mask does (D7).

    Parameters
    ----------
    B : Tensor, shape (n_left, n_right), entries 0 or 1
    W : Tensor, shape (n_left, n_right)
        Weights; entries off the mask are ignored.
    rules : {"iclr2023", "fsp2023"} or Rules

    Returns
    -------
    float
        ``nan`` if no subgraph is valid.

    References
    ----------
    [1]_, fourth coordinate.
    """
    rules = _rules(rules)
    W = W.abs().to(torch.float64).where(B != 0, 0)
    gaps = []
    for rows, _, c in nested_subgraphs(B, rules):
        W_K = _without_isolated(W[rows])
        if _valid(W_K, rules):
            gaps.append(c * weighted_gap(W_K))
        elif rules.zero_weights == "published":
            return math.nan
    return _mean(gaps)


def narc(B: Tensor, *, rules: str | Rules = "iclr2023", edge_count: str = "directed") -> float:
    r"""Normalised random coefficient: at most 0 for random-like graphs, positive for structured ones.

    .. math:: \mathrm{NaRC}_{2023a} = \frac{(\sigma_2^2/4 + 1)\sqrt{n_l n_r}
              - \bigl| E - \frac{\bar d_l}{C_{out}} n_l n_r \bigr|}{n_{in}\, C_{out}}, \qquad
              \mathrm{NaRC}_{2023b} = \frac{\sigma_2 \sqrt{n_l n_r}
              - \bigl| E - \frac{\bar d_l}{N} n_l n_r \bigr|}{N}

    (a) for rules "iclr2023" and (b) for rules with the Cheeger factor, whose left side is ``rules.whole_left`` (D1).
    :math:`n_l, n_r` count vertices with an edge, :math:`n_{in}, C_{out}` all vertices, :math:`N = n_l + n_r`.

    Parameters
    ----------
    B : Tensor, shape (n_left, n_right), entries 0 or 1
        With its isolated vertices.
    rules : {"iclr2023", "fsp2023"} or Rules
    edge_count : {"directed", "undirected"}
        E is twice the number of kept weights, as in the published code, whose sign pattern depends on it, or once (D2).

    Returns
    -------
    float
        Dimensionless; ``nan`` where the whole graph is not valid.

    References
    ----------
    [2]_, normalised random coefficient.
    """
    if edge_count not in ("directed", "undirected"):
        raise ValueError(f'edge_count is "directed" or "undirected", not {edge_count!r}')
    rules = _rules(rules)
    n_in, c_out = B.shape
    B = _checked_whole(B, rules)
    if B is None:
        return math.nan
    n_left, n_right = B.shape
    kept = int(torch.count_nonzero(B))
    edges = 2 * kept if edge_count == "directed" else kept
    sigma = singular_values(B)[1].item()
    if rules.cheeger:
        n = n_left + n_right
        n_r = n_right if rules.whole_left == "inputs" else n_left
        return (sigma * math.sqrt(n_left * n_right) - abs(edges - kept * n_r / n)) / n
    spread = (sigma**2 / 4 + 1) * math.sqrt(n_left * n_right)
    return (spread - abs(edges - kept * n_right / c_out)) / (n_in * c_out)


# ---- coordinates of layers and networks --------------------------------------------------------------------------


def coordinate(mask: Tensor, weight: Tensor, *, rules: str | Rules = "fsp2023") -> Coordinate:
    """Full-spectrum coordinate of one layer.

    Parameters
    ----------
    mask : Tensor, shape (C_out, C_in, *kernel) or (out, in), bool or 0/1
    weight : Tensor, same shape
        Weights of the layer; those off the mask are ignored.
    rules : {"iclr2023", "fsp2023"} or Rules

    Returns
    -------
    Coordinate

    Raises
    ------
    ValueError
        If the shapes differ, the mask is not binary, a weight is not finite, or the tensor is no layer's.

    References
    ----------
    [1]_, full-spectrum coordinate.
    """
    return coordinates({"layer": mask}, {"layer": weight}, rules=rules)["layer"]


def coordinates(
    masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | nn.Module, *, rules: str | Rules = "fsp2023"
) -> dict[str, Coordinate]:
    """Full-spectrum coordinate of every masked layer of a network.

    Parameters
    ----------
    masks : dict of parameter name to mask, as made by `fsp.prune.prune`
    weights : dict of parameter name to weights, or the model itself
        May hold more names than `masks`.
    rules : {"iclr2023", "fsp2023"} or Rules

    Returns
    -------
    dict of parameter name to Coordinate, in the order of `masks`

    Raises
    ------
    ValueError
        As for `coordinate`, naming the layer; also for a mask without weights and for no masks at all.

    Examples
    --------
    >>> mask = torch.ones(4, 4, dtype=torch.bool)
    >>> [round(x, 4) for x in coordinates({"w": mask}, {"w": torch.ones(4, 4)})["w"]]
    [3.4641, 4.0, 1.9795, 2.2857]
    """
    rules = _rules(rules)
    if isinstance(weights, nn.Module):
        weights = dict(weights.named_parameters())
    if not masks:
        raise ValueError("there are no masks: fsp.prune.prune(model, ...) makes them")
    for name, mask in masks.items():
        _check_layer(name, mask, weights.get(name))
    result = {}
    for name, mask in masks.items():
        B = biadjacency(mask)
        W = biadjacency(weights[name]).where(B != 0, 0)
        result[name] = Coordinate(
            ramanujan_gap(B, rules=rules),
            weighted_gap(W, rules=rules),
            imdb(B, rules=rules),
            imsg(B, W, rules=rules),
        )
    return result


def spectrum_norm(coordinates: Mapping[str, Coordinate]) -> float:
    r"""Full-spectrum norm of a network, :math:`D = \frac1L \sum_\ell \lVert v_\ell \rVert_2`.

    The distance from the origin, with undefined entries counted as 0 (D5; the unweighted form of D4).

    Parameters
    ----------
    coordinates : dict of layer name to Coordinate

    Returns
    -------
    float
    """
    return _mean([v.norm for v in coordinates.values()])


def distance(a: Mapping[str, Coordinate], b: Mapping[str, Coordinate]) -> float:
    r"""Distance of two networks' coordinates, :math:`\frac1L \sum_\ell \lVert a_\ell - b_\ell \rVert_2`.

    Undefined entries count as 0, as in the norm.

    Parameters
    ----------
    a, b : dict of layer name to Coordinate
        Of the same layers.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the layers differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"coordinates of different layers: {sorted(a.keys() ^ b.keys())} are in one only")
    return _mean([math.dist(_zeroed(a[name]), _zeroed(b[name])) for name in a])


def layer_mean(coordinates: Mapping[str, Coordinate]) -> Coordinate:
    """Mean of each quantity over the layers in which it is defined.

    As published; layers without a valid graph drop out of the mean (D27), so report `coverage` beside it.

    Parameters
    ----------
    coordinates : dict of layer name to Coordinate

    Returns
    -------
    Coordinate
        ``nan`` for a quantity that no layer has.

    Examples
    --------
    >>> layer_mean({"a": Coordinate(1.0, 2.0, math.nan, math.nan), "b": Coordinate(3.0, 4.0, 5.0, math.nan)})
    Coordinate(ramanujan_gap=2.0, weighted_gap=3.0, imdb=5.0, imsg=nan)
    """
    return Coordinate(*(_mean([v[i] for v in coordinates.values() if not math.isnan(v[i])]) for i in range(4)))


def coverage(coordinates: Mapping[str, Coordinate]) -> Coordinate:
    """Number of layers in which each quantity is defined.

    Parameters
    ----------
    coordinates : dict of layer name to Coordinate

    Returns
    -------
    Coordinate of int

    Examples
    --------
    >>> coverage({"w": Coordinate(1.0, 2.0, math.nan, math.nan)})
    Coordinate(ramanujan_gap=1, weighted_gap=1, imdb=0, imsg=0)
    """
    return Coordinate(*(sum(not math.isnan(v[i]) for v in coordinates.values()) for i in range(4)))


# ---- checks ------------------------------------------------------------------------------------------------------


def _rules(rules: str | Rules) -> Rules:
    """The preset of that name, or the rules themselves."""
    if isinstance(rules, Rules):
        return rules
    if rules not in RULES:
        raise ValueError(f"rules {rules!r} are unknown: use one of {', '.join(RULES)} or a fsp.spectrum.Rules")
    return RULES[rules]


def _checked_whole(B: Tensor, rules: str | Rules | None) -> Tensor | None:
    """`B` without isolated vertices, or None if it has no edge or the whole-layer test of `rules` fails."""
    rules = rules if rules is None else _rules(rules)
    B = _without_isolated(B.to(torch.float64))
    if B.numel() == 0 or (rules is not None and not _valid(B, rules, left=rules.whole_left)):
        return None
    return B


def _check_layer(name: str, mask: Tensor, weight: Tensor | None) -> None:
    """Raise a ValueError that names the layer if mask and weight cannot be measured."""
    if weight is None:
        raise ValueError(f"layer {name!r} has a mask but no weights: pass the model or a dict that holds {name!r}")
    if mask.shape != weight.shape:
        raise ValueError(f"layer {name!r}: mask {tuple(mask.shape)} and weights {tuple(weight.shape)} differ in shape")
    if mask.ndim < 2 or mask.numel() == 0:
        raise ValueError(f"layer {name!r}: shape {tuple(mask.shape)} is not (outputs, inputs, ...) with entries")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"layer {name!r}: the mask holds values other than 0 and 1")
    if not torch.isfinite(weight[mask.bool()]).all():
        raise ValueError(f"layer {name!r}: a kept weight is nan or infinite")


def _zeroed(v: Coordinate) -> list[float]:
    """Entries with undefined ones as 0."""
    return [0.0 if math.isnan(x) else x for x in v]


def _mean(values: list[float]) -> float:
    """Arithmetic mean, nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
