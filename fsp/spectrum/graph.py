"""The bipartite graph of a mask: biadjacency, singular values, validity, nested subgraphs."""

import math
from collections.abc import Iterator
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


def rules_of(rules: str | Rules) -> Rules:
    """The preset of that name, or the rules themselves."""
    if isinstance(rules, Rules):
        return rules
    if rules not in RULES:
        raise ValueError(f"rules {rules!r} are unknown: use one of {', '.join(RULES)} or a fsp.spectrum.Rules")
    return RULES[rules]


class Wiring(NamedTuple):
    """How the entries of a layer's weight connect inputs and outputs.

    Attributes
    ----------
    groups : int
        Of a grouped convolution; a depthwise one has as many as channels.
    transposed : bool
        Whether inputs come first, as in the weight of a transposed convolution.
    """

    groups: int = 1
    transposed: bool = False


PLAIN = Wiring()


def wiring_of(model: nn.Module) -> dict[str, Wiring]:
    """Wiring of every convolution's weight in a model, by parameter name; anything else has the default.

    Weights under `torch.nn.utils.prune` (``weight_orig``) and under a parametrisation are found too.
    """
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            wiring = Wiring(module.groups, module.transposed)
            for name in ("weight", "weight_orig", "parametrizations.weight.original"):
                found[f"{prefix}.{name}" if prefix else name] = wiring
    return found


def blocks(tensor: Tensor, wiring: Wiring = PLAIN) -> Tensor:
    """A layer's tensor as one matrix a group, outputs by unrolled inputs.

    Parameters
    ----------
    tensor : Tensor, shape (C_out, C_in / groups, *kernel), or (C_in, C_out / groups, *kernel) if transposed
    wiring : Wiring

    Returns
    -------
    Tensor, shape (groups, C_out / groups, C_in / groups * prod(kernel))

    Raises
    ------
    ValueError
        For a tensor of fewer than two dimensions or without entries, or whose first dimension the groups do not divide.
    """
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(
            f"a layer's tensor has shape (outputs, inputs, ...) and entries, this has {tuple(tensor.shape)}"
        )
    groups, transposed = wiring
    if tensor.shape[0] % groups:
        raise ValueError(f"{groups} groups do not divide the first dimension of {tuple(tensor.shape)}")
    if not transposed:
        return tensor.reshape(groups, tensor.shape[0] // groups, -1)
    split = tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], -1)  # (groups, in, out, kernel)
    return split.transpose(1, 2).flatten(2)


def biadjacency(tensor: Tensor, wiring: Wiring = PLAIN) -> Tensor:
    """Biadjacency matrix of a layer: rows are unrolled inputs, columns are outputs.

    Parameters
    ----------
    tensor : Tensor, shape (C_out, C_in, *kernel) or (out, in)
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
        As for `blocks`.

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


def dense_enough(edges: int, n_left: int, n_right: int, rules: Rules, *, left: str = "inputs") -> bool:
    """Whether a graph without isolated vertices reaches the mean degrees that `rules` ask of a valid graph.

    Parameters
    ----------
    edges, n_left, n_right : int
    rules : Rules
    left : {"inputs", "outputs"}
        Which side the threshold on the left degree is for.

    Returns
    -------
    bool
    """
    if left == "outputs":
        n_left, n_right = n_right, n_left
    # mean degrees compared as edge counts: exact where degree thresholds are whole numbers
    enough = edges > rules.right_degree * n_right if rules.right_strict else edges >= rules.right_degree * n_right
    return edges > 0 and edges >= rules.left_degree * n_left and enough


def is_valid(B: Tensor, rules: Rules, *, left: str = "inputs") -> bool:
    """Whether the graph of non-zero entries of `B` (no isolated vertices) is valid by `rules`."""
    return dense_enough(int(torch.count_nonzero(B)), *B.shape, rules, left=left)


def cheeger_factor(n_left: int, n_right: int) -> float:
    """Cheeger-type factor max(n_left, n_right) / (n_left + n_right - 1) of a nested subgraph (D25)."""
    return max(n_left, n_right) / (n_left + n_right - 1)


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
            yield rows, K, cheeger_factor(*K.shape) if rules.cheeger else 1.0


def whole_graph(B: Tensor, rules: str | Rules | None) -> Tensor | None:
    """`B` without isolated vertices, or None if it has no edge or the whole-layer test of `rules` fails."""
    rules = rules if rules is None else rules_of(rules)
    B = without_isolated(B.to(torch.float64))
    if B.numel() == 0 or (rules is not None and not is_valid(B, rules, left=rules.whole_left)):
        return None
    return B
