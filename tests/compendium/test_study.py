"""What the experiments of several notebooks share: the order of all draws, and where results go."""

from types import SimpleNamespace

import pytest
import torch

from fsp import models, paths, pruning, runs
from fsp.compendium import claims, report, stats, study
from fsp.data import load, scoring_batches
from fsp.runs import tables
from fsp.training import TrainConfig, fit

CONFIG = {
    "dataset": "digits",
    "model": "mlp",
    "model_options": {"hidden": [16]},
    "device": "cpu",
    "seed": 3,
    "method": "snip",
    "density": 0.2,
    "epochs": 1,
    "lr": 0.05,
    "train_options": {"batch_size": 256},
}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_draws_weights_then_examples_then_masks_from_one_generator_of_its_seed():
    data = load("digits", seed=3)
    generator = torch.Generator().manual_seed(3)
    network = models.build("mlp", data.shape, data.classes, generator=generator, hidden=[16])
    examples = scoring_batches(data, generator=generator)
    masks = pruning.prune(network, "snip", 0.2, batches=examples, generator=generator)

    begun = study.begin(CONFIG)
    assert equal(begun.network.state_dict(), network.state_dict())
    assert torch.equal(begun.data.validation.labels, data.validation.labels)
    assert equal(study.prune(CONFIG, *begun), masks)
    assert torch.equal(begun.generator.get_state(), generator.get_state())
    again = study.build(CONFIG, data, begun.generator)
    assert not equal(again.state_dict(), network.state_dict())  # new weights, by the next draws


def test_the_initialiser_is_a_choice_of_the_config():
    default = study.begin(CONFIG).network.get_parameter("linear1.weight")
    lecun = study.begin(CONFIG | {"init": "lecun"}).network.get_parameter("linear1.weight")
    assert default.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert lecun.std().item() == pytest.approx((1 / 64) ** 0.5, rel=0.1)


def test_options_reach_the_method():
    once, often = (study.prune(CONFIG | {"method": "synflow"}, *study.begin(CONFIG), rounds=n) for n in (1, 100))
    assert not equal(once, often)


def test_training_has_the_settings_of_the_config_and_keeps_the_masks():
    assert study.train_config(CONFIG) == TrainConfig(1, lr=0.05, seed=3, batch_size=256)
    data, network, generator = study.begin(CONFIG)
    masks = study.prune(CONFIG, data, network, generator)
    history = study.train(CONFIG, data, network, masks)
    plain = study.begin(CONFIG).network
    assert fit(plain, data, TrainConfig(1, lr=0.05, seed=3, batch_size=256), masks=masks).epochs == history.epochs
    assert equal(plain.state_dict(), network.state_dict())
    assert not network.get_parameter("linear1.weight")[~masks["linear1.weight"]].any()


# ---- where the results of a notebook go --------------------------------------------------------------------------


