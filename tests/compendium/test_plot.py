"""Looks, error bars, legends and files of figures; assertions are on what is drawn, not on pixels."""

import math
import time
from itertools import combinations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from fsp import pruning, spectrum
from fsp.compendium import plot, stats
from fsp.compendium.stats import Estimate
from fsp.training import dynamic

NAN = math.nan
FAMILIES = {
    "at initialisation": ["dense", *pruning.METHODS, "imp"],
    "dynamic": ["dense", "set", "rigl", "static", "shuffled"],
    "searched": [
        "search_published",
        "search_gap",
        "search_pretrained",
        "search_optimised",
        "search_again",
        "shuffled",
        "rewired",
    ],
    "ensembles": [
        "one_network",
        "independent",
        "independent_full",
        "snapshot",
        "bagged",
        "dropout",
        "pat_antirandom",
        "pat_random",
        "pat_antirandom_constant",
        "pat_random_constant",
        "clones",
        "one_mask",
        "pat_partition",
        "pat_far_apart",
        "pat_high_norm",
        "pat_neurons",
    ],
    "recipes": ["recipe_default", "recipe_labels", "recipe_all"],
    "in-time": ["set_itop", "set_itop_guided", "rigl_itop", "static", "shuffled", "units_left"],
}


@pytest.fixture(autouse=True)
def _style():
    plt.switch_backend("agg")
    with matplotlib.rc_context():
        plot.use_style()
        yield
        plt.close("all")


# ---- looks -------------------------------------------------------------------------------------------------------


def test_every_method_and_every_dynamic_has_a_look_and_a_label_of_its_own():
    assert plot.METHODS.keys() >= {"dense", "shuffled", "imp", *pruning.METHODS, *dynamic.PRESETS}
    assert len({look.label for look in plot.METHODS.values()}) == len(plot.METHODS)


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_share_a_figure_differ_in_colour_and_in_marker(family):
    looks = [plot.METHODS[name] for name in FAMILIES[family]]
    assert len({to_rgb(look.colour) for look in looks}) == len(looks)
    assert len({look.marker for look in looks}) == len(looks)


def area(marker):
    """Points of a grid that a marker covers, as large as matplotlib draws it."""
    style = MarkerStyle(marker)
    assert style.is_filled()  # seaborn mixes no markers of lines with filled ones
    grid = np.stack(np.meshgrid(*[np.linspace(-0.8, 0.8, 81)] * 2), axis=-1).reshape(-1, 2)
    return style.get_path().transformed(style.get_transform()).contains_points(grid)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_markers_in_a_figure_cover_nearly_the_same_area(family):
    areas = {name: area(plot.METHODS[name].marker) for name in FAMILIES[family]}
    alike = [
        (a, b) for a, b in combinations(areas, 2) if (areas[a] & areas[b]).sum() > 0.8 * (areas[a] | areas[b]).sum()
    ]
    assert alike == []


