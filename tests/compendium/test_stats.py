"""Intervals and correlations against scipy, formulas and simulated data with a known answer."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from fsp.compendium.stats import (
    Estimate,
    clustered,
    explained,
    holm,
    mean,
    p_value,
    paired_difference,
    rank_correlation,
)

NAN = math.nan


def rng(seed=0):
    return np.random.default_rng(seed)


def is_undefined(estimate, n):
    return np.isnan(estimate[:3]).all() and estimate.n == n


# ---- means -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (121, 1.980)])
def test_half_an_interval_is_the_tabulated_quantile_times_the_standard_error(n, quantile):
    """Two-sided 95 % points of Student's t for n - 1 degrees of freedom, as in any printed table."""
    values = np.arange(n, dtype=float)
    found = mean(values)
    assert found.high - found.value == pytest.approx(quantile * values.std(ddof=1) / math.sqrt(n), rel=2e-4)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert (found.value, found.n) == ((n - 1) / 2, n)


def test_fewer_than_two_values_have_no_interval():
    assert is_undefined(mean([]), 0)
    assert is_undefined(mean([NAN, NAN]), 0)
    one = mean([7.0, NAN])
    assert (one.value, one.n) == (7.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.5, 0.4, 0.61), "0.50 [0.40, 0.61] (n = 9)"),
        ((0.00151, 0.00142, 0.00161), "0.0015 [0.0014, 0.0016] (n = 9)"),
        ((-0.3, -0.3, -0.3), "-0.30 [-0.30, -0.30] (n = 9)"),
        ((7.0, NAN, NAN), "7.00 [nan, nan] (n = 9)"),
        ((1.0, -math.inf, math.inf), "1.00 [-inf, inf] (n = 9)"),
    ],
)
def test_printed_ends_of_a_narrow_interval_are_apart(values, text):
    assert str(Estimate(*values, 9)) == text


def test_paired_difference_is_the_mean_of_the_differences():
    a, b = rng(1).normal(size=(2, 12))
    found = paired_difference(a, b + 0.5)
    oracle = scipy.stats.ttest_rel(a, b + 0.5).confidence_interval(0.95)
    assert found == pytest.approx(((a - b).mean() - 0.5, oracle.low, oracle.high, 12))
    turned = paired_difference(b + 0.5, a)
    assert turned == pytest.approx((-found.value, -found.high, -found.low, 12))


def test_a_pair_with_an_undefined_member_is_left_out():
    assert paired_difference([1.0, 2.0, NAN, 5.0], [0.0, NAN, 1.0, 2.0]) == mean([1.0, 3.0])


def test_pairs_need_two_samples_of_one_length():
    with pytest.raises(ValueError, match="pairs are needed, there are 3 and 1 values"):
        paired_difference([1.0, 2.0, 3.0], [1.0])


# ---- rank correlation --------------------------------------------------------------------------------------------

GROUPS = np.repeat([0.01, 0.05, 0.1], [8, 12, 5])


def samples(n=25, seed=0, ties=False):
    x, noise = rng(seed).normal(size=(2, n))
    y = x + noise
    return (x.round(), y.round()) if ties else (x, y)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [3, 60])
def test_a_correlation_is_that_of_scipy(n, ties):
    x, y = samples(n, n, ties)
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def test_a_group_with_a_constant_side_counts_as_it_is_told():
    x, y, groups = [1.0, 2, 3, 5, 5, 5], [1.0, 2, 3, 1, 2, 3], ["a"] * 3 + ["b"] * 3
    assert rank_correlation(x, y, within=groups) == 1
    assert rank_correlation(x, y, within=groups, constant=0.0) == 0.5
    assert rank_correlation(x[3:], y[3:], constant=0.0) == 0


def test_a_constant_side_has_no_correlation():
    changing = [3.0, 1.0, 2.0, 5.0]
    assert math.isnan(rank_correlation([2.0] * 4, changing))
    assert math.isnan(rank_correlation(changing, [0.1] * 4))
    assert math.isnan(rank_correlation([NAN] * 4, changing))


