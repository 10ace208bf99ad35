"""Bipartite graphs whose spectrum is known exactly, and random layers with what makes spectra awkward.

The first functions return a `Graph`: the biadjacency matrix (rows = left = inputs), all its singular values,
descending, as many as the smaller side has vertices, and the Ramanujan gap
sqrt(mean left degree - 1) + sqrt(mean right degree - 1) - sigma2, isolated vertices not counted.
Everything is worked out by hand; nothing here decomposes a matrix.
"""

from math import cos, nan, pi, sqrt
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st


class Graph(NamedTuple):
    """A biadjacency matrix (float64), its singular values and its Ramanujan gap."""

    B: torch.Tensor
    singular_values: torch.Tensor
    gap: float


def _graph(B: torch.Tensor, singular_values: list[float], gap: float) -> Graph:
    """Put together what a function below worked out; the values are sorted here."""
    values = torch.tensor(sorted(singular_values, reverse=True), dtype=torch.float64)
    assert len(values) == min(B.shape)
    return Graph(B.to(torch.float64), values, gap)


def complete(m: int, n: int) -> Graph:
    """K(m, n): rank one, so sigma = sqrt(mn), 0, 0, ..."""
    return _graph(torch.ones(m, n), [sqrt(m * n)] + [0.0] * (min(m, n) - 1), sqrt(n - 1) + sqrt(m - 1))


def star(n: int) -> Graph:
    """One left vertex with n leaves, K(1, n); sigma2 = 0 as there is no second singular value."""
    return complete(1, n)


def one_edge() -> Graph:
    """K(1, 1), the smallest graph with a spectrum."""
    return complete(1, 1)


def empty(m: int, n: int) -> Graph:
    """Vertices without edges: sigma = 0, no gap."""
    return _graph(torch.zeros(m, n), [0.0] * min(m, n), nan)


def even_cycle(n: int) -> Graph:
    """C(2n): input i meets outputs i and i+1 (mod n).

    B = I + P with P the cyclic shift, normal with eigenvalues 1 + exp(2 pi i k / n), of modulus 2 |cos(pi k / n)|.
    Among k = 1 .. n-1 the largest is k = 1.
    """
    B = torch.eye(n) + torch.eye(n).roll(1, dims=1)
    return _graph(B, [2 * abs(cos(pi * k / n)) for k in range(n)], 2 - 2 * cos(pi / n))


def heawood() -> Graph:
    """Points and lines of the Fano plane: B B^T = 2 I + J, so sigma^2 = 9, 2 (six times)."""
    B = torch.zeros(7, 7)
    for line in range(7):
        for point in (0, 1, 3):  # a perfect difference set modulo 7
            B[(line + point) % 7, line] = 1
    return _graph(B, [3.0] + [sqrt(2)] * 6, 2 * sqrt(2) - sqrt(2))


def matching(n: int) -> Graph:
    """n disjoint edges (n >= 2): sigma = 1 throughout and all degrees 1."""
    return _graph(torch.eye(n), [1.0] * n, -1.0)


def complete_minus_matching(m: int, n: int) -> Graph:
    """K(m, n) without the edges (i, i), 2 <= m <= n.

    Two rows share n - 2 columns, so B B^T = (n - 2) J + I: sigma^2 = m (n - 2) + 1, then 1 (m - 1 times).
    For m < n the outputs have degree m - 1 or m, on average m (n - 1) / n.
    """
    B = torch.ones(m, n)
    B[range(m), range(m)] = 0
    gap = sqrt(n - 2) + sqrt(m * (n - 1) / n - 1) - 1
    return _graph(B, [sqrt(m * (n - 2) + 1)] + [1.0] * (m - 1), gap)


def copies(graph: Graph, times: int) -> Graph:
    """Disjoint copies (times >= 2): every singular value repeats, mean degrees stay, so sigma2 becomes sigma1.

    Only for graphs without isolated vertices and whose smaller side stays the same in every copy.
    """
    values = graph.singular_values.tolist()
    sigma1, sigma2 = values[0], values[1] if len(values) > 1 else 0.0
    return _graph(torch.block_diag(*[graph.B] * times), values * times, graph.gap + sigma2 - sigma1)


