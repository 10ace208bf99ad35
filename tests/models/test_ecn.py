"""Evenly cascaded networks: the cascade and its plan, and how scores, walks and paths take it."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fsp.masks import prunable
from fsp.models import build, ecn_plan
from fsp.models.ecn import CascadeLayer
from fsp.pruning import diagnose, prune
from fsp.pruning.scores import synflow

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 1, 40), (2, 40, 1), (3, 9, 17), (1, 1, 1)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def resized(x, size):
    """Linear interpolation along height and then width, first pixel on first pixel and last on last."""
    values = x.detach().numpy()
    for axis, new in zip((2, 3), size, strict=True):
        at = np.linspace(0, values.shape[axis] - 1, new)
        values = np.apply_along_axis(lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, values)
    return torch.from_numpy(values)


def sizes_and_channels(model, shape):
    """Height, width and channels behind the stem and every layer, from a forward pass."""
    found = []
    for module in (model.stem, *model.layers):
        module.register_forward_hook(lambda *call: found.append((*call[2].shape[2:], call[2].shape[1])))
    model(torch.empty(2, *shape))
    return found


def total_flow(model, shape):
    """R by its definition: absolute parameters in eval mode, one input of ones, the sum of the outputs."""
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            parameter.abs_()
        return model(torch.ones(1, *shape, dtype=torch.float64)).sum().item()


def test_six_layers_take_32_pixels_to_4_and_each_adds_the_growth():
    steps = ecn_plan((3, 32, 32), width=14, growth=14)
    assert [step.height for step in steps] == [step.width for step in steps] == [32, 24, 18, 13, 9, 6, 4]
    assert [step.low + step.high for step in steps] == [14 + 14 * layer for layer in range(7)]
    assert [step.high for step in steps] == [14] * 7


@pytest.mark.parametrize("shape", SHAPES)
def test_a_forward_pass_has_the_sizes_and_channels_of_the_plan(shape):
    options = {"layers": 3, "width": 4, "growth": 3}
    found = sizes_and_channels(build("ecn3", shape, 10, **options), shape)
    assert found == [(s.height, s.width, s.low + s.high) for s in ecn_plan(shape, **options)]


def test_sizes_are_rounded_down_from_the_decimal_rate_and_not_from_its_binary_neighbour():
    assert 0.29 * 100 < 29
    assert ecn_plan((1, 100, 10), layers=1, rate=0.29)[1][1:3] == (29, 2)


@pytest.mark.parametrize("convs", [1, 2])
def test_parameters_are_those_of_the_sum_over_the_layers(convs):
    width, growth, classes = 5, 3, 7
    expected, c = 27 * width, width
    for _ in range(6):
        expected += 2 * c + 9 * c * (c + growth)
        expected += (convs == 2) * (2 * (c + growth) + 9 * (c + growth) ** 2)
        c += growth
    expected += 2 * c + c * classes + classes
    model = build("ecn6_s", (3, 32, 32), classes, width=width, growth=growth, convs=convs)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("convs", [1, 2])
@pytest.mark.parametrize(("kernel", "size", "new"), [((3, 3), (8, 7), (6, 5)), ((1, 3), (1, 40), (1, 30))])
def test_a_layer_adds_its_input_to_its_first_channels_and_then_resizes(convs, kernel, size, new):
    layer = CascadeLayer(4, 7, kernel, new, convs, True).double()
    x = torch.randn(2, 4, *size, generator=seeded(1), dtype=torch.float64)
    y = layer.conv1(layer.norm1(x).clamp(min=0))
    if convs == 2:
        y = layer.conv2(layer.norm2(y).clamp(min=0))
    merged = torch.cat([y[:, :4] + x, y[:, 4:]], 1)
    torch.testing.assert_close(layer(x), resized(merged, new))


@pytest.mark.parametrize("convs", [1, 2])
def test_with_convolutions_of_zeros_a_layer_resizes_its_input_and_channels_of_zeros(convs):
    layer = CascadeLayer(4, 6, (3, 3), (6, 6), convs, True).double()
    nn.init.zeros_(layer.conv2.weight if convs == 2 else layer.conv1.weight)
    x = torch.randn(2, 4, 8, 8, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(layer(x), resized(torch.cat([x, torch.zeros(2, 2, 8, 8)], 1), (6, 6)))
    layer.low_stream = False
    assert not layer(x).any()


def test_each_stream_and_the_resize_can_be_taken_away():
    shape = (1, 8, 8)
    assert sizes_and_channels(build("ecn3", shape, 10, growth=0), shape) == [(8, 8, 6), (6, 6, 6), (4, 4, 6), (3, 3, 6)]
    assert [found[:2] for found in sizes_and_channels(build("ecn3", shape, 10, rate=1), shape)] == [(8, 8)] * 4
    with_low, without = build("ecn3", shape, 10), build("ecn3", shape, 10, low_stream=False)
    assert [(n, p.shape) for n, p in with_low.named_parameters()] == [
        (n, p.shape) for n, p in without.named_parameters()
    ]
    nn.init.zeros_(without.layers[1].conv2.weight)
    nn.init.zeros_(with_low.layers[1].conv2.weight)
    inputs = torch.rand(2, *shape, generator=seeded(1))
    assert without(inputs)[0].equal(without(inputs)[1])  # nothing of the input gets past an empty layer
    assert not with_low(inputs)[0].equal(with_low(inputs)[1])


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("ecn3", (1, 8, 8), {}),
        ("ecn3", (1, 1, 40), {"convs": 1}),
        ("ecn6_fig1", (3, 32, 32), {}),
        ("ecn3", (1, 8, 8), {"low_stream": False}),
    ],
)
def test_flow_through_the_convolutions_of_a_layer_is_what_is_lost_without_them(name, shape, options):
    model = build(name, shape, 10, **options)
    kept = {key: torch.ones_like(p, dtype=torch.bool) for key, p in prunable(model).items()}
    flows = {key: s.sum().item() for key, s in synflow(model, kept, shape=shape).items()}
    whole = total_flow(model, shape)
    assert flows["stem.conv.weight"] == pytest.approx(whole, rel=1e-10)
    assert flows["classifier.weight"] == pytest.approx(whole, rel=1e-10)
    for i in range(len(model.layers)):
        keys = [key for key in flows if key.startswith(f"layers.{i}.")]
        assert len(keys) == options.get("convs", 2)
        assert flows[keys[0]] == pytest.approx(flows[keys[-1]], rel=1e-10)
        cut = build(name, shape, 10, **options)
        nn.init.zeros_(cut.get_parameter(keys[-1]))
        assert flows[keys[0]] == pytest.approx(whole - total_flow(cut, shape), rel=1e-8)
        assert options.get("low_stream", True) == (flows[keys[0]] < 0.999 * whole)


@pytest.mark.parametrize("low_stream", [True, False])
def test_with_all_layers_empty_the_low_stream_alone_connects_a_network(low_stream):
    shape = (1, 8, 8)
    model = build("ecn3", shape, 10, low_stream=low_stream)
    masks = {key: torch.full_like(p, "layers" not in key, dtype=torch.bool) for key, p in prunable(model).items()}
    layers, network = diagnose(model, masks, shape)
    effective = dict(zip(layers["layer"], layers["effective"], strict=True))
    assert network["disconnected"] == (not low_stream)
    assert network["empty"] == 6
    assert effective["classifier.weight"] == 10 * 6 * low_stream  # of 24 channels those of the stem
    assert effective["stem.conv.weight"] == 9 * 6 * low_stream


def test_new_channels_that_a_layer_does_not_make_have_no_weight_on_a_path():
    shape = (1, 8, 8)
    model = build("ecn3", shape, 10)
    masks = {key: torch.ones_like(p, dtype=torch.bool) for key, p in prunable(model).items()}
    masks["layers.0.conv2.weight"][6:] = False
    table = diagnose(model, masks, shape).layers.set_index("layer")
    assert table.loc["layers.1.conv1.weight", "effective"] == 18 * 6 * 9  # inputs 6 to 11 hold zeros
    assert table.loc["layers.1.conv2.weight", "effective"] == 18 * 18 * 9
    assert table.loc["layers.2.conv1.weight", "effective"] == 24 * 18 * 9  # but layer 1 adds to them


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 40)])
@pytest.mark.parametrize("options", [{}, {"convs": 1}, {"low_stream": False}, {"growth": 0}])
@pytest.mark.parametrize("identity", ["residual", "coin"])
def test_walks_through_the_cascade_end_in_paths(shape, options, identity):
    model = build("ecn3", shape, 10, **options)
    masks = prune(model, "phew", 0.1, shape=shape, generator=seeded(0), identity=identity)
    network = diagnose(model, masks, shape).network
    assert network["effective"] == network["kept"] > 0
    assert network["empty"] == 0


ecn3 = partial(build, "ecn3", (1, 8, 8), 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(build, "ecn6_s", (1, 8, 8), 10), ValueError, "layers=6 at rate=0.75 shrink the map from 8x8 to 6x6 to "
         "4x4 to 3x3 to 2x2 to 1x1, and layer 6 would have less than one pixel: use at most 5 layers"),
        (partial(build, "ecn3", (1, 8, 2), 10, rate=0.4), ValueError, "from 8x2, and layer 1 .*: use a rate near"),
        (partial(ecn3, layers=0), ValueError, "layers=0: expected an integer of at least 1"),
        (partial(ecn3, width=0), ValueError, "width=0"),
        (partial(ecn3, growth=-1), ValueError, "growth=-1: expected an integer of at least 0"),
        (partial(ecn3, rate=0), ValueError, "rate=0: expected a number above 0 and at most 1"),
        (partial(ecn3, rate=1.5), ValueError, "rate=1.5"),
        (partial(ecn3, rate=float("nan")), ValueError, "rate=nan"),
        (partial(ecn3, rate="3/4"), ValueError, "rate='3/4'"),
        (partial(ecn3, rate=True), ValueError, "rate=True"),
        (partial(ecn3, convs=3), ValueError, "convs=3: expected one of 2, 1"),
        (partial(ecn3, low_stream=0), ValueError, "low_stream=0: expected one of True, False"),
        (partial(ecn_plan, (8, 8)), ValueError, r"shape=\(8, 8\): expected \(channels, height, width\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
