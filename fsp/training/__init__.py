"""Training of masked networks: one visible loop, checkpoints, many at once, moving masks, tickets, ToST, ensembles."""

from fsp.training import distributed, dynamic, ensemble, probabilities, tickets, tost
from fsp.training.hooks import Snapshots
from fsp.training.many import fit_many
from fsp.training.train import History, TrainConfig, evaluate, fit, predict, steps