def luminance(colour):
    """Relative luminance of the web content accessibility guidelines: 0 is black, 1 white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


@pytest.mark.parametrize("method", plot.METHODS)
def test_every_colour_stands_out_from_white_paper(method):
    assert 1.05 / (luminance(plot.METHODS[method].colour) + 0.05) > 2


def test_every_quantity_of_the_coordinate_has_a_symbol_and_a_name():
    assert set(plot.QUANTITIES) == {*spectrum.Coordinate._fields, "spectrum_norm"}
    figure, axes = plt.subplots()
    for symbol, name in plot.QUANTITIES.values():
        axes.set(xlabel=name, ylabel=symbol)
        figure.canvas.draw()  # a formula that does not parse raises


def test_a_method_that_has_no_look_yet_is_drawn_under_its_own_name():
    assert plot.looks(["snip", "my_score"])["hue_order"] == ["SNIP", "my score"]
    assert "my_score" not in plot.METHODS


def table():
    """Eight runs of three methods at two densities."""
    rows = [
        {"Method": plot.METHODS[m].label, "density": d, "x": s + d, "y": 0.1 * s + d}
        for m in ("random", "snip", "synflow") for d in (0.05, 0.1) for s in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_seaborn_draws_methods_by_their_looks():
    methods = FAMILIES["at initialisation"]
    looks = [plot.METHODS[m] for m in methods]
    rows = pd.DataFrame(
        {"Method": [look.label for look in looks] * 2, "x": [0] * len(looks) + [1] * len(looks), "y": 0}
    )
    _, axes = plt.subplots()
    sns.lineplot(rows, x="x", y="y", hue="Method", style="Method", errorbar=None, ax=axes, **plot.looks(methods))
    drawn = [line for line in axes.lines if len(line.get_xdata())]
    for line, look in zip(drawn, looks, strict=True):
        assert same_color(line.get_color(), look.colour)
        assert line.get_marker() == look.marker
        assert line.is_dashed() == bool(look.dash)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [look.label for look in looks]


def test_style_gives_small_open_figures_with_editable_text():
    settings = matplotlib.rcParams
    assert not settings["axes.spines.top"]
    assert not settings["axes.spines.right"]
    assert settings["pdf.fonttype"] == 42
    assert settings["savefig.dpi"] >= 300
    assert (plot.COLUMN, plot.PAGE) == (3.4, 7.0)


# ---- error bars --------------------------------------------------------------------------------------------------


def test_the_error_bar_of_a_single_value_has_no_length():
    assert plot.t_interval(pd.Series([0.7])) == (0.7, 0.7)
    assert plot.t_interval(pd.Series([NAN, 0.7])) == (0.7, 0.7)
    assert np.isnan(plot.t_interval(pd.Series([NAN, NAN]))).all()


def test_seaborn_draws_a_band_of_that_interval():
    data = table()
    data = data[data.Method == "SNIP"]
    _, axes = plt.subplots()
    sns.lineplot(data, x="density", y="y", errorbar=plot.t_interval, ax=axes)
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    for density, values in data.groupby("density").y:
        found = stats.mean(values)
        at = corners[np.isclose(corners[:, 0], density), 1]
        assert (at.min(), at.max()) == pytest.approx((found.low, found.high))
        assert axes.lines[0].get_ydata()[list(axes.lines[0].get_xdata()).index(density)] == pytest.approx(found.value)


# ---- files -------------------------------------------------------------------------------------------------------


def figure_with_text():
    figure, axes = plt.subplots(figsize=(plot.COLUMN, 2))
    axes.plot([0, 1], [0, 1], label="a")
    axes.set(xlabel=plot.QUANTITIES["ramanujan_gap"][1], ylabel="test accuracy")
    axes.legend()
    return figure


def test_a_figure_is_saved_as_png_and_pdf_and_nothing_else(tmp_path):
    folder = tmp_path / "made" / "here"
    paths = plot.save(figure_with_text(), str(folder), "04_correlation")
    assert paths == [folder / "04_correlation.png", folder / "04_correlation.pdf"]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert plot.save(figure_with_text(), folder, "04_correlation", "left")[0].name == "04_correlation_left.png"
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")
    image = plt.imread(paths[0])
    assert image.shape[1] == pytest.approx(300 * plot.COLUMN, rel=0.1)
    assert image[..., :3].std() > 0.01  # not blank


def test_where_nobody_reads_the_files_of_figures_none_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("FSP_FIGURES", "0")
    assert plot.save(figure_with_text(), tmp_path, "04_correlation") == []
    assert list(tmp_path.iterdir()) == []


def test_saving_again_later_gives_the_same_bytes(tmp_path):
    first = [path.read_bytes() for path in plot.save(figure_with_text(), tmp_path, "one")]
    time.sleep(1.1)  # a time stamp has seconds
    again = [path.read_bytes() for path in plot.save(figure_with_text(), tmp_path, "one")]
    other = [path.read_bytes() for path in plot.save(figure_with_text(), tmp_path, "two")]
    assert first == again == other
    assert not any(word in first[1] for word in (b"CreationDate", b"ModDate", b"/Producer", b"/Creator"))
    assert b"Software" not in first[0]


def test_a_save_that_fails_leaves_the_old_files_and_no_other(tmp_path, monkeypatch):
    old = {path: path.read_bytes() for path in plot.save(figure_with_text(), tmp_path, "one")}

    def breaks(figure, path, **options):
        path.write_bytes(b"half a figure")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", breaks)
    with pytest.raises(OSError, match="disk full"):
        plot.save(figure_with_text(), tmp_path, "one")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


# ---- legends -----------------------------------------------------------------------------------------------------


def entries(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_legend_goes_below_all_panels_and_numbers_get_the_name_of_their_section():
    methods = ["random", "snip", "synflow"]
    looks = {key: value for key, value in plot.looks(methods).items() if key != "dashes"}
    figure, axes = plt.subplots(1, 2, figsize=(plot.PAGE, 2.5), layout="constrained")
    for axis in axes:
        sns.scatterplot(
            table(),
            x="x",
            y="y",
            hue="Method",
            style="Method",
            size="density",
            legend=axis is axes[0],
            ax=axis,
            **looks,
        )
    assert "Method" in [text.get_text() for text in axes[0].get_legend().get_texts()]  # seaborn's headings
    plot.legend_below(figure, axes[0], columns=3, title="n = 8")
    assert entries(figure) == ["Random", "SNIP", "SynFlow", "density 0.05", "density 0.1"]
    assert figure.legends[0].get_title().get_text() == "n = 8"
    assert axes[0].get_legend() is None
    handles = figure.legends[0].legend_handles
    for handle, method in zip(handles, methods, strict=False):
        assert same_color(handle.get_markerfacecolor(), plot.METHODS[method].colour)
        assert handle.get_marker() == plot.METHODS[method].marker

    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert all(box.y1 <= axis.get_tightbbox().y0 for axis in axes)
    assert box.y0 >= 0
    columns = {round(text.get_window_extent().x0) for text in figure.legends[0].get_texts()}
    assert len(columns) == 3


# ---- forest ------------------------------------------------------------------------------------------------------


def forest_of(estimates):
    _, axes = plt.subplots()
    frame = pd.DataFrame(estimates, index=["ramanujan_gap", "imsg"])
    plot.forest(axes, frame, "rank correlation")
    return axes


POOLED = [Estimate(0.2, -0.1, 0.6, 30), Estimate(0.7, 0.5, 0.8, 30)]
WITHIN = [Estimate(-0.3, -0.9, 0.1, 30), Estimate(NAN, NAN, NAN, 0)]


def test_a_forest_has_a_marker_and_an_interval_for_each_estimate():
    axes = forest_of({"pooled": POOLED, "within": WITHIN})
    assert [container.get_label() for container in axes.containers] == ["pooled", "within"]
    for container, estimates in zip(axes.containers, (POOLED, WITHIN), strict=True):
        markers, _, (intervals,) = container
        np.testing.assert_array_equal(markers.get_xdata(), [e.value for e in estimates])
        ends = np.array([segment[:, 0] for segment in intervals.get_segments() if len(segment)])
        np.testing.assert_allclose(ends, [(e.low, e.high) for e in estimates if e.n], rtol=1e-12)
    first, second = (container[0] for container in axes.containers)
    assert first.get_marker() != second.get_marker()
    assert not same_color(first.get_color(), second.get_color())


def test_a_forest_has_a_row_for_each_quantity_from_the_top_with_columns_beside_each_other():
    axes = forest_of({"pooled": POOLED, "within": WITHIN})
    assert list(axes.get_yticks()) == [0, 1]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [r"$\Delta_r$", "IMSG"]
    bottom, top = axes.get_ylim()
    assert bottom > top
    first, second = (container[0].get_ydata() for container in axes.containers)
    assert (first != second).all()
    np.testing.assert_allclose((np.array(first) + second) / 2, [0, 1], atol=1e-12)
    assert np.abs(np.subtract(first, second)).max() < 0.5  # nearer to its own row than to the next
    assert axes.get_xlabel() == "rank correlation"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pooled", "within"]
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)  # where there is no correlation


def test_more_columns_than_markers_are_refused():
    with pytest.raises(ValueError, match="9 columns are too many"):
        forest_of(dict.fromkeys("abcdefghi", POOLED))
