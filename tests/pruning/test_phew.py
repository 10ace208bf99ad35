"""`fsp.pruning.phew`: whole paths, exact counts, and the walk's law checked against its definition."""

import copy
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import generator, same, size, total
from scipy.stats import chisquare
from torch import nn

from fsp.masks import density, kept_count, prunable
from fsp.models import build
from fsp.pruning import walkgraph
from fsp.pruning.diagnosis import follow_paths
from fsp.pruning.phew import _accept, _close, _walks, phew

SHAPE = (3, 8, 8)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Concatenated(nn.Module):
    """Two convolutions side by side, concatenated behind their input."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.mix = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(12, 6, 1)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x):
        y = torch.cat([x[:, :, 1:-1, 1:-1], self.left(x), self.right(x).relu()], dim=1)
        return self.classifier(self.mix(y).mean((2, 3)))


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, groups=4),
        nn.Dropout(), nn.Conv2d(12, 12, 1, groups=12), nn.Flatten(), nn.Linear(48, 10)
    )  # fmt: skip


def over_time():
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(8, 6, 3), nn.Flatten(), nn.Linear(6, 4)
    )


MODELS = {
    "mlp": build("mlp", SHAPE, 10, hidden=(48, 32)),
    "resnet8": build("resnet8", SHAPE, 10, width=8),
    "resnet8-A": build("resnet8", SHAPE, 10, width=8, shortcut="A"),
    "ecn3": build("ecn3", SHAPE, 10),
    "grouped": seeded(grouped),
    "concatenated": seeded(Concatenated),
    "over_time": seeded(over_time),
}
SHAPES = dict.fromkeys(MODELS, SHAPE) | {"over_time": (3, 8)}


def graph_of(model, shape, identity="residual", kernels=False):
    return walkgraph.graph_of(model, prunable(model), shape, identity, kernels)


def assert_on_paths(model, masks, shape):
    """Every kept kernel lies on a path of kept kernels, whatever its positions meet."""
    kept = {name: mask.view(*mask.shape[:2], -1).any(2) for name, mask in masks.items()}
    whole = {
        n: kernels.view(*kernels.shape, *[1] * (masks[n].ndim - 2)).expand_as(masks[n]) for n, kernels in kept.items()
    }
    found = follow_paths(model, whole, shape).effective
    for name, kernels in kept.items():
        assert torch.equal(found[name].view(*kernels.shape, -1).any(2), kernels)


# ---- counts and paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("asked", [1, 0.8, 0.3, 0.05, 0.02])
@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_asked_number_is_kept_and_every_kept_weight_lies_on_a_path(name, asked, kernels):
    model, shape = MODELS[name], SHAPES[name]
    if asked == 0.02 and kernels:
        asked = 0.04  # a path of whole kernels is longer than 2% of the smallest network
    if name == "over_time" and asked < 0.1:
        asked = 0.15
    masks = phew(model, asked, shape=shape, generator=generator(), kernels=kernels)
    assert list(masks) == list(prunable(model))
    assert all(
        m.dtype == torch.bool and m.shape == p.shape
        for m, p in zip(masks.values(), prunable(model).values(), strict=True)
    )
    assert total(masks) == kept_count(size(model), asked)
    if asked < 1:
        assert_on_paths(model, masks, shape)
    if kernels:
        assert all(len(set(k.tolist())) == 1 for m in masks.values() if m.ndim > 2 for k in m.flatten(2).flatten(0, 1))


@pytest.mark.parametrize("asked", [0.002, 0.01, 0.1])
@pytest.mark.parametrize("identity", ["residual", "coin"])
def test_all_kept_kernels_of_a_resnet_lie_on_paths_through_its_blocks(identity, asked):
    kept = {
        name.removesuffix(".weight"): m.flatten(2).any(2).double() if m.ndim > 2 else m.double()
        for name, m in phew(MODELS["resnet8"], asked, shape=SHAPE, generator=generator(5), identity=identity).items()
    }
    skip = identity == "coin"  # only then may a path leave block 0 out
    reach = {"stem.conv": torch.ones(3).double()}
    x = kept["stem.conv"] @ reach["stem.conv"]
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        reach[f"{block}.conv1"] = reach[f"{block}.shortcut.conv"] = x
        reach[f"{block}.conv2"] = kept[f"{block}.conv1"] @ x
        around = kept[f"{block}.shortcut.conv"] @ x if f"{block}.shortcut.conv" in kept else x * skip
        x = kept[f"{block}.conv2"] @ reach[f"{block}.conv2"] + around
    reach["classifier"] = x
    lead = {"classifier": torch.ones(10).double()}
    y = kept["classifier"].T @ lead["classifier"]
    for block in ("blocks.2", "blocks.1", "blocks.0"):
        lead[f"{block}.conv2"] = lead[f"{block}.shortcut.conv"] = y
        lead[f"{block}.conv1"] = kept[f"{block}.conv2"].T @ y
        around = kept[f"{block}.shortcut.conv"].T @ y if f"{block}.shortcut.conv" in kept else y * skip
        y = kept[f"{block}.conv1"].T @ lead[f"{block}.conv1"] + around
    lead["stem.conv"] = y
    for name, mask in kept.items():
        assert (reach[name][None] * lead[name][:, None])[mask > 0].gt(0).all(), name


@pytest.mark.parametrize("forward", [True, False])
def test_every_walk_is_one_chain_from_the_input_to_the_output(forward):
    model = MODELS["grouped"]
    graph = graph_of(model, SHAPE)
    starts = torch.arange(300) % (3 if forward else 10)
    passed = _walks(graph, starts, forward, generator(1))
    shapes = [p.shape for p in prunable(model).values()]
    groups = [1, 4, 12, 1]
    firsts = np.cumsum([0] + [s.numel() for s in shapes])
    for start, walk in zip(starts.tolist(), passed.T.tolist(), strict=True):
        ends = []
        for item, first, shape, g in zip(walk, firsts, shapes, groups, strict=False):
            o, i, *_ = np.unravel_index(item - first, shape)
            ends.append((o // (shape[0] // g) * shape[1] + i, o))
        assert (ends[0][0] if forward else ends[-1][1]) == start
        ends[-1] = (ends[-1][0] // 4, ends[-1][1])  # four positions of each channel are flattened
        assert all(a[1] == b[0] for a, b in pairwise(ends))


def test_walks_start_at_every_input_and_end_at_every_output_however_light_these_are():
    model = build("mlp", (1, 4, 4), 10, hidden=(32,))
    with torch.no_grad():
        model.linear1.weight[:, 5] *= 1e-9  # chance alone would take neither
        model.classifier.weight[7] *= 1e-9
    masks = phew(model, 0.1, shape=(1, 4, 4), generator=generator())
    assert masks["linear1.weight"].any(0).all()
    assert masks["classifier.weight"].any(1).all()


def test_one_seed_gives_one_mask_and_another_seed_another():
    first, again, other = (
        phew(MODELS["resnet8"], 0.1, shape=SHAPE, generator=generator(seed)) for seed in (0, 0, 1)
    )  # fmt: skip
    assert same(first, again)
    assert not same(first, other)


def test_the_model_and_the_global_random_state_stay_as_they_are():
    model = build("resnet8", SHAPE, 10, width=8)
    model.blocks[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    phew(model, 0.1, shape=SHAPE, generator=generator())
    assert same(before, model.state_dict())
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ---- the law of a walk -------------------------------------------------------------------------------------------


def agree(counts, probabilities):
    """Chi-square test of counts; entries of probability 0 must not occur."""
    counts, probabilities = np.asarray(counts, float).ravel(), np.asarray(probabilities, float).ravel()
    assert counts[probabilities == 0].sum() == 0
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    assert chisquare(counts, probabilities / probabilities.sum() * counts.sum()).pvalue > 1e-3


LAYERS = {
    "linear": (nn.Linear(4, 3), (4,), nn.Identity()),
    "convolution": (nn.Conv2d(4, 3, (2, 3)), (4, 6, 6), nn.Identity()),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), (4, 6, 6), nn.Identity()),
}


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_takes_a_unit_by_its_kernel_sums_and_then_a_position_by_its_magnitude(name, forward):
    layer, shape, rest = LAYERS[name]
    weight = torch.randn(layer.weight.shape, generator=generator(2))
    weight[0, 0] = 0  # a kernel of zeros is never passed
    layer.weight.data = weight
    passed = _walks(graph_of(nn.Sequential(layer, rest), shape), torch.ones(60_000).long(), forward, generator(4))
    counts = torch.bincount(passed[0], minlength=weight.numel()).view(len(weight), weight.shape[1], -1)
    w = weight.abs().flatten(2) if weight.ndim > 2 else weight.abs()[..., None]
    members = slice(0, 3)  # outputs that input 1 leads to: with two groups those of the first
    unit = (members, 1) if forward else (1,)
    kernel = w[unit].sum(-1)
    expected = torch.zeros_like(w)
    expected[unit] = (kernel / kernel.sum())[:, None] * w[unit] / kernel[:, None].clamp(min=1e-30)
    agree(counts, expected)


def test_a_row_of_zeros_is_walked_uniformly():
    layer = nn.Conv1d(2, 3, 4)
    layer.weight.data[:, 1] = 0
    passed = _walks(graph_of(nn.Sequential(layer), (2, 9)), torch.ones(20_000).long(), True, generator())
    counts = torch.bincount(passed[0], minlength=24).view(3, 2, 4)
    expected = torch.zeros(3, 2, 4)
    expected[:, 1] = 1 / 12
    agree(counts, expected)


def test_a_flattened_channel_is_left_by_each_of_its_positions_alike():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    passed = _walks(graph_of(model, (1, 2, 2)), torch.zeros(40_000).long(), True, generator())
    channel, feature = passed[0], (passed[1] - 2) % 8
    assert torch.equal(feature // 4, channel)
    for c in (0, 1):
        agree(torch.bincount(feature[channel == c] - 4 * c, minlength=4), np.full(4, 0.25))


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("identity", ["residual", "coin"])
def test_a_fair_coin_decides_at_projections_and_at_identities_only_if_asked(identity, forward):
    graph = graph_of(MODELS["resnet8"], SHAPE, identity)
    passed = _walks(graph, torch.zeros(20_000).long(), forward, generator()) >= 0
    taken = dict(zip((name for name, _ in prunable(MODELS["resnet8"]).items()), passed, strict=True))
    branch = {i: taken[f"blocks.{i}.conv1.weight"] for i in range(3)}
    for i in range(3):
        assert torch.equal(branch[i], taken[f"blocks.{i}.conv2.weight"])
    for i in (1, 2):
        assert torch.equal(branch[i], ~taken[f"blocks.{i}.shortcut.conv.weight"])
        agree([int(branch[i].sum()), int((~branch[i]).sum())], [0.5, 0.5])
    if identity == "residual":
        assert branch[0].all()
    else:
        agree([int(branch[0].sum()), int((~branch[0]).sum())], [0.5, 0.5])
    agree(torch.bincount(2 * branch[1] + branch[2].long(), minlength=4), np.full(4, 0.25))  # independent


def test_a_backward_walk_leaves_padded_channels_by_the_residual_branch():
    model = MODELS["resnet8-A"]  # channels 8 to 15 of block 1 come from its convolutions alone
    graph = graph_of(model, SHAPE, "coin")
    passed = _walks(graph, torch.zeros(20_000).long(), False, generator())
    names = [name for name in prunable(model)]
    first, second = (names.index(f"blocks.{i}.conv1.weight") for i in (1, 2))
    through = passed[second] >= 0
    sizes = [p.numel() for p in prunable(model).values()]
    entered = (passed[second] - sum(sizes[:second])) // 9 % 16  # input channel of block 2
    padded = through & (entered >= 8)
    assert padded.sum() > 100
    assert (passed[first][padded] >= 0).all()
    agree(torch.bincount((passed[first][through & ~padded] >= 0).long(), minlength=2), [0.5, 0.5])


def test_padded_channels_are_followed_through_a_flatten():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.classifier = nn.Conv2d(2, 4, 1), nn.Linear(16, 3)

        def forward(self, x):
            around = nn.functional.pad(x, (0, 0, 0, 0, 2, 0))  # the input is channels 2 and 3
            return self.classifier(torch.flatten(self.a(x), 1) + torch.flatten(around, 1))

    model = seeded(Padded)
    passed = _walks(graph_of(model, (2, 2, 2), "coin"), torch.arange(400) % 2, True, generator())
    feature = (passed[1] - 8) % 16
    around = passed[0] < 0
    assert torch.equal(feature[around] // 4, (torch.arange(400) % 2 + 2)[around])
    assert torch.equal(feature[~around] // 4, passed[0][~around] // 2)


# ---- acceptance and the last walks -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(4, 7), st.integers(-1, 7)), min_size=1, max_size=12),
    st.sets(st.integers(0, 7)),
    st.integers(1, 9),
)
def test_walks_are_accepted_in_order_until_one_does_not_fit(walks, kept, missing):
    mask = torch.tensor([i in kept for i in range(8)])
    sizes = np.array([1, 3, 3])  # items 4 to 7 hold three weights each
    walks = [(a, b, c if c >= 4 else -1) for a, b, c in walks]
    held, added, accepted = set(kept), 0, 0
    for walk in walks:
        new = {item for item in walk if item >= 0} - held
        gain = sum(1 if item < 4 else 3 for item in new)
        if added + gain > missing:
            break
        held, added, accepted = held | new, added + gain, accepted + 1
    assert _accept(mask, torch.tensor(walks).T, sizes, missing) == (added, accepted)
    assert set(mask.nonzero()[:, 0].tolist()) == held


class Forked(nn.Module):
    """A projection around two convolutions, few units: all walks can be counted."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 2, 2), nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 2)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x):
        return self.classifier(torch.flatten(self.b(self.a(x).relu()) + self.c(x), 1))


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_last_walks_have_the_law_of_walks_that_add_few_enough(kernels, missing):
    model = seeded(Forked, 3)
    graph = graph_of(model, (2, 3), kernels=kernels)
    sizes, share = torch.zeros(len(graph.kept)).long(), torch.zeros(len(graph.kept))
    # few are kept on the branch of two: cheap walks mostly take the projection
    for layer, part in zip(graph.layers.values(), (0.2, 0.2, 0.8, 0.6), strict=True):
        sizes[layer.items], share[layer.items] = layer.size, part
    given_kept = torch.rand(len(graph.kept), generator=generator(8)) < share
    walks = _walks(graph, torch.arange(100_000) % 2, True, generator(1)).T
    gain = ((walks >= 0) & ~given_kept[walks]).long().mul(sizes[walks]).sum(1)
    rejected = Counter(tuple(sorted(set(w) - {-1})) for w in walks[(gain >= 1) & (gain <= missing)].tolist())
    drawn, source = Counter(), generator(2)
    for _ in range(600):
        graph.kept = given_kept.clone()
        added = _close(graph, missing, source, "")
        new = (graph.kept & ~given_kept).nonzero()[:, 0]
        assert added == int(sizes[new].sum()) in range(1, missing + 1)
        drawn[tuple(new.tolist())] += 1
    expected = Counter()
    for walk, n in rejected.items():
        expected[tuple(item for item in walk if not given_kept[item])] += n
    assert set(drawn) <= set(expected)
    agree([drawn[key] for key in expected], list(expected.values()))


