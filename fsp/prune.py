"""Pruning at initialisation in one call: score, rounds, exact masks.

A method is a function in the dict `METHODS`.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from fsp import allocate, scores
from fsp.masks import Masks, check_density, check_scope, keep_counts, keep_top, kept_count, prunable


def by_score(
    score: Callable[..., scores.Scores],
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: scores.Batches | None = None,
    exclude: Iterable[str] = (),
    scope: str = "global",
    rounds: int = 1,
    schedule: str = "exponential",
    **options: object,
) -> Masks:
    r"""Keep the weights with the highest scores, in one round or several.

    Round k of T prunes to the density :math:`d^{k/T}` ("exponential") or :math:`1 - (1-d)\,k/T` ("linear") and scores
    anew at the weights that are left; what is pruned stays pruned.

    Parameters
    ----------
    score : callable
        From `fsp.scores`.
    model, density, batches, generator
        As for `prune`.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks.
    scope : {"global", "layer"}
        Rank all weights together, or every tensor by itself.
    rounds : int, >= 1
    schedule : {"exponential", "linear"}
    **options
        For `score`.

    Returns
    -------
    Masks
    """
    densities = {
        "exponential": lambda k: density ** (k / rounds),
        "linear": lambda k: 1 - (1 - density) * k / rounds,
    }
    if schedule not in densities:
        raise ValueError(f'schedule is "exponential" or "linear", not {schedule!r}')
    check_scope(scope)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds {rounds!r} is not a whole number of at least 1")
    masks = _ones(model, exclude)
    available = {"batches": batches, "generator": generator}
    options |= {name: value for name, value in available.items() if name in inspect.signature(score).parameters}
    for k in range(1, rounds + 1):
        target = density if k == rounds else densities[schedule](k)
        masks = keep_top(score(model, masks, **options), target, scope=scope, generator=generator)
    return masks


def at_random(
    allocation: Callable[[allocate.Shapes, float], dict[str, float]],
    model: nn.Module,
    density: float,
    *,
    generator: torch.Generator,
    batches: scores.Batches | None = None,
    exclude: Iterable[str] = (),
) -> Masks:
    """Random positions with the exact counts of a layer-wise allocation.

    Parameters
    ----------
    allocation : callable
        From `fsp.allocate`.
    model, density, generator
        As for `prune`.
    batches
        Not used.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks.

    Returns
    -------
    Masks
    """
    masks = _ones(model, exclude)
    shapes = {name: tuple(m.shape) for name, m in masks.items()}
    counts = allocate.counts(allocation(shapes, density), shapes, density)
    return keep_counts(scores.random(model, masks, generator=generator), counts, generator)


METHODS: dict[str, Callable[..., Masks]] = {
    "random": partial(by_score, scores.random),
    "uniform": partial(at_random, allocate.uniform),
    "er": partial(at_random, allocate.er),
    "erk": partial(at_random, allocate.erk),
    "magnitude": partial(by_score, scores.magnitude),
    "snip": partial(by_score, scores.snip),
    "grasp": partial(by_score, scores.grasp),
    "synflow": partial(by_score, scores.synflow, rounds=100),
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

    Examples
    --------
    >>> options_of("synflow")
    ('exclude', 'scope', 'rounds', 'schedule', 'shape', 'dtype')
    """
    function = METHODS[method]
    names = [*inspect.signature(function.func).parameters]
    if function.func is by_score:
        names += inspect.signature(function.args[0]).parameters
    given = {"score", "allocation", "model", "density", "masks", "batches", "generator", "options"}
    return tuple(dict.fromkeys(name for name in names if name not in given))


def prune(
    model: nn.Module,
    method: str,
    density: float,
    *,
    batches: scores.Batches | None = None,
    generator: torch.Generator | None = None,
    **options: object,
) -> Masks:
    """Masks that keep exactly the asked fraction of a model's prunable weights; the model is left bit-identical.

    Parameters
    ----------
    model : nn.Module
        Any module with convolutions or linear layers; `fsp.masks.apply_` puts the masks on it afterwards.
    method : str
        A key of `METHODS`.
    density : float, in (0, 1]
        Fraction of prunable weights kept.
    batches : sequence of (inputs, labels), optional
        Examples that SNIP and GraSP score on; SynFlow takes the input shape from them.
    generator : torch.Generator on the CPU, optional
        Positions of random methods, ties, dropout; default a fresh generator with seed 0.
    **options
        Of the method, see `options_of`: among them ``rounds``, ``scope``, ``exclude``, ``temperature``, ``training``.

    Returns
    -------
    Masks
        Parameter name to bool tensor, True = kept, on the device of the parameter.

    Raises
    ------
    ValueError
        For an unknown method, a density outside (0, 1], missing batches, a model without prunable weights, scores
        that cannot be ranked.
    TypeError
        For an option that the method does not have.
    RuntimeError
        If the masks do not have the asked density.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> masks = prune(model, "synflow", 0.05, shape=(1, 8, 8))
    >>> int(masks["1.weight"].sum())
    32
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    check_density(density)
    unknown = options.keys() - set(options_of(method))
    if unknown:
        raise TypeError(f"method {method!r} has no option {sorted(unknown)}; it has {', '.join(options_of(method))}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    batches = batches if batches is None else list(batches)
    masks = METHODS[method](model, density, batches=batches, generator=generator, **options)
    _check_achieved(masks, density, options.get("scope", "global"))
    return masks


def _ones(model: nn.Module, exclude: Iterable[str]) -> Masks:
    """Masks that keep every prunable weight."""
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model, exclude=exclude).items()}


def _check_achieved(masks: Masks, density: float, scope: object) -> None:
    """Raise if the number of kept weights is not the number asked for."""
    sizes = [m.numel() for m in masks.values()]
    asked = sum(kept_count(n, density) for n in (sizes if scope == "layer" else [sum(sizes)]))
    kept = sum(int(m.sum()) for m in masks.values())
    if kept != asked:
        raise RuntimeError(f"{kept} of {sum(sizes)} weights are kept where density {density} asks for {asked}")
