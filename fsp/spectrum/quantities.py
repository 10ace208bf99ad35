"""Quantities of one graph, each as its definition reads.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
.. [2] Hoang, Liu, Marculescu, Wang: Revisiting pruning at initialization through the lens of Ramanujan graph.
   ICLR 2023.
"""

import math

import torch
from torch import Tensor

from fsp.spectrum.graph import (
    Rules,
    is_valid,
    nested_subgraphs,
    ramanujan_bound,
    rules_of,
    singular_values,
    whole_graph,
    without_isolated,
)


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
    B = whole_graph(B, rules)
    if B is None:
        return math.nan
    return ramanujan_bound(B) - singular_values(B)[1].item()


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
    return mean(
        [c * (ramanujan_bound(K) - singular_values(K)[1].item()) for _, K, c in nested_subgraphs(B, rules_of(rules))]
    )


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
    rules = rules_of(rules)
    W = W.abs().to(torch.float64).where(B != 0, 0)
    gaps = []
    for rows, _, c in nested_subgraphs(B, rules):
        W_K = without_isolated(W[rows])
        if is_valid(W_K, rules):
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
    n_in, c_out = B.shape
    B = whole_graph(B, rules)
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


def mean(values: list[float]) -> float:
    """Arithmetic mean, nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
