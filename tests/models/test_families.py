"""Bottlenecks, wide residual networks, MobileNet and DenseNet: what they compute, and how pruning takes them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fsp.masks import prunable, rewire
from fsp.models import MODELS, build
from fsp.models.wide_resnet import wide_resnet
from fsp.pruning import diagnose, prune
from fsp.pruning.scores import synflow
from fsp.spectrum import layer_table

COLOUR = (3, 32, 32)
SIGNAL = (1, 1, 40)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def all_kept(model):
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model).items()}


def depthwise(model):
    """Names of the weights of MobileNet's 13 depthwise layers."""
    found = [name for name, weight in prunable(model).items() if weight.shape[1:] == (1, 3, 3)]
    assert len(found) == 13
    return found


def layers(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("shape", [COLOUR, (1, 28, 28), SIGNAL])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet104b", {"width": 2, "skip": False}),
        ("resnet50", {"width": 4, "shortcut": "A", "stem": "3x3+pool"}),
        ("wrn16_4", {}),
        ("wrn16_4", {"variant": "pat"}),
        ("mobilenet", {"width": 2}),
        ("densenet121", {"growth": 2}),
        ("densenet121", {"growth": 2, "stem": "3x3+pool"}),
    ],
)
def test_every_family_maps_images_and_signals_to_logits(name, options, shape):
    with torch.device("meta"):
        assert MODELS[name](shape, 7, **options)(torch.empty(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(("ours", "theirs"), [("resnet50", "resnet50"), ("densenet121", "densenet121")])
def test_with_the_large_stem_a_network_computes_what_torchvisions_does(ours, theirs):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, theirs)(num_classes=10)
    ours = build(ours, COLOUR, 10, stem="7x7", bn_gamma="uniform")
    for norm in (module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1, generator=seeded(3))  # else a ReLU could change places with it
    states = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict({key: value.clone() for key, value in states}, assign=True)
    x = torch.randn(2, 3, 64, 64, generator=seeded(2))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_resnet104b_has_155_layers_beside_its_three_projections():
    with torch.device("meta"):
        model = MODELS["resnet104b"](COLOUR, 10)
    assert len(layers(model)) == 155 + 3
    assert [name for name, _ in model.named_modules() if name.endswith("shortcut.conv")] == [
        f"blocks.{i}.shortcut.conv" for i in (0, 17, 34)
    ]
    assert [model.blocks[i].conv2.stride for i in (0, 17, 34)] == [(1, 1), (2, 2), (2, 2)]


def test_the_small_stem_with_a_pool_halves_the_map_once():
    for name in ("resnet18", "densenet121"):
        with torch.device("meta"):
            model = MODELS[name](COLOUR, 10, stem="3x3+pool")
            assert model.stem(torch.empty(1, *COLOUR)).shape[2:] == (16, 16)


def by_hand(model, x, depth, pat):
    """A wide residual network from its parameters in order, batch norms in train mode."""
    parameters = iter(model.parameters())

    def conv(x, stride=1):
        weight = next(parameters)
        return F.conv2d(x, weight, next(parameters) if pat else None, stride, weight.shape[-1] // 2)

    def active(x):
        return F.batch_norm(x, None, None, next(parameters), next(parameters), training=True).relu()

    x = conv(x)
    for stage in range(3):
        for i in range((depth - 4) // 6):
            stride = 2 if stage and not i else 1
            a = active(x)
            y = conv(active(conv(a, 1 if pat else stride)), stride if pat else 1)
            x = y + (x if i else conv(x if pat else a, stride))
    features = active(x).mean((2, 3))
    return F.linear(features, next(parameters), next(parameters))


@pytest.mark.parametrize("variant", ["plain", "pat"])
def test_a_wide_residual_network_computes_its_definition(variant):
    model = wide_resnet(16, 2, COLOUR, 5, variant=variant).double()
    x = torch.randn(3, *COLOUR, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(model(x), by_hand(model, x, 16, variant == "pat"))
    assert model.norm.momentum == (0.9 if variant == "pat" else 0.1)


def test_pats_wide_residual_network_has_biases_in_all_convolutions_and_the_weights_of_the_plain_one():
    plain, pat = (wide_resnet(10, 2, COLOUR, 5, variant=variant) for variant in ("plain", "pat"))
    assert [w.shape for w in prunable(plain).values()] == [w.shape for w in prunable(pat).values()]
    assert all(layer.bias is not None for layer in layers(pat))
    assert [layer.bias is not None for layer in layers(plain)] == [False] * 10 + [True]


def test_a_block_of_mobilenet_filters_each_channel_by_itself_and_then_mixes_them():
    model = build("mobilenet", (3, 9, 9), 10, width=2, bn_gamma="uniform")
    block = model.blocks[1]
    x = torch.randn(4, 4, 9, 9, generator=seeded(2))
    channels = [F.conv2d(x[:, c : c + 1], block.conv1.weight[c : c + 1], stride=2, padding=1) for c in range(4)]
    y = block.norm1(torch.cat(channels, 1)).clamp(min=0)
    y = torch.einsum("oc,nchw->nohw", block.conv2.weight[:, :, 0, 0], y)
    torch.testing.assert_close(block(x), block.norm2(y).clamp(min=0))
    assert block(x).shape == (4, 8, 5, 5)


def test_depthwise_layers_are_measured_channel_by_channel():
    model = build("mobilenet", COLOUR, 10, width=2)
    table = layer_table(all_kept(model), model).set_index("layer")
    for name, weight in prunable(model).items():
        row, alone = table.loc[name], name in depthwise(model)
        assert row["n_inputs"] == (9 * len(weight) if alone else weight[0].numel())
        assert row["n_outputs"] == len(weight)
        star = 9  # edges of a channel's graph, which has one output
        assert row["sigma1"] == pytest.approx((star if alone else weight.numel()) ** 0.5)
        assert row["edges"] == weight.numel()


def test_depthwise_layers_are_on_paths_and_counted_and_carry_the_whole_flow():
    model = build("mobilenet", COLOUR, 10, width=2)
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, y, name=name: outputs.update({name: y[0, 0].numel()}))
    model(torch.zeros(2, *COLOUR))
    found = diagnose(model, all_kept(model), COLOUR)
    assert found.network["effective"] == found.network["weights"]  # the last map has 2×2 pixels
    flops = sum(w.numel() * outputs[name.removesuffix(".weight")] for name, w in prunable(model).items())
    assert found.network["flops"] == flops
    flows = [s.sum().item() for s in synflow(model, all_kept(model), shape=COLOUR).values()]
    assert flows == pytest.approx([flows[0]] * 28, rel=1e-10)


def test_rewiring_moves_weights_of_pointwise_layers_and_leaves_stars_as_they_are():
    model = build("mobilenet", COLOUR, 10, width=4)
    masks = prune(model, "random", 0.4, generator=seeded(0))
    rewired = rewire(masks, generator=seeded(1), model=model)
    for name, mask in masks.items():
        if name in depthwise(model):
            assert torch.equal(rewired[name], mask)  # one output a channel: no other graph has these degrees
        else:
            for over in (0, 1):
                assert torch.equal(rewired[name].flatten(1).sum(over), mask.flatten(1).sum(over))
            assert not torch.equal(rewired[name], mask)


@pytest.mark.parametrize(
    ("name", "options"), [("mobilenet", {"width": 2}), ("densenet121", {"growth": 2}), ("resnet104b", {"width": 2})]
)
def test_walks_follow_every_family(name, options):
    model = build(name, COLOUR, 10, **options)
    masks = prune(model, "phew", 0.3, shape=COLOUR, generator=seeded(0))
    network = diagnose(model, masks, COLOUR).network
    assert not network["disconnected"]
    assert network["effective"] > 0.98 * network["kept"] > 0  # a walk does not see that corners meet only padding


mobilenet, densenet, resnet18, resnet8 = (
    partial(build, name, COLOUR, 10) for name in ("mobilenet", "densenet121", "resnet18", "resnet8")
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(mobilenet, width=0), ValueError, "width=0: expected an integer of at least 1"),
        (partial(densenet, growth=0), ValueError, "growth=0: expected an integer of at least 1"),
        (partial(densenet, stem="5x5"), ValueError, "stem='5x5': expected one of '3x3', '3x3.pool', '7x7'"),
        (partial(resnet8, block="wide"), ValueError, "block='wide': expected one of 'basic', 'bottleneck'"),
        (partial(resnet18, block="basic"), TypeError, "resnet18 has no option block"),
        (partial(build, "wrn16_4", COLOUR, 10, variant="PAT"), ValueError, "variant='PAT': expected one of 'plain'"),
        (partial(wide_resnet, 27, 2, COLOUR, 10), ValueError, r"depth=27: expected 6n . 4 with n >= 1 \(10, 16"),
        (partial(wide_resnet, 4, 2, COLOUR, 10), ValueError, "depth=4"),
        (partial(wide_resnet, 10, 0, COLOUR, 10), ValueError, "factor=0: expected an integer of at least 1"),
        (partial(MODELS["densenet121"].func, 169, COLOUR, 10), ValueError, "depth=169: expected one of 121"),
    ],
)
def test_bad_input_is_named_with_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
