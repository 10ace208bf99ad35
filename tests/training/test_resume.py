"""A training that is interrupted, at any moment, and called again ends bit-equal to one that is not."""

import copy
import dataclasses
import json
import multiprocessing
import random
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fsp.data import Split, load
from fsp.files import CannotResume
from fsp.masks import save as save_masks
from fsp.pruning.methods import prune
from fsp.training import resume, train
from fsp.training.dynamic import PRESETS, DynamicTraining
from fsp.training.hooks import Snapshots
from fsp.training.train import TrainConfig, fit

STEPS_AN_EPOCH, EPOCHS = 5, 3
STEPS = STEPS_AN_EPOCH * EPOCHS


class Killed(Exception):
    """Ends a training from outside."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


@pytest.fixture(autouse=True)
def _own_global_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(**options):
    """70 training, 10 validation and 20 test images of three classes, 4x4."""
    return load("synthetic", **{"shape": (1, 4, 4), "classes": 3, "size": 100, "validation": 0.125} | options)


def small(seed=0):
    """Linear, batch norm, ReLU, dropout, Linear: 16 inputs, 8 hidden units, 3 classes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4, generator=seeded(seed + parameter.numel()))
    return net


def config(**options):
    defaults = {"epochs": EPOCHS, "batch_size": 16, "lr": 0.1, "augmented": True, "seed": 3, "milestones": (0.2, 0.6)}
    return TrainConfig(**defaults | options)


CASES = {
    "plain": {"momentum": 0.0, "augmented": False},
    "cosine": {},
    "multistep": {"schedule": "multistep", "nesterov": False},
    "one_cycle": {"schedule": "one_cycle"},
    "constant": {"schedule": "constant", "label_smoothing": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.01, "pruned": True, "schedule": "one_cycle"},
    "pat_parent": {"schedule": "pat_parent"},
    "pruned": {"pruned": True, "weight_decay": 0.1},
    "set": {"pruned": True, "moves": "set"},
    "rigl": {"pruned": True, "moves": "rigl", "schedule": "one_cycle"},
    "late": {"start_step": 7, "momentum": 0.9},
    "diverging": {"lr": 1e4, "schedule": "constant"},
}


