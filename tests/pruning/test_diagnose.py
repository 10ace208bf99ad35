"""`fsp.pruning`: weights on complete paths against reachability by hand, multiply-adds, models left as they were."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import all_kept, random_masks, same
from torch import nn, tensor
from torch.utils.flop_counter import FlopCounterMode

from fsp.masks import density, to_torch_
from fsp.models import build
from fsp.pruning.diagnosis import diagnose, follow_paths
from fsp.pruning.methods import prune

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)
COLOUR = (3, 32, 32)


def effective(model, kept, shape):
    """The kept weights on a complete path, as masks."""
    return follow_paths(model, kept, shape).effective


# ---- weights on complete paths -----------------------------------------------------------------------------------


def mlp(widths, activation=nn.ReLU):
    layers = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), activation())]
    return nn.Sequential(*layers[:-1])


def reachable(kept):
    """Effective weights of a plain chain of (out, in) masks: reached from the left, and leading to the right."""
    from_input = [torch.ones(kept[0].shape[1], dtype=torch.bool)]
    for mask in kept:
        from_input.append((mask & from_input[-1]).any(1))
    to_output = [torch.ones(len(kept[-1]), dtype=torch.bool)]
    for mask in reversed(kept):
        to_output.append((mask & to_output[-1][:, None]).any(0))
    to_output.reverse()
    return [
        mask & left & right[:, None] for mask, left, right in zip(kept, from_input[:-1], to_output[1:], strict=True)
    ]


@examples
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    fraction=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    seed=st.integers(0, 999),
    activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.Hardswish, nn.SELU]),
)
def test_in_an_mlp_effective_weights_are_those_of_boolean_reachability(widths, fraction, seed, activation):
    model = mlp(widths, activation)
    kept = random_masks(model, fraction, seed)
    found, expected = effective(model, kept, (widths[0],)), reachable(list(kept.values()))
    assert list(found) == list(kept)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    _, network = diagnose(model, kept, (widths[0],))
    assert network["disconnected"] == (not expected[-1].any())


class Residual(nn.Module):
    """Two convolutions with a max-pool and a stride, a projection around them, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(2)
        self.a = nn.Conv2d(2, 2, 3, padding=1, stride=2)
        self.b = nn.Conv2d(2, 2, 1, groups=2)
        self.around = nn.Conv2d(2, 2, 1, stride=2)
        self.classifier = nn.Linear(2, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.pool(self.stem(x))))
        x = torch.relu(self.b(F.relu(self.a(x))) + self.around(x))
        return self.classifier(x.mean((2, 3)))


def edges_of_convolution(name, layer, size, source, target):
    """Every use of a weight: (name, index in the weight, vertex it reads, vertex it writes), and the output size."""
    out, per_group, height, width = layer.weight.shape
    (stride, _), (padding, _) = layer.stride, layer.padding
    after = (size + 2 * padding - height) // stride + 1
    edges = []
    for o, i, k, l, y, x in itertools.product(*map(range, (out, per_group, height, width, after, after))):
        row, column = y * stride + k - padding, x * stride + l - padding
        if 0 <= row < size and 0 <= column < size:
            channel = o // (out // layer.groups) * per_group + i
            edges.append((name, (o, i, k, l), (source, channel, row, column), (target, o, y, x)))
    return edges, after


