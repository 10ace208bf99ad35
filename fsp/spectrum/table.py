"""One tidy row a layer: everything that the two papers say of a mask's graph.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
.. [2] Hoang, Liu, Marculescu, Wang: Revisiting pruning at initialization through the lens of Ramanujan graph.
   ICLR 2023.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from torch import Tensor, nn

from fsp.spectrum.definitions import PLAIN, RULES, Rules, Wiring, blocks, is_valid, mean, rules_of, wiring_of
from fsp.spectrum.fast import top_two
from fsp.spectrum.full_spectrum import Coordinate, coordinates


def layer_table(
    masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | nn.Module, *, rules: str | Rules = "iclr2023"
) -> pd.DataFrame:
    r"""Counts, spectra and every published quantity of each layer's graph, one row a layer.

    Parameters
    ----------
    masks : dict of parameter name to mask, as made by `fsp.pruning.prune`
        Shape (C_out, C_in, \*kernel) or (out, in), bool or 0/1.
    weights : dict of parameter name to weights, or the model itself
        As in `coordinates`: only a model tells of grouped and transposed convolutions.
    rules : {"iclr2023", "fsp2023"} or Rules

    Returns
    -------
    pandas.DataFrame
        Rows in the order of `masks`.  Of any layer with an edge (the short name of the published tables in brackets):

        * layer : parameter name
        * n_inputs, n_outputs : all vertices, isolated ones too
        * density [sparsity] : fraction of the layer's weights kept
        * edges : kept weights, E
        * n_left, n_right : inputs and outputs with an edge
        * degree_left, degree_right : mean degrees :math:`\bar d_l = E / n_{left}`, :math:`\bar d_r = E / n_{right}`
        * sigma1 [t1m], sigma2 [t2m] : largest singular values of the binary biadjacency matrix
        * valid : whole-layer test of `rules`; valid_inputs_left, valid_outputs_left : the same test with either side
          taken for the left one (D1)
        * expansion [ep] : n_right / n_left
        * degree_groups : distinct input degrees > 0, a subgraph each; nested_valid : how many of them count by `rules`
        * overlap [overlap_coefs] : mean over input channels, each of whose kernel positions has an edge, of
          :math:`|\bigcap_p N(p)| / \min_p |N(p)|`, N(p) the outputs that position p meets; 1 where a channel has one
          position

        Where the layer is valid:

        * delta_s_bound [sm_ub] : :math:`2 \sqrt{\sigma_1 - 1}`
        * delta_s [sm] : :math:`\Delta_s = 2 \sqrt{\sigma_1 - 1} - \sigma_2`
        * ramanujan_bound [rm_ub] : :math:`\sqrt{\bar d_l - 1} + \sqrt{\bar d_r - 1}`
        * ramanujan_gap [rm] : :math:`\Delta_r`, the bound less sigma2
        * gap_normalised [rm_norm] : ramanujan_gap / ramanujan_bound
        * weighted_gap : :math:`\lambda`; where the graph of non-zero weights is valid

        Means over the nested subgraphs that are valid:

        * ism [ism], ism_normalised [ism_norm] : of delta_s, and of delta_s / delta_s_bound
        * imdb [irm] : of ramanujan_gap, times the Cheeger-type factor where `rules` have one
        * imdb_normalised [irm_norm] : of ramanujan_gap / ramanujan_bound, never with that factor
        * imsg : of the weighted gap, see `fsp.spectrum.imsg`
        * expansion_max [imax_ep], expansion_mean [i_mean_ep] : of expansion
        * narc_nested, narc_nested_undirected : of the NaRC of [1]_, N being the vertices of the whole layer (D9)

        Both together:

        * imdb_stable [stable_irm_norm] : imdb_normalised where it is defined, else gap_normalised (D27)
        * norm : L2 norm of (ramanujan_gap, weighted_gap, imdb, imsg), undefined entries counted as 0

        Where the layer is valid by the rules in the column's name, whatever `rules` says (D2: edges counted once in
        the columns that end in undirected, else twice as published):

        * narc_iclr2023 [random_factor], narc_iclr2023_undirected, narc_fsp2023, narc_fsp2023_undirected

        About a layer and the next one, over the *live* channels, those of its outputs that have an edge:

        * compatibility : fraction of live channels that the next layer reads with some edge
        * copeland [copeland_score] : mean over live channels and kernel positions of (edges of the position in the
          next layer / its n_right) / (edges of the channel in this layer / its n_left); below 1 a bottleneck

        What is undefined is ``nan``; counts and tests never are.

    Raises
    ------
    ValueError
        As for `coordinates`, naming the layer.

    Examples
    --------
    >>> import torch
    >>> masks = {"hidden": torch.ones(6, 4, dtype=torch.bool), "out": torch.ones(3, 6, dtype=torch.bool)}
    >>> table = layer_table(masks, {name: torch.ones(mask.shape) for name, mask in masks.items()})
    >>> table[["layer", "edges", "sigma1", "ramanujan_gap", "imdb", "copeland"]].round(3)
        layer  edges  sigma1  ramanujan_gap   imdb  copeland
    0  hidden     24   4.899          3.968  3.968       1.0
    1     out     18   4.243          3.650  3.650       NaN

    Notes
    -----
    *The next layer* is the next of `masks`; residual branches are not followed.  compatibility and copeland are
    ``nan`` for the last layer and where the two do not fit: a layer of C outputs is followed by one of C input
    channels, or a convolution of C outputs by a linear layer whose inputs are a multiple of C (flattened channel by
    channel; the published tables leave such pairs out); never a linear layer by a convolution.

    The published code reads degrees of the last vertices from a list that ends at the last vertex with an edge, so
    that its channels are shifted where a layer's last outputs are dead; here they are not.

    References
    ----------
    [1]_, [2]_.
    """
    rules = rules_of(rules)
    found = coordinates(masks, weights, rules=rules)  # checks every layer first
    wirings = wiring_of(weights) if isinstance(weights, nn.Module) else {}
    layers = [_read(name, mask, wirings.get(name, PLAIN)) for name, mask in masks.items()]
    following = [*layers[1:], None]
    rows = [
        _row(layer, found[layer.name], rules) | _passage(layer, after)
        for layer, after in zip(layers, following, strict=True)
    ]
    return pd.DataFrame(rows)


class _Layer(NamedTuple):
    """A layer's biadjacency matrix with its isolated vertices, and what its vertices are."""

    name: str
    B: sparse.csr_array  # (inputs, outputs)
    density: float
    channels_in: int
    channels_out: int
    linear: bool


