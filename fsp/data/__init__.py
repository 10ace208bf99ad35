"""Data sets as tensors on the device, and the batches made of them."""

from fsp.checks import is_count
from fsp.data.batching import augment, batch_size, batches, scoring_batches
from fsp.data.cifar_c import BENCHMARK, EXTRA, corrupted
from fsp.data.corruptions import CORRUPTIONS, corrupt
from fsp.data.datasets import DATASETS, STATISTICS, Data, Split, check_files, load
