"""One style for every figure, and one look for a method wherever it appears."""

import os
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline

from fsp.compendium import stats
from fsp.files import replacing

COLUMN, PAGE = 3.4, 7.0  # widths of a figure, in inches


class Look(NamedTuple):
    """How a method is drawn: told apart by marker and dash as well, for readers in grey."""

    label: str
    colour: str
    marker: str | tuple[int, int, float] | Outline  # the tuple: corners, 1 for a star, angle in degrees
    dash: tuple = ()


# Matplotlib has fewer filled markers that stay apart when small than there are methods.
UPPER_HALF, LEFT_HALF, LOWER_HALF = (Outline.wedge(angle, angle + 180) for angle in (0, 90, 180))  # of a disc
BEAM = Outline([(-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4), (-1, -0.4)], closed=True)
POST = Outline([(-0.4, -1), (0.4, -1), (0.4, 1), (-0.4, 1), (-0.4, -1)], closed=True)
RHOMBUS = Outline([(-1, 0), (0, -0.6), (1, 0), (0, 0.6), (-1, 0)], closed=True)  # SynFlow's diamond, lying
HOURGLASS = Outline([(-1, -1), (1, -1), (0.35, 0), (1, 1), (-1, 1), (-0.35, 0), (-1, -1)], closed=True)
CHEVRON = Outline([(-1, -0.9), (0, 0), (1, -0.9), (1, 0.1), (0, 1), (-1, 0.1), (-1, -0.9)], closed=True)
TEE = Outline(
    [(-1, 1), (1, 1), (1, 0.3), (0.4, 0.3), (0.4, -1), (-0.4, -1), (-0.4, 0.3), (-1, 0.3), (-1, 1)], closed=True
)


class _Looks(dict):
    """Looks by key; a method that has none yet is a grey cross under its own name."""

    def __missing__(self, method: str) -> Look:
        return Look(method.replace("_", " "), "#555555", "X", (1, 2))