def with_isolated(graph: Graph, left: int, right: int) -> Graph:
    """The same graph among vertices without edges: `left` more inputs and `right` more outputs, first and last."""
    m, n = graph.B.shape
    B = torch.zeros(m + left, n + right, dtype=torch.float64)
    B[left // 2 : left // 2 + m, right // 2 : right // 2 + n] = graph.B
    extra = min(m + left, n + right) - min(m, n)
    return _graph(B, graph.singular_values.tolist() + [0.0] * extra, graph.gap)


class Nested(NamedTuple):
    """A graph made of groups of left vertices, with the published means over its nested subgraphs.

    `imdb` and `imsg` (for weights that are 1 on every edge) are keyed by the name of the rules.
    """

    B: torch.Tensor
    imdb: dict[str, float]
    imsg: dict[str, float]


def several_degrees() -> Nested:
    """Eight groups of inputs, of eight degrees, that share outputs; each group alone is a graph from above.

    ====== ======================== ======= ======================= ==================================
    degree graph of the group       outputs counts under            because
    ====== ======================== ======= ======================= ==================================
    0      2 inputs without edges           neither                 degree 0
    2      K(3, 2)                  0-1     neither                 left degree < 3
    3      Heawood, 7 + 7           0-6     both
    4      K(5, 5) - matching       2-6     both
    5      K(2, 5)                  0-4     fsp2023                 2 inputs
    6      K(1, 6)                  0-5     neither                 1 input
    7      two copies of K(2, 7)    7-20    fsp2023                 right degree 2
    8      two disjoint K(1, 8)     5-20    neither                 right degree 1
    ====== ======================== ======= ======================= ==================================

    The Cheeger-type factor is max(inputs, outputs) / (inputs + outputs - 1), outputs the group touches.
    """
    placed = [
        (empty(2, 21).B, 0),
        (complete(3, 2).B, 0),
        (heawood().B, 0),
        (complete_minus_matching(5, 5).B, 2),
        (complete(2, 5).B, 0),
        (complete(1, 6).B, 0),
        (copies(complete(2, 7), 2).B, 7),
        (copies(star(8), 2).B, 5),
    ]
    B = torch.cat([torch.nn.functional.pad(part, (at, 21 - at - part.shape[1])) for part, at in placed])
    gap3, gap4, gap5, gap7 = sqrt(2), 2 * sqrt(3) - 1, 3.0, sqrt(6) + 1 - sqrt(14)
    factor3, factor4, factor5, factor7 = 7 / 13, 5 / 9, 5 / 6, 14 / 17
    weighted3, weighted4, weighted5, weighted7 = 3 - sqrt(2), 4 - 1, sqrt(10), 0.0
    return Nested(
        B,
        imdb={
            "iclr2023": (gap3 + gap4) / 2,
            "fsp2023": (factor3 * gap3 + factor4 * gap4 + factor5 * gap5 + factor7 * gap7) / 4,
        },
        imsg={
            "iclr2023": (weighted3 + weighted4) / 2,
            "fsp2023": (factor3 * weighted3 + factor4 * weighted4 + factor5 * weighted5 + factor7 * weighted7) / 4,
        },
    )


@st.composite
def layers(draw):
    """A biadjacency matrix and weights, numpy float64: dead vertices, equal rows, rank one, zeros among the weights."""
    shape = draw(st.integers(1, 40) | st.just(1)), draw(st.integers(1, 20))
    density = draw(st.sampled_from([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B = random.random(shape) < density
    twists = draw(st.sets(st.sampled_from(["dead rows", "dead columns", "duplicates", "block", "disconnected"])))
    if "block" in twists:  # rank one: some inputs all meet the same outputs and nothing else
        rows, columns = random.random(shape[0]) < 0.5, random.random(shape[1]) < 0.5
        B[rows] = columns
    if "duplicates" in twists:
        B = B[random.integers(0, 1 + shape[0] // 3, shape[0])]
    if "disconnected" in twists:
        B[: shape[0] // 2, shape[1] // 2 :] = B[shape[0] // 2 :, : shape[1] // 2] = False
    if "dead rows" in twists:
        B[random.random(shape[0]) < 0.3] = False
    if "dead columns" in twists:
        B[:, random.random(shape[1]) < 0.3] = False
    W = {
        "normal": random.normal(size=shape),
        "equal": np.full(shape, -0.3),
        "rank one": np.outer(random.random(shape[0]), random.random(shape[1])),
        "some zero": random.normal(size=shape) * (random.random(shape) < 0.9),
        "one zero": random.normal(size=shape) * (np.arange(B.size).reshape(shape) != random.integers(B.size)),
        "many zero": random.normal(size=shape) * (random.random(shape) < 0.5),
        "all zero": np.zeros(shape),
    }
    return B.astype(np.float64), W[draw(st.sampled_from(list(W)))]