def test_within_is_the_plain_mean_of_the_correlations_of_each_group():
    x, y = samples()
    cuts = np.split(x, [8, 20]), np.split(y, [8, 20])
    each = [scipy.stats.spearmanr(*cut).statistic for cut in zip(*cuts, strict=True)]
    assert rank_correlation(x, y, within=GROUPS) == pytest.approx(np.mean(each), abs=1e-12)
    order = rng(8).permutation(25)
    shuffled = rank_correlation(x[order], y[order], within=GROUPS[order])
    assert shuffled == pytest.approx(rank_correlation(x, y, within=GROUPS), abs=1e-12)


def test_within_is_not_fooled_by_simpsons_paradox():
    """In each group y falls with x, while the group with the larger x has the larger y."""
    x = np.array([1, 2, 3, 4, 11, 12, 13, 14.0])
    y = np.array([4, 3, 2, 1, 14, 13, 12, 11.0])
    assert rank_correlation(x, y) > 0.5
    assert rank_correlation(x, y, within=["low"] * 4 + ["high"] * 4) == pytest.approx(-1)


def test_a_group_without_a_correlation_and_pairs_of_no_group_are_left_out():
    x, y = samples(20)
    constant = np.append(x, [5.0] * 4), np.append(y, [1.0, 2, 3, 4])
    assert rank_correlation(*constant, within=[0] * 20 + [1] * 4) == pytest.approx(rank_correlation(x, y))
    assert rank_correlation([1.0, 2, 3, 9, 8], [1.0, 2, 3, 1, 2], within=[1, 1, 1, NAN, NAN]) == pytest.approx(1)


# ---- whole groups left out ---------------------------------------------------------------------------------------


def crossed(seeds, methods, seed=30, *, of_seed=0.0, of_method=0.0, noise=1.0):
    """A table of one value for every seed and method: the sum of their effects and noise."""
    draw = rng(seed)
    effects = of_seed * draw.normal(size=(seeds, 1)) + of_method * draw.normal(size=(1, methods))
    values = effects + noise * draw.normal(size=(seeds, methods))
    index = pd.MultiIndex.from_product([range(seeds), [f"m{i}" for i in range(methods)]], names=["seed", "method"])
    return pd.DataFrame({"value": values.ravel()}, index=index).reset_index()


def of_mean(table):
    return table["value"].mean()


def test_the_value_is_that_of_the_table_and_n_its_rows():
    table = crossed(6, 4)
    found = clustered(of_mean, table, by=["seed", "method"])
    assert found.value == pytest.approx(table["value"].mean())
    assert found.n == 24
    assert found.low < found.value < found.high
    assert found == clustered(of_mean, table, by=["seed", "method"])


def test_rows_of_one_group_count_as_one_row_each_group_and_copies_say_nothing_new():
    table = crossed(8, 5)
    once = clustered(of_mean, table, by=["seed"])
    assert once[:3] == pytest.approx(mean(table.groupby("seed")["value"].mean())[:3])
    assert clustered(of_mean, pd.concat([table] * 20), by=["seed"])[:3] == pytest.approx(once[:3])


@pytest.mark.parametrize("effect", ["of_seed", "of_method"])
def test_what_levels_have_in_common_widens_the_interval_of_the_column_they_are_grouped_by(effect):
    table = crossed(12, 12, **{effect: 3.0})
    widths = {by: np.ptp(clustered(of_mean, table, by=by)[1:3]) for by in (("seed",), ("method",), ("seed", "method"))}
    matters, other = (("seed",), ("method",)) if effect == "of_seed" else (("method",), ("seed",))
    assert widths[matters] > 2 * widths[other]
    assert widths["seed", "method"] >= widths[matters]


def covered(seeds, methods, tables, **effects):
    """In how many of many tables the interval of the rank correlation of two independent quantities holds 0."""
    held = 0
    for i in range(tables):
        pair = crossed(seeds, methods, 1000 + i, **effects)
        pair["other"] = crossed(seeds, methods, 5000 + i, **effects)["value"]
        found = clustered(lambda t: rank_correlation(t["value"], t["other"]), pair, by=["seed", "method"])
        held += found.low <= 0 <= found.high
    return held / tables


