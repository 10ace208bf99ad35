"""The bipartite graph of a mask: biadjacency, singular values, validity, nested subgraphs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


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


def without_isolated(B: Tensor) -> Tensor:
    """`B` without zero rows and zero columns."""
    edges = B != 0
    return B[edges.any(1)][:, edges.any(0)]


def is_valid(B: Tensor, rules: Rules, *, left: str = "inputs") -> bool:
    """Whether the graph of non-zero entries of `B` (no isolated vertices) is dense enough for `rules`."""
    edges = int(torch.count_nonzero(B))
    n_left, n_right = B.shape if left == "inputs" else B.shape[::-1]
    # mean degrees compared as edge counts: exact where degree thresholds are whole numbers
    enough_right = edges > rules.right_degree * n_right if rules.right_strict else edges >= rules.right_degree * n_right
    return edges > 0 and edges >= rules.left_degree * n_left and enough_right


def ramanujan_bound(B: Tensor) -> float:
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
        K = without_isolated(B[rows])
        if is_valid(K, rules):
            n_left, n_right = K.shape
            yield rows, K, max(n_left, n_right) / (n_left + n_right - 1) if rules.cheeger else 1.0


def whole_graph(B: Tensor, rules: str | Rules | None) -> Tensor | None:
    """`B` without isolated vertices, or None if it has no edge or the whole-layer test of `rules` fails."""
    rules = rules if rules is None else rules_of(rules)
    B = without_isolated(B.to(torch.float64))
    if B.numel() == 0 or (rules is not None and not is_valid(B, rules, left=rules.whole_left)):
        return None
    return B
