r"""Lottery tickets: iterative magnitude pruning (IMP) with weight rewinding.

Train, prune the smallest weights, put what is left back to an early point of the training, train again.  IMP needs
many trainings, so it is no pruning at initialisation; it is the bar that pruning at initialisation is measured by.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from fsp import masks as mask_algebra
from fsp.checks import check_count, given_or_seed_0
from fsp.data import Data, is_count
from fsp.files import CannotResume, differences, digest, load_tensors, replacing, save_tensors
from fsp.masks import Masks, apply_, check_density, check_scope, keep_counts, kept_count, prunable
from fsp.progress import bar
from fsp.pruning.scores import magnitude
from fsp.training.hooks import Snapshots
from fsp.training.resume import identity
from fsp.training.settings import is_number
from fsp.training.train import History, TrainConfig, check_last_batch, fit, steps

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Level:
    r"""One training of `imp` and the masks it was made with.

    Attributes
    ----------
    level : int
        0 is the dense training.
    density : float
        Fraction of the prunable weights kept.
    masks : Masks
        On the model's device.
    history : fsp.training.History
    rewound : dict of name to Tensor
        :math:`\theta_k`, all parameters and buffers at the rewind point, dense and on the CPU; the same for every
        level.  ``rewind_(model, level.rewound, level.masks)`` makes the ticket.  Empty if the dense training diverged
        before step k.
    """

    level: int
    density: float
    masks: Masks = field(repr=False)
    history: History = field(repr=False)
    rewound: State = field(repr=False)


# ---- how many weights a level keeps ------------------------------------------------------------------------------


def kept_by_level(n: int, rate: float = 0.2, *, levels: int | None = None, density: float | None = None) -> list[int]:
    r"""Number of weights kept at each level of `imp`, from level 0, which keeps all.

    .. math:: K_0 = n, \qquad K_j = K_{j-1} - \lfloor p\, K_{j-1} \rfloor

    Parameters
    ----------
    n : int, >= 1
        Prunable weights.
    rate : float, in (0, 1)
        p, the fraction of the remaining weights that a level prunes; read as the decimal it prints as.
    levels : int, >= 1
        Number of prunings.
    density : float, in (0, 1)
        Instead of `levels`: the first level that would fall to ``kept_count(n, density)`` or below is the last, and
        keeps exactly that many.

    Returns
    -------
    list of int
        ``len(...) - 1`` prunings, each keeping fewer weights than the one before.

    Raises
    ------
    ValueError
        If both or neither of `levels` and `density` are given, one of them, `n` or `rate` is out of range, or a level
        would prune nothing, because fewer than 1 / rate weights are left.

    Examples
    --------
    >>> kept_by_level(1000, levels=3)
    [1000, 800, 640, 512]
    >>> kept_by_level(1000, density=0.3)
    [1000, 800, 640, 512, 410, 328, 300]
    >>> len(kept_by_level(270_896, density=0.02)) - 1
    18
    """
    check_count("n", n, 1)
    if not (is_number(rate) and 0 < rate < 1):
        raise ValueError(
            f"rate {rate!r} is not in (0, 1): it is the fraction of remaining weights to prune, such as 0.2"
        )
    if (levels is None) == (density is None):
        raise ValueError(f"levels={levels!r} and density={density!r}: give exactly one of them, to say where IMP ends")
    if density is None and not is_count(levels, 1):
        raise ValueError(f"levels {levels!r} is not a whole number of at least 1")
    end = 0
    if density is not None:
        check_density(density)
        end = kept_count(n, density)
        if end == n:
            raise ValueError(
                f"density {density!r} keeps all {n} weights: there is nothing to prune, use fsp.training.fit"
            )
    counts = [n]
    while counts[-1] > end and len(counts) - 1 != levels:
        counts.append(max(_pruned_once(counts[-1], rate), end))
        if counts[-1] == counts[-2]:
            raise ValueError(
                f"level {len(counts) - 1} would prune nothing: {counts[-2]} of {n} weights are left, fewer than "
                f"1 / rate = {1 / rate:g}; ask for fewer levels, a higher density or a higher rate"
            )
    return counts


def _pruned_once(kept: int, rate: float) -> int:
    """What is left of `kept` weights after one level."""
    return kept - math.floor(Fraction(repr(float(rate))) * kept)


def _plan(
    sizes: Mapping[str, int], scope: str, rate: float, levels: int | None, density: float | None
) -> list[dict[str, int]]:
    """Weights kept at each level: under "" in global scope, tensor by tensor in layer scope."""
    total = kept_by_level(sum(sizes.values()), rate, levels=levels, density=density)
    if scope == "global":
        return [{"": kept} for kept in total]
    end = {name: 0 if density is None else kept_count(n, density) for name, n in sizes.items()}
    if end == sizes:
        raise ValueError(f"density {density!r} keeps all weights of every layer: there is nothing to prune")
    plan = [dict(sizes)]
    while len(plan) < len(total) and plan[-1] != end:
        plan.append({name: max(_pruned_once(kept, rate), end[name]) for name, kept in plan[-1].items()})
    if density is not None:
        plan[-1] = end
    for number, (before, after) in enumerate(pairwise(plan), start=1):
        if before == after:
            raise ValueError(
                f"level {number} would prune nothing: no layer that is still to be pruned keeps 1 / rate = "
                f"{1 / rate:g} weights; ask for fewer levels, a higher density or a higher rate"
            )
    return plan


# ---- the levels --------------------------------------------------------------------------------------------------


def imp(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    levels: int | None = None,
    density: float | None = None,
    rate: float = 0.2,
    rewind: int = 0,
    scope: str = "global",
    exclude: Iterable[str] = (),
    directory: str | Path | None = None,
    generator: torch.Generator | None = None,
) -> list[Level]:
    r"""Find lottery tickets by iterative magnitude pruning with rewinding.

    Level 0 trains the dense model from the weights it has, :math:`\theta_0`, to the end, :math:`\theta_T`, and keeps
    a copy of :math:`\theta_k`, the weights after k = `rewind` steps.  Level j prunes the fraction `rate` of the
    remaining weights, the smallest by :math:`|\theta_T|` of level j - 1, sets all parameters and buffers (batch norm
    included) back to :math:`\theta_k`, and trains what is left from step k to the end.

    Parameters
    ----------
    model : nn.Module
        With its initial weights.  Trained in place, left in eval mode with the weights that end the last level.
    data : fsp.data.Data
        On the model's device.
    config : TrainConfig
        Of every level; ``config.seed`` gives each level the same order of the data.
    levels : int, >= 1
        Number of prunings; there is one training more.
    density : float, in (0, 1)
        Instead of `levels`: prune until exactly ``kept_count(N, density)`` weights are left, as many as `fsp.pruning`
        keeps, by a smaller last step.  See `kept_by_level`.
    rate : float, in (0, 1)
        Fraction of the remaining weights that a level prunes: :math:`K_j = K_{j-1} - \lfloor p K_{j-1} \rfloor`.
    rewind : int, from 0 to ``steps(data, config) - 1``
        k in optimiser steps; 0 rewinds to the initial weights, e epochs are
        ``e * steps(data, config) // config.epochs``.
    scope : {"global", "layer"}
        Rank all weights together, or every tensor by itself.  "layer" counts tensor by tensor; with `density` the
        last level brings each to its own ``kept_count``, which prunes more than `rate` of a tensor with too few
        weights left for a smaller step.
    exclude : iterable of str
        Parameters or modules to leave dense, outside the masks.
    directory : path, optional
        Where every level is written as soon as it is finished, and a checkpoint of the level in training at least
        every five minutes.  A second call with the same arguments continues there, and one with more `levels` goes on
        after the last level.
    generator : torch.Generator on the CPU, optional
        Breaks ties; one number is drawn.  Default a fresh generator with seed 0.

    Returns
    -------
    list of Level
        From level 0.  Ends early with a level whose ``history.status`` is "diverged": its weights cannot be ranked.

    Raises
    ------
    ValueError
        Before any training: both or neither of `levels` and `density`, one of them, `rate` or `rewind` out of range,
        a level that would prune nothing, an unknown scope or excluded name, no prunable weight; a last batch of one
        example that the model cannot be trained on.
    fsp.files.CannotResume
        A ValueError.  Before any training: a directory with levels of other settings, data or initial weights (naming
        what differs).  While levels are read: a damaged file, or a level that does not follow from the one before it
        (naming the file and what to delete).

    Notes
    -----
    From step k on, each level meets the batches, augmentation and learning rates that level 0 met there.  Its
    optimiser is fresh: the momentum at step k is not kept, as in the code of [2]_, which drops it at level 0 too,
    while here level 0 is one training without a break, as in [2]_'s algorithm.  Buffers that a model does not save in
    its ``state_dict`` are not rewound.

    The published code rounds rate * K up and then prunes one weight more, so it keeps one or two fewer at each level.

    On one machine with the same versions an interrupted call that is continued gives the weights of an uninterrupted
    one to the last bit, as far as `fsp.training.fit` is repeatable: on the CPU, without dropout.

    A directory holds ``settings.json``; ``rewind.safetensors`` (:math:`\theta_k`); and for each level
    ``level_NN.masks.safetensors`` (read by `fsp.masks.load`) and ``level_NN.safetensors`` (:math:`\theta_T`, all
    parameters and buffers, with the history and digests of the masks and of :math:`\theta_k` in the header).  The
    latter is written last: without it a level counts as not finished.  Every file is checked when it is read, and
    the masks of a level against the weights that the level before it ended with.

    References
    ----------
    .. [1] Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019:
       IMP, rewinding to the initial weights.
    .. [2] Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020,
       algorithm 1: rewinding to step k.

    Examples
    --------
    >>> from fsp.data import load
    >>> model, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")
    >>> tickets = imp(model, data, TrainConfig(epochs=1), levels=2, rewind=3)
    >>> [(level.level, level.density, level.history.steps) for level in tickets]
    [(0, 1.0, 11), (1, 0.8, 8), (2, 0.640625, 8)]
    >>> rewind_(model, tickets[-1].rewound, tickets[-1].masks)
    """
    check_scope(scope)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model, exclude=exclude).items()}
    plan = _plan({name: m.numel() for name, m in masks.items()}, scope, rate, levels, density)
    last_step = steps(data, config)
    if not is_count(rewind, 0) or rewind >= last_step:
        raise ValueError(
            f"rewind={rewind!r}: expected a whole number of steps from 0 to {last_step - 1}, for a training has "
            f"{last_step} steps"
        )
    check_last_batch(model, data, config)
    generator = given_or_seed_0(generator)
    seed = int(torch.randint(2**31, (), generator=generator, dtype=torch.int64, device="cpu"))
    folder = None if directory is None else Path(directory)
    if folder is not None:
        settings = {"rate": float(rate), "rewind": int(rewind), "scope": scope, "prunable": list(masks)}
        _check_settings(folder, settings | {"seed_of_ties": seed} | identity(model, data, config))

    found: list[Level] = []
    rewound: State = {}
    with bar(total=len(plan), unit="level", desc="imp") as progress:
        for number, counts in enumerate(plan):
            if number > 0:
                # ties of its own for each level, so that a continued call draws as an uninterrupted one
                ties = torch.Generator().manual_seed(seed + number)
                masks = _without_smallest(model, masks, counts, ties)
            stored = None if folder is None else _read(folder, number, masks, rewound)
            if stored is not None:
                history, weights, rewound = stored
                model.load_state_dict(weights)
                model.eval()
            else:
                checkpoint = None if folder is None else folder / f"level_{number:02d}.checkpoint.safetensors"
                if number == 0:
                    snapshots = Snapshots(model, [rewind])
                    history = fit(model, data, config, hooks=[snapshots], checkpoint=checkpoint)
                    rewound = {name: t.cpu() for name, t in snapshots.states.get(rewind, {}).items()}
                else:
                    rewind_(model, rewound, masks)
                    history = fit(model, data, config, masks=masks, start_step=rewind, checkpoint=checkpoint)
            found.append(Level(number, mask_algebra.density(masks), masks, history, rewound))
            if folder is not None and stored is None:
                _write(folder, found[-1], model)
            if history.status == "diverged":
                break
            accuracy = history.epochs[-1]["validation_accuracy"]
            progress.set_postfix(refresh=False, density=f"{found[-1].density:.3g}", validation=f"{accuracy:.3f}")
            progress.update()
    return found


def rewind_(model: nn.Module, rewound: Mapping[str, Tensor], masks: Masks) -> None:
    r"""Make a ticket: give a model the weights of the rewind point, 0 where they are pruned, in place.

    Parameters
    ----------
    model : nn.Module
    rewound : dict of name to Tensor
        All parameters and buffers, see `Level`.
    masks : Masks
        Empty for the dense model.

    Raises
    ------
    RuntimeError
        If the weights are not those of such a model.
    ValueError
        If a mask fits no parameter.
    """
    model.load_state_dict(rewound)
    apply_(model, masks)


def _without_smallest(model: nn.Module, masks: Masks, counts: Mapping[str, int], generator: torch.Generator) -> Masks:
    """Masks of the largest remaining weights, as many as `counts` says: in all under "", or for each tensor."""
    remaining = {name: s[masks[name]] for name, s in magnitude(model, masks).items()}
    if "" in counts:
        flat = keep_counts({"": torch.cat([*remaining.values()])}, counts, generator)[""]
        kept = dict(zip(remaining, flat.split([len(s) for s in remaining.values()]), strict=True))
    else:
        kept = keep_counts(remaining, counts, generator)
    return {name: mask.masked_scatter(mask, kept[name]) for name, mask in masks.items()}


# ---- the directory -----------------------------------------------------------------------------------------------


def _check_settings(folder: Path, settings: dict[str, object]) -> None:
    """Write the settings, or raise if the levels in the folder were made with others."""
    path = folder / "settings.json"
    if not path.exists():
        if levels := sorted(folder.glob("level_*")):
            raise CannotResume(
                f"{levels[0]} was made with unknown settings, as {path} is missing: choose another directory"
            )
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    try:
        different = differences(json.loads(path.read_text(encoding="utf-8")), settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise CannotResume(f"{path} is damaged ({error!r}): choose another directory, or delete this one") from error
    if different:
        raise CannotResume(
            f"{folder} holds levels of another run: {different}. Choose another directory, or give the same settings, "
            "data and model, with the weights it had before the first call"
        )


def _paths(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Files of one level: its last weights, its masks, and the weights of the rewind point."""
    level = f"level_{number:02d}"
    return folder / f"{level}.safetensors", folder / f"{level}.masks.safetensors", folder / "rewind.safetensors"


