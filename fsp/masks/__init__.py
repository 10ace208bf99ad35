"""Mask algebra: which weights are prunable, which are kept, and how they stay that way.

Masks are a plain dict, parameter name to bool tensor, True = kept, in the model's parameter order.  A density is the
fraction of prunable weights kept.  Counts are exact: a density d keeps N - floor((1 - d) N) of N weights, d read as
the decimal it prints as.
"""

from fsp.masks.algebra import (
    NAMES,
    PRUNABLE,
    Masks,
    check_density,
    check_masks,
    check_plain,
    check_scope,
    density,
    keep_counts,
    keep_top,
    kept_count,
    layer_densities,
    prunable,
    scattered,
    shuffle,
    shuffle_weights,
)
from fsp.masks.files import digest, load, metadata, save
from fsp.masks.holding import apply_, from_torch, hold_, to_torch_

__all__ = [
    "NAMES",
    "PRUNABLE",
    "Masks",
    "apply_",
    "check_density",
    "check_masks",
    "check_plain",
    "check_scope",
    "density",
    "digest",
    "from_torch",
    "hold_",
    "keep_counts",
    "keep_top",
    "kept_count",
    "layer_densities",
    "load",
    "metadata",
    "prunable",
    "save",
    "scattered",
    "shuffle",
    "shuffle_weights",
    "to_torch_",
]