class Training:
    """One training as a fresh process would make it: the model, masks and hooks of a case, and a global seed."""

    def __init__(self, case, global_seed=0, **options):
        options = CASES[case] | options
        pruned, moves, start = options.pop("pruned", False), options.pop("moves", None), options.pop("start_step", 0)
        self.net, self.data, self.config = small(), task(), config(**options)
        self.masks = prune(self.net, "random", 0.4, generator=seeded()) if pruned else None
        self.snapshots = Snapshots(self.net, [0, 4, 9])
        self.hooks = [self.snapshots]
        if moves:
            settings = dataclasses.replace(PRESETS[moves], update_every=2)
            steps = train.steps(self.data, self.config)
            self.hooks.append(DynamicTraining(self.net, self.masks, settings, steps, generator=seeded(5)))
        self.start, self.made = start, 0
        torch.manual_seed(global_seed)

    def run(self, path=None, *, until=None, **options):
        """Train; `until` is the step before which it is killed."""

        def count(net, inputs):
            if net.training:
                if until is not None and self.made == until:
                    raise Killed
                self.made += 1

        handle = self.net.register_forward_pre_hook(count)
        options = {"masks": self.masks, "hooks": self.hooks, "start_step": self.start, "checkpoint": path} | options
        try:
            self.history = fit(self.net, self.data, self.config, **{"checkpoint_every_s": 0} | options)
        finally:
            handle.remove()
        return self.outcome()

    def outcome(self):
        """Weights, buffers, masks, snapshots, random state and history without the wall time, comparable with ==."""
        states = {"end": self.net.state_dict(), "masks": self.masks or {}, **self.snapshots.states}
        tensors = {f"{at} {name}": t for at, state in states.items() for name, t in state.items()}
        tensors["random"] = torch.get_rng_state()
        bits = {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
        explored = [hook.exploration() for hook in self.hooks[1:]]
        return bits, repr(dataclasses.replace(self.history, seconds=0)), explored


def killed(case, path, until, **options):
    with pytest.raises(Killed):
        Training(case, options.pop("global_seed", 0)).run(path, until=until, **options)


# ---- interrupted and not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_training_killed_before_any_step_ends_bit_equal_to_an_uninterrupted_one(case, tmp_path):
    whole = Training(case)
    expected = whole.run()
    # one case at every step, the others around the ends of epochs
    some = {1, STEPS_AN_EPOCH - 1, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 1, 2 * STEPS_AN_EPOCH, whole.made - 1}
    for step in range(1, whole.made):
        if case != "rigl" and step not in some:
            continue
        path = tmp_path / f"{step}.safetensors"
        killed(case, path, step)
        again = Training(case, global_seed=99)
        assert again.run(path) == expected, f"killed after {step} steps"
        assert again.made == whole.made - step, "steps that were made before the kill are not made again"


@pytest.mark.parametrize("case", ["one_cycle", "set"])
@pytest.mark.parametrize("every", [2, 4, 7])
def test_steps_since_the_last_checkpoint_are_made_again_and_nothing_else(case, every, tmp_path, monkeypatch):
    expected = Training(case).run()
    clock = iter(range(10**6))
    monkeypatch.setattr(resume.time, "monotonic", lambda: next(clock))
    for step in range(1, STEPS):
        path = tmp_path / f"{step}.safetensors"
        killed(case, path, step, checkpoint_every_s=every)
        again = Training(case, global_seed=99 if path.exists() else 0)
        kept = position(path)["step"] if path.exists() else 0
        assert step - every <= kept <= step
        assert again.run(path, checkpoint_every_s=every) == expected
        assert again.made == STEPS - kept


def position(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fsp_checkpoint"])["at"]


@pytest.mark.parametrize(
    ("split", "time", "left"),
    [("validation", 1, 2), ("validation", 2, 1), ("validation", 3, 0), ("test", 1, 0), ("test", 2, 0)],
)
def test_a_training_killed_while_it_evaluates_goes_on_bit_equal(split, time, left, tmp_path, monkeypatch):
    expected = Training("pruned").run()
    path, asked, evaluate = tmp_path / "c.safetensors", [], train.evaluate

    def dies(model, data, name, **options):
        asked.append(name)
        if name == split and asked.count(name) == time:
            raise Killed
        return evaluate(model, data, name, **options)

    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", dies)
        killed("pruned", path, None)
    again = Training("pruned", global_seed=99)
    assert again.run(path) == expected
    assert again.made == left * STEPS_AN_EPOCH


def test_checkpoints_change_nothing_in_a_training_that_is_not_killed(tmp_path):
    for case in ("set", "late", "one_cycle"):
        assert Training(case).run(tmp_path / "c.safetensors") == Training(case).run()


def in_a_process(path, result, started, until):
    """Body of a process: a training of 200 steps and its outcome as a file, or a wait for the kill before `until`."""
    torch.set_num_threads(1)
    started.set()
    try:
        found = Training("set", epochs=40).run(path, until=until)
    except Killed:
        time.sleep(600)
    result.write_text(repr(found))


def test_a_process_killed_by_the_system_again_and_again_gives_the_result_of_one_that_is_not(tmp_path):
    processes, chance = multiprocessing.get_context("forkserver"), random.Random(0)
    # so that each starts at once; the last would come with its optimiser
    processes.set_forkserver_preload(["fsp.pruning", "fsp.training.dynamic", "pytest", "torch._dynamo"])
    path, reached = tmp_path / "c.safetensors", [0]

    def start(path, result, until):
        started = processes.Event()
        process = processes.Process(target=in_a_process, args=(path, tmp_path / result, started, until))
        process.start()
        assert started.wait(120)
        return process

    def written():
        return path.stat().st_mtime_ns if path.exists() else None

    for _ in range(3):
        before, process = written(), start(path, "resumed", until=35)
        while process.is_alive() and written() == before:  # its first checkpoint, so that there is some progress
            time.sleep(1e-3)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached.append(position(path)["step"])
    assert reached == sorted(set(reached)), "each process goes on where the one before it was"
    for each, result in ((path, "resumed"), (tmp_path / "whole.safetensors", "whole")):
        start(each, result, until=None).join()
    assert (tmp_path / "resumed").read_text() == (tmp_path / "whole").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "resumed"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_dropout_and_memory_format_go_on_where_they_were(tmp_path):
    def training(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
        net.append(nn.Linear(32, 3))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.4, generator=seeded(parameter.numel()))
        torch.cuda.manual_seed(seed)
        return net.cuda()

    def run(net, **options):
        return fit(net, task(device="cuda"), config(channels_last=True), **options)

    path, nets = tmp_path / "c.safetensors", (training(0), training(0), training(9))
    run(nets[0])

    def dies(net, inputs, count=[]):  # noqa: B006
        count.append(net.training)
        if sum(count) == 9:
            raise Killed

    nets[1].register_forward_pre_hook(dies)
    with pytest.raises(Killed):
        run(nets[1], checkpoint=path, checkpoint_every_s=0)
    run(nets[2], checkpoint=path)
    assert nets[2][0].weight.is_contiguous(memory_format=torch.channels_last)
    for whole, resumed in zip(nets[0].parameters(), nets[2].parameters(), strict=True):
        torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-5)


# ---- the file ----------------------------------------------------------------------------------------------------


def test_the_file_is_gone_when_training_ends_and_so_are_leftovers_of_killed_writers(tmp_path):
    path = tmp_path / "run.safetensors"
    for case in ("plain", "diverging"):
        (tmp_path / ".run-a1b2c3_9.safetensors").touch()
        (tmp_path / ".run-of-mine.safetensors").touch()
        killed(case, path, 2)
        assert path.exists()
        Training(case).run(path)
        assert [p.name for p in tmp_path.iterdir()] == [".run-of-mine.safetensors"]


def test_a_checkpoint_is_written_when_it_is_due_and_not_before(tmp_path, monkeypatch):
    written = []
    save = resume.save_tensors
    monkeypatch.setattr(resume, "save_tensors", lambda *a: written.append(a) or save(*a))
    Training("plain").run(tmp_path / "c.safetensors", checkpoint_every_s=300)
    assert written == []
    clock = iter(range(10**6))
    monkeypatch.setattr(resume.time, "monotonic", lambda: next(clock))
    Training("plain").run(tmp_path / "c.safetensors", checkpoint_every_s=3)
    assert len(written) == STEPS // 3  # the clock is read at the start, at every step, and after every write
    Training("plain").run(tmp_path / "c.safetensors", checkpoint_every_s=0)
    assert len(written) == STEPS // 3 + STEPS


def test_the_file_holds_masks_momentum_and_best_weights_and_a_header_to_read(tmp_path):
    path = tmp_path / "made" / "here" / "c.safetensors"
    killed("pruned", path, 12)
    tensors = load_file(path)
    masks = Training("pruned").masks
    assert all(torch.equal(tensors[f"masks/{name}"], mask) for name, mask in masks.items())
    assert sum(name.startswith("optimizer/") for name in tensors) == len(list(small().parameters()))
    assert {name.removeprefix("best/") for name in tensors if name.startswith("best/")} == small().state_dict().keys()
    assert position(path)["step"] == 12
    assert position(path)["epoch"] == 3
    assert position(path)["seen"] == 32


def test_the_wall_time_of_the_parts_is_added_up(tmp_path):
    path = tmp_path / "c.safetensors"
    training = Training("plain")
    clock = iter(range(0, 10**6, 10))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.time, "perf_counter", lambda: next(clock))
        with pytest.raises(Killed):
            training.run(path, until=4)  # the clock is read once at the start and at each of four checkpoints
    again = Training("plain")
    again.run(path, checkpoint_every_s=300)
    assert 40 < again.history.seconds < 50


