"""The two searches: the published one, and one that recombines weights.  See `fsp.search` for the method."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from fsp import masks as mask_algebra
from fsp import spectrum
from fsp.files import digest
from fsp.masks import Masks, check_density
from fsp.progress import bar
from fsp.pruning.scores import Batches
from fsp.search.acceptance import ACCEPT, norms
from fsp.search.candidates import OfCandidate, check_randomness, drawer, first_examples
from fsp.search.recombine import leading, resized, swapped
from fsp.search.state import State, described, read, write
from fsp.spectrum.graph import PLAIN, Rules, rules_of, wiring_of

Draw = Callable[[int, Masks, dict[str, Tensor]], Masks]  # (candidate, incumbent, votes) -> masks


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes
    ----------
    masks : Masks
        The last incumbent: the method's result.
    coordinates : dict of layer name to Coordinate
        Of `masks`.
    trajectory : pandas.DataFrame
        One row for candidate 0, for every `every`-th and for the last one: ``candidate``; ``ramanujan_gap``,
        ``weighted_gap``, ``imdb`` and ``imsg``, means over the layers that have them; ``norm``, the mean of the layer
        norms; ``density`` that is achieved; ``explored``, the fraction of weights that some candidate kept;
        ``accepted``, layers replaced so far.  All but the last two are the incumbent's.
    tickets : dict of candidate to Masks
        The incumbents of these rows.  Layers that stayed the same share one tensor.
    timing : dict
        Seconds of ``sampling``, which is drawing and resizing masks, and of ``measuring`` them.
    """

    masks: Masks
    coordinates: dict[str, spectrum.Coordinate]
    trajectory: pd.DataFrame
    tickets: dict[int, Masks]
    timing: dict[str, float]


# ---- the two searches --------------------------------------------------------------------------------------------


def search(
    model: nn.Module,
    method: str,
    density: float,
    *,
    population: int,
    batches: OfCandidate | Batches | None = None,
    accept: str = "published",
    density_control: str = "exact",
    generator: torch.Generator | None = None,
    chunk: int = 10,
    every: int = 10,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    noise: float = 1.0,
    rules: str | Rules = "fsp2023",
    **options: object,
) -> SearchResult:
    r"""Mask-population search: keep, layer by layer, the best of many masks of one method.

    Mask 0 is the method on all data without noise.  Candidates 1 to `population` differ by what the method leaves to
    chance (`fsp.search.RANDOMNESS`).  Layer :math:`\ell` of a candidate replaces the incumbent's if

    .. math::
        \text{published:}\quad & IMDB \ge IMDB^* \;\wedge\; S \ge S^* \\
        \text{alt:}\quad & \Delta_r < \Delta_r^* \;\wedge\; S \ge S^* \\
        \text{strict:}\quad & IMDB \ge IMDB^* \;\wedge\; S \ge S^* \;\wedge\; IMSG \le IMSG^* \\
        \text{norm:}\quad & S \ge S^*

    so that ties replace.  Undefined entries count as 0, as published, but for :math:`\Delta_r` in "alt": a layer
    whose :math:`\Delta_r` is undefined is never replaced there and never replaces (D8).

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
    accept : {"published", "alt", "strict", "norm"}
        "published" is the default of the published code, "alt" its later option (D29), "strict" an earlier one.
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
    KeyboardInterrupt
        After the incumbent has been written to `directory`.

    Notes
    -----
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
    if density_control not in ("exact", "none"):
        raise ValueError(f'density_control is "exact" or "none", not {density_control!r}')
    job = _job(locals())
    exact = density_control == "exact"
    settings = {"search": "population", "density_control": density_control, **job.settings}

    def draw(i: int, masks: Masks, votes: dict[str, Tensor]) -> Masks:
        return job.draw(i)

    return _run(job, draw, settings, exact)


def optimise(
    model: nn.Module,
    method: str,
    density: float,
    *,
    population: int,
    batches: OfCandidate | Batches | None = None,
    accept: str = "published",
    explore: float = 0.25,
    generator: torch.Generator | None = None,
    chunk: int = 5,
    every: int = 10,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    noise: float = 1.0,
    rules: str | Rules = "fsp2023",
    **options: object,
) -> SearchResult:
    """Beyond the paper: recombine the weights of the candidates, not only their layers, at an exact density.

    The first part of the candidates is that of `search` with exact density.  Every further candidate is made of the
    incumbent: in each layer some kept weights are swapped for explored ones, weights that some mask of the method
    kept, led by the leading singular vectors of mask and weights (`fsp.search.recombine.swapped`).  It is measured and
    accepted like any other candidate, by the same rule.

    Parameters
    ----------
    model, method, density, batches, accept, generator, every, directory, device, noise, rules, **options
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
    ValueError, TypeError, KeyboardInterrupt
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
    job = _job(locals())
    drawn = max(1, math.ceil(explore * population))
    own = {"search": "optimise", "explore": explore, "population": population, "chunk": chunk}
    parameters, wirings = dict(model.named_parameters()), wiring_of(model)
    led: dict[str, tuple[Tensor, tuple]] = {}

    def vectors(name: str, mask: Tensor) -> tuple:
        if name not in led or led[name][0] is not mask:  # masks are never changed in place
            led[name] = mask, leading(mask, parameters[name], wirings.get(name, PLAIN))
        return led[name][1]

    def draw(i: int, masks: Masks, votes: dict[str, Tensor]) -> Masks:
        if i <= drawn:
            return job.draw(i)
        chance = torch.Generator().manual_seed(job.seed + i)
        return {
            n: swapped(m, parameters[n], votes[n] > 0, vectors(n, m), chance, wirings.get(n, PLAIN))
            for n, m in masks.items()
        }

    return _run(job, draw, own | job.settings, True)


