"""One tidy row a layer: everything that the two papers say of a mask's graph.

References
----------
.. [1] Hoang, Kundu, Liu, Wang: Don't just prune by magnitude! Your mask topology is a secret weapon. NeurIPS 2023.
.. [2] Hoang, Liu, Marculescu, Wang: Revisiting pruning at initialization through the lens of Ramanujan graph.
   ICLR 2023.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, nn

from fsp.checks import plain_settings
from fsp.masks import PLAIN, wiring_of
from fsp.spectrum.definitions import (
    RULES,
    Rules,
    blocks,
    is_nested,
    is_valid,
    mean,
    narc_2023b,
    ramanujan_bound,
    rules_of,
    whole_narc,
)
from fsp.spectrum.fast import touching
from fsp.spectrum.full_spectrum import Coordinate, coordinates
from fsp.spectrum.two_values import top_two

COLUMNS = """layer n_inputs n_outputs density n_left n_right edges sigma1 sigma2 degree_left degree_right expansion
valid valid_inputs_left valid_outputs_left delta_s delta_s_bound ramanujan_gap ramanujan_bound gap_normalised
degree_groups nested_valid ism ism_normalised imdb imdb_normalised imdb_stable expansion_max expansion_mean
narc_iclr2023 narc_fsp2023 narc_nested narc_iclr2023_undirected narc_fsp2023_undirected narc_nested_undirected
weighted_gap imsg norm overlap compatibility copeland"""


@plain_settings()
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
    wirings = wiring_of(weights)
    layers = []
    for name, mask in masks.items():
        B = torch.block_diag(*blocks(mask.detach().cpu().bool(), wirings.get(name, PLAIN)).mT)
        layers.append(_Layer(name, mask, sparse.csr_array(B.numpy())))
    rows = [
        _row(layer, found[layer.name], rules) | _passage(layer, following)
        for layer, following in zip(layers, [*layers[1:], None], strict=True)
    ]
    return pd.DataFrame(rows, columns=COLUMNS.split())


class _Layer(NamedTuple):
    """A layer's mask and its biadjacency matrix, bool, isolated vertices too."""

    name: str
    mask: Tensor
    B: sparse.csr_array

    @property
    def channels(self) -> int:
        """Input channels: left vertices but for the positions of the kernel."""
        return self.B.shape[0] // self.mask[0, 0].numel()


class _Graph(NamedTuple):
    """Counts and singular values of a graph without isolated vertices."""

    edges: int
    n_left: int
    n_right: int
    sigma1: float
    sigma2: float

    def bounds(self) -> dict[str, float]:
        """Both bounds and how far the second singular value lies below them."""
        bound = ramanujan_bound(self.edges, self.n_left, self.n_right)
        # sigma1 >= sqrt(degree_left degree_right) >= 1: below 1 it is by rounding, and D23 has no case
        bound_s = 2 * math.sqrt(max(self.sigma1 - 1, 0))
        return {
            "ramanujan_bound": bound,
            "gap_normalised": _ratio(bound - self.sigma2, bound),
            "delta_s_bound": bound_s,
            "delta_s": bound_s - self.sigma2,
        }


