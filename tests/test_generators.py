"""Every function that takes a generator refuses anything else by one kind of error, before it draws."""

import inspect
import random
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fsp import data, masks, models, pruning, search, spectrum, training
from fsp.pruning import scores
from fsp.pruning.phew import phew
from fsp.search.recombine import leading_vectors, swapped
from fsp.training import dynamic, ensemble
from fsp.training.rescaling import Rescaling, rescale_

DIGITS = data.load("digits")
NET = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
KEPT = pruning.prune(NET, "random", 0.5)
FULL = {name: torch.ones_like(mask) for name, mask in KEPT.items()}
BATCHES = [(torch.randn(8, 6), torch.arange(8) % 4)]
WEIGHT, MASK = NET[0].weight.detach(), KEPT["0.weight"]
VECTORS = leading_vectors(MASK, WEIGHT)
CALLS = {  # each with all that it needs but a generator
    "augment": partial(data.augment, torch.zeros(2, 3, 8, 8)),
    "batches": partial(data.batches, DIGITS.train, 10),
    "scoring_batches": partial(data.scoring_batches, DIGITS),
    "corrupt": partial(data.corrupt, DIGITS.test, "noise", 1),
    "build": partial(models.build, "mlp", (1, 8, 8), 10),
    "initialise_": partial(models.initialise_, nn.Linear(2, 2), "lecun"),
    "keep_top": partial(masks.keep_top, {"w": torch.arange(4.0)}, 0.5),
    "keep_counts": partial(masks.keep_counts, {"w": torch.arange(4.0)}, {"w": 2}),
    "draw": partial(masks.draw, KEPT, 1),
    "shuffle": partial(masks.shuffle, KEPT),
    "shuffle globally": partial(masks.shuffle, KEPT, scope="global"),
    "rewire": partial(masks.rewire, KEPT),
    "scattered": partial(masks.scattered, KEPT, NET),
    "children": partial(masks.children, NET, "antirandom", 2),
    "overlapping": partial(masks.overlapping, KEPT, 0.5),
    "bagged": partial(ensemble.bagged, DIGITS),
    "rescale_": partial(rescale_, models.build("mlp", (1, 8, 8), 10), DIGITS, settings=Rescaling(iterations=1)),
    **{
        f"prune {method}": partial(pruning.prune, NET, method, 0.5, batches=BATCHES)
        for method in ("random", "erk", "regular", "ramanujan", "magnitude", "snip", "grasp", "phew", "synflow")
    },
    "imp": partial(pruning.lottery.imp, models.build("mlp", (1, 8, 8), 10), DIGITS, training.TrainConfig(1), levels=1),
    "phew": partial(phew, NET, 0.5, batches=BATCHES),
    **{
        f"score {name}": partial(getattr(scores, name), NET, FULL, batches=BATCHES)
        for name in ("snip", "taylor", "force", "grasp")
    },
    "search": partial(search.search, NET, "erk", 0.5, population=1),
    "optimise": partial(search.optimise, NET, "erk", 0.5, population=1),
    "matched": partial(search.matched, KEPT),
    "matched to magnitude": partial(search.matched, KEPT, model=NET, method="magnitude"),
    "swapped": partial(swapped, MASK, WEIGHT, MASK, VECTORS),
    "drop_and_grow": partial(dynamic.drop_and_grow, WEIGHT, MASK, 0.5, [WEIGHT.abs()]),
    "DynamicTraining": partial(dynamic.DynamicTraining, NET, KEPT, dynamic.PRESETS["set"], 10),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wrong", [0, np.random.default_rng(0), random.Random(0)], ids=["a seed", "numpy", "random"])
def test_what_is_no_generator_is_refused_with_what_was_expected(call, wrong):
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"^generator=.*: expected a torch\.Generator on the CPU"):
        call(generator=wrong)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_generator_is_taken(call):
    if call is not CALLS["imp"]:
        call(generator=torch.Generator().manual_seed(0))


def parameters_of(function) -> Mapping:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of built-in classes
        return {}


def test_the_table_above_holds_every_public_name_that_takes_a_generator():
    known = {name.split()[0] for name in CALLS} | {"prune", "score"}
    found = set()
    for wing in (data, masks, models, pruning, pruning.lottery, search, spectrum, training, dynamic, ensemble):
        for name, value in vars(wing).items():
            if callable(value) and value.__module__ != "fsp.checks" and "generator" in parameters_of(value):
                found.add(name)
    assert {name for name in found - known if not name.startswith("_")} == set()
