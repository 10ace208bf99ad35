"""Tables of published numbers: the committed ones are what they say, and a wrong one is refused by file and column."""

import numpy as np
import pandas as pd
import pytest
import torch

from fsp.masks import prunable
from fsp.models import MODELS
from fsp.paths import PUBLISHED
from fsp.pruning.allocate import erk
from fsp.runs.tables import read_published

ACCURACY = {"dataset": "text", "model": "text", "method": "text", "density": "fraction", "accuracy_percent": "percent"}
METRICS = ["imdb_normalised", "gap_normalised", "imdb_stable"]

GOOD = "method,density,accuracy_percent,std_percent,gap,n\nsnip,0.01,86.5,,-0.5,3\nerk,0.4,0.5,0.3,0.1,3\n"
UNITS = {
    "method": "text",
    "density": "fraction",
    "accuracy_percent": "percent",
    "std_percent": "number",
    "gap": "number",
    "n": "count",
}


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "paper.csv"
        path.write_text(text)
        return path

    return write


def test_a_table_that_is_right_comes_back_with_the_columns_that_were_asked_for(table):
    found = read_published(table(GOOD), {"n": "count", "std_percent": "number"}, optional=["std_percent"])
    assert list(found) == ["n", "std_percent"]
    assert found.n.tolist() == [3, 3]
    assert np.isnan(found.std_percent[0])
    assert list(read_published(table(GOOD), UNITS, optional=["std_percent"])) == list(UNITS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("density", "sparsity", r"paper\.csv has no column 'density': it has method, sparsity, accuracy_percent"),
        ("0.4,", "40,", r"paper\.csv, column 'density': expected a fraction in \[0, 1\], found 40 in row 3"),
        ("86.5", "0.865", r"paper\.csv, column 'accuracy_percent': .*0.865 is the largest: these look like fractions"),
        ("86.5", "865", r"paper\.csv, column 'accuracy_percent': expected a percentage .*found 865 in row 2"),
        ("86.5", "86.5 %", r"paper\.csv, column 'accuracy_percent': .*found text such as '86.5 %'"),
        ("86.5", "", r"paper\.csv, column 'accuracy_percent': row 2 is empty"),
        ("-0.5", "-inf", r"paper\.csv, column 'gap': expected a finite number, found -inf"),
        (",3\nerk", ",3.5\nerk", r"paper\.csv, column 'n': expected a whole number .*found 3.5"),
    ],
)
def test_a_wrong_table_is_refused_with_the_names_of_file_and_column(table, old, new, message):
    assert old in GOOD
    path = table(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_published(path, UNITS, optional=["std_percent"])


def test_an_unknown_unit_is_named(table):
    with pytest.raises(ValueError, match="unit 'metres' is unknown: use text, fraction, percent, number, count"):
        read_published(table(GOOD), {"gap": "metres"})


# ---- the committed tables ----------------------------------------------------------------------------------------


def test_the_published_correlations_come_out_as_printed():
    # Pearson across methods at densities .01 .05 .1 .2 .4, VGG-16 without GraSP
    printed = {
        ("torchvision resnet34", "imdb_normalised"): [0.84, 0.89, 0.93, 0.93, 0.99],
        ("torchvision vgg16_bn", "imdb_normalised"): [0.85, 0.93, 0.96, 0.94, 0.93],
        ("torchvision resnet34", "gap_normalised"): [-0.21, -0.15, -0.07, 0.17, 0.68],
        ("torchvision vgg16_bn", "gap_normalised"): [-0.30, -0.30, -0.17, 0.00, 0.43],
        ("torchvision resnet34", "imdb_stable"): [0.33, 0.79, 0.94, 0.94, 0.99],
        ("torchvision vgg16_bn", "imdb_stable"): [0.70, 0.75, 0.96, 0.94, 0.93],
    }
    units = dict.fromkeys(["dataset", "model", "method"], "text") | {"density": "fraction"}
    metrics = read_published(
        PUBLISHED / "iclr2023_metrics.csv", units | dict.fromkeys(METRICS, "number"), optional=METRICS
    )
    both = metrics.merge(read_published(PUBLISHED / "iclr2023_accuracy.csv", ACCURACY), validate="1:1")
    assert len(both) == 60
    both = both[~((both.model == "torchvision vgg16_bn") & (both.method == "grasp"))]
    for (model, metric), expected in printed.items():
        found = both[both.model == model].groupby("density")[["accuracy_percent", metric]].corr().iloc[::2, 1]
        assert found.round(2).tolist() == expected


def layers():
    numbers = ["ramanujan_gap", "sigma1", "sigma2", "narc_iclr2023", "imdb"]
    units = {"layer": "text", "method": "text", "density": "fraction"} | dict.fromkeys(numbers, "number")
    return read_published(PUBLISHED / "iclr2023_layers.csv", units, optional=numbers)


def shapes():
    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in prunable(MODELS["resnet34"]((3, 32, 32), 10, stem="7x7")).items()}