def edges_of_residual(model, size):
    """The graph of `Residual` on images of size × size; name None where an edge is no weight."""
    edges, n = edges_of_convolution("stem", model.stem, size, "in", "stem")
    for c, y, x in itertools.product(range(2), range(n // 2 * 2), range(n // 2 * 2)):
        edges.append((None, None, ("stem", c, y, x), ("pool", c, y // 2, x // 2)))
    n //= 2
    a, after = edges_of_convolution("a", model.a, n, "pool", "a")
    b, _ = edges_of_convolution("b", model.b, after, "a", "sum")
    around, _ = edges_of_convolution("around", model.around, n, "pool", "sum")
    edges += a + b + around
    for c, y, x, o in itertools.product(range(2), range(after), range(after), range(2)):
        edges.append(("classifier", (o, c), ("sum", c, y, x), ("out", o)))
    return edges


def on_paths(edges, kept):
    """Weights used by an edge on some path from an ``in`` vertex to an ``out`` vertex, by following each path."""
    edges = [edge for edge in edges if edge[0] is None or kept[f"{edge[0]}.weight"][edge[1]]]
    leaving = {}
    for edge in edges:
        leaving.setdefault(edge[2], []).append(edge)
    found = {name: torch.zeros_like(mask) for name, mask in kept.items()}
    known = {}

    def leads_out(vertex):
        if vertex not in known:
            known[vertex] = vertex[0] == "out" or any([leads_out(edge[3]) for edge in leaving.get(vertex, [])])
        return known[vertex]

    seen, open_ = set(), [vertex for vertex in leaving if vertex[0] == "in"]
    while open_:
        vertex = open_.pop()
        if vertex in seen:
            continue
        seen.add(vertex)
        for name, index, _, target in leaving.get(vertex, []):
            if leads_out(target):
                open_.append(target)
                if name is not None:
                    found[f"{name}.weight"][index] = True
    return found


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.6, 1.0])
def test_in_a_small_residual_convnet_effective_weights_are_those_on_paths_through_its_pixels(size, fraction):
    model = Residual()
    edges = edges_of_residual(model, size)
    for seed in range(8):
        kept = random_masks(model, fraction, seed)
        found = effective(model, kept, (2, size, size))
        assert same(found, on_paths(edges, kept))
        assert all((found[name] <= kept[name]).all() for name in kept)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool1d(3, ceil_mode=True),
        nn.MaxPool1d(2),
        nn.MaxPool1d(4, padding=1, stride=2),
        nn.AdaptiveMaxPool1d(1),
        nn.AdaptiveMaxPool1d(2),
    ],
)
def test_no_max_pool_hides_a_path_behind_a_tie_or_beyond_its_last_whole_window(pool):
    windows = pool(torch.zeros(1, 1, 4)).shape[2]
    model = nn.Sequential(nn.ConvTranspose1d(1, 1, 4), pool, nn.Flatten(), nn.Linear(windows, 1))
    kept = all_kept(model)  # one pixel becomes four equal ones, each by a tap of its own
    assert same(effective(model, kept, (1, 1)), kept)


def test_taps_that_meet_padding_alone_are_never_effective():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1))
    centre = F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1)).bool()
    assert same(effective(model, all_kept(model), (1, 1, 1)), {"0.weight": centre, "1.weight": centre})
    assert diagnose(model, all_kept(model), (1, 1, 1)).network["effective_density"] == 1 / 9