def test_the_masks_of_the_moment_are_put_into_the_dict_that_is_given(tmp_path):
    first, again = Training("set"), Training("set")
    given, initial = again.masks, dict(again.masks)
    for training, until in ((first, 6), (again, 0)):
        with pytest.raises(Killed):
            training.run(tmp_path / "c.safetensors", until=until)
    assert all(torch.equal(given[name], first.masks[name]) for name in initial)
    assert not all(torch.equal(given[name], initial[name]) for name in initial)


# ---- what is refused ---------------------------------------------------------------------------------------------


def examples(training):
    labels = training.data.train.labels.flip(0)
    return dataclasses.replace(training.data, train=Split(training.data.train.images, labels))


OTHERS = {
    "config.lr": lambda t: {"config": config(lr=0.2)},
    "config.epochs": lambda t: {"config": config(epochs=4)},
    "config.milestones": lambda t: {"config": config(milestones=(0.3,))},
    "config.seed": lambda t: {"config": config(seed=4)},
    "examples": lambda t: {"data": examples(t)},
    "mean": lambda t: {"data": dataclasses.replace(t.data, mean=(0.3,))},
    "augmented": lambda t: {"data": dataclasses.replace(t.data, augmented=not t.data.augmented)},
    "initial_weights": lambda t: {"net": small(1)},
    "parameters": lambda t: {"net": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))},
    "masks": lambda t: {"masks": prune(t.net, "random", 0.4, generator=seeded(9))},
    "hooks": lambda t: {"hooks": [SimpleNamespace(epoch_end=int)]},
    "start_step": lambda t: {"start": 2},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_training_is_refused_by_the_name_of_what_differs(name, tmp_path):
    path = tmp_path / "c.safetensors"
    killed("cosine", path, 4)
    before = path.read_bytes()
    other = Training("cosine")
    vars(other).update(OTHERS[name](other))
    weights = copy.deepcopy(other.net.state_dict())
    with pytest.raises(
        CannotResume, match=rf"is the checkpoint of another training: .*\b{name} is .* there and"
    ) as error:
        other.run(path)
    if name.startswith(("config", "start")):
        assert str(error.value).count(" there and ") == 1, "what is the same is not named"
    assert other.made == 0
    assert all(torch.equal(t, weights[key]) for key, t in other.net.state_dict().items())
    assert path.read_bytes() == before
    assert Training("cosine", 99).run(path) == Training("cosine").run()


