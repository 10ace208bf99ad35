"""Tickets of dynamic sparse training: what is written, that it is read back, and what it puts into a model."""

import itertools

import pytest
import torch
from torch import nn

from fsp import masks as mask_algebra
from fsp.data import load
from fsp.files import DamagedFile
from fsp.pruning.methods import prune
from fsp.training import tickets
from fsp.training.dynamic import DynamicConfig, DynamicTraining
from fsp.training.train import TrainConfig, fit

CONFIG = DynamicConfig(4, 0.5, t_end_frac=1.0)
TOTAL = 30  # steps; updates at 4, 8, ... 28


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("FSP_PROGRESS", "0")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task():
    """Five steps an epoch."""
    return load("synthetic", shape=(1, 4, 4), classes=3, size=100, validation=0)


def small(seed=0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
    for name, parameter in net.named_parameters():
        if not name.startswith("2."):
            nn.init.normal_(parameter, std=0.4, generator=seeded(seed + parameter.numel()))
    return net


def copied(state):
    return {name: t.clone() for name, t in state.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(directory):
    """A training whose tickets are collected; what they ought to be, noted independently."""
    net = small()
    masks = prune(net, "erk", 0.3, generator=seeded())
    expected = {(-1, "init"): (0, {name: m | True for name, m in masks.items()}, copied(net.state_dict()))}
    collector = tickets.collect(directory, net, masks)
    number = itertools.count()

    def note(kind, step, masks):
        state = copied(net.state_dict())
        for name, mask in masks.items():
            state[name] = state[name] * mask
        expected[this[0], kind] = step, dict(masks), state

    def before(step, masks):
        note("end", step, masks)
        collector.end(step, masks)

    def after(step, masks):
        this[0] = next(number)
        note("start", step, masks)
        collector.start(step, masks)

    this = [next(number)]
    note("start", 0, masks)
    moving = DynamicTraining(net, masks, CONFIG, TOTAL, generator=seeded(), before_update=before, on_update=after)
    fit(net, task(), TrainConfig(6, 16), masks=masks, hooks=[moving])
    note("end", TOTAL, masks)
    collector.end(TOTAL, masks)
    return expected


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tickets") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSP_PROGRESS", "0")
        return directory, trained(directory)


# ---- what is written and read ------------------------------------------------------------------------------------


def test_every_update_ends_a_ticket_and_starts_the_next_and_each_is_read_as_it_was(collected):
    directory, expected = collected
    times = [0, 4, 8, 12, 16, 20, 24, 28, TOTAL]
    starts = {(number, "start"): step for number, step in enumerate(times[:-1])}
    ends = {(number, "end"): step for number, step in enumerate(times[1:])}
    assert {key: value[0] for key, value in expected.items()} == {(-1, "init"): 0, **starts, **ends}
    for (number, kind), (step, masks, state) in expected.items():
        ticket = tickets.load(directory, number, kind)
        assert (ticket.number, ticket.kind, ticket.step) == (number, kind, step)
        assert list(ticket.masks) == list(masks)
        assert same(ticket.masks, masks)
        assert same(ticket.weights, state)
        assert {name: t.dtype for name, t in ticket.weights.items()} == {name: t.dtype for name, t in state.items()}


def test_consecutive_tickets_differ_in_mask_and_a_ticket_in_weights_from_start_to_end(collected):
    directory, _ = collected
    all_starts = [tickets.load(directory, number) for number in range(8)]
    for one, next_one in itertools.pairwise(all_starts):
        assert not torch.equal(one.masks["1.weight"], next_one.masks["1.weight"])
        end = tickets.load(directory, one.number, "end")
        assert same(end.masks, one.masks)
        assert not same(end.weights, one.weights)
        # the update itself moves no weight that stays
        stay = end.masks["1.weight"] & next_one.masks["1.weight"]
        assert torch.equal(end.weights["1.weight"][stay], next_one.weights["1.weight"][stay])
        grown = next_one.masks["1.weight"] & ~end.masks["1.weight"]
        assert (next_one.weights["1.weight"][grown] == 0).all()


def test_the_masks_of_a_ticket_are_plain_mask_files(collected):
    directory, expected = collected
    path = directory / "ticket_0003.masks.safetensors"
    assert same(mask_algebra.load(path), expected[3, "start"][1])
    assert (mask_algebra.metadata(path)["number"], mask_algebra.metadata(path)["step"]) == (3, 12)


def test_files_are_compact(tmp_path):
    net = nn.Sequential(nn.Linear(1000, 400, bias=False))
    masks = prune(net, "random", 0.01, generator=seeded())
    tickets.collect(tmp_path, net, masks)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["ticket_0000.start.safetensors"] < 4 * 4_000 + 1000
    assert sizes["ticket_0000.masks.safetensors"] < 400_000 / 8 + 1000
    assert sizes["init.safetensors"] >= 4 * 400_000


def test_weights_that_two_modules_share_and_empty_layers_can_be_kept(tmp_path):
    one = nn.Linear(5, 5, bias=False)
    net = nn.Sequential(one, nn.ReLU(), one, nn.Linear(5, 2, bias=False))
    masks = {"0.weight": torch.eye(5) > 0, "3.weight": torch.zeros(2, 5) > 0}
    tickets.collect(tmp_path, net, masks)
    other = nn.Sequential(shared := nn.Linear(5, 5, bias=False), nn.ReLU(), shared, nn.Linear(5, 2, bias=False))
    tickets.put_(other, tickets.load(tmp_path, 0))
    assert torch.equal(other[0].weight, one.weight * torch.eye(5))
    assert (other[3].weight == 0).all()


# ---- into a model ------------------------------------------------------------------------------------------------


def test_a_ticket_gives_a_model_its_weights_and_nothing_else(collected):
    directory, expected = collected
    for key in [(0, "start"), (3, "start"), (3, "end")]:
        net = small(seed=5)
        tickets.put_(net, tickets.load(directory, *key))
        assert same(net.state_dict(), expected[key][2])


def test_a_ticket_gives_a_model_the_initial_weights_under_its_mask(collected):
    directory, expected = collected
    net = small(seed=5)
    tickets.put_(net, tickets.load(directory, 5), initial=tickets.load(directory, -1))
    fresh, masks = small().state_dict(), expected[5, "start"][1]
    assert same(net.state_dict(), {name: t * masks[name] if name in masks else t for name, t in fresh.items()})


def test_the_initial_ticket_gives_the_dense_model_back(collected):
    directory, _ = collected
    net = small(seed=5)
    ticket = tickets.load(directory, -1)
    tickets.put_(net, ticket)
    assert same(net.state_dict(), small().state_dict())
    assert all(m.all() for m in ticket.masks.values())


def test_ending_a_ticket_with_other_masks_is_refused(tmp_path):
    net = small()
    masks = prune(net, "erk", 0.3, generator=seeded())
    collector = tickets.collect(tmp_path, net, masks)
    with pytest.raises(ValueError, match="the masks are not those that ticket 0"):
        collector.end(4, {name: ~mask for name, mask in masks.items()})
    assert not (tmp_path / "ticket_0000.end.safetensors").exists()


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_tickets_is_refused(collected):
    directory, _ = collected
    net = small()
    with pytest.raises(ValueError, match="holds tickets already"):
        tickets.collect(directory, net, prune(net, "erk", 0.3, generator=seeded()))


def test_a_model_that_is_masked_already_is_refused(tmp_path):
    net = small()
    masks = prune(net, "erk", 0.3, generator=seeded())
    mask_algebra.apply_(net, masks)
    with pytest.raises(ValueError, match="are 0 already, so its dense initial weights cannot be kept"):
        tickets.collect(tmp_path / "new", net, masks)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("number", "kind"), [(8, "start"), (0, "middle")])
