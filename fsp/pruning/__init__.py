"""Pruning at initialisation and by magnitude: scores, allocations, exact masks, and what they leave of a network."""

from fsp.pruning import lottery
from fsp.pruning.diagnosis import diagnose
from fsp.pruning.methods import METHODS, REFERENCES, options_of, prune
