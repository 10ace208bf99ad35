"""Many masks from one pruning method: by fresh mini-batches, by its generator or by noise on the weights.

Candidate i of a search depends on nothing but the seed and i, so that a population can be drawn again, or from its
middle on.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsp import masks as mask_algebra
from fsp.checks import check_choice, check_count, check_generator, given_or_seed_0, plain_settings
from fsp.data import Data
from fsp.data.batching import augment
from fsp.data.batching import batches as cut
from fsp.masks import NAMES, PRUNABLE, Masks, check_density, check_masks, keep_counts
from fsp.pruning.allocate import ALLOCATIONS
from fsp.pruning.methods import METHODS, EachRound, by_score, prune
from fsp.pruning.scores import Batches

CandidateBatches = Callable[[int], Batches | EachRound]

# What can make the masks of a method differ, and of which methods.  Those that published code adds noise on the weights
# to have it (D10).  "magnitude" is in no row: it depends on the weights alone.
RANDOMNESS: dict[str, tuple[str, ...]] = {
    "generator": ("random", "regular", "ramanujan", "phew", *ALLOCATIONS),
    "batches": ("snip", "taylor", "grasp", "force", "iterative_snip"),
    "noise": ("iterative_snip", "synflow", "synflow_l2"),
}


def check_randomness(method: str, batches: object, noise: float) -> None:
    """Raise a ValueError unless the candidates of a method can differ, saying what they lack."""
    check_choice("method", method, METHODS)
    if not isinstance(noise, int | float) or isinstance(noise, bool) or not 0 <= noise < float("inf"):
        raise ValueError(f"noise {noise!r}: expected a number of at least 0, times the standard deviation of a layer")
    sources = [source for source, methods in RANDOMNESS.items() if method in methods]
    if not sources:
        raise ValueError(
            f"method {method!r} has no randomness: its score depends on the initial weights alone, so every candidate "
            "would be mask 0. Search with another method, or add this one to fsp.search.candidates.RANDOMNESS"
        )
    given = {"generator": True, "batches": callable(batches), "noise": noise > 0}
    lacking = {
        "batches": "batches as a callable, batches(i) for candidate i, see fsp.search.mini_batches",
        "noise": "noise above 0",
    }
    if not any(given[source] for source in sources):
        wanted = " or ".join(lacking[source] for source in sources)
        raise ValueError(f"every candidate of {method!r} would be the same mask: pass {wanted}")


@dataclass
class CandidateSource:
    r"""Candidates that a method draws; number i depends on nothing but the arguments, the seed and i.

    Candidate 0 is the method on ``batches(0)`` without noise.  Noise draws :math:`\theta' = \theta + \epsilon`,
    :math:`\epsilon_\ell \sim N(0, (s\,\mathrm{std}\,\theta_\ell)^2)` with s = `noise`, on a deep copy of the model,
    and leaves the model bit-identical.  At initialisation :math:`\mathrm{std}\,\theta_\ell` is the standard deviation
    of the initialiser (D10).  Layers outside the masks are noisy too, as published.

    Parameters
    ----------
    model, method, density, batches, noise, generator, options
        As for `fsp.search.search`, where the errors are listed.

    Attributes
    ----------
    seed : int
        One number drawn from `generator`; candidate i has a generator of its own with seed + i.
    """

    model: nn.Module
    method: str
    density: float
    batches: CandidateBatches | Batches | None
    noise: float
    generator: torch.Generator | None
    options: dict[str, Any]

    def __post_init__(self):
        check_density(self.density)
        check_randomness(self.method, self.batches, self.noise)
        generator = given_or_seed_0(self.generator)
        self.seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
        self._noisy = self.method in RANDOMNESS["noise"] and self.noise > 0
        self._scored = _copy(self.model) if self._noisy else self.model

    def draw(self, i: int) -> Masks:
        """Candidate i."""
        generator = torch.Generator().manual_seed(self.seed + i)
        if self._noisy:
            _set_noisy(self._scored, self.model, self.noise if i else 0.0, generator)
        batches = self.batches(i) if callable(self.batches) else self.batches
        return prune(self._scored, self.method, self.density, batches=batches, generator=generator, **self.options)


@plain_settings()
def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; weights that torch has computed in a forward pass are copied without their history."""
    computed = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


@torch.no_grad()
def _set_noisy(scored: nn.Module, model: nn.Module, noise: float, generator: torch.Generator) -> None:
    """Give the copy that is scored the weights of the model plus normal noise, drawn on the CPU."""
    copies = dict(scored.named_parameters())
    layers = [module for module in model.modules() if isinstance(module, PRUNABLE)]
    own = {id(p) for layer in layers for key, p in layer.named_parameters() if key in NAMES}
    for name, weight in model.named_parameters():
        if id(weight) not in own:
            continue
        copies[name].copy_(weight)
        std = noise * float(weight.double().std(correction=0))
        if std:
            noise_drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            copies[name].add_((std * noise_drawn).to(weight))


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
    check_count("number", number, 1)
    check_count("size", size, 1)
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
        chosen = torch.randperm(len(labels), generator=generator, device="cpu")[: number * size].to(images.device)
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
    r"""Masks with the layer counts of others: the control that separates positions from layer densities.

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
        For an unknown method, a method without a model, masks that do not fit it, or "phew", whose walks cannot keep a
        given number of weights in each layer.

    Examples
    --------
    >>> masks = {"w": torch.tensor([[True, False, False]])}
    >>> int(matched(masks, torch.Generator().manual_seed(0))["w"].sum())
    1
    """
    check_choice("method", method, (None, *METHODS))
    check_generator(generator)
    if method == "phew":
        raise ValueError('method "phew" walks through all layers and has no count for each: match it with method=None')
    if method is None or getattr(METHODS[method], "func", None) is not by_score:
        return mask_algebra.shuffle(masks, generator=generator)
    if model is None:
        raise ValueError(f"method {method!r} scores a model: pass model=")
    check_masks(model, masks)
    (score,) = METHODS[method].args  # type: ignore[attr-defined]  # a partial of `by_score`
    rounds: Any = options.pop("rounds", METHODS[method].keywords.get("rounds", 1))  # type: ignore[attr-defined]  # as above
    taken = inspect.signature(score).parameters
    options |= {name: value for name, value in {"batches": batches, "generator": generator}.items() if name in taken}
    found = {name: torch.ones_like(m) for name, m in masks.items()}
    for k in range(1, rounds + 1):
        counts = {}
        for name, m in masks.items():
            n = int(m.count_nonzero())
            counts[name] = n if k == rounds else math.ceil(m.numel() * (n / m.numel()) ** (k / rounds))
        found = keep_counts(score(model, found, **options), counts, generator)
    return found


def first_examples(batches: Sequence | Callable | None) -> list[Tensor]:
    """Tensors of the first examples that a candidate is scored on, to tell one data set from another."""
    for _ in range(2):  # batches(1) are those of candidate 1, or a callable of the round
        if callable(batches):
            batches = batches(1)
    return [t for batch in list(batches or [])[:1] for t in batch if isinstance(t, Tensor)]  # type: ignore[arg-type]  # no callable by now