class _Graph(NamedTuple):
    """Counts and singular values of a graph without isolated vertices; `nan` if it has no edge."""

    n_left: int
    n_right: int
    edges: int
    sigma1: float
    sigma2: float

    @property
    def degree_left(self) -> float:
        return _ratio(self.edges, self.n_left)

    @property
    def degree_right(self) -> float:
        return _ratio(self.edges, self.n_right)

    @property
    def expansion(self) -> float:
        return _ratio(self.n_right, self.n_left)

    @property
    def ramanujan_bound(self) -> float:
        return math.sqrt(self.degree_left - 1) + math.sqrt(self.degree_right - 1)

    @property
    def delta_s_bound(self) -> float:
        # sigma1 >= sqrt(degree_left degree_right) >= 1: below 1 it is by rounding, and D23 has no case
        return 0.0 if self.sigma1 < 1 else 2 * math.sqrt(self.sigma1 - 1)

    @property
    def delta_s(self) -> float:
        return self.delta_s_bound - self.sigma2

    def is_valid(self, rules: Rules, left: str) -> bool:
        return is_valid(self.edges, self.n_left, self.n_right, rules, left=left)


NO_GRAPH = _Graph(0, 0, 0, math.nan, math.nan)  # every quantity of it is nan


def _read(name: str, mask: Tensor, wiring: Wiring) -> _Layer:
    """The graph of a layer's mask."""
    kept = blocks(mask.detach().cpu().bool(), wiring)
    groups, outputs, inputs = kept.shape
    block, output, input_ = kept.nonzero().numpy().T
    B = sparse.csr_array(
        (np.ones(len(block), bool), (block * inputs + input_, block * outputs + output)),
        shape=(groups * inputs, groups * outputs),
    )
    channels = mask.shape[0], mask.shape[1] * wiring.groups
    channels_in, channels_out = channels if wiring.transposed else channels[::-1]
    return _Layer(name, B, B.nnz / mask.numel(), channels_in, channels_out, mask.ndim == 2)


def _without_isolated(B: sparse.csr_array) -> sparse.csr_array:
    """The graph with the vertices that have an edge."""
    touched = np.bincount(B.indices, minlength=B.shape[1]) > 0
    return B[np.diff(B.indptr) > 0][:, touched]


def _nested(B: sparse.csr_array, degrees: np.ndarray, rules: Rules) -> Iterator[sparse.csr_array]:
    """Valid subgraphs of the left vertices of one degree."""
    for degree in np.unique(degrees[degrees > 0]):
        alike = degrees == degree
        if np.count_nonzero(alike) >= rules.group_size and degree >= rules.left_degree:
            K = _without_isolated(B[alike])
            if is_valid(K.nnz, *K.shape, rules):
                yield K


