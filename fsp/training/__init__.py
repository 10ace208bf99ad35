"""Training of masked networks: one visible loop, checkpoints, moving masks and their tickets, ToST, ensembles."""

from fsp.training import dynamic, ensemble, probabilities, tickets, tost
from fsp.training.hooks import Snapshots
from fsp.training.train import History, TrainConfig, evaluate, fit, predict, steps
