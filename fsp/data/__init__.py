"""Data sets as tensors on the device, and the batches made of them."""

from fsp.data.batching import augment, batches, scoring_batches
from fsp.data.datasets import DATASETS, STATISTICS, Data, Split, is_count, load

__all__ = ["DATASETS", "STATISTICS", "Data", "Split", "augment", "batches", "is_count", "load", "scoring_batches"]