def test_with_five_seeds_and_six_methods_the_interval_is_a_95_percent_interval():
    """Under the null; 240 tables tell a share to .014 (one standard error), so this fails for 90 % and for 99.5 %."""
    assert 0.92 <= covered(5, 6, 240, of_seed=0.5, of_method=1.0, noise=0.5) <= 0.97
    assert covered(5, 6, 240) >= 0.95  # rows that are independent after all


def test_fewer_than_three_levels_have_no_interval():
    found = clustered(of_mean, crossed(2, 9), by=["seed", "method"])
    assert np.isnan([found.low, found.high]).all()
    assert found.n == 18


def test_without_a_value_for_some_level_there_is_no_interval():
    def undefined_without_the_first_seed(t):
        return t["value"].max() if (t["seed"] == 0).any() else NAN

    found = clustered(undefined_without_the_first_seed, crossed(6, 1), by=["seed"])
    assert not math.isnan(found.value)
    assert np.isnan(found[1:3]).all()


@pytest.mark.parametrize("by", [[], ["sede"], ["seed", "hole"], ["seed", "method", "value"]])
def test_columns_to_group_by_must_be_there_and_filled(by):
    table = crossed(3, 3).assign(hole=NAN)
    with pytest.raises(ValueError, match="columns without missing values, of seed, method, value, hole"):
        clustered(of_mean, table, by=by)


# ---- several claims ----------------------------------------------------------------------------------------------


def test_a_p_value_is_that_of_the_t_test_and_small_exactly_where_the_interval_excludes_the_bound():
    values = rng(40).normal(0.5, 1, 12)
    found = mean(values)
    for bound in (-0.3, 0.0, 0.4, found.value, 2.0):
        assert p_value(found, bound) == pytest.approx(scipy.stats.ttest_1samp(values, bound).pvalue)
        assert (p_value(found, bound) < 0.05) == (not found.low <= bound <= found.high)
    assert math.isnan(p_value(mean([1.0]), 0.0))
    for bound in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"bound={bound}: expected a finite number"):
            p_value(mean([1.0, 2.0]), bound)


def test_holm_rejects_what_its_step_down_rule_rejects():
    """The oracle is the rule as Holm states it: from the smallest p on, compare with .05 / (number of those left)."""
    for seed in range(20):
        p = rng(seed).random(9) ** 4
        rejected, left = set(), len(p)
        for i in np.argsort(p):
            if p[i] >= 0.05 / left:
                break
            rejected.add(int(i))
            left -= 1
        assert set(np.flatnonzero(holm(p) < 0.05).tolist()) == rejected
    assert holm([0.5, NAN]).tolist() == [1.0, 1.0]


# ---- explained ---------------------------------------------------------------------------------------------------


def test_what_is_explained_is_judged_on_seeds_that_the_fit_has_not_seen():
    x = np.tile(np.arange(5.0), 3)
    rows = pd.DataFrame({"seed": np.repeat([0, 1, 2], 5), "x": x, "y": 2 * x + 1})
    assert np.allclose(explained(rows, "x", "y"), 1)
    rows.loc[rows.seed == 2, "y"] += 100  # one seed lies elsewhere
    found = explained(rows, "x", "y")
    # fitted to the line and to the line 100 higher, seed 0 is predicted 50 too high; its variance is 8
    assert found.line[0] == pytest.approx(1 - 50**2 / 8)
    assert found.line[2] == pytest.approx(1 - 100**2 / 8)
    steps = rows.assign(y=np.where(rows.x > 1, 1.0, 0.0))
    assert np.allclose(explained(steps, "x", "y").curve, 1)
    assert (explained(steps, "x", "y").line < 0.9).all()


def test_nothing_is_explained_where_nothing_varies():
    rows = pd.DataFrame({"seed": [0, 0, 1, 1], "x": [0.0, 1.0, 0.0, 1.0], "y": 1.0})
    assert explained(rows, "x", "y").isna().all(axis=None)


# ---- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: rank_correlation([1, 2, 3], [1, 2]),
        lambda: rank_correlation(1.0, 2.0),
        lambda: rank_correlation([1, 2, 3], [1, 2, 3], within=[0, 1]),
    ],
)
def test_samples_of_other_shapes_are_refused_with_their_shapes(call):
    with pytest.raises(ValueError, match=r"one-dimensional samples of one length are needed, not of shapes \[\("):
        call()
