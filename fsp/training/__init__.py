"""Training of masked networks: one visible loop, checkpoints, masks that move, and the tickets they pass through."""

from fsp.training import dynamic, tickets, tost
from fsp.training.hooks import Snapshots
from fsp.training.train import History, TrainConfig, evaluate, fit, predict, steps