def _row(layer: _Layer, v: Coordinate, rules: Rules) -> dict[str, object]:
    """What is to be said of one layer by itself."""
    n_inputs, n_outputs = layer.B.shape
    degrees = np.diff(layer.B.indptr)
    graphs = [_without_isolated(layer.B), *_nested(layer.B, degrees, rules)]
    spectra = top_two([K if K.nnz else None for K in graphs])
    whole, *nested = (
        NO_GRAPH if pair is None else _Graph(*K.shape, K.nnz, *pair) for K, pair in zip(graphs, spectra, strict=True)
    )
    valid = {side: whole.is_valid(rules, side) for side in ("inputs", "outputs")}
    bounds = whole if valid[rules.whole_left] else NO_GRAPH
    gap_normalised = _ratio(v.ramanujan_gap, bounds.ramanujan_bound)
    imdb_normalised = mean([_ratio(K.ramanujan_bound - K.sigma2, K.ramanujan_bound) for K in nested])
    vertices = whole.n_left + whole.n_right or math.nan
    iclr, fsp = (whole if whole.is_valid(r, r.whole_left) else NO_GRAPH for r in (RULES["iclr2023"], RULES["fsp2023"]))
    row = {
        "layer": layer.name,
        "n_inputs": n_inputs,
        "n_outputs": n_outputs,
        "density": layer.density,
        **whole._asdict(),
        "degree_left": whole.degree_left,
        "degree_right": whole.degree_right,
        "expansion": whole.expansion,
        "valid": valid[rules.whole_left],
        "valid_inputs_left": valid["inputs"],
        "valid_outputs_left": valid["outputs"],
        "delta_s": bounds.delta_s,
        "delta_s_bound": bounds.delta_s_bound,
        "ramanujan_gap": v.ramanujan_gap,
        "ramanujan_bound": bounds.ramanujan_bound,
        "gap_normalised": gap_normalised,
        "degree_groups": len(np.unique(degrees[degrees > 0])),
        "nested_valid": len(nested),
        "ism": mean([K.delta_s for K in nested]),
        "ism_normalised": mean([_ratio(K.delta_s, K.delta_s_bound) for K in nested]),
        "imdb": v.imdb,
        "imdb_normalised": imdb_normalised,
        "imdb_stable": gap_normalised if math.isnan(imdb_normalised) else imdb_normalised,
        "expansion_max": max((K.expansion for K in nested), default=math.nan),
        "expansion_mean": mean([K.expansion for K in nested]),
    }
    for times, ending in ((2, ""), (1, "_undirected")):
        row[f"narc_iclr2023{ending}"] = _narc_iclr(iclr, times, n_inputs, n_outputs)
        # outputs are on the left of the whole layer (D1), inputs on that of its subgraphs
        row[f"narc_fsp2023{ending}"] = _narc_fsp(fsp, times, fsp.n_left, vertices)
        row[f"narc_nested{ending}"] = mean([_narc_fsp(K, times, K.n_right, vertices) for K in nested])
    return row | {
        "weighted_gap": v.weighted_gap,
        "imsg": v.imsg,
        "norm": v.norm,
        "overlap": _overlap(layer),
    }


def _narc_iclr(graph: _Graph, times: int, n_inputs: int, n_outputs: int) -> float:
    """NaRC of [2]_ with each edge counted `times`, see `fsp.spectrum.narc`."""
    spread = (graph.sigma2**2 / 4 + 1) * math.sqrt(graph.n_left * graph.n_right)
    return (spread - abs(times * graph.edges - graph.edges * graph.n_right / n_outputs)) / (n_inputs * n_outputs)


def _narc_fsp(graph: _Graph, times: int, n_right: int, vertices: int) -> float:
    """NaRC of [1]_ with each edge counted `times`, `n_right` vertices on the right side, `vertices` in the layer."""
    spread = graph.sigma2 * math.sqrt(graph.n_left * graph.n_right)
    return (spread - abs(times * graph.edges - graph.edges * n_right / vertices)) / vertices


def _overlap(layer: _Layer) -> float:
    """Mean overlap of the outputs that an input channel's kernel positions meet."""
    B, channels = layer.B, layer.channels_in
    positions = B.shape[0] // channels
    least = np.diff(B.indptr).reshape(channels, positions).min(1)
    if not least.any():
        return math.nan
    left, right = B.nonzero()
    met = sparse.csr_array((np.ones(len(left)), (left // positions, right)), shape=(channels, B.shape[1])).tocoo()
    common = np.bincount(met.row[met.data == positions], minlength=channels)  # a pair's entries have been summed
    return float((common[least > 0] / least[least > 0]).mean())


def _passage(layer: _Layer, following: _Layer | None) -> dict[str, float]:
    """What a layer's live channels meet in the next layer."""
    undefined = {"compatibility": math.nan, "copeland": math.nan}
    if following is None or not _fits(layer, following):
        return undefined
    incoming = np.bincount(layer.B.indices, minlength=layer.channels_out)
    live = incoming > 0
    if not live.any():
        return undefined
    outgoing = np.diff(following.B.indptr).reshape(layer.channels_out, -1)[live]  # (live channels, positions)
    compatibility = float(outgoing.any(1).mean())
    n_left = np.count_nonzero(np.diff(layer.B.indptr))
    n_right = len(np.unique(following.B.indices))
    if n_right == 0:
        return undefined | {"compatibility": compatibility}
    throughput = (outgoing / n_right) / (incoming[live, None] / n_left)
    return {"compatibility": compatibility, "copeland": float(throughput.mean())}


def _fits(layer: _Layer, following: _Layer) -> bool:
    """Whether the inputs of one layer can be the outputs of another."""
    if layer.linear == following.linear:
        return following.channels_in == layer.channels_out
    return following.linear and following.channels_in % layer.channels_out == 0


def _ratio(part: float, whole: float) -> float:
    """Quotient, nan where there is nothing to divide by."""
    return part / whole if whole else math.nan