def test_the_values_of_weights_and_norms_and_dead_units_play_no_part():
    model = Residual()
    kept = random_masks(model, 0.5, 3)
    expected = effective(model, kept, (2, 8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1e30)
        model.norm.weight.zero_()
        model.norm.running_mean.fill_(1e9)
        model.norm.running_var.zero_()
    assert same(effective(model, kept, (2, 8, 8)), expected)


def test_biases_and_constants_are_no_inputs():
    model = mlp([2, 2, 2])
    nn.init.ones_(model[0].bias)
    kept = {"0.weight": tensor([[True, True], [False, False]]), "2.weight": torch.ones(2, 2, dtype=torch.bool)}
    found = effective(model, kept, (2,))
    assert found["2.weight"].tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("depth", [20, 110])
def test_neither_depth_nor_width_overflows_or_underflows(depth):
    model = build(f"resnet{depth}", COLOUR, 10)
    assert same(effective(model, all_kept(model), COLOUR), all_kept(model))
    chain = nn.Sequential(*[nn.Linear(50, 50, bias=False) for _ in range(400)])  # R is 50 ** 401
    assert same(effective(chain, all_kept(chain), (50,)), all_kept(chain))
    thin = {name: torch.eye(50, dtype=torch.bool) for name in all_kept(chain)}
    assert same(effective(chain, thin, (50,)), thin)
    dead = all_kept(chain)
    dead["200.weight"][7] = False
    dead["300.weight"][:, 8] = False
    expected = reachable(list(dead.values()))
    assert all(torch.equal(a, b) for a, b in zip(effective(chain, dead, (50,)).values(), expected, strict=True))


def test_a_resnet18_with_its_three_projections_empty_is_still_connected():
    model = build("resnet18", COLOUR, 10)
    kept = all_kept(model)
    for name in kept:
        if "shortcut" in name:
            kept[name].fill_(False)
    layers, network = diagnose(model, kept, COLOUR)
    assert network["empty"] == layers["empty"].sum() == 3
    assert not network["disconnected"]
    assert (layers["effective"] == layers["kept"]).all()
    kept["blocks.6.conv2.weight"].fill_(False)  # now the residual branch of the last transition is cut as well
    layers, network = diagnose(model, kept, COLOUR)
    assert network["disconnected"]
    assert network["effective"] == 0 < network["kept"]


def test_synflow_of_a_resnet18_at_one_percent_in_one_shot_is_disconnected_and_random_is_not():
    model = build("resnet18", COLOUR, 10, init="kaiming_normal_fan_out")  # R(masked) = 0
    one_shot = prune(model, "synflow", 0.01, rounds=1, shape=COLOUR)
    assert diagnose(model, one_shot, COLOUR).network["disconnected"]
    network = diagnose(model, prune(model, "uniform", 0.05), COLOUR).network
    assert not network["disconnected"]
    assert 0 < network["effective_density"] < network["density"]


class Gated(nn.Module):
    """Squeeze-and-excitation in its shortest form: `gate` scales what `main` computes."""

    def __init__(self):
        super().__init__()
        self.main, self.gate = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)

    def forward(self, x):
        return self.main(x) * torch.sigmoid(self.gate(x.mean(2, keepdim=True)))


def test_a_gate_is_open_without_weights_and_useless_on_a_dead_channel():
    model = Gated()
    kept = all_kept(model)
    kept["gate.weight"].fill_(False)
    assert effective(model, kept, (2, 5))["main.weight"].all()
    kept = all_kept(model)
    kept["main.weight"][1] = False
    found = effective(model, kept, (2, 5))
    assert found["gate.weight"][..., 0].tolist() == [[True, True], [False, False]]


def test_a_network_that_ends_in_a_gate_can_be_disconnected():
    model = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid())
    kept = all_kept(model)
    assert not diagnose(model, kept, (2,)).network["disconnected"]
    kept["0.weight"].fill_(False)
    assert diagnose(model, kept, (2,)).network["disconnected"]