def test_the_published_layers_satisfy_the_definitions_of_gap_and_narc():
    sizes = [(s[0], int(np.prod(s[1:]))) for s in shapes().values()]
    for _, rows in layers().groupby("method"):
        for (outputs, inputs), row in zip(sizes, rows.itertuples(), strict=True):
            edges = row.density * inputs * outputs
            assert edges == pytest.approx(round(edges), abs=1e-3)
            if np.isnan(row.ramanujan_gap):
                continue
            # a few inputs of the smallest layers may have no edge: their number is not published
            bounds = [(n, np.sqrt(edges / n - 1) + np.sqrt(edges / outputs - 1)) for n in range(inputs - 3, inputs + 1)]
            alive, bound = min(bounds, key=lambda pair: abs(pair[1] - row.sigma2 - row.ramanujan_gap))
            assert row.ramanujan_gap == pytest.approx(bound - row.sigma2, abs=2e-5)
            spread = (row.sigma2**2 / 4 + 1) * np.sqrt(alive * outputs)
            assert row.narc_iclr2023 == pytest.approx((spread - edges) / (inputs * outputs), abs=2e-6)


def test_the_published_layer_densities_are_those_of_erk_up_to_the_draw():
    expected, found = erk(shapes(), 0.1), layers().set_index("method").density["erk"]
    for (name, d), published in zip(expected.items(), found, strict=True):
        weights = int(np.prod(shapes()[name]))
        assert abs(published - d) <= 4 * np.sqrt(d * (1 - d) / weights) + 1e-9, name


def test_the_reference_lines_are_those_of_the_paper():
    # best and last epoch of the dense networks, LTH and LTH-rewind at density .01
    printed = {"resnet18": (95.59, 95.47, 89.43, 91.22), "resnet34": (95.71, 95.71, 91.43, 92.80)}
    printed["vgg-d"] = (94.21, 93.81, 88.90, 91.36)
    units = {"dataset": "text", "read": "text", "source": "text", "steps": "count"} | ACCURACY
    table = read_published(PUBLISHED / "fsp2023_reference.csv", units, optional=["steps"])
    assert set(table.dataset) == {"cifar10"}
    assert not table.duplicated(["model", "method", "read"]).any()
    whole = table[table.steps.isna()]
    for model, expected in printed.items():
        rows = whole[whole.model == model]
        assert tuple(rows.accuracy_percent) == expected
        assert rows.method.tolist() == ["dense", "dense", "imp", "imp_rewind"]
        assert rows.density.tolist() == [1, 1, 0.01, 0.01]
        assert rows["read"].tolist() == ["best epoch", "last epoch", "not stated", "not stated"]
    assert table[table.steps == 500].accuracy_percent.tolist() == [55.09, 34.21, 28.30]


def test_every_published_table_has_its_columns_in_the_readme():
    text = (PUBLISHED.parent / "README.md").read_text(encoding="utf-8")
    for path in PUBLISHED.glob("*2023_*.csv"):
        assert f"published/{path.name}" in text
        assert [c for c in pd.read_csv(path, nrows=1) if f"`{c}`" not in text] == []