def test_a_ticket_that_is_not_there_is_refused_with_those_that_are(collected, number, kind):
    with pytest.raises(ValueError, match=rf"holds no ticket {number} {kind}; it holds init.*, ticket_0000\.end"):
        tickets.load(collected[0], number, kind)


def test_only_initial_weights_are_taken_for_initial_weights(collected):
    ticket = tickets.load(collected[0], 1)
    with pytest.raises(ValueError, match="initial is ticket 1 start"):
        tickets.put_(small(), ticket, initial=ticket)


def test_a_ticket_of_another_model_is_refused(collected):
    with pytest.raises(ValueError, match="belongs to no parameter"):
        tickets.put_(nn.Sequential(nn.Linear(16, 24)), tickets.load(collected[0], 1))


def test_a_damaged_file_is_refused(tmp_path):
    net = small()
    tickets.collect(tmp_path, net, prune(net, "erk", 0.3, generator=seeded()))
    path = tmp_path / "ticket_0000.start.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedFile, match=r"ticket_0000\.start\.safetensors"):
        tickets.load(tmp_path, 0)


def test_weights_with_the_masks_of_another_ticket_are_refused(tmp_path):
    net = small()
    masks = prune(net, "erk", 0.3, generator=seeded())
    collector = tickets.collect(tmp_path, net, masks)
    collector.start(4, prune(net, "erk", 0.3, generator=seeded(1)))
    (tmp_path / "ticket_0001.masks.safetensors").replace(tmp_path / "ticket_0000.masks.safetensors")
    with pytest.raises(ValueError, match="was written with other masks"):
        tickets.load(tmp_path, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tickets_are_collected_from_cuda(tmp_path):
    net = small().cuda()
    masks = prune(net, "erk", 0.3, generator=seeded())
    collector = tickets.collect(tmp_path, net, masks)
    moves = {"before_update": collector.end, "on_update": collector.start}
    moving = DynamicTraining(net, masks, CONFIG, TOTAL, generator=seeded(), **moves)
    data = load("synthetic", shape=(1, 4, 4), classes=3, size=100, validation=0, device="cuda")
    fit(net, data, TrainConfig(6, 16), masks=masks, hooks=[moving])
    collector.end(TOTAL, masks)
    ticket, other = tickets.load(tmp_path, 7, "end"), small(seed=5).cuda()
    tickets.put_(other, ticket)
    assert same(other.state_dict(), net.state_dict())
    assert same({name: mask.cuda() for name, mask in ticket.masks.items()}, masks)