def square(config):
    if config["x"] < 0:
        raise FloatingPointError(f"no root of {config['x']}")
    return {"square": config["x"] ** 2}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of its own, in which the runs 1 and 2 are committed; where its tables are."""
    committed = paths.Outputs(tmp_path / "data" / "runs", tmp_path / "data" / "results", tmp_path / "figures")
    for module in (paths, study):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "COMMITTED", committed)
    monkeypatch.setenv("FSP_RENEW", "1")
    study.sweep(square, xs(1, 2), asked(), "99_test")
    monkeypatch.delenv("FSP_RENEW")
    for record in committed.runs.glob("*"):
        record.unlink()
    return committed.results


def asked(out_dir="", *, recompute=False):
    return SimpleNamespace(out_dir=str(out_dir), recompute=recompute, scheduler=None)


def xs(*values):
    return [{"x": value} for value in values]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_below_a_given_folder_a_sweep_puts_its_rows_into_the_table_and_keeps_others(tmp_path, repository):
    out, before = tmp_path / "out", files(repository)
    calls = []

    def counted(config):
        calls.append(config["x"])
        return square(config)

    made = study.sweep(counted, xs(1, 2), asked(out), "99_test")
    assert made.square.tolist() == [1, 4]
    study.sweep(counted, xs(2, 3), asked(out), "99_test")
    assert calls == [1, 2, 3]  # the committed table is not looked at
    assert tables.read(out / "results" / "99_test.csv").square.tolist() == [4, 9, 1]
    assert len(list((out / "runs").glob("*.json"))) == 3
    study.sweep(counted, xs(2), asked(out, recompute=True), "99_test")
    assert calls == [1, 2, 3, 2]
    assert files(repository) == before
    assert not (tmp_path / "scratch").exists()


def test_without_a_folder_committed_rows_are_taken_and_never_written(tmp_path, repository, capsys):
    before = files(repository)
    assert study.sweep(square, xs(2, 3), asked(), "99_test").attrs["reused"] == 1
    assert study.sweep(square, xs(3), asked(recompute=True), "99_test").attrs["computed"] == 1
    rows = [claims.claim("It holds.", stats.Estimate(1.0, 0.5, 1.5, 5), above=0, paper="None")]
    study.save_claims(rows, asked(), "99_test")
    assert files(repository) == before
    results = tmp_path / "scratch" / "99_test" / "results"
    assert tables.read(results / "99_test.csv").square.tolist() == [9, 4, 1]  # the committed ones, too
    study.sweep(square, xs(2, 5), asked(), "99_test")
    assert tables.read(results / "99_test.csv").square.tolist() == [4, 25, 9, 1]  # a second sweep drops no new row
    assert tables.read(results / "99_test.claims.csv").holds.tolist() == ["yes"]
    assert paths.outputs("", "99_test").figures == results.parent / "figures"


def test_what_one_sweep_computed_again_another_one_of_the_notebook_leaves(tmp_path, repository, monkeypatch):
    """The committed rows come back with the next process alone."""
    monkeypatch.setattr(study, "_begun", set())
    study.sweep(lambda config: {"square": -1}, xs(1), asked(recompute=True), "99_test")
    study.sweep(square, xs(3), asked(), "99_test")
    path = tmp_path / "scratch" / "99_test" / "results" / "99_test.csv"
    assert dict(zip(tables.read(path).x, tables.read(path).square, strict=True)) == {3: 9, 1: -1, 2: 4}
    monkeypatch.setattr(study, "_begun", set())
    study.sweep(square, xs(2), asked(), "99_test")
    assert dict(zip(tables.read(path).x, tables.read(path).square, strict=True)) == {2: 4, 1: 1}


def test_one_line_says_where_results_go_and_whether_the_text_describes_them(tmp_path, repository, capsys):
    def said(*values, **options):
        study.sweep(square, xs(*values), asked(options.pop("out_dir", "")), "99_test", **options)
        return capsys.readouterr().out

    capsys.readouterr()
    place = "table, claims and figures of this run: scratch/99_test"
    assert said(1, 2) == said(2, 1) == f"{place}\n"
    other = "(the text describes the committed run, and this is another: {} runs are new)\n"
    assert said(1, 2, 3) == f"{place} {other.format(1)}"
    assert said(1) == f"{place} {other.format(0)}"
    assert said(1, out_dir=tmp_path / "out") == said(1).replace("scratch/99_test", "out")
    assert said(1, whole=True) == f"{place}\n"  # all of the committed table is shown


def test_rows_that_other_code_made_are_told_of_in_a_line_and_not_in_a_warning_that_names_a_folder(
    repository, capsys, recwarn
):
    capsys.readouterr()
    assert study.sweep(lambda config: square(config), xs(2, 3), asked(), "99_test").attrs["stale"]
    said = capsys.readouterr()
    assert said.out.startswith(f"1 of 2 {report.EDITED}; recompute=True redoes all\n")
    assert (said.err, list(recwarn)) == ("", [])


def test_a_refresh_alone_writes_the_committed_table_and_prints_nothing(monkeypatch, tmp_path, repository, capsys):
    capsys.readouterr()
    monkeypatch.setenv("FSP_RENEW", "1")
    study.sweep(square, xs(3, 1), asked(), "99_test")
    assert tables.read(repository / "99_test.csv").square.tolist() == [9, 1, 4]
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "scratch").exists()
    monkeypatch.setenv("FSP_RENEW", "yes")
    assert paths.outputs("", "99_test").results != repository


def test_a_refresh_goes_on_with_records_of_one_that_failed_but_not_with_those_of_other_code(monkeypatch, repository):
    monkeypatch.setenv("FSP_RENEW", "1")
    runs.sweep(lambda config: {"square": 0}, xs(3), store=paths.COMMITTED.runs)
    runs.sweep(square, xs(4), store=paths.COMMITTED.runs)
    made = study.sweep(square, xs(3, 4), asked(), "99_test")
    assert made.square.tolist() == [9, 16]
    assert (made.attrs["computed"], made.attrs["reused"]) == (1, 1)


@pytest.mark.filterwarnings("ignore:.* runs failed")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, -2), "^2 of 2 runs failed, the first with FloatingPointError: no root of -1$"),
        (
            (3, -2),
            "^1 of 2 runs failed, the first with FloatingPointError: no root of -2; finished ones are kept",
        ),
    ],
)
@pytest.mark.parametrize("renew", ["", "1"])
def test_failed_runs_are_an_error_that_tells_the_first_one_and_enter_no_table(
    monkeypatch, tmp_path, repository, values, message, renew
):
    monkeypatch.setenv("FSP_RENEW", renew)
    before = files(repository)
    with pytest.raises(RuntimeError, match=message):
        study.sweep(square, xs(*values), asked(), "99_test")
    assert files(repository) == before
    assert not (tmp_path / "scratch").exists()
    done = [value for value in values if value > 0]
    if done:
        assert study.sweep(square, xs(*done), asked(), "99_test").attrs["reused"] == len(done)


def test_the_whole_table_is_given_where_it_is_asked_for_and_runs_stay_here(repository):
    given = SimpleNamespace(out_dir="", recompute=False, scheduler="tcp://nobody:1")
    assert study.sweep(square, xs(3), given, "99_test", here=True, whole=True).square.tolist() == [9, 1, 4]


def test_claims_are_written_beside_the_table_in_their_columns(tmp_path):
    row = claims.claim("It holds.", stats.Estimate(1.0, 0.5, 1.5, 5), above=0, paper="None")
    shown = study.save_claims([row], asked(tmp_path), "99_test")
    assert tuple(shown) == tuple(study.save_claims([], asked(tmp_path / "none"), "99_test")) == claims.CLAIM_COLUMNS
    written = tables.read(tmp_path / "results" / "99_test.claims.csv")
    assert written.claim.tolist() == ["It holds."]
    assert written.measured.tolist() == [1.0]


def test_some_parameters_are_chosen_by_name():
    assert study.chosen(SimpleNamespace(lr=0.1, seeds=[0, 1], epochs=3), "seeds", "lr") == {"seeds": [0, 1], "lr": 0.1}


def test_what_a_notebook_was_made_with_names_versions_and_what_is_added_but_no_hash_of_code():
    made = study.made_with(device="cpu")["made with"]
    assert made["torch"] == str(torch.__version__)
    assert made["device"] == "cpu"
    assert not {"code", "host", "process"} & set(made.index)