@pytest.mark.parametrize("damage", ["one bit", "another kind"])
def test_a_file_that_is_no_whole_checkpoint_is_set_aside_with_a_warning_and_training_starts_anew(damage, tmp_path):
    path = tmp_path / "c.safetensors"
    killed("cosine", path, 4)
    if damage == "one bit":
        content = path.read_bytes()
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    else:
        save_masks(path, {"w": torch.ones(3, dtype=torch.bool)})
    broken = path.read_bytes()
    again = Training("cosine")
    with pytest.warns(UserWarning, match=r"set aside as c.safetensors.corrupt, training starts anew") as warned:
        assert again.run(path) == Training("cosine").run()
    assert warned[0].filename == __file__
    assert again.made == STEPS
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"c.safetensors.corrupt": broken}


@pytest.mark.parametrize("every", [-1, float("nan"), float("inf"), "300", True, None])
def test_an_interval_that_is_no_number_of_seconds_is_refused(every, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint_every_s=.*: expected a number of seconds of at least 0"):
        Training("plain").run(tmp_path / "c.safetensors", checkpoint_every_s=every)


def test_a_place_that_cannot_be_written_to_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "c.safetensors", tmp_path):
        training = Training("plain")
        with pytest.raises(OSError, match=str(tmp_path)):
            training.run(path)
        assert training.made == 0


def remembers(state, given=()):
    """A hook with a state; what is loaded is appended to a list."""
    return SimpleNamespace(epoch_end=int, state_dict=lambda: state, load_state_dict=lambda found: given.append(found))


def test_what_hooks_offer_comes_back_to_each_tensors_and_json_alike(tmp_path):
    tensors = {"a/b": torch.tensor([1.5, -0.0]), "bits": torch.ones(2, 3, dtype=torch.bool)}
    values = {"n": 3, "list": [1, [2.5, None]], "text": "é", "empty": {}}
    states = [{"n": 1}, tensors | values]
    first, again = Training("plain"), Training("plain")
    given = [[], []]
    silent = SimpleNamespace(after_step=lambda step, optimizer: None)
    first.hooks = [remembers(states[0]), silent, remembers(states[1])]
    again.hooks = [remembers({}, given[0]), silent, remembers({}, given[1])]
    for training, until in ((first, 3), (again, 0)):
        with pytest.raises(Killed):
            training.run(tmp_path / "c.safetensors", until=until)
    assert given[0] == [{"n": 1}]
    assert given[1][0].keys() == states[1].keys()
    assert all(torch.equal(given[1][0][name], tensor) for name, tensor in tensors.items())
    assert {name: given[1][0][name] for name in values} == values


@pytest.mark.parametrize("value", [{1, 2}, torch.float32])
def test_a_hook_whose_state_cannot_be_saved_is_refused_before_training(value, tmp_path):
    training = Training("plain")
    training.hooks = [remembers({"fine": 1, "odd": value})]
    with pytest.raises(TypeError, match=r"holds neither tensors nor JSON: .*odd"):
        training.run(tmp_path / "c.safetensors")
    assert training.made == 0


def test_weights_that_two_layers_share_are_saved_and_stay_shared(tmp_path):
    def tied():
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2, generator=seeded(parameter.numel()))
        net[2].weight = net[1].weight
        return net

    trainings = [Training("cosine") for _ in range(3)]
    for training in trainings:
        training.net = tied()
    expected = trainings[0].run()
    with pytest.raises(Killed):
        trainings[1].run(tmp_path / "c.safetensors", until=8)
    torch.manual_seed(0)
    assert trainings[2].run(tmp_path / "c.safetensors") == expected
    assert trainings[2].net[1].weight is trainings[2].net[2].weight