def test_a_count_of_one_short_path_is_met_past_a_branch_that_is_too_long():
    class Long(Forked):
        def forward(self, x):
            return self.classifier(torch.flatten(self.b(self.b(self.b(self.a(x)))) + self.c(x), 1))

    model = seeded(Long)  # the projection and the classifier are the shortest path: 2 of 28 weights
    for seed in range(8):
        masks = phew(model, 1.5 / 28, shape=(2, 3), generator=generator(seed))
        assert {name: int(m.sum()) for name, m in masks.items() if m.any()} == {"c.weight": 1, "classifier.weight": 1}


def test_the_last_walks_do_not_underflow_in_a_deep_network():
    model = build("resnet56", SHAPE, 10)
    masks = phew(model, 0.001, shape=SHAPE, generator=generator())
    assert total(masks) == kept_count(size(model), 0.001)


# ---- other networks ----------------------------------------------------------------------------------------------


def test_an_excluded_layer_stays_dense_outside_the_masks_and_walks_pass_it():
    model = MODELS["mlp"]
    masks = phew(model, 0.1, shape=SHAPE, generator=generator(), exclude=["linear2"])
    assert list(masks) == ["linear1.weight", "classifier.weight"]
    assert total(masks) == kept_count(192 * 48 + 32 * 10, 0.1)