class Attention(nn.Module):
    """One head written out, or PyTorch's fused function, or its module; three tokens of width 4."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "written out":
            x = (q @ k.mT / 2).softmax(-1) @ v
        elif self.how == "fused":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x, _ = self.heads(q, k, v, need_weights=False)
        return self.last(x)


@pytest.mark.parametrize("how", ["written out", "fused", "module"])
def test_attention_passes_paths_through_query_key_and_value_and_ends_at_its_output_projection(how):
    model = Attention(how)
    kept = all_kept(model)
    unused = {"module": []}.get(how, ["heads.out_proj.weight"])
    assert [name for name, mask in effective(model, kept, (3, 4)).items() if not mask.any()] == unused
    cut = "heads.out_proj.weight" if how == "module" else "v.weight"
    kept[cut].fill_(False)
    network = diagnose(model, kept, (3, 4)).network
    assert network["disconnected"]
    assert network["effective"] == 0
    kept = all_kept(model)
    kept["q.weight"].fill_(False)
    kept["k.weight"].fill_(False)
    assert effective(model, kept, (3, 4))["last.weight"].all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvision_networks_are_whole_when_dense(name):
    model = getattr(torchvision.models, name)(num_classes=5)
    kept = all_kept(model)
    layers, network = diagnose(model, kept, (3, 64, 64))
    partly = layers[layers["effective"] != layers["kept"]]
    # only 5×5 kernels on maps of 2×2: their outermost taps meet padding alone
    assert [shape[-2:] for shape in partly["shape"]] == [(5, 5)] * (2 if name == "mobilenet_v3_small" else 0)
    assert (partly["effective"] * 25 == partly["kept"] * 9).all()
    assert not network["disconnected"]


def test_a_vgg_with_biases_and_dropout_and_a_vision_transformer_are_whole_when_dense():
    vgg = torchvision.models.vgg11(num_classes=5).features
    vgg.append(nn.Flatten()).append(nn.Dropout()).append(nn.Linear(512, 5))
    vit = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)
    for model in (vgg, vit):
        kept = all_kept(model)
        found = effective(model, kept, COLOUR)
        # the last blocks of a VGG see maps of 2×2 at this size, where every tap of 3×3 still meets a pixel
        assert same(found, kept)


def test_depthwise_transposed_and_three_dimensional_layers_keep_to_their_channels():
    model = nn.Sequential(
        nn.ConvTranspose1d(4, 4, 2, stride=2, groups=4, bias=False),
        nn.Conv1d(4, 4, 3, groups=4, padding=1, padding_mode="circular"),
        nn.Unflatten(2, (2, 2, 2)),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.Conv3d(4, 4, 1, groups=2),
    )
    kept = all_kept(model)
    assert same(effective(model, kept, (4, 4)), kept)
    kept["0.weight"][2] = False
    found = effective(model, kept, (4, 4))
    assert found["1.weight"].flatten(1).any(1).tolist() == [True, True, False, True]
    assert found["4.weight"].flatten(1).tolist() == [[True, True], [True, True], [False, True], [False, True]]


def test_a_weight_that_two_modules_share_is_effective_where_either_use_is():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    kept = {"0.weight": tensor([[False, True], [False, False]])}  # 1 -> 0 twice is no path
    layers, network = diagnose(model, kept, (2,))
    assert network["disconnected"]
    assert layers["flops"].tolist() == [8]
    kept["0.weight"][0, 0] = True  # 1 -> 0 -> 0
    assert effective(model, kept, (2,))["0.weight"].tolist() == [[True, True], [False, False]]
    assert diagnose(model, kept, (2,)).network["parameters"] == 4 + 4


def test_layers_without_a_mask_are_whole():
    model = mlp([2, 3, 2])
    kept = {"2.weight": tensor([[True, False, False], [False, False, False]])}
    layers, network = diagnose(model, kept, (2,))
    assert layers[["layer", "kept", "effective"]].to_numpy().tolist() == [["2.weight", 1, 1]]
    assert (network["flops"], network["flops_kept"]) == (12, 7)
    assert (network["parameters"], network["parameters_kept"]) == (17, 12)


# ---- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(build, "resnet20", COLOUR, 10), COLOUR),
        (partial(build, "vgg11", COLOUR, 10), COLOUR),
        (partial(build, "mlp", (1, 8, 8), 10), (1, 8, 8)),
        (partial(torchvision.models.mobilenet_v3_small, num_classes=5), (3, 64, 64)),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Conv2d(6, 6, 3, groups=3)), (4, 5, 7)),
        (lambda: nn.Linear(4, 3), (7, 4)),
    ],
)
def test_dense_multiply_adds_are_half_the_flops_that_pytorch_counts(make, shape):
    model = make().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    _, network = diagnose(model, all_kept(model), shape)
    assert 2 * network["flops"] == counter.get_total_flops()
    assert network["flops_kept"] == network["flops"]


def test_the_table_counts_by_layer_and_the_network_adds_up():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    kept = {"0.weight": torch.zeros(2, 1, 2, 2, dtype=torch.bool), "3.weight": torch.ones(3, 8, dtype=torch.bool)}
    kept["0.weight"][0, 0, 0, 0] = True
    layers, network = diagnose(model, kept, (1, 3, 3))
    fractions = layers.pop("density").tolist(), layers.pop("effective_density").tolist()
    assert fractions == (
        [1 / 8, 1],
        [1 / 8, 1 / 2],
    )  # of the linear layer the four positions of the channel that is left
    columns = ["layer", "shape", "weights", "kept", "empty", "effective", "flops", "flops_kept"]
    assert layers.to_dict("split", index=False) == {
        "columns": columns,
        "data": [["0.weight", (2, 1, 2, 2), 8, 1, False, 1, 32, 4], ["3.weight", (3, 8), 24, 24, False, 12, 24, 24]],
    }
    fractions = {"density": density(kept), "effective_density": 13 / 32}
    counts = {"weights": 32, "kept": 25, "effective": 13, "empty": 0, "flops": 56, "flops_kept": 28}
    parameters = {"parameters": 32 + 2 + 4 + 3, "parameters_kept": 25 + 2 + 4 + 3}
    assert network == fractions | counts | parameters | {"disconnected": False}
    assert {type(value) for value in network.values()} == {int, float, bool}


# ---- the model stays as it was -----------------------------------------------------------------------------------


class Careless(nn.Module):
    """Dropout and noise whatever the mode, and a norm that is in train mode alone."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        x = F.dropout(self.norm(self.linear(x)), 0.9)
        return self.last(x + torch.rand_like(x))