# Colours of Okabe and Ito, for colour-blind readers, and darker or lighter ones for a method's relatives; solid lines
# for methods that look at weights or data.
METHODS = _Looks(
    {
        "dense": Look("Dense", "#000000", "D"),
        "random": Look("Random", "#999999", "X", (1, 1)),
        "uniform": Look("Uniform", "#6e6e6e", "P", (1, 1)),
        "er": Look("ER", "#b98a4a", "<", (3, 1)),
        "erk": Look("ERK", "#e69f00", "^", (3, 1)),
        "uniform_plus": Look("Uniform+", "#333333", TEE, (1, 1)),
        "igq": Look("IGQ", "#7a5200", "p", (3, 1)),
        "balanced": Look("Balanced", "#009e73", BEAM, (5, 1, 1, 1)),
        "pyramidal": Look("Pyramidal", "#7a8a00", ">", (5, 1, 1, 1)),
        "smart_ratio": Look("Smart-ratio", "#00664a", "*", (5, 1, 1, 1)),
        "ratio_of": Look("Ratio of another mask", "#a58fd0", POST, (2, 2)),
        "regular": Look("Regular", "#17a2a2", (4, 1, 0), (2, 1)),
        "ramanujan": Look("Ramanujan", "#0b5d66", CHEVRON, (4, 1, 1, 1)),
        "magnitude": Look("Magnitude", "#56b4e9", "v"),
        "snip": Look("SNIP", "#0072b2", "o"),
        "taylor": Look("Taylor", "#4a6fe3", UPPER_HALF),
        "iterative_snip": Look("Iterative SNIP", "#00304d", LEFT_HALF),
        "force": Look("FORCE", "#3f9fbf", LOWER_HALF),
        "grasp": Look("GraSP", "#cc79a7", "s"),
        "synflow": Look("SynFlow", "#d55e00", "d"),
        "synflow_l2": Look("SynFlow-L2", "#8a2f00", RHOMBUS),
        "phew": Look("PHEW", "#7b2d8e", (6, 1, 0)),
        "imp": Look("IMP", "#b0003a", HOURGLASS),
        "search_published": Look("Published search", "#e0529c", "s"),
        "search_gap": Look("Search for the gap", "#3d5a1f", "P", (3, 1, 1, 1)),
        "search_pretrained": Look("Search after pretraining", "#2f6fdb", "^", (5, 1)),
        "search_optimised": Look("Optimised masks", "#00a5c4", "d", (2, 1)),
        "search_again": Look("Another draw", "#a0522d", "v", (1, 1)),
        "set": Look("SET", "#56b4e9", "v", (1, 1)),
        "rigl": Look("RigL", "#cc79a7", "d", (6, 1, 1, 1)),
        "set_itop": Look("SET-ITOP", "#0072b2", "o"),
        "rigl_itop": Look("RigL-ITOP", "#d55e00", "s", (5, 1.5)),
        "set_itop_guided": Look("SET-ITOP, guided", "#009e73", "P", (2, 1)),
        "static": Look("Static ERK", "#e69f00", "^", (3, 1)),
        "recipe_default": Look("Default training", "#4d4d4d", "o", (1, 1)),
        "recipe_labels": Look("Smoothed labels alone", "#8a6d3b", "^", (3, 1)),
        "recipe_all": Look("Whole recipe", "#20208a", "s"),
        "shuffled": Look("Same density, random", "#999999", "X", (1, 1)),
        "units_left": Look("Same density and units left, random", "#5c5c5c", "*", (1, 2)),
        "rewired": Look("Same degrees, random", "#4b3fa0", "D", (4, 1, 1, 1)),
        "one_network": Look("One network", "#000000", "D"),
        "independent": Look("Independent networks", "#0072b2", "o"),
        "independent_full": Look("Independent, full budget each", "#56b4e9", "v", (5, 1)),
        "snapshot": Look("Snapshots of one training", "#7a5200", "p", (3, 1)),
        "bagged": Look("Bagged networks", "#b0003a", HOURGLASS, (2, 1)),
        "dropout": Look("Dropout", "#3d5a1f", "d", (3, 1, 1, 1)),
        "pat_antirandom": Look("Antirandom children", "#d55e00", "s"),
        "pat_random": Look("Random children", "#7f7f7f", "X", (1, 1)),
        "pat_antirandom_constant": Look("Antirandom, constant rate", "#8a2f00", RHOMBUS, (5, 1, 1, 1)),
        "pat_random_constant": Look("Random, constant rate", "#4d4d4d", BEAM, (1, 2)),
        "clones": Look("Unpruned clones", "#009e73", "P", (3, 1)),
        "one_mask": Look("One mask for all", "#e69f00", "^", (4, 1)),
        "pat_partition": Look("Partition of the weights", "#cc79a7", "<", (2, 2)),
        "pat_far_apart": Look("Far apart in spectrum", "#4b3fa0", ">", (4, 1, 1, 1)),
        "pat_high_norm": Look("Highest spectrum norm", "#7b2d8e", POST, (6, 1, 1, 1)),
        "pat_neurons": Look("Random neurons pruned", "#17a2a2", (4, 1, 0), (2, 1)),
        "ecn": Look("ECN", "#1b6e1b", "o"),
        "ecn_no_stream": Look("ECN without additive stream", "#c0392b", "v", (4, 1.5)),
        "ecn_no_growth": Look("ECN without growth", "#8fbc5a", ">", (3, 1, 1, 1)),
        "resnet": Look("ResNet, equal parameters", "#2c5aa0", "s", (5, 1)),
        "resnet_adds": Look("ResNet, equal multiply-adds", "#7fa6d9", "D", (5, 1)),
        "plain": Look("CNN, equal parameters", "#6b4226", "^", (2, 1)),
        "plain_adds": Look("CNN, equal multiply-adds", "#b08d6e", "<", (2, 1)),
    }
)

# Symbol and name of each quantity of a network, for axes: lambda and IMSG have the unit of the weights.
QUANTITIES = {
    "ramanujan_gap": (r"$\Delta_r$", r"Ramanujan gap $\Delta_r$"),
    "weighted_gap": (r"$\lambda$", r"weighted gap $\lambda$"),
    "imdb": ("IMDB", "IMDB"),
    "imsg": ("IMSG", "IMSG"),
    "spectrum_norm": ("norm", r"spectrum norm $\|v\|_2$"),
}


def use_style() -> None:
    """Set the figure style of the compendium for this process."""
    sns.set_theme(context="paper", style="ticks")
    plt.style.use(Path(__file__).with_name("fsp.mplstyle"))