def test_a_weight_that_two_layers_share_counts_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    for asked in (0.02, 0.05, 0.3):
        masks = phew(seeded(Shared), asked, shape=(12,), generator=generator())
        assert total(masks) == kept_count(180, asked)


def test_what_torch_prune_and_parametrize_do_to_a_layer_is_followed():
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)))
    expected = phew(model, 0.2, shape=(8,), generator=generator())
    nn.utils.prune.identity(model[0], "weight")
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    masks = phew(model, 0.2, shape=(8,), generator=generator())
    assert set(masks) == {"0.weight_orig", "2.parametrizations.weight.original"}
    assert torch.equal(masks["0.weight_orig"], expected["0.weight"])


def test_networks_of_torchvision_are_pruned():
    model = seeded(lambda: torchvision.models.resnet18(num_classes=10))
    masks = phew(model, 0.01, shape=(3, 64, 64), generator=generator())
    assert total(masks) == kept_count(size(model), 0.01)
    assert all(mask.any() for mask in masks.values())
    model = seeded(lambda: torchvision.models.squeezenet1_1(num_classes=10))
    assert density(phew(model, 0.1, shape=(3, 64, 64), generator=generator())) == pytest.approx(0.1, abs=1e-5)


@pytest.mark.slow
def test_a_vgg11_of_torchvision_with_its_large_linear_layers_is_pruned():
    model = seeded(lambda: torchvision.models.vgg11())
    masks = phew(model, 0.01, shape=(3, 224, 224), generator=generator())
    assert total(masks) == kept_count(size(model), 0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_do_not_depend_on_the_device():
    there = copy.deepcopy(MODELS["resnet8"]).cuda()
    masks = phew(there, 0.1, shape=SHAPE, generator=generator())
    assert all(m.is_cuda for m in masks.values())
    here = phew(MODELS["resnet8"], 0.1, shape=SHAPE, generator=generator())
    assert same({name: m.cpu() for name, m in masks.items()}, here)


# ---- what cannot be done -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0}, ValueError, r"density 0 is not in \(0, 1\]"),
        ({"shape": None}, ValueError, "the shape of an input is missing"),
        ({"shape": (3, 9, 9)}, ValueError, r"cannot trace Sequential .* inputs of shape \(3, 9, 9\)"),
        ({"identity": "skip"}, ValueError, "identity='skip': expected one of 'residual', 'coin'"),
        ({"kernels": 1}, ValueError, "kernels=1: expected one of True, False"),
        ({"generator": None}, ValueError, "generator=None: expected"),
        ({"density": 1e-4}, ValueError, "keeps 2 of 11072 weights, but one complete path has 3"),
        ({"exclude": ["nothing"]}, ValueError, "matches no prunable weight"),
    ],
)
def test_bad_input_is_named(options, error, message):
    arguments = {"density": 0.1, "shape": SHAPE, "generator": generator()} | options
    with pytest.raises(error, match=message):
        phew(MODELS["mlp"], **arguments)


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, a, something, b):
        super().__init__()
        self.a, self.something, self.b = a, something, b

    def forward(self, x):
        return self.b(self.something(self.a(x)))


