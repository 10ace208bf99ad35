"""Candidates of one search, measured and judged one after the other, and written to a directory on the way."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fsp import masks as mask_algebra
from fsp import spectrum
from fsp.checks import check_choice, check_count, check_device, plain_settings
from fsp.files import CannotResume, digest
from fsp.masks import Masks
from fsp.progress import bar
from fsp.search.acceptance import ACCEPTANCE, norms
from fsp.search.candidates import CandidateSource, first_examples
from fsp.search.recombine import resized
from fsp.search.state import State, as_json, read, write

# masks of candidate i, made with the incumbent and the votes of the candidates before it
MakeCandidate = Callable[[int, Masks, dict[str, Tensor]], Masks]


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


@dataclass
class Plan:
    """How many candidates are judged, how, and where that is kept: arguments of `fsp.search.search`, checked."""

    population: int
    accept: str
    density_control: str
    chunk: int
    every: int
    directory: str | Path | None
    device: str | torch.device | None
    rules: spectrum.Rules
    precision: str

    def __post_init__(self):
        check_choice("accept", self.accept, ACCEPTANCE)
        check_choice("density_control", self.density_control, ("exact", "none"))
        check_choice("precision", self.precision, ("float64", "float32"))
        check_device(self.device)
        for name in ("population", "chunk", "every"):
            value = getattr(self, name)
            check_count(name, value, 1)
            setattr(self, name, int(value))  # JSON holds no integer of numpy


@plain_settings()
def judge_candidates(
    plan: Plan, source: CandidateSource, make_candidate: MakeCandidate, own_settings: dict[str, object]
) -> SearchResult:
    """Judge one chunk of candidates after the other; whatever stops it, what was judged is written.

    Parameters
    ----------
    plan : Plan
    source : CandidateSource
        Draws mask 0.
    make_candidate : callable
        Makes candidates 1, 2, ...
    own_settings : dict
        Of this kind of search; its directory keeps them with those of the plan and the source.

    Returns
    -------
    SearchResult

    Raises
    ------
    CannotResume
        If the directory holds another search, a longer one, or a damaged file.
    """
    written = state = None
    if plan.directory is not None:
        folder, settings = Path(plan.directory), as_json(own_settings | _settings(plan, source))
        written = state = read(folder, settings, source.model)
    if state is None:
        state = _first(plan, source)
    if state.candidate > plan.population:
        raise CannotResume(
            f"{plan.directory} holds a search of {state.candidate} candidates already, more than "
            f"population={plan.population}: choose another directory, or a population at least as large"
        )
    with bar(total=plan.population, initial=state.candidate, unit="mask", desc=f"search {source.method}") as progress:
        try:
            while state.candidate < plan.population:
                # a chunk ends at fixed multiples, among them those of `every`, where there is a row and a ticket
                ends = (state.candidate // n * n + n for n in (plan.chunk, plan.every))
                before, stop = state.candidate, min(*ends, plan.population)
                state = _judged(plan, source, make_candidate, state, stop)
                progress.set_postfix(refresh=False, norm=f"{float(norms(state.values).mean()):.4g}")
                progress.update(stop - before)
                if plan.directory is not None and stop % plan.every == 0:
                    write(folder, state, settings)
                    written = state
        finally:
            if plan.directory is not None and state is not written:
                write(folder, state, settings)
    if state.rows[-1]["candidate"] != state.candidate:  # not in the directory: a larger population has no such row
        state = _recorded(state)
    return SearchResult(state.masks, _coordinates(state), pd.DataFrame(state.rows), state.tickets, state.timing)


def _settings(plan: Plan, source: CandidateSource) -> dict[str, object]:
    """Settings that must be the same for a search to continue in a directory."""
    return {
        **{name: getattr(source, name) for name in ("method", "density", "noise", "seed", "options")},
        **{name: getattr(plan, name) for name in ("accept", "density_control", "every", "rules", "precision")},
        "initial_weights": digest(source.model.state_dict()),
        "scoring_examples": first_examples(source.batches),
    }


def _first(plan: Plan, source: CandidateSource) -> State:
    """Mask 0, measured."""
    begin = time.perf_counter()
    masks = source.draw(0)
    drawn = time.perf_counter()
    values = _measured(plan, source, [masks])[0]
    timing = {"sampling": drawn - begin, "measuring": time.perf_counter() - drawn}
    return _recorded(State(0, masks, values, {name: m.int() for name, m in masks.items()}, timing=timing))


def _measured(plan: Plan, source: CandidateSource, several: list[Masks]) -> Tensor:
    """Coordinates of some masks, (masks, layers, 4)."""
    return spectrum.population(several, source.model, rules=plan.rules, precision=plan.precision, device=plan.device)


def _judged(plan: Plan, source: CandidateSource, make_candidate: MakeCandidate, state: State, stop: int) -> State:
    """The state after the candidates up to `stop`."""
    begin = time.perf_counter()
    votes = {name: v.clone() for name, v in state.votes.items()}
    counts = {name: mask_algebra.number_kept(m) for name, m in state.masks.items()}
    candidates = []
    for i in range(state.candidate + 1, stop + 1):
        masks = make_candidate(i, state.masks, votes)
        for name, m in masks.items():
            _add_votes(votes[name], m)
        if plan.density_control == "exact":
            # a generator of its own: that of the drawing would tie the positions to its draws
            ties = torch.Generator().manual_seed(2**32 + source.seed + i)
            masks = resized(masks, counts, votes, ties)
        candidates.append(masks)
    drawn = time.perf_counter()
    measured = _measured(plan, source, candidates)
    timing = {
        "sampling": state.timing["sampling"] + drawn - begin,
        "measuring": state.timing["measuring"] + time.perf_counter() - drawn,
    }
    best, best_values, accepted = state.masks, state.values, state.accepted
    for masks, values in zip(candidates, measured, strict=True):
        taken = ACCEPTANCE[plan.accept](values, best_values)
        best = {n: masks[n] if t else old for (n, old), t in zip(best.items(), taken.tolist(), strict=True)}
        best_values = torch.where(taken[:, None], values, best_values)
        accepted += int(taken.sum())
    state = State(stop, best, best_values, votes, accepted, state.rows, state.tickets, timing)
    return _recorded(state) if stop % plan.every == 0 else state


def _add_votes(votes: Tensor, mask: Tensor) -> None:
    """Add a vote for every weight that a mask keeps, in place; on the CPU by NumPy, in a seventh of torch's time."""
    if votes.device.type == "cpu":
        np.add(votes.numpy(), mask.numpy(), out=votes.numpy())
    else:
        votes += mask


def _recorded(state: State) -> State:
    """The state with a row and a ticket of its incumbent."""
    found = _coordinates(state)
    explored = sum(int(v.count_nonzero()) for v in state.votes.values())
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


def _coordinates(state: State) -> dict[str, spectrum.Coordinate]:
    """Coordinates of the incumbent."""
    return {name: spectrum.Coordinate(*four) for name, four in zip(state.masks, state.values.tolist(), strict=True)}
