"""Runs: one function over many configs, each done once.

A run is one call of a function with one config, a plain dict. When it finishes it writes one JSON record named
by the config's `key`; a sweep skips what already has one, and that is all resuming means. (A long run may keep a
checkpoint in its `scratch`, to go on inside the run.) The tidy table of a sweep is made from the records alone, so an
interrupted and an uninterrupted sweep give the same bytes, in this process or on a cluster.
``python -m fsp.runs --help`` lists records and clears up.
"""

from fsp.runs.records import EXCLUDED, key, load, read_record
from fsp.runs.scratching import scratch
from fsp.runs.sweeping import sweep
