"""Training of masked networks: one visible loop, checkpoints, moving masks and their tickets, ensembles of children."""

from fsp.training import dynamic, ensemble, probabilities, tickets
from fsp.training.hooks import Snapshots
from fsp.training.train import History, TrainConfig, evaluate, fit, predict, steps