def test_a_diagnosis_leaves_weights_buffers_flags_gradients_and_random_state_bit_identical():
    model = Careless()
    model.norm.eval()
    model(torch.ones(2, 4)).sum().backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    flags, random = [m.training for m in model.modules()], torch.get_rng_state()
    kept = random_masks(model, 0.5)
    with torch.inference_mode():
        first = effective(model, kept, (4,))
    assert same(first, effective(model, kept, (4,)))
    assert same(before, model.state_dict())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == flags == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random)


class WithHelper(nn.Linear):
    """A second output in training, as auxiliary classifiers have."""

    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)


def test_the_network_is_the_one_that_is_evaluated():
    kept = {"weight": torch.ones(2, 2, dtype=torch.bool)}
    assert diagnose(WithHelper(2, 2).train(), kept, (2,)).network["effective"] == 4


def test_layers_pruned_by_torch_outside_the_masks_count_with_their_masks_and_stay_as_they_were():
    model = mlp([2, 2, 2])
    to_torch_(model, {"0.weight": tensor([[True, True], [False, False]])})
    weight = model[0].weight
    found = effective(model, {"2.weight": torch.ones(2, 2, dtype=torch.bool)}, (2,))
    assert found["2.weight"].tolist() == [[True, False], [True, False]]
    assert model[0].weight is weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_makes_no_difference():
    model = build("resnet18", COLOUR, 10)
    kept = random_masks(model, 0.02)
    here = effective(model, kept, COLOUR)
    there = effective(model.cuda(), kept, COLOUR)
    assert all(mask.is_cuda for mask in there.values())
    assert same(here, {name: mask.cpu() for name, mask in there.items()})


# ---- bad input ---------------------------------------------------------------------------------------------------


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Weightless(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(1, 2))
        self[0].weight = nn.Parameter(torch.empty(2, 0))


ONES = torch.ones(2, 2, dtype=torch.bool)
PLAIN, DILATED = nn.Linear(2, 2), nn.Sequential(nn.Conv1d(1, 1, 1), nn.MaxPool1d(2, dilation=2))


@pytest.mark.parametrize(
    ("model", "masks", "shape", "error", "message"),
    [
        (PLAIN, {}, (2,), ValueError, "there are no masks"),
        (PLAIN, {"v": ONES}, (2,), ValueError, "'v' belongs to no"),
        (PLAIN, {"weight": ONES.float()}, (2,), ValueError, "its parameter needs bool"),
        (PLAIN, {"weight": ONES}, 2, ValueError, "shape=2: expected"),
        (PLAIN, {"weight": ONES}, (), ValueError, r"shape=\(\)"),
        (PLAIN, {"weight": ONES}, (0, 2), ValueError, r"shape=\(0, 2\)"),
        (Weightless(), {"0.weight": torch.ones(2, 0, dtype=torch.bool)}, (1,), ValueError, "holds no weight"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), {"weight_orig": ONES}, (2,), ValueError, "computed by SpectralNorm"),
        (Two(2, 2), {"weight": ONES}, (2,), TypeError, "the model returns a tuple"),
        (DILATED, {"0.weight": torch.ones(1, 1, 1, dtype=torch.bool)}, (1, 8), ValueError, "dilation 2"),
    ],
)
def test_bad_input_is_named_with_what_was_expected(model, masks, shape, error, message):
    with pytest.raises(error, match=message):
        diagnose(model, masks, shape)
