"""Many masks from one pruning method: by fresh mini-batches, by its generator or by noise on the weights.

Candidate i of a search depends on nothing but the seed and i, so that a population can be drawn again, or from its
middle on.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fsp import masks as mask_algebra
from fsp.data import Data, is_count
from fsp.data.batching import augment
from fsp.data.batching import batches as cut
from fsp.masks import Masks, check_masks, keep_counts, prunable
from fsp.pruning.methods import METHODS, EachRound, by_score, prune
from fsp.pruning.scores import Batches

OfCandidate = Callable[[int], Batches | EachRound]

# What makes two masks of a method differ.  Weight noise is for the methods that published code adds it to (D10).
RANDOMNESS: dict[str, tuple[str, ...]] = {
    "random": ("generator",),
    "uniform": ("generator",),
    "uniform_plus": ("generator",),
    "er": ("generator",),
    "erk": ("generator",),
    "igq": ("generator",),
    "balanced": ("generator",),
    "pyramidal": ("generator",),
    "smart_ratio": ("generator",),
    "ratio_of": ("generator",),
    "phew": ("generator",),
    "magnitude": (),
    "snip": ("batches",),
    "taylor": ("batches",),
    "grasp": ("batches",),
    "force": ("batches",),
    "iterative_snip": ("batches", "noise"),
    "synflow": ("noise",),
    "synflow_l2": ("noise",),
}


def check_randomness(method: str, batches: object, noise: float) -> None:
    """Raise a ValueError unless the candidates of a method can differ, saying what they lack."""
    if method not in RANDOMNESS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(RANDOMNESS)}")
    if not isinstance(noise, int | float) or isinstance(noise, bool) or not 0 <= noise < float("inf"):
        raise ValueError(f"noise {noise!r}: expected a number of at least 0, times the standard deviation of a layer")
    sources = RANDOMNESS[method]
    given = {"generator": True, "batches": callable(batches), "noise": noise > 0}
    if any(given[source] for source in sources):
        return
    if not sources:
        raise ValueError(
            f"method {method!r} has no randomness: its score depends on the initial weights alone, so every candidate "
            f"would be mask 0. Search with one of {', '.join(name for name, found in RANDOMNESS.items() if found)}"
        )
    lacking = {
        "batches": "batches as a callable, batches(i) for candidate i, see fsp.search.mini_batches",
        "noise": "noise above 0",
    }
    wanted = " or ".join(lacking[source] for source in sources)
    raise ValueError(f"every candidate of {method!r} would be the same mask: pass {wanted}")


def drawer(
    model: nn.Module,
    method: str,
    density: float,
    *,
    batches: OfCandidate | Batches | None,
    noise: float,
    seed: int,
    options: dict[str, object],
) -> Callable[[int], Masks]:
    r"""A function of i that gives candidate i; 0 is the method on ``batches(0)`` without noise.

    Noise draws :math:`\theta' = \theta + \epsilon`, :math:`\epsilon_\ell \sim N(0, (s\,\mathrm{std}\,\theta_\ell)^2)`
    with s = `noise`, on a deep copy of the model, and leaves the model bit-identical.  At initialisation
    :math:`\mathrm{std}\,\theta_\ell` is the standard deviation of the initialiser (D10).  Layers outside the masks are
    noisy too, as published.

    Parameters
    ----------
    model, method, density, batches, noise
        As for `fsp.search.search`; checked by `check_randomness`.
    seed : int
        Candidate i has a generator of its own with seed + i.
    options : dict
        For `fsp.pruning.prune`.

    Returns
    -------
    callable
    """
    noisy = "noise" in RANDOMNESS[method] and noise > 0
    scratch = copy.deepcopy(model) if noisy else model
    spread = {name: float(p.detach().double().std(correction=0)) for name, p in prunable(model).items()}

    def draw(i: int) -> Masks:
        generator = torch.Generator().manual_seed(seed + i)
        if noisy:
            _set_noisy(scratch, model, {name: noise * std * (i > 0) for name, std in spread.items()}, generator)
        found = batches(i) if callable(batches) else batches
        return prune(scratch, method, density, batches=found, generator=generator, **options)

    return draw


@torch.no_grad()
def _set_noisy(scratch: nn.Module, model: nn.Module, spread: dict[str, float], generator: torch.Generator) -> None:
    """Give the copy the weights of the model plus normal noise, drawn on the CPU."""
    new, old = dict(scratch.named_parameters()), dict(model.named_parameters())
    for name, std in spread.items():
        new[name].copy_(old[name])
        if std:
            new[name].add_((std * torch.randn(old[name].shape, generator=generator)).to(new[name]))


def mini_batches(
    data: Data, *, number: int = 4, size: int = 128, augmented: bool = False, seed: int = 0
) -> Callable[[int], list[tuple[Tensor, Tensor]]]:
    """Scoring examples of every candidate: all training examples for mask 0, a few fresh mini-batches for the others.

    Parameters
    ----------
    data : Data
    number : int, at least 1
        Mini-batches of a candidate, drawn without replacement; 4 are what the published setting "2" amounts to (D15).
    size : int, at least 1
        Examples in a batch, of mask 0 too.
    augmented : bool
        Crop and flip the mini-batches, as published for CIFAR; those of mask 0 never are.
    seed : int
        Candidate i depends on it and on i alone.

    Returns
    -------
    callable
        ``batches(i)``, a list of (images, labels): normalised float32 images, on the device of `data`.

    Raises
    ------
    ValueError
        `number` or `size` is not a positive integer, the training examples are too few for them, or `augmented` is
        asked for a dataset that has no such recipe.

    Examples
    --------
    >>> from fsp.data import load
    >>> batches = mini_batches(load("digits"), number=2, size=100)
    >>> [len(labels) for _, labels in batches(1)]
    [100, 100]
    """
    for name, value in (("number", number), ("size", size)):
        if not is_count(value, 1):
            raise ValueError(f"{name}={value!r}: expected a positive integer")
    if number * size > len(data.train.labels):
        raise ValueError(
            f"{number} batches of {size} are more than the {len(data.train.labels)} training examples of {data.name}"
        )
    if augmented and not data.augmented:
        raise ValueError(f"augmented=True, but {data.name} is not trained with crop and flip: pass augmented=False")
    images, labels = data.train

    def of_candidate(i: int) -> list[tuple[Tensor, Tensor]]:
        if i == 0:
            return [(data.normalise(x), y) for x, y in cut((images, labels), size)]
        generator = torch.Generator().manual_seed(seed + i)
        chosen = torch.randperm(len(labels), generator=generator)[: number * size].to(images.device)
        found = augment(images[chosen], generator=generator) if augmented else images[chosen]
        return list(cut((data.normalise(found), labels[chosen]), size))

    return of_candidate


def matched(
    masks: Masks,
    generator: torch.Generator,
    *,
    model: nn.Module | None = None,
    method: str | None = None,
    batches: Batches | None = None,
    **options: object,
) -> Masks:
    r"""Masks with the layer counts of others: the control that tells positions from layer densities.

    Without a method the positions are random.  With one they are the method's own choice at these counts: every
    layer is ranked by itself; in round k of T it keeps :math:`N_\ell (n_\ell / N_\ell)^{k/T}` weights, rounded up.

    Parameters
    ----------
    masks : Masks
        For instance those that a search has found.
    generator : torch.Generator on the CPU
    model : nn.Module, optional
        With `method`; its masked weights are those of `masks`.
    method : str, optional
        Key of `fsp.pruning.METHODS`.  Random methods give random positions.
    batches : sequence of (inputs, labels), optional
        For methods that score on data.
    **options
        Of the method's score, and ``rounds``.

    Returns
    -------
    Masks

    Raises
    ------
    ValueError
        For an unknown method, a method without a model, masks that do not fit it, or "phew", whose walks cannot be
        told how many weights to keep in a layer.

    Examples
    --------
    >>> masks = {"w": torch.tensor([[True, False, False]])}
    >>> int(matched(masks, torch.Generator().manual_seed(0))["w"].sum())
    1
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    if method == "phew":
        raise ValueError('method "phew" walks through all layers and has no count for each: match it with method=None')
    if method is None or getattr(METHODS[method], "func", None) is not by_score or method == "random":
        return mask_algebra.shuffle(masks, generator=generator)
    if model is None:
        raise ValueError(f"method {method!r} scores a model: pass model=")
    check_masks(model, masks)
    (score,) = METHODS[method].args
    rounds = options.pop("rounds", METHODS[method].keywords.get("rounds", 1))
    counts = {name: int(m.sum()) for name, m in masks.items()}
    found = {name: torch.ones_like(m) for name, m in masks.items()}
    taken = inspect.signature(score).parameters
    options |= {name: value for name, value in {"batches": batches, "generator": generator}.items() if name in taken}
    for k in range(1, rounds + 1):
        target = {
            name: n if k == rounds else math.ceil(m.numel() * (n / m.numel()) ** (k / rounds))
            for (name, n), m in zip(counts.items(), masks.values(), strict=True)
        }
        found = keep_counts(score(model, found, **options), target, generator)
    return found


def first_examples(batches: Sequence | Callable | None) -> list[Tensor]:
    """Tensors of the first examples that a candidate is scored on, to tell one data set from another."""
    for argument in (1, 1):  # of candidate 1; of its first round
        batches = batches(argument) if callable(batches) else batches
    return [t for batch in list(batches or [])[:1] for t in batch if isinstance(t, Tensor)]
