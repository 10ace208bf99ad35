"""The graphs and the quantities of both papers, each as its definition reads.

First the graph of a layer and its singular values; then what depends on counts of edges and vertices alone, validity,
bounds and NaRC, written once for this file, for the table and for the fast ways to the same numbers; then the
quantities.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
.. [2] Hoang, Liu, Marculescu, Wang: Revisiting pruning at initialization through the lens of Ramanujan graph.
   ICLR 2023.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fsp.checks import check_count
from fsp.masks import PLAIN, Wiring, blocks


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


def rules_of(rules: str | Rules) -> Rules:
    """The preset of that name, or the rules themselves."""
    if isinstance(rules, Rules):
        return rules
    if rules not in RULES:
        raise ValueError(f"rules {rules!r} are unknown: use one of {', '.join(RULES)} or a fsp.spectrum.Rules")
    return RULES[rules]


def biadjacency(tensor: Tensor, wiring: Wiring = PLAIN) -> Tensor:
    """Biadjacency matrix of a layer: rows are unrolled inputs, columns are outputs.

    Parameters
    ----------
    tensor : Tensor, shape ``(C_out, C_in, *kernel)`` or (out, in)
        Mask (bool or 0/1) or weights.
    wiring : Wiring, optional
        Of grouped and transposed convolutions: the groups are separate blocks of the matrix.

    Returns
    -------
    Tensor, shape (C_in * prod(kernel), C_out), float64
        Rows run over input channels slowest, kernel positions fastest.  Isolated vertices (zero rows and columns)
        are kept.

    Raises
    ------
    ValueError
        As for `fsp.masks.blocks`.

    Examples
    --------
    >>> biadjacency(torch.tensor([[True, False, True]])).T
    tensor([[1., 0., 1.]], dtype=torch.float64)

    A depthwise convolution of two channels with kernels of two weights:

    >>> biadjacency(torch.tensor([[[1, 1]], [[1, 0]]]), Wiring(groups=2)).T
    tensor([[1., 1., 0., 0.],
            [0., 0., 1., 0.]], dtype=torch.float64)
    """
    return torch.block_diag(*(block.T for block in blocks(tensor.detach().to(torch.float64), wiring)))


def _check_matrix(B: Tensor) -> None:
    """Raise a ValueError unless this is a matrix."""
    if B.ndim != 2:
        raise ValueError(
            f"expected a matrix of inputs and outputs, found shape {tuple(B.shape)}: "
            "fsp.spectrum.biadjacency makes one of a layer's tensor"
        )


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

    Raises
    ------
    ValueError
        If `B` is no matrix or holds complex numbers, nan or inf, or for a `k` below 1.

    Examples
    --------
    K(4, 4) has the singular values 4, 0, 0, 0:

    >>> singular_values(torch.ones(4, 4, dtype=torch.float64)).round(decimals=9)
    tensor([4., 0.], dtype=torch.float64)
    """
    _check_matrix(B)
    check_count("k", k, 1)
    if B.is_complex() or not B.isfinite().all():
        raise ValueError("B holds complex numbers, nan or inf: expected real ones; check the weights")
    B = B.to(torch.float64)
    values = B.new_zeros(k)
    if B.numel() == 0:
        return values
    gram = B @ B.T if B.shape[0] <= B.shape[1] else B.T @ B
    squares = torch.linalg.eigvalsh(gram).flip(0)[:k].clamp(min=0) if gram.isfinite().all() else None
    if squares is None or squares[-1] < 1e-6 * squares[0]:
        found = torch.linalg.svdvals(B)[:k]
    else:
        found = squares.sqrt()
    values[: len(found)] = found
    return values


# ---- functions of counts -----------------------------------------------------------------------------------------


def counts(B: Tensor) -> tuple[int, int, int]:
    """Edges, left and right vertices of a graph without isolated vertices."""
    return int(torch.count_nonzero(B)), *B.shape


def is_valid(edges, n_left, n_right, rules: Rules, *, left: str = "inputs"):
    """Whether a graph without isolated vertices reaches the mean degrees that `rules` ask of a valid graph.

    Parameters
    ----------
    edges, n_left, n_right : int, or Tensors of counts
    rules : Rules
    left : {"inputs", "outputs"}
        Which side the threshold on the left degree is for.

    Returns
    -------
    bool, or Tensor of bool
    """
    if left == "outputs":
        n_left, n_right = n_right, n_left
    # mean degrees compared as edge counts: exact where degree thresholds are whole numbers
    enough = edges > rules.right_degree * n_right if rules.right_strict else edges >= rules.right_degree * n_right
    return (edges > 0) & (edges >= rules.left_degree * n_left) & enough


def is_nested(edges, n_left, n_right, rules: Rules):
    """Whether left vertices of one degree, with all they touch, are a nested subgraph: enough of them, and valid.

    Parameters and result as for `is_valid`.
    """
    return (n_left >= rules.group_size) & is_valid(edges, n_left, n_right, rules)


