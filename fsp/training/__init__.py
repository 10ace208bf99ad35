"""Training of masked networks: one visible loop, checkpoints, masks that move, and the tickets they pass through."""

from fsp.training.train import History, TrainConfig, evaluate, fit, steps

__all__ = ["History", "TrainConfig", "evaluate", "fit", "steps"]
