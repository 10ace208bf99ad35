"""The two searches: the published one, and one that recombines weights.  See `fsp.search` for the method."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from fsp.masks import PLAIN, Masks, used_weights, wiring_of
from fsp.pruning.scores import Batches
from fsp.search.candidates import CandidateBatches, CandidateSource
from fsp.search.judging import Plan, SearchResult, judge_candidates
from fsp.search.recombine import leading_vectors, swapped
from fsp.spectrum.definitions import Rules, rules_of


def search(
    model: nn.Module,
    method: str,
    density: float,
    *,
    population: int,
    batches: CandidateBatches | Batches | None = None,
    accept: str = "published",
    density_control: str = "exact",
    generator: torch.Generator | None = None,
    chunk: int = 10,
    every: int = 10,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    noise: float = 1.0,
    rules: str | Rules = "fsp2023",
    precision: str = "float64",
    **options: object,
) -> SearchResult:
    r"""Mask-population search: keep, layer by layer, the best of many masks of one method.

    Mask 0 is the method on all data without noise.  Candidates 1 to `population` differ by what the method leaves to
    chance (`fsp.search.RANDOMNESS`).  Layer :math:`\ell` of a candidate replaces the incumbent's if

    .. math::
        \text{published:}\quad & IMDB \ge IMDB^* \;\wedge\; S \ge S^* \\
        \text{alt:}\quad & \Delta_r < \Delta_r^* \;\wedge\; S \ge S^* \\
        \text{strict:}\quad & IMDB \ge IMDB^* \;\wedge\; S \ge S^* \;\wedge\; IMSG \le IMSG^* \\
        \text{norm:}\quad & S \ge S^* \\
        \text{gap:}\quad & \Delta_r \ge \Delta_r^*

    so that ties replace.  Undefined entries count as 0, as published, but for :math:`\Delta_r`: in "alt" a layer
    whose :math:`\Delta_r` is undefined is never replaced and never replaces (D8), in "gap" any defined one is larger.

    Parameters
    ----------
    model : nn.Module
        At its initial weights, or trained for a while (D24).  It is left bit-identical.
    method : str
        A key of `fsp.pruning.METHODS` with some randomness, so not "magnitude".
    density : float, in (0, 1]
    population : int, >= 1
        Candidates beside mask 0; published: 3000.
    batches : callable, optional
        ``batches(i)`` gives the scoring examples of candidate i, or a callable of the round for fresh ones in each,
        see `fsp.pruning.prune`; ``batches(0)`` those of mask 0.  `fsp.search.mini_batches` makes one.  Its examples
        may depend on i alone.  For methods that are random by themselves a plain sequence will do.
    accept : {"published", "alt", "strict", "norm", "gap"}
        "published" is the default of the published code, "alt" its later option (D29), "strict" an earlier one; "gap"
        is what the ICLR'23 paper warns of: the Ramanujan gap alone.
    density_control : {"exact", "none"}
        See the notes.  "none" is as published: the density drifts (D3).
    generator : torch.Generator on the CPU, optional
        One number is drawn; candidate i has a generator of its own.  Default a fresh generator with seed 0.
    chunk : int, >= 1
        Candidates measured together; it changes no result on a CPU.
    every : int, >= 1
        Candidates between two rows of the trajectory, two tickets and two writes (published: 10).
    directory : path, optional
        Where the search is written.  A second call with the same arguments goes on from there, also with a larger
        `population`, and gives the result of an uninterrupted one to the last bit.
    device : str or torch.device, optional
        Where masks are measured; default the CPU.
    noise : float, >= 0
        Standard deviation of the noise of SynFlow, SynFlow-L2 and iterative SNIP, in units of each layer's own (D10).
        Only a copy for scoring is noisy; coordinates are those of the weights without noise.
    rules : {"iclr2023", "fsp2023"} or Rules
    precision : {"float64", "float32"}
        Of the spectra, see `fsp.spectrum.population`.  With "float32" a candidate whose quantities differ from the
        incumbent's by less than 1e-5 of a singular value may be taken for better or worse than it is; equal layers
        stay equal.
    **options
        Of the method, see `fsp.pruning.options_of`; also ``reference``.

    Returns
    -------
    SearchResult

    Raises
    ------
    ValueError
        Before any long work: a method without randomness, or without what its randomness needs; an unknown method or
        option value; a number out of range; a directory of another search (naming what differs) or with a damaged
        file.  And those of `fsp.pruning.prune`.
    TypeError
        For an option that the method does not have.

    Notes
    -----
    *Interruption.*  Whatever stops a search, such as a KeyboardInterrupt or an error in `batches`, is raised after the
    incumbent has been written to `directory`.

    *Exact density.*  All coordinates tend to grow with a layer's density, so a search that may change counts wins by
    denser layers.  With "exact" every layer of a candidate is brought to mask 0's count *before* it is measured: a
    surplus goes by the fewest votes, a lack is filled by the most votes, ties at random, where the votes for a weight
    are the candidates so far, with this one, that kept it.  Votes are the method's own preference, averaged over its
    randomness, and exist for methods of many rounds and for random ones too.  Layers of equal count are compared, so
    denser ones cannot be favoured, and each incumbent has the asked count and mask 0's count in every layer.  The
    price: layer counts are not searched.

    *What a larger norm may hide.*  A graph is measured without its isolated vertices, so a candidate can gain norm by
    emptying rows or columns of a layer, in the last one whole classes.  No rule forbids this, as published; look at
    `fsp.pruning.diagnose` before trusting a mask.

    *Differences from the published code.*  Exactly k weights are kept, not k - 1 (D16); tickets are kept whether or
    not they changed (D22); ``accepted`` counts ties; weights that were pruned in an earlier round stay pruned (D17).

    References
    ----------
    [1]_, mask search.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> found = search(model, "erk", 0.2, population=4, every=2)
    >>> found.trajectory["candidate"].tolist(), found.trajectory["density"].tolist()
    ([0, 2, 4], [0.2, 0.2, 0.2])
    """
    plan = Plan(population, accept, density_control, chunk, every, directory, device, rules_of(rules), precision)
    source = CandidateSource(model, method, density, batches, noise, generator, options)
    return judge_candidates(plan, source, lambda i, incumbent, votes: source.draw(i), {"search": "population"})


def optimise(
    model: nn.Module,
    method: str,
    density: float,
    *,
    population: int,
    batches: CandidateBatches | Batches | None = None,
    accept: str = "published",
    explore: float = 0.25,
    generator: torch.Generator | None = None,
    chunk: int = 5,
    every: int = 10,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    noise: float = 1.0,
    rules: str | Rules = "fsp2023",
    precision: str = "float64",
    **options: object,
) -> SearchResult:
    """Beyond the paper: recombine the weights of the candidates, not only their layers, at an exact density.

    The first part of the candidates is that of `search` with exact density.  Every further candidate is made of the
    incumbent: in each layer some kept weights are swapped for explored ones, weights that some mask of the method
    kept, led by the leading singular vectors of mask and weights (`fsp.search.recombine.swapped`).  It is measured and
    accepted like any other candidate, by the same rule.

    Parameters
    ----------
    model, method, density, batches, accept, generator, every, directory, device, noise, rules, precision, **options
        As for `search`.
    population : int, >= 1
        Masks that are measured beside mask 0, drawn ones and swapped ones together.
    explore : float, in (0, 1]
        Part of the candidates that the method draws, at least one.
    chunk : int, >= 1
        Swapped candidates that are made of one incumbent and measured together.  Here it changes the result, and so
        do `every`, which cuts chunks, and `population`, which `explore` is a part of: to go on from a directory they
        must be the same.

    Returns
    -------
    SearchResult
        Every kept weight was kept by some drawn mask; layer counts are those of mask 0.

    Raises
    ------
    ValueError, TypeError
        As `search`.

    Notes
    -----
    A larger norm is what this is asked for, and what it gives.  Whether accuracy follows is another question.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> found = optimise(model, "erk", 0.2, population=40)
    >>> bool(found.trajectory["norm"].is_monotonic_increasing), found.trajectory["density"].unique().tolist()
    (True, [0.2])
    """
    if isinstance(explore, bool) or not isinstance(explore, int | float) or not 0 < explore <= 1:
        raise ValueError(f"explore {explore!r} is not in (0, 1]: it is the part of the candidates that is drawn")
    plan = Plan(population, accept, "exact", chunk, every, directory, device, rules_of(rules), precision)
    source = CandidateSource(model, method, density, batches, noise, generator, options)
    drawn = max(1, math.ceil(explore * population))
    wirings = wiring_of(model)
    known: dict[str, tuple[Tensor, tuple]] = {}  # a layer's mask, and the vectors that lead its swaps

    def draw_or_swap(i: int, incumbent: Masks, votes: dict[str, Tensor]) -> Masks:
        if i <= drawn:
            return source.draw(i)
        chance = torch.Generator().manual_seed(source.seed + i)
        masks, weights = {}, used_weights(model, incumbent)
        for name, mask in incumbent.items():
            weight, wiring = weights[name], wirings.get(name, PLAIN)
            if name not in known or known[name][0] is not mask:  # masks are never changed in place
                known[name] = mask, leading_vectors(mask, weight, wiring)
            masks[name] = swapped(mask, weight, votes[name] > 0, known[name][1], chance, wiring)
        return masks

    own = {"search": "optimise", "explore": explore, "population": plan.population, "chunk": plan.chunk}
    return judge_candidates(plan, source, draw_or_swap, own)