def ramanujan_bound(edges, n_left, n_right, *, sqrt: Callable = math.sqrt):
    r"""Ramanujan bound :math:`\sqrt{\bar d_l - 1} + \sqrt{\bar d_r - 1}` of a graph without isolated vertices.

    Parameters
    ----------
    edges, n_left, n_right : int > 0, or Tensors of float64
        Mean degrees are edges / n_left and edges / n_right.
    sqrt : callable
        `torch.sqrt` for tensors.

    Returns
    -------
    float, or Tensor of float64
        Not negative; of tensors ``nan`` where there are no edges.
    """
    return sqrt(edges / n_left - 1) + sqrt(edges / n_right - 1)


def subgraph_factor(n_left, n_right, rules: Rules, *, maximum: Callable = max):
    """Cheeger-type factor max(n_left, n_right) / (n_left + n_right - 1) of a nested subgraph, or 1 by `rules` (D25).

    `maximum` is `torch.maximum` for tensors of float64.
    """
    return maximum(n_left, n_right) / (n_left + n_right - 1) if rules.cheeger else 1.0


def whole_narc(
    edges: int, n_left: int, n_right: int, sigma2: float, shape: tuple[int, int], rules: Rules, times: int
) -> float:
    """NaRC of a whole layer of `shape` (inputs, outputs), isolated vertices too, each edge counted `times`: see `narc`.

    The other numbers are of the graph without isolated vertices.
    """
    if not rules.cheeger:
        spread = (sigma2**2 / 4 + 1) * math.sqrt(n_left * n_right)
        return (spread - abs(times * edges - edges * n_right / shape[1])) / (shape[0] * shape[1])
    if rules.whole_left == "outputs":
        n_left, n_right = n_right, n_left
    return narc_2023b(edges, n_left, n_right, sigma2, n_left + n_right, times)


def narc_2023b(edges: int, n_left: int, n_right: int, sigma2: float, vertices: int, times: int) -> float:
    """NaRC of [1]_, formula (b) of `narc`, each edge counted `times`, `vertices` the N of the formula."""
    spread = sigma2 * math.sqrt(n_left * n_right)
    return (spread - abs(times * edges - edges * n_right / vertices)) / vertices


def mean(values: list[float]) -> float:
    """Arithmetic mean, nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


# ---- subgraphs ---------------------------------------------------------------------------------------------------


def without_isolated(B: Tensor) -> Tensor:
    """`B` without zero rows and zero columns."""
    _check_matrix(B)
    edges = B != 0
    return B[edges.any(1)][:, edges.any(0)]


def whole_graph(B: Tensor, rules: str | Rules | None) -> Tensor | None:
    """`B` without isolated vertices, or None if it has no edge or the whole-layer test of `rules` fails."""
    K = without_isolated(B.to(torch.float64))
    if rules is None:
        return K if K.numel() else None
    rules = rules_of(rules)
    return K if is_valid(*counts(K), rules, left=rules.whole_left) else None


def nested_subgraphs(B: Tensor, rules: Rules) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Valid d-left-regular subgraphs: left vertices of one degree with all the outputs they touch.

    Yields
    ------
    rows : Tensor of int64
        The left vertices, in order.
    K : Tensor, shape (len(rows), touched outputs)
    factor : float
        Of `subgraph_factor`.
    """
    _check_matrix(B)
    degrees = torch.count_nonzero(B, dim=1)
    for degree in degrees[degrees > 0].unique():
        rows = (degrees == degree).nonzero()[:, 0]
        K = without_isolated(B[rows])
        if is_nested(*counts(K), rules):
            yield rows, K, subgraph_factor(*K.shape, rules)


# ---- quantities --------------------------------------------------------------------------------------------------


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
    K = whole_graph(B, rules)
    if K is None:
        return math.nan
    return ramanujan_bound(*counts(K)) - singular_values(K)[1].item()


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
    W = whole_graph(W, rules)
    if W is None:
        return math.nan
    sigma = singular_values(W.abs())
    return (sigma[0] - sigma[1]).item()


def imdb(B: Tensor, *, rules: str | Rules = "fsp2023") -> float:
    r"""Iterative mean difference of bound: mean Ramanujan gap of the nested d-left-regular subgraphs.

    .. math:: \mathrm{IMDB} = \frac1{|\mathcal K|} \sum_{K \in \mathcal K} c_K\, \Delta_r(K)

    over the valid subgraphs :math:`\mathcal K`, each counted once whatever its size (see `nested_subgraphs`), with the
    Cheeger factor :math:`c_K` of `subgraph_factor`, which is 1 for "iclr2023".

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
    return mean([c * ramanujan_gap(K) for _, K, c in nested_subgraphs(B, rules_of(rules))])


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

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    [1]_, fourth coordinate.
    """
    rules = rules_of(rules)
    if W.shape != B.shape:
        raise ValueError(f"B has shape {tuple(B.shape)}, W {tuple(W.shape)}: every entry of the mask has a weight")
    W = W.abs().to(torch.float64).where(B != 0, 0)
    gaps = []
    for rows, _, c in nested_subgraphs(B, rules):
        W_K = without_isolated(W[rows])
        if is_valid(*counts(W_K), rules):
            gaps.append(c * weighted_gap(W_K))
        elif rules.zero_weights == "published":
            return math.nan
    return mean(gaps)


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
    rules = rules_of(rules)
    K = whole_graph(B, rules)
    if K is None:
        return math.nan
    sigma2 = singular_values(K)[1].item()
    return whole_narc(*counts(K), sigma2, B.shape, rules, 2 if edge_count == "directed" else 1)
