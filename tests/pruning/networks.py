"""What the tests of pruning say about models and masks, in few words."""

import math
from fractions import Fraction

import torch

from fsp.masks import prunable


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def all_kept(model):
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in prunable(model).items()}


def random_masks(model, fraction, seed=0):
    rng = generator(seed)
    return {name: torch.rand(p.shape, generator=rng) < fraction for name, p in prunable(model).items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def size(model):
    return sum(p.numel() for p in prunable(model).values())


def total(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def asked(n, density):
    """How many of n weights a density keeps."""
    return max(1, n - math.floor((1 - Fraction(str(density))) * n))