# ---- what they share ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Checked arguments of a search."""

    model: nn.Module
    method: str
    population: int
    accept: str
    chunk: int
    every: int
    folder: Path | None
    device: str | torch.device | None
    rules: str | Rules
    seed: int
    draw: Callable[[int], Masks]
    settings: dict[str, object]


def _job(given: dict[str, object]) -> _Job:
    """Check what both searches are given, and draw the seed."""
    model, method, batches, noise = (given[name] for name in ("model", "method", "batches", "noise"))
    check_density(given["density"])
    check_randomness(method, batches, noise)
    if given["accept"] not in ACCEPT:
        raise ValueError(f"accept {given['accept']!r} is unknown: use one of {', '.join(ACCEPT)}")
    rules_of(given["rules"])
    for name in ("population", "chunk", "every"):
        if not isinstance(given[name], int) or isinstance(given[name], bool) or given[name] < 1:
            raise ValueError(f"{name}={given[name]!r}: expected a whole number of at least 1")
    generator = torch.Generator().manual_seed(0) if given["generator"] is None else given["generator"]
    seed = int(torch.randint(2**31, (), generator=generator))
    draw = drawer(model, method, given["density"], batches=batches, noise=noise, seed=seed, options=given["options"])
    folder = None if given["directory"] is None else Path(given["directory"])
    settings = {}
    if folder is not None:
        settings = {
            "method": method,
            "density": float(given["density"]),
            "accept": given["accept"],
            "every": given["every"],
            "noise": float(noise),
            "rules": described(given["rules"]),
            "seed": seed,
            "options": described(given["options"]),
            "initial_weights": digest(model.state_dict()),
            "scoring_examples": described(first_examples(batches)),
        }
    return _Job(
        model,
        method,
        *(given[n] for n in ("population", "accept", "chunk", "every")),
        folder,
        given["device"],
        given["rules"],
        seed,
        draw,
        settings,
    )