def looks(methods: list[str]) -> dict:
    """Arguments that make seaborn draw methods by their looks.

    Parameters
    ----------
    methods : list of str
        In the order of the legend.

    Returns
    -------
    dict
        ``palette``, ``markers``, ``dashes``, ``hue_order`` and ``style_order``, keyed by label.

    Examples
    --------
    >>> looks(["snip"])["palette"]
    {'SNIP': '#0072b2'}
    """
    chosen = [METHODS[m] for m in methods]
    labels = [look.label for look in chosen]
    return {
        "palette": {look.label: look.colour for look in chosen},
        "markers": {look.label: look.marker for look in chosen},
        "dashes": {look.label: look.dash for look in chosen},
        "hue_order": labels,
        "style_order": labels,
    }


def save(figure: Figure, directory: str | Path, stem: str, panel: str = "") -> list[Path]:
    """Write a figure as PNG for reading and PDF for papers, atomically and without time stamps.

    Where the environment says ``FSP_FIGURES=0`` no file is written: `fsp.compendium.renew.check` would not read them.

    Parameters
    ----------
    figure : Figure
    directory : path
    stem : str
        The notebook's name without extension.
    panel : str
        Appended to the name where a notebook has several figures.

    Returns
    -------
    list of Path
        The two files, or nothing.
    """
    if os.environ.get("FSP_FIGURES") == "0":
        return []
    name = f"{stem}_{panel}" if panel else stem
    paths = [Path(directory) / f"{name}{suffix}" for suffix in (".png", ".pdf")]
    metadata = [{"Software": None}, {"CreationDate": None, "Producer": None, "Creator": None}]
    for path, kept in zip(paths, metadata, strict=True):
        with replacing(path) as temporary:
            figure.savefig(temporary, bbox_inches="tight", metadata=kept)
    return paths


def t_interval(values: pd.Series) -> tuple[float, float]:
    """Error bar for seaborn: the 95 % interval of `fsp.compendium.stats.mean`; of one value, the value itself.

    Parameters
    ----------
    values : Series

    Returns
    -------
    low, high : float
    """
    found = stats.mean(values)
    return (found.low, found.high) if found.n > 1 else (found.value, found.value)


def legend_below(figure: Figure, axes: Axes, *, columns: int = 5, title: str = "") -> None:
    """Move the legend of one axes below the figure, for all panels.

    Entries of a numeric section (sizes by density) carry the section's name.

    Parameters
    ----------
    figure : Figure
        With ``layout="constrained"``.
    axes : Axes
        The one whose legend it is.
    columns : int
    title : str
        Such as what a band shows, and n.
    """
    legend = axes.get_legend()
    entries, section = [], ""
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        label = text.get_text()
        if handle.get_markersize() == 0:  # seaborn's heading of a section
            section = label
        else:
            entries.append((handle, f"{section} {label}" if label.replace(".", "", 1).isdigit() else label))
    legend.remove()
    figure.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=columns, title=title)


def forest(axes: Axes, estimates: pd.DataFrame, label: str) -> None:
    """Draw estimates with their intervals, one row a quantity, one marker a column.

    Parameters
    ----------
    axes : Axes
    estimates : DataFrame of `fsp.compendium.stats.Estimate`
        Index: keys of `QUANTITIES`, or names as they are to be shown.
    label : str
        Of the horizontal axis.
    """
    looks = [("#000000", "o"), ("#999999", "s"), ("#555555", "^"), ("#0072b2", "v"), ("#e69f00", "d"), ("#cc79a7", "X")]
    if estimates.shape[1] > len(looks):
        raise ValueError(f"{estimates.shape[1]} columns are too many for one axes: at most {len(looks)}")
    offsets = [0.16 * (i - (estimates.shape[1] - 1) / 2) for i in range(estimates.shape[1])]
    for (column, found), (colour, marker), offset in zip(estimates.items(), looks, offsets, strict=False):
        value, low, high, _ = np.array(found.tolist(), dtype=float).T
        axes.errorbar(
            value,
            np.arange(len(value)) + offset,
            xerr=[value - low, high - value],
            fmt=marker,
            color=colour,
            markersize=3.5,
            elinewidth=1,
            label=column,
        )
    axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    names = [QUANTITIES.get(name, [name])[0] for name in estimates.index]
    axes.set(yticks=range(len(estimates)), yticklabels=names, xlabel=label)
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(estimates.columns))