@pytest.mark.parametrize(
    ("something", "message"),
    [
        (lambda y: y.transpose(1, 2).transpose(1, 2), "operation transpose"),
        (lambda y: y * y.mean((2, 3), keepdim=True), r"operation mul .*\(2, 3, 1, 1\)|operation mul .*\(2, 3, 8, 8\)"),
        (lambda y: torch.cat(y.chunk(3, 1), 1), "operation chunk"),
        (lambda y: y[:, [2, 1, 0]], "operation getitem"),
        (lambda y: y.flip(1), "operation flip"),
        (lambda y: torch.cat([y, y], 2), "operation cat"),
        (lambda y: y.flatten(1).view(-1, 3, 8, 8), "operation view"),
        (lambda y: y.mean(1, keepdim=True).expand(-1, 3, -1, -1), "operation mean"),
        (lambda y: torch.nn.functional.conv2d(y, torch.ones(3, 3, 1, 1)), "operation conv2d"),
        (lambda y: y if y.sum() > 0 else -y, "cannot trace Between with torch.fx .* use another method"),
        (lambda y: nn.functional.pad(y[:, :, ::1], (0, 0, 0, 0, 1, -1)), "operation pad"),
    ],
)
def test_an_operation_that_walks_cannot_follow_is_named(something, message):
    with pytest.raises(ValueError, match=message):
        phew(
            Between(nn.Conv2d(3, 3, 3, padding=1), something, nn.Conv2d(3, 3, 1)),
            0.5,
            shape=SHAPE,
            generator=generator(),
        )


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), SHAPE, "operation ConvTranspose2d"),
        (nn.Sequential(nn.Linear(8, 4)), SHAPE, "operation Linear"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConstantPad3d((0, 0, 0, 0, 1, 0), 0.0), nn.Conv2d(5, 2, 1)),
         SHAPE, "operation ConstantPad3d"),
        (nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 4)), (6,), "operation LSTM"),
        (Between(nn.Linear(6, 4), lambda y: nn.functional.pad(y, (1, 1), "reflect"), nn.Linear(6, 2)), (6,), "on pad"),
        (Between(nn.Conv2d(3, 3, 1), lambda y: y.mean(1), nn.Conv1d(3, 2, 1)), (3, 3, 5), "operation mean")
    ]
)  # fmt: skip
def test_a_module_that_walks_cannot_follow_is_named(model, shape, message):
    with pytest.raises(ValueError, match=message):
        phew(model, 0.5, shape=shape, generator=generator())


