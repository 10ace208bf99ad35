"""Mask algebra: which weights are prunable, which are kept, and how they stay that way.

Masks are a plain dict, parameter name to bool tensor, True = kept, in the model's parameter order.  A density is the
fraction of prunable weights kept.  Counts are exact: a density d keeps N - floor((1 - d) N) of N weights, d read as
the decimal it prints as.
"""

from fsp.masks.algebra import (
    Masks,
    all_kept,
    check_density,
    check_masks,
    check_plain,
    check_scope,
    density,
    keep_counts,
    keep_top,
    kept_count,
    layer_densities,
    number_kept,
    prunable,
    used_weights,
)
from fsp.masks.children import children, farthest, mask_distances, overlapping
from fsp.masks.exchange import from_torch, to_torch_
from fsp.masks.files import load, metadata, save
from fsp.masks.holding import apply_, gradients_are_masked, hold_
from fsp.masks.layers import NAMES, PRUNABLE, layers_of, put_weight, unpruned, weight_of
from fsp.masks.randomise import draw, rewire, scattered, shuffle
from fsp.masks.wiring import PLAIN, Wiring, blocks, joined, wiring_of
