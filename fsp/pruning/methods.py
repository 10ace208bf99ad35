"""Pruning at initialisation in one call: score, rounds, exact masks.

A method is a function in the dict `METHODS`; `REFERENCES` holds the settings that published code used for it.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Unpack, get_args, get_origin

import torch
from torch import nn

from fsp.checks import check_choice, check_count, check_has_values, check_options, given_or_seed_0, plain_settings
from fsp.masks import Masks, all_kept, check_density, check_scope, draw, keep_counts, keep_top, kept_count, number_kept
from fsp.pruning import allocate, scores
from fsp.pruning.expanders import ramanujan, regular
from fsp.pruning.phew import phew

EachRound = Callable[[int], scores.Batches]


def by_score(
    score: Callable[..., scores.Scores],
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: scores.Batches | EachRound | None = None,
    exclude: Iterable[str] = (),
    scope: str = "global",
    rounds: int = 1,
    schedule: str = "exponential",
    invert: bool = False,
    **options: object,
) -> Masks:
    r"""Keep the weights with the highest scores, in one round or several.

    Round k of T prunes to the density :math:`d^{k/T}` ("exponential") or :math:`1 - (1-d)\,k/T` ("linear") and scores
    anew at the weights that are left; what is pruned stays pruned, except with `fsp.pruning.scores.force`.

    Parameters
    ----------
    score : callable
        From `fsp.pruning.scores`.
    model, density, batches, generator
        As for `prune`.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks.
    scope : {"global", "layer"}
        Rank all weights together, or every tensor by itself.
    rounds : int, >= 1
    schedule : {"exponential", "linear"}
    invert : bool
        Keep the *lowest* scores (a sanity check); what is pruned stays pruned.  At scope "global", in one round and
        from the same generator state, this mask and the one that is not inverted have no weight in common, ties or
        not, as long as the two together keep no more than all weights.
    **options
        For `score`.

    Returns
    -------
    Masks

    References
    ----------
    Frankle et al., Pruning neural networks at initialization: why are we missing the mark? ICLR 2021 (inversion).
    """
    check_choice("schedule", schedule, ("exponential", "linear"))
    check_scope(scope)
    check_count("rounds", rounds, 1)
    check_choice("invert", invert, (True, False))
    masks = start = all_kept(model, exclude=exclude)
    pruned = [name for name, mask in start.items() if not mask.all()]
    taken = inspect.signature(score).parameters
    options |= {n: value for n, value in {"batches": batches, "generator": generator}.items() if n in taken}
    if density == 1:
        rounds = 1  # nothing to prune: one look at the scores finds what is wrong with them
    for k in range(1, rounds + 1):
        target = density
        if k < rounds:
            target = density ** (k / rounds) if schedule == "exponential" else 1 - (1 - density) * k / rounds
        if k < rounds and pruned and not _leaves(start, target, scope):
            continue  # torch has pruned more already
        if callable(batches) and "batches" in taken:
            options["batches"] = list(batches(k))
        found = score(model, masks, **options)
        for name in pruned:  # by torch: no round may bring them back, those of FORCE neither
            found[name] = found[name].masked_fill(~start[name], -torch.inf)
        masks = (_keep_lowest if invert else keep_top)(found, target, scope=scope, generator=generator)
    return masks


def _leaves(masks: Masks, density: float, scope: str) -> bool:
    """Whether masks leave as many weights as a density keeps."""
    kept, sizes = [int(m.count_nonzero()) for m in masks.values()], [m.numel() for m in masks.values()]
    if scope == "global":
        kept, sizes = [sum(kept)], [sum(sizes)]
    return all(k >= kept_count(n, density) for k, n in zip(kept, sizes, strict=True))


def _keep_lowest(found: scores.Scores, density: float, *, scope: str, generator: torch.Generator) -> Masks:
    """Like `keep_top`, but the lowest scores of the same ranking (ties included); -inf is still never kept."""
    keep_top(found, density, scope=scope)  # raises for scores that cannot be ranked
    ranked = found if scope == "layer" else {"all": torch.cat([s.flatten() for s in found.values()])}
    alive = {name: ~torch.isneginf(s) for name, s in ranked.items()}
    spare = {name: int(a.sum()) - kept_count(a.numel(), density) for name, a in alive.items()}
    top = keep_counts(ranked, spare, generator)
    lowest = {name: a & ~top[name] for name, a in alive.items()}
    if scope == "layer":
        return lowest
    parts = lowest["all"].split([s.numel() for s in found.values()])
    return {name: part.view_as(s) for (name, s), part in zip(found.items(), parts, strict=True)}


def by_chance(
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: scores.Batches | EachRound | None = None,
    exclude: Iterable[str] = (),
    scope: str = "global",
) -> Masks:
    """Random positions.

    Parameters
    ----------
    model, density, generator, scope
        As for `prune`.
    batches
        Ignored.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks.

    Returns
    -------
    Masks
    """
    check_scope(scope)
    masks = all_kept(model, exclude=exclude)
    counts = {name: kept_count(mask.numel(), density) for name, mask in masks.items()}
    together = kept_count(sum(mask.numel() for mask in masks.values()), density)
    return draw(masks, counts if scope == "layer" else together, generator=generator)


def at_random(
    allocation: Callable[..., dict[str, float]],
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: scores.Batches | EachRound | None = None,
    exclude: Iterable[str] = (),
    **options: object,
) -> Masks:
    """Random positions with the exact counts of a layer-wise allocation.

    Parameters
    ----------
    allocation : callable
        From `fsp.pruning.allocate`.
    model, density, generator
        As for `prune`.
    batches
        Ignored.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks.
    **options
        For `allocation`.

    Returns
    -------
    Masks

    Raises
    ------
    ValueError
        If the allocation cannot spend exactly the weights that `density` keeps, with the numbers.
    """
    masks = all_kept(model, exclude=exclude)
    shapes = {name: tuple(m.shape) for name, m in masks.items()}
    counts = allocate.counts(allocation(shapes, density, **options), shapes, density)
    return draw(masks, counts, generator=generator)


METHODS: dict[str, Callable[..., Masks]] = {
    "random": by_chance,
    **{name: partial(at_random, allocation) for name, allocation in allocate.ALLOCATIONS.items()},
    "regular": regular,
    "ramanujan": ramanujan,
    "magnitude": partial(by_score, scores.magnitude),
    "snip": partial(by_score, scores.snip),
    "taylor": partial(by_score, scores.taylor),
    # 60 rounds as in the commands of FORCE's code; its argument parser has 10, other papers take 100 or 300
    "iterative_snip": partial(by_score, scores.snip, rounds=60),
    "force": partial(by_score, scores.force, rounds=60),
    "grasp": partial(by_score, scores.grasp),
    "synflow": partial(by_score, scores.synflow, rounds=100),
    "synflow_l2": partial(by_score, scores.synflow_l2, rounds=100),
    "phew": phew,
}

SYNFLOW = {"rounds": 100, "schedule": "exponential", "training": False, "dtype": torch.float32}
FORCE = {"rounds": 60, "schedule": "exponential", "training": True}

# Options of `prune` as in the authors' code.  Not all of it has an option: SNIP's code prunes biases as well and draws
# the weights anew after pruning, GraSP's draws its classifier anew for scoring and cuts its examples by class.  Nor do
# they set the examples, which `fsp.data.scoring_batches` draws.  The SynFlow repository takes 10 a class, drawn from
# all classes together and augmented, in batches of 256.  SNIP's authors take one training batch, 100 examples of MNIST
# or 128 of CIFAR; FORCE's fresh batches of 128 in every round: one for CIFAR-10, 10 for CIFAR-100, 20 for TinyImageNet;
# GraSP's 10 of each class, augmented.
REFERENCES: dict[str, dict[str, dict[str, object]]] = {
    "synflow_repo": {  # Tanaka et al. for all methods: SynFlow in float32, eval mode throughout
        "random": {},
        "magnitude": {"rounds": 1},
        "snip": {"rounds": 1, "training": False},
        "grasp": {"rounds": 1, "training": False, "temperature": 200.0},
        "synflow": SYNFLOW,
    },
    "original": {  # each method's own authors
        "snip": {"rounds": 1, "training": False},
        "iterative_snip": FORCE,
        "force": FORCE,
        "grasp": {"rounds": 1, "training": True, "temperature": 200.0},
        "synflow": SYNFLOW,
        "synflow_l2": {"rounds": 100, "schedule": "exponential", "training": False},
    },
}


def options_of(method: str) -> tuple[str, ...]:
    """Names of the options that a method takes in `prune`.

    Parameters
    ----------
    method : str
        A key of `METHODS`.

    Returns
    -------
    tuple of str

    Raises
    ------
    ValueError
        For an unknown method.

    Examples
    --------
    >>> options_of("synflow")
    ('exclude', 'scope', 'rounds', 'schedule', 'invert', 'shape', 'training', 'dtype', 'forward')
    >>> options_of("balanced")
    ('exclude', 'redistribute')
    """
    check_choice("method", method, METHODS)
    names: list[str] = []
    for function in [
        METHODS[method],
        *getattr(METHODS[method], "args", ()),
    ]:  # the function in a partial has options too
        for parameter in inspect.signature(function).parameters.values():
            named = get_args(parameter.annotation) if get_origin(parameter.annotation) is Unpack else ()
            names += named[0].__annotations__ if named else [parameter.name]
    given = {"model", "density", "masks", "shapes", "batches", "generator", "options"}
    return tuple(dict.fromkeys(name for name in names if name not in given))


def prune(
    model: nn.Module,
    method: str,
    density: float,
    *,
    batches: scores.Batches | EachRound | None = None,
    generator: torch.Generator | None = None,
    reference: str | None = None,
    **options: object,
) -> Masks:
    """Masks that keep exactly the asked fraction of a model's prunable weights; the model is left bit-identical.

    Parameters
    ----------
    model : nn.Module
        Any module with convolutions or linear layers, see the notes; `fsp.masks.apply_` puts the masks on it
        afterwards.
    method : str
        A key of `METHODS`.
    density : float, in (0, 1]
        Fraction of prunable weights kept.
    batches : sequence of (inputs, labels), or callable, optional
        Examples that SNIP, GraSP and similar methods score on; SynFlow and PHEW only take the input shape from them.
        A callable is called in each round, ``batches(round)`` with rounds from 1, and gives fresh examples, as in
        FORCE.
    generator : torch.Generator on the CPU, optional
        Positions of random methods, ties, dropout; default a fresh generator with seed 0.
    reference : str, optional
        Key of `REFERENCES`: settings of published code instead of our defaults; `options` overrule them.  They do
        not include the examples.
    **options
        Of the method, see `options_of`: among them ``rounds``, ``scope``, ``exclude``, ``temperature``, ``training``,
        ``forward`` and ``loss`` for models with other outputs and tasks.

    Returns
    -------
    Masks
        Parameter name to bool tensor, True = kept, on the device of the parameter.

    Raises
    ------
    ValueError
        For an unknown method or reference, a density outside (0, 1], missing batches, a model without prunable
        weights or with one that masks cannot follow, scores that cannot be ranked, an allocation that cannot reach the
        density, a model that recomputes activations other than by ``torch.utils.checkpoint``.
    TypeError
        For an option that the method does not have, or needs and does not get.
    RuntimeError
        If the masks do not have the asked density.

    Notes
    -----
    Rounds are exponential; by default 100 for SynFlow and SynFlow-L2 as published, 60 for iterative SNIP and FORCE as
    in the published commands of FORCE, 1 for all others.

    `fsp.masks.prunable` says what can be pruned.  Of an ``nn.MultiheadAttention`` that is ``out_proj.weight`` alone:
    ``in_proj_weight`` belongs to no linear layer, stays dense and is not counted.

    *Bit-identical* are parameters, buffers, ``vars`` of every module with the lists, dicts and sets in it, train and
    eval flags and the global random state.  No global setting (default dtype and device, grad and inference mode,
    autocast, deterministic mode, locale) changes a result.

    *Wrappers.*  ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel``, at any depth,
    give the masks of the model inside, under names with their prefix; compiled code is not used for scoring.
    Activation checkpointing by ``torch.utils.checkpoint``, reentrant or not, changes no score.

    *Computed weights.*  Weights under `torch.nn.utils.prune` and under element-wise parametrisations that leave 0 at 0
    are scored as the weight that the forward pass uses; what torch has pruned stays pruned, and counts as pruned.
    Weight norm, spectral norm, orthogonal and other parametrisations, quantisation-aware layers, and layers whose
    forward computes their weight otherwise are refused by name, unless excluded.  So are lazy, sparse and integer
    weights, those spread over processes, and models on the meta device.  What the forward of another module than the
    layer does to a weight is not seen.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> masks = prune(model, "synflow", 0.05, shape=(1, 8, 8))
    >>> int(masks["1.weight"].sum())
    32
    """
    check_choice("method", method, METHODS)
    check_density(density)
    check_options(f"method {method!r}", options, options_of(method))
    if reference is not None:
        if method not in REFERENCES.get(reference, {}):
            listed = "; ".join(f"{name!r} for {', '.join(settings)}" for name, settings in REFERENCES.items())
            raise ValueError(f"reference {reference!r} has no settings for method {method!r}: there is {listed}")
        options = REFERENCES[reference][method] | options
    generator = given_or_seed_0(generator)
    if batches is not None and not callable(batches):
        batches = list(batches)
    check_has_values(model)
    with plain_settings():
        masks = METHODS[method](model, density, batches=batches, generator=generator, **options)
    sizes = [m.numel() for m in masks.values()]
    asked = sum(kept_count(n, density) for n in (sizes if options.get("scope") == "layer" else [sum(sizes)]))
    kept = sum(number_kept(m) for m in masks.values())
    if kept != asked:
        raise RuntimeError(f"{kept} of {sum(sizes)} weights are kept where density {density} asks for {asked}")
    return masks