def _write(folder: Path, level: Level, model: nn.Module) -> None:
    """Write a level; its last weights, which make it count, come last."""
    path, masks_path, rewound_path = _paths(folder, level.level)
    mask_algebra.save(masks_path, level.masks, level=level.level)
    if level.level == 0:
        save_tensors(rewound_path, "rewind point", level.rewound, {})
    about: dict[str, object] = {
        "history": asdict(level.history),
        "masks": digest(level.masks),
        "rewound": digest(level.rewound),
    }
    save_tensors(path, "level", model.state_dict(), about)


def _read(folder: Path, number: int, masks: Masks, rewound: State) -> tuple[History, State, State] | None:
    """History, last weights and rewind point of a level, all checked; None if it was not finished.

    `masks` and `rewound` are those it has to be made with, `rewound` from level 1.
    """
    path, masks_path, rewound_path = _paths(folder, number)
    if not path.exists():
        return None
    remedy = f"delete {path}, and the next call trains this level again"
    try:
        weights, about = load_tensors(path, "level")
        stored = mask_algebra.load(masks_path)
        if number == 0:
            rewound, _ = load_tensors(rewound_path, "rewind point")
    except (OSError, ValueError) as error:
        raise CannotResume(f"{error}: {remedy}") from error
    if not digest(masks) == about["masks"] == digest(stored):
        kept, asked = (sum(int(m.count_nonzero()) for m in each.values()) for each in (stored, masks))
        raise CannotResume(
            f"{masks_path} keeps {kept} weights, and not the {asked} that follow from the level before it: it was made "
            f"with another density, or is damaged. Choose another directory, or {remedy}"
        )
    if digest(rewound) != about["rewound"]:
        raise CannotResume(f"{path} was not made from the weights in {rewound_path}: {remedy}")
    return History(**about["history"]), weights, rewound