def _run(job: _Job, draw: Draw, settings: dict[str, object], exact: bool) -> SearchResult:
    """Judge one chunk of candidates after the other; write what there is, also when interrupted."""
    state = None
    if job.folder is not None:
        parameters = dict(job.model.named_parameters(remove_duplicate=False))
        state = read(job.folder, settings, {name: p.device for name, p in parameters.items()})
    if state is None:
        state = _first(job)
    if state.candidate > job.population:
        raise ValueError(
            f"{job.folder} holds a search of {state.candidate} candidates already, more than "
            f"population={job.population}: choose another directory, or a population at least as large"
        )
    start = state.candidate
    with bar(total=job.population, initial=start, unit="mask", desc=f"search {job.method}") as progress:
        try:
            while state.candidate < job.population:
                # a chunk ends at fixed multiples, among them those of `every`, where it is written
                ends = (state.candidate // n * n + n for n in (job.chunk, job.every))
                before, state = state, _judged(job, draw, state, min(*ends, job.population), exact)
                progress.set_postfix(refresh=False, norm=f"{float(norms(state.values).mean()):.4g}")
                progress.update(state.candidate - before.candidate)
                if job.folder is not None and state.candidate % job.every == 0:
                    write(job.folder, state, settings)
        except KeyboardInterrupt:
            if job.folder is not None:
                write(job.folder, state, settings)
            raise
    if job.folder is not None and state.candidate != start:
        write(job.folder, state, settings)
    if state.rows[-1]["candidate"] != state.candidate:  # not in the state: a larger population has no such row
        explored = sum(int(v.count_nonzero()) for v in state.votes.values())
        state = _recorded(state, explored)
    found = dict(zip(state.masks, state.values.tolist(), strict=True))
    return SearchResult(
        state.masks,
        {name: spectrum.Coordinate(*values) for name, values in found.items()},
        pd.DataFrame(state.rows),
        state.tickets,
        state.timing,
    )


def _first(job: _Job) -> State:
    """Mask 0, measured."""
    begin = time.perf_counter()
    masks = job.draw(0)
    drawn = time.perf_counter()
    values = spectrum.population([masks], job.model, rules=job.rules, device=job.device)[0]
    timing = {"sampling": drawn - begin, "measuring": time.perf_counter() - drawn}
    votes = {name: m.int() for name, m in masks.items()}
    state = State(0, masks, values, votes, timing=timing)
    return _recorded(state, sum(int(m.sum()) for m in masks.values()))


def _judged(job: _Job, draw: Draw, state: State, stop: int, exact: bool) -> State:
    """The state after the candidates up to `stop`."""
    begin = time.perf_counter()
    votes = {name: v.clone() for name, v in state.votes.items()}
    counts = {name: int(m.sum()) for name, m in state.masks.items()}
    candidates, explored = [], []
    for i in range(state.candidate + 1, stop + 1):
        masks = draw(i, state.masks, votes)
        for name, m in masks.items():
            votes[name] += m
        if exact:
            # a generator of its own: that of the drawing would tie the positions to its draws
            ties = torch.Generator().manual_seed(2**32 + job.seed + i)
            masks = resized(masks, counts, votes, ties)
        candidates.append(masks)
        explored.append(sum(int(v.count_nonzero()) for v in votes.values()) if i % job.every == 0 else 0)
    drawn = time.perf_counter()
    measured = spectrum.population(candidates, job.model, rules=job.rules, device=job.device)
    timing = {
        "sampling": state.timing["sampling"] + drawn - begin,
        "measuring": state.timing["measuring"] + time.perf_counter() - drawn,
    }
    state = dataclasses.replace(state, votes=votes, timing=timing)
    for masks, values, reached in zip(candidates, measured, explored, strict=True):
        taken = ACCEPT[job.accept](values, state.values)
        state = dataclasses.replace(
            state,
            candidate=state.candidate + 1,
            masks={n: masks[n] if t else old for (n, old), t in zip(state.masks.items(), taken.tolist(), strict=True)},
            values=torch.where(taken[:, None], values, state.values),
            accepted=state.accepted + int(taken.sum()),
        )
        if state.candidate % job.every == 0:
            state = _recorded(state, reached)
    return state


def _recorded(state: State, explored: int) -> State:
    """The state with a row and a ticket of its incumbent."""
    names = [str(i) for i in range(len(state.values))]
    found = {n: spectrum.Coordinate(*v) for n, v in zip(names, state.values.tolist(), strict=True)}
    row = {
        "candidate": state.candidate,
        **spectrum.layer_mean(found)._asdict(),
        "norm": spectrum.spectrum_norm(found),
        "density": mask_algebra.density(state.masks),
        "explored": explored / sum(m.numel() for m in state.masks.values()),
        "accepted": state.accepted,
    }
    tickets = {**state.tickets, state.candidate: state.masks}
    return dataclasses.replace(state, rows=[*state.rows, row], tickets=tickets)