def _row(layer: _Layer, v: Coordinate, rules: Rules) -> dict[str, object]:
    """What is to be said of one layer by itself; what is undefined is nan or left out."""
    B = layer.B
    degrees = B.count_nonzero(axis=1)
    alike = [degrees == degree for degree in np.unique(degrees[degrees > 0])]
    every, *groups = [touching(B[inputs]) for inputs in (degrees > 0, *alike)]
    parts = [every, *(K for K in groups if is_nested(K.nnz, *K.shape, rules))]
    whole, *nested = [_Graph(K.nnz, *K.shape, *sigma) for K, sigma in zip(parts, top_two(parts), strict=True)]
    number = whole.edges, whole.n_left, whole.n_right
    valid = {side: is_valid(*number, rules, left=side) for side in ("inputs", "outputs")}
    bounds = [K.bounds() for K in nested]
    expansions = [K.n_right / K.n_left for K in nested]
    row = {
        "layer": layer.name,
        "n_inputs": B.shape[0],
        "n_outputs": B.shape[1],
        "density": whole.edges / layer.mask.numel(),
        **whole._asdict(),
        "degree_left": _ratio(whole.edges, whole.n_left),
        "degree_right": _ratio(whole.edges, whole.n_right),
        "expansion": _ratio(whole.n_right, whole.n_left),
        "valid": valid[rules.whole_left],
        "valid_inputs_left": valid["inputs"],
        "valid_outputs_left": valid["outputs"],
        "overlap": _overlap(layer),
        **v._asdict(),
        "norm": v.norm,
        "degree_groups": len(groups),
        "nested_valid": len(nested),
        "ism": mean([K["delta_s"] for K in bounds]),
        "ism_normalised": mean([_ratio(K["delta_s"], K["delta_s_bound"]) for K in bounds]),
        "imdb_normalised": mean([K["gap_normalised"] for K in bounds]),
        "expansion_max": max(expansions, default=math.nan),
        "expansion_mean": mean(expansions),
    }
    if not whole.edges:
        row |= {"sigma1": math.nan, "sigma2": math.nan}
    if row["valid"]:
        row |= whole.bounds()
        row["gap_normalised"] = _ratio(v.ramanujan_gap, row["ramanujan_bound"])
    fallback = row.get("gap_normalised", math.nan)
    row["imdb_stable"] = fallback if math.isnan(row["imdb_normalised"]) else row["imdb_normalised"]
    vertices = whole.n_left + whole.n_right
    for times, ending in ((2, ""), (1, "_undirected")):
        for name, published in RULES.items():
            if is_valid(*number, published, left=published.whole_left):
                row[f"narc_{name}{ending}"] = whole_narc(*number, whole.sigma2, B.shape, published, times)
        coefficients = [narc_2023b(K.edges, K.n_left, K.n_right, K.sigma2, vertices, times) for K in nested]
        row[f"narc_nested{ending}"] = mean(coefficients)
    return row


def _overlap(layer: _Layer) -> float:
    """Mean overlap of the outputs that an input channel's kernel positions meet."""
    kernels = layer.B.toarray().reshape(layer.channels, -1, layer.B.shape[1])  # (channels, positions, outputs)
    common = np.count_nonzero(kernels.all(1), axis=1)
    least = layer.B.count_nonzero(axis=1).reshape(layer.channels, -1).min(1)
    return float((common[least > 0] / least[least > 0]).mean()) if least.any() else math.nan


def _passage(layer: _Layer, following: _Layer | None) -> dict[str, float]:
    """What a layer's live channels meet in the next layer; what is undefined is left out."""
    if following is None or not _fits(layer, following) or not layer.B.nnz:
        return {}
    incoming, n_left = layer.B.count_nonzero(axis=0), np.count_nonzero(layer.B.count_nonzero(axis=1))
    live = incoming > 0
    outgoing = following.B.count_nonzero(axis=1).reshape(len(live), -1)[live]  # (live channels, positions)
    found = {"compatibility": float(outgoing.any(1).mean())}
    n_right = np.count_nonzero(following.B.count_nonzero(axis=0))
    if n_right:
        found["copeland"] = float(((outgoing / n_right) / (incoming[live, None] / n_left)).mean())
    return found


def _fits(layer: _Layer, following: _Layer) -> bool:
    """Whether the inputs of one layer can be the outputs of another."""
    outputs, linear = layer.B.shape[1], following.mask.ndim == 2
    if linear == (layer.mask.ndim == 2):
        return following.channels == outputs
    return linear and following.channels % outputs == 0


def _ratio(part: float, whole: float) -> float:
    """Quotient, nan where there is nothing to divide by."""
    return part / whole if whole else math.nan