def test_channels_from_nowhere_are_refused():
    model = Between(nn.Conv2d(3, 3, 1), lambda y: nn.functional.pad(y, (0, 0, 0, 0, 1, 0)), nn.Conv2d(4, 3, 1))
    with pytest.raises(ValueError, match="1 channels come from nowhere"):
        phew(model, 0.5, shape=SHAPE, generator=generator())


def test_two_outputs_are_refused():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = nn.Sequential(Two(4, 4))
    with pytest.raises(ValueError, match="operation Two"):
        phew(model, 0.5, shape=(4,), generator=generator())


def test_weights_that_are_not_numbers_are_refused():
    model = build("mlp", (1, 4, 4), 10)
    model.linear2.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"'linear2' holds nan or inf"):
        phew(model, 0.5, shape=(1, 4, 4), generator=generator())


def test_walks_that_saturate_say_how_far_they_came():
    model = build("mlp", (1, 4, 4), 10)
    model.linear2.weight.data[:128, :128] *= 1e-12  # a quarter of the layer that neither direction passes
    with pytest.raises(RuntimeError, match=r"keeps 64973 of 72192 weights, but walks have saturated: \d+ of them"):
        phew(model, 0.9, shape=(1, 4, 4), generator=generator())


def test_no_walk_enters_a_branch_that_only_training_uses():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
            self.auxiliary = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))

        def forward(self, x):
            y = self.a(x).relu()
            aside = self.auxiliary(y)
            return (self.b(y), aside) if self.training else self.b(y)

    model = seeded(Auxiliary)
    masks = phew(model, 0.3, shape=(6,), generator=generator())
    assert model.training
    assert total(masks) == kept_count(128, 0.3)
    assert not masks["auxiliary.0.weight"].any()


def test_weights_off_every_path_cannot_be_kept():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(50, 50)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="keeps 1282 of 2564 weights, but only 64 lie on a path"):
        phew(Part(), 0.5, shape=(8,), generator=generator())
    assert not phew(Part(), 0.01, shape=(8,), generator=generator())["unused.weight"].any()


def test_whole_kernels_that_cannot_make_the_count_are_refused():
    model = nn.Sequential(nn.Conv1d(2, 2, 4), nn.Flatten())
    with pytest.raises(RuntimeError, match=r"3 are missing, and no complete walk adds so few"):
        phew(model, 7 / 16, shape=(2, 4), generator=generator(), kernels=True)
