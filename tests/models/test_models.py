import math
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.vgg import cfgs, make_layers

from fsp.models import INITS, MODELS, WITH_MASKS, build, initialise_
from fsp.models.resnet import PadShortcut

COLOUR = (3, 32, 32)
DIGITS = (1, 8, 8)
MNIST = (1, 28, 28)
SIGNAL = (1, 1, 40)

# model, options, input, prunable tensors, {classes: (total, prunable)}
COUNTS = [
    ("resnet20", {}, COLOUR, 22, {10: (272_474, 270_896), 100: (278_324, 276_656), 200: (284_824, 283_056)}),
    (
        "resnet20",
        {"shortcut": "A"},
        COLOUR,
        20,
        {10: (269_722, 268_336), 100: (275_572, 274_096), 200: (282_072, 280_496)},
    ),
    ("resnet32", {}, COLOUR, 34, {10: (466_906, 464_432), 100: (472_756, 470_192)}),
    (
        "resnet32",
        {"width": 32},
        COLOUR,
        34,
        {10: (1_860_522, 1_855_584), 100: (1_872_132, 1_867_104), 200: (1_885_032, 1_879_904)},
    ),
    ("resnet56", {}, COLOUR, 58, {10: (855_770, 851_504), 100: (861_620, 857_264)}),
    ("resnet110", {}, COLOUR, 112, {10: (1_730_714, 1_722_416), 100: (1_736_564, 1_728_176)}),
    ("resnet18", {}, COLOUR, 21, {10: (11_173_962, 11_164_352), 100: (11_220_132, 11_210_432)}),
    ("resnet34", {}, COLOUR, 37, {10: (21_282_122, 21_265_088), 100: (21_328_292, 21_311_168)}),
    (
        *("resnet104", {}, COLOUR, 106),
        {10: (1_633_498, 1_625_648), 100: (1_639_348, 1_631_408), 200: (1_645_848, 1_637_808)},
    ),
    (
        *("resnet104b", {}, COLOUR, 158),
        {10: (1_611_418, 1_587_632), 100: (1_634_548, 1_610_672), 200: (1_660_248, 1_636_272)},
    ),
    (
        *("resnet50", {}, COLOUR, 54),
        {10: (23_520_842, 23_467_712), 100: (23_705_252, 23_652_032), 200: (23_910_152, 23_856_832)},
    ),
    ("wrn28_10", {}, COLOUR, 29, {10: (36_479_194, 36_461_232), 100: (36_536_884, 36_518_832)}),
    # published without the classifier, which is not pruned: 36,454,832 in 28 tensors
    ("wrn28_10", {"variant": "pat"}, COLOUR, 29, {10: (36_489_290, 36_461_232), 100: (36_546_980, 36_518_832)}),
    ("wrn28_2", {}, COLOUR, 29, {10: (1_467_610, 1_463_984), 100: (1_479_220, 1_475_504)}),
    ("wrn22_2", {}, COLOUR, 23, {10: (1_079_642, 1_076_912), 100: (1_091_252, 1_088_432)}),
    ("wrn16_4", {}, COLOUR, 17, {10: (2_748_890, 2_745_264), 100: (2_772_020, 2_768_304)}),
    ("mobilenet", {}, COLOUR, 28, {10: (3_217_226, 3_195_328), 100: (3_309_476, 3_287_488)}),
    # torchvision's 7,978,856 for 1000 classes with a smaller stem and classifier
    ("densenet121", {}, COLOUR, 121, {10: (6_956_426, 6_872_768)}),
    ("ecn6_fig1", {}, COLOUR, 14, {10: (146_242, 145_352), 100: (151_372, 150_392)}),
    ("ecn6_s", {}, COLOUR, 14, {10: (445_672, 444_122), 100: (454_582, 452_942)}),
    ("ecn6_l", {}, COLOUR, 14, {10: (2_935_126, 2_931_156), 100: (2_957_896, 2_953_836)}),
    (
        *("ecn6_s", {"width": 21, "growth": 21, "convs": 1}, COLOUR, 8),
        {10: (447_751, 446_565), 100: (461_071, 459_795)},
    ),
    ("vgg11", {}, COLOUR, 9, {10: (9_231_114, 9_222_848), 100: (9_277_284, 9_268_928)}),
    ("vgg16", {}, COLOUR, 14, {10: (14_728_266, 14_715_584), 100: (14_774_436, 14_761_664)}),
    ("vgg19", {}, COLOUR, 17, {10: (20_040_522, 20_024_000), 100: (20_086_692, 20_070_080)}),
    ("vgg16", {"conv_bias": False}, COLOUR, 14, {10: (14_724_042, 14_715_584), 100: (14_770_212, 14_761_664)}),
    ("vgg19", {"conv_bias": False}, COLOUR, 17, {10: (20_035_018, 20_024_000), 100: (20_081_188, 20_070_080)}),
    ("resnet18", {"stem": "7x7"}, COLOUR, 21, {10: (11_181_642, 11_172_032), 100: (11_227_812, 11_218_112)}),
    ("resnet34", {"stem": "7x7"}, COLOUR, 37, {10: (21_289_802, 21_272_768), 100: (21_335_972, 21_318_848)}),
    ("vgg16", {"head": "512"}, COLOUR, 16, {10: (15_255_626, 15_239_872), 100: (15_301_796, 15_285_952)}),
    ("vgg16", {"head": "4096"}, COLOUR, 16, {10: (134_309_962, 134_289_088), 100: (134_678_692, 134_657_728)}),
    ("lenet300", {}, MNIST, 3, {10: (266_610, 266_200)}),
    ("lenet_s", {}, COLOUR, 5, {10: (253_290, 252_848)}),
    ("lenet_m", {}, COLOUR, 5, {10: (1_007_306, 1_006_432)}),
    ("lenet_l", {}, COLOUR, 5, {10: (4_017_546, 4_015_808)}),
    ("mlp", {"hidden": (100,) * 5}, MNIST, 6, {10: (119_910, 119_400)}),
    ("mlp", {"hidden": (1024, 512)}, COLOUR, 3, {10: (3_676_682, 3_675_136)}),
]


def on_meta(name, shape, classes, **options):
    with torch.device("meta"):
        return MODELS[name](shape, classes, **options)


def prunable(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "options", "shape", "tensors", "classes", "total", "kept"),
    [
        pytest.param(name, options, shape, tensors, classes, *pair, id=f"{name}-{classes}-{options or 'default'}")
        for name, options, shape, tensors, by_classes in COUNTS
        for classes, pair in by_classes.items()
    ],
)
def test_parameter_counts_are_those_of_the_literature(name, options, shape, tensors, classes, total, kept):
    model = on_meta(name, shape, classes, **options)
    weights = prunable(model)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(w.numel() for w in weights) == kept
    assert len(weights) == tensors


def test_counts_do_not_depend_on_height_and_width_where_a_global_average_ends_the_convolutions():
    for name in MODELS:
        small = sum(p.numel() for p in on_meta(name, (3, 16, 16), 10).parameters())
        large = sum(p.numel() for p in on_meta(name, (3, 64, 64), 10).parameters())
        assert (small == large) == (not name.startswith(("mlp", "lenet")))


# model, options: one or more of each convolutional family
CONVOLUTIONAL = [
    ("cnn", {}),
    ("cnn", {"widths": (4, 6), "kernel": 7, "strides": (3, 1), "norm": False}),
    ("lenet_s", {}),
    ("lenet_s", {"norm": True}),
    ("resnet8", {}),
    ("resnet8", {"shortcut": "A"}),
    ("resnet20", {"skip": False}),
    ("resnet18", {"width": 8, "stem": "7x7"}),
    ("resnet104b", {"width": 2}),
    ("vgg11", {}),
    ("wrn16_4", {}),
    ("wrn16_4", {"variant": "pat"}),
    ("mobilenet", {"width": 2}),
    ("densenet121", {"growth": 4}),
    ("ecn3", {}),
    ("ecn6_fig1", {"convs": 1, "low_stream": False}),
]


@pytest.mark.parametrize(("name", "options"), CONVOLUTIONAL)
def test_on_images_one_pixel_high_or_wide_every_weight_acts_on_the_output(name, options):
    for shape in (SIGNAL, (2, 40, 1)):
        model = build(name, shape, 10, **options).double().eval()
        for weight in prunable(model):
            weight.data.abs_()  # nothing cancels and every ReLU passes: a zero gradient is a weight without effect
        model(torch.ones(1, *shape, dtype=torch.float64)).sum().backward()
        assert all((weight.grad > 0).all() for weight in prunable(model))


@pytest.mark.parametrize("name", ["cnn", "lenet_s", "lenet_l", "resnet20", "resnet34", "vgg19", "ecn6_s"])
def test_on_a_signal_a_kernel_has_the_length_of_the_square_ones_side(name):
    squares, rows = (
        [m for m in on_meta(name, shape, 10).modules() if isinstance(m, nn.Conv2d)] for shape in (MNIST, SIGNAL)
    )
    for square, row in zip(squares, rows, strict=True):
        side = square.kernel_size[0]
        assert (square.kernel_size, row.kernel_size) == ((side, side), (1, side))
        assert (square.padding, row.padding) == ((square.padding[0],) * 2, (0, square.padding[0]))
        assert square.stride[1] == row.stride[1]


def test_the_large_head_of_a_vgg_spreads_a_signal_along_its_length_only():
    square, row = (on_meta("vgg11", shape, 10, head="4096") for shape in (MNIST, SIGNAL))
    assert (square.linear1.in_features, row.linear1.in_features) == (512 * 49, 512 * 7)


def test_the_plain_network_computes_what_torch_computes_on_signals_in_one_dimension():
    model = build("cnn", SIGNAL, 10, bn_gamma="uniform")
    x = torch.randn(4, *SIGNAL, generator=seeded(2))
    hidden = x.squeeze(2)
    for i, stride in enumerate((1, 2, 2, 2), start=1):
        weight, norm = getattr(model, f"conv{i}").weight.squeeze(2), getattr(model, f"norm{i}")
        hidden = nn.functional.conv1d(hidden, weight, stride=stride, padding=2)
        hidden = nn.functional.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True).clamp(min=0)
    assert hidden.shape == (4, 32, 5)
    torch.testing.assert_close(model(x), model.classifier(hidden.mean(2)))


def test_widths_kernel_strides_and_norm_shape_the_plain_network():
    model = on_meta("cnn", COLOUR, 7, widths=[4, 6], kernel=3, strides=[2, 3], norm=False)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "conv1.weight": (4, 3, 3, 3),
        "conv1.bias": (4,),
        "conv2.weight": (6, 4, 3, 3),
        "conv2.bias": (6,),
        "classifier.weight": (7, 6),
        "classifier.bias": (7,),
    }
    assert model[:-3](torch.empty(1, *COLOUR, device="meta")).shape == (1, 6, 6, 6)  # 32, 16, 6
    assert [m.stride[0] for m in on_meta("cnn", COLOUR, 7, widths=(1,) * 3).modules() if hasattr(m, "kernel_size")] == [
        *(1, 2, 2)
    ]


def test_resnet8_has_one_block_a_stage_and_width_multiplies_its_channels():
    # stem 1·16, stages 2·16², 16·32 + 32² with projection 16·32, likewise 32 to 64, classifier 64·10
    expected = 9 * (16 + 2 * 256 + 512 + 1024 + 2048 + 4096) + 512 + 2048 + 640
    assert sum(w.numel() for w in prunable(on_meta("resnet8", DIGITS, 10))) == expected
    wide = on_meta("resnet8", DIGITS, 10, width=24)
    assert [len(block.conv1.weight) for block in wide.blocks] == [24, 48, 96]


@pytest.mark.parametrize("shape", [DIGITS, MNIST, COLOUR, (3, 64, 64), (2, 5, 3), (1, 1, 1)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in MODELS if not name.startswith(("lenet_", "ecn"))],
        ("resnet8", {"skip": False}),
        ("resnet18", {"stem": "7x7", "skip": False}),
        ("vgg16", {"head": "512"}),
        ("vgg16", {"head": "4096"}),
    ],
)
def test_every_model_maps_a_batch_to_logits_whatever_the_size_of_the_image(name, options, shape):
    logits = on_meta(name, shape, 7, **options)(torch.empty(4, *shape, device="meta"))
    assert logits.shape == (4, 7)


@pytest.mark.parametrize("shape", [MNIST, COLOUR, SIGNAL, (1, 16, 16), (3, 64, 17), (1, 1, 1)])
def test_a_lenet_maps_a_batch_to_logits_if_the_image_has_16_pixels_a_side(shape):
    assert on_meta("lenet_s", shape, 7, norm=True)(torch.empty(4, *shape, device="meta")).shape == (4, 7)


@pytest.mark.parametrize("name", ["mlp", "lenet300", "cnn", "resnet8", "resnet20", "vgg11"])
def test_a_built_model_trains_on_digits_sized_images(name):
    model = build(name, DIGITS, 10)
    logits = model(torch.randn(4, *DIGITS, generator=seeded(1)))
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert model.training
    assert all(p.device.type == "cpu" and p.grad.isfinite().all() for p in model.parameters())
    assert all(w.grad.any() for w in prunable(model))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in MODELS],
        ("mlp", {"norm": True}),
        ("cnn", {"norm": False}),
        ("lenet_m", {"norm": True}),
        ("resnet20", {"shortcut": "A"}),
        ("resnet20", {"skip": False}),
        ("resnet18", {"stem": "7x7"}),
        ("vgg16", {"conv_bias": False}),
        ("vgg16", {"head": "512"}),
        ("vgg16", {"head": "4096"}),
    ],
)
def test_modules_are_registered_in_the_order_in_which_the_forward_pass_calls_them(name, options):
    model = on_meta(name, COLOUR, 10, **options)
    leaves = {path: module for path, module in model.named_modules() if not list(module.children())}
    called = []
    for path, module in leaves.items():
        module.register_forward_hook(lambda *_, path=path: called.append(path))
    model(torch.empty(2, *COLOUR, device="meta"))
    assert called == list(leaves)


BLOCK = ["conv1", "norm1", "conv2", "norm2"]
VGG11 = [f"{layer}{i}" for i in range(1, 9) for layer in ("conv", "norm")]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mlp", {"norm": True}, ["linear1", "norm1", "linear2", "norm2", "classifier"]),
        ("cnn", {}, [*VGG11[:8], "classifier"]),
        ("lenet_s", {}, ["conv1", "conv2", "linear1", "linear2", "classifier"]),
        ("lenet_s", {"norm": True}, [*VGG11[:4], "linear1", "norm3", "linear2", "norm4", "classifier"]),
        (
            "resnet8",
            {},
            ["stem.conv", "stem.norm", *(f"blocks.0.{layer}" for layer in BLOCK)]
            + [f"blocks.{i}.{layer}" for i in (1, 2) for layer in (*BLOCK, "shortcut.conv", "shortcut.norm")]
            + ["classifier"],
        ),
        ("vgg11", {}, [*VGG11, "classifier"]),
        (
            "ecn3",
            {},
            ["stem.conv"]
            + [f"layers.{i}.{layer}{j}" for i in range(3) for j in (1, 2) for layer in ("norm", "conv")]
            + ["norm", "classifier"],
        ),
        ("vgg11", {"head": "4096"}, [*VGG11, "linear1", "linear2", "classifier"]),
        ("vgg11", {"head": "512"}, [*VGG11, "linear1", "norm9", "linear2", "norm10", "classifier"]),
    ],
)
def test_parameter_names_are_readable(name, options, expected):
    model = on_meta(name, COLOUR, 10, **options)
    owners = dict.fromkeys(key.rpartition(".")[0] for key, _ in model.named_parameters())
    assert list(owners) == expected


def test_resnet18_computes_what_torchvisions_does_with_a_small_stem():
    with torch.random.fork_rng(devices=[]):
        theirs = torchvision.models.resnet18(num_classes=10)
        theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = build("resnet18", (3, 16, 16), 10, bn_gamma="uniform")
    states = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict({key: value.clone() for key, value in states})
    x = torch.randn(4, 3, 16, 16, generator=seeded(2))
    torch.testing.assert_close(ours(x), theirs(x))


def test_resnet34_with_the_large_stem_computes_what_torchvisions_does():
    with torch.device("meta"):
        theirs = torchvision.models.resnet34(num_classes=10)
    ours = build("resnet34", COLOUR, 10, stem="7x7", bn_gamma="uniform")
    states = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict({key: value.clone() for key, value in states}, assign=True)
    x = torch.randn(2, *COLOUR, generator=seeded(2))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_vgg16_with_the_large_head_has_torchvisions_tensors_and_modules():
    with torch.device("meta"):
        theirs = torchvision.models.vgg16_bn(num_classes=10)
    ours = on_meta("vgg16", COLOUR, 10, head="4096")
    assert [tuple(t.shape) for t in ours.state_dict().values()] == [
        tuple(t.shape) for t in theirs.state_dict().values()
    ]
    leaves = [[type(m) for m in net.modules() if not list(m.children())] for net in (ours, theirs)]
    leaves[1].remove(nn.AdaptiveAvgPool2d)
    leaves[0].remove(nn.AdaptiveAvgPool2d)
    leaves[0].remove(nn.Flatten)  # torchvision flattens in forward
    assert leaves[0] == leaves[1]


def test_without_skips_a_block_is_a_plain_stack_and_holds_no_shortcut():
    model = build("resnet8", DIGITS, 10, skip=False, bn_gamma="uniform").eval()
    block = model.blocks[1]
    x = torch.randn(4, 16, 8, 8, generator=seeded(2))
    expected = block.norm2(block.conv2(block.norm1(block.conv1(x)).clamp(min=0)))
    torch.testing.assert_close(block(x), expected)
    assert (expected < 0).any()
    with_skips = prunable(build("resnet8", DIGITS, 10))
    assert sum(w.numel() for w in with_skips) - sum(w.numel() for w in prunable(model)) == 16 * 32 + 32 * 64


def test_vgg11_computes_torchvisions_features_with_the_last_pool_averaged():
    ours = build("vgg11", COLOUR, 10, bn_gamma="uniform")
    with torch.device("meta"):
        theirs = make_layers(cfgs["A"], batch_norm=True)[:-1]
    states = zip(theirs.state_dict(), ours.state_dict().values(), strict=False)
    theirs.load_state_dict({key: value.clone() for key, value in states}, assign=True)
    x = torch.randn(4, *COLOUR, generator=seeded(2))
    pooled = nn.functional.avg_pool2d(theirs(x), 2)  # (4, 512, 1, 1)
    torch.testing.assert_close(ours(x), ours.classifier(pooled.flatten(1)))


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        (COLOUR, [(2, 2)] * 4),
        (DIGITS, [(2, 2)] * 3),
        ((1, 28, 28), [(2, 2)] * 4),
        ((3, 8, 2), [(2, 2), (2, 1), (2, 1)]),
        ((1, 1, 1), []),
    ],
)
def test_vgg_pools_no_side_that_is_one_pixel_long(shape, windows):
    pools = [m.kernel_size for m in on_meta("vgg16", shape, 10).modules() if isinstance(m, nn.MaxPool2d)]
    assert pools == windows


def test_an_mlp_is_linear_maps_with_relu_between():
    model = build("mlp", (1, 2, 2), 3, hidden=(5, 4), init="torch_default")
    x = torch.randn(6, 1, 2, 2, generator=seeded(3))
    w1, b1, w2, b2, w3, b3 = model.parameters()
    hidden = (x.reshape(6, 4) @ w1.T + b1).clamp(min=0)
    hidden = (hidden @ w2.T + b2).clamp(min=0)
    torch.testing.assert_close(model(x), hidden @ w3.T + b3)


def test_the_padding_shortcut_subsamples_and_appends_zero_channels():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = torch.tensor([[[[0.0, 2.0], [8.0, 10.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert torch.equal(PadShortcut(1, 2)(x), expected)


@pytest.mark.parametrize("name", ["mlp", "resnet20", "vgg11"])
def test_the_seed_alone_decides_every_bit_and_is_zero_without_a_generator(name):
    make, generator = partial(build, name, COLOUR, 10, bn_gamma="uniform"), seeded(0)
    first, again, after = (bits(make(generator=g)) for g in (generator, seeded(0), generator))
    assert equal(first, again)
    assert equal(first, bits(make()))
    drawn = [key for key in first if first[key].ndim > 1]
    assert drawn
    assert not any(torch.equal(first[key], after[key]) for key in drawn)  # the generator has been advanced


@pytest.mark.parametrize("name", ["mlp", "lenet300", "resnet8", "resnet110", "resnet18", "vgg11"])
def test_building_neither_changes_nor_reads_the_global_random_state(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        before = torch.get_rng_state()
        first = bits(build(name, DIGITS, 10))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(12)
        assert equal(bits(build(name, DIGITS, 10)), first)


def test_no_part_of_a_built_model_is_left_uninitialised():
    model = build("resnet20", COLOUR, 10)
    for name, tensor in model.state_dict().items():
        if name.endswith(("bias", "running_mean", "num_batches_tracked")):
            assert not tensor.any(), name
        elif tensor.ndim == 1:  # scale and running variance of a norm
            assert (tensor == 1).all(), name
        else:
            assert tensor.std() > 0.01, name


# initialiser, standard deviation on Linear(600, 900) (fans 600 and 900) and on Conv2d(64, 128, 3) (576 and 1152), law
STDS = [
    ("kaiming_normal_fan_in", math.sqrt(2 / 600), math.sqrt(2 / 576), "normal"),
    ("kaiming_normal_fan_out", math.sqrt(2 / 900), math.sqrt(2 / 1152), "normal"),
    ("torch_default", 1 / math.sqrt(3 * 600), 1 / math.sqrt(3 * 576), "uniform"),
    ("xavier_normal", math.sqrt(2 / 1500), math.sqrt(2 / 1728), "normal"),
    ("xavier_uniform", math.sqrt(2 / 1500), math.sqrt(2 / 1728), "uniform"),
    ("lecun", math.sqrt(1 / 600), math.sqrt(1 / 576), "normal"),
    ("fsp2023", 0.01, math.sqrt(2 / 1152), "normal"),
]


# a network, and masks of it with the densities 1/16, 0 and, of the layer that has none, 1
def pruned():
    model = nn.ModuleDict({"conv": nn.Conv2d(64, 128, 3), "dense": nn.Linear(600, 900), "empty": nn.Linear(5, 4)})
    return model, {
        "conv.weight": torch.arange(128 * 576).remainder(16).eq(3).view(128, 64, 3, 3),
        "empty.weight": torch.zeros(4, 5, dtype=torch.bool),
    }


def test_density_scaled_weights_have_the_gain_of_dense_ones_over_the_weights_that_are_kept():
    model, masks = pruned()
    initialise_(model, "density_scaled", generator=seeded(7), masks=masks)
    assert model.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (576 / 16)), rel=0.015)
    assert model.dense.weight.std().item() == pytest.approx(math.sqrt(2 / 600), rel=0.015)
    assert model.empty.weight.isfinite().all()
    assert not model.conv.bias.any()


def test_density_scaled_draws_the_dense_networks_numbers_each_divided_by_the_root_of_the_density():
    (scaled, masks), (plain, _) = pruned(), pruned()
    initialise_(scaled, "density_scaled", generator=seeded(3), masks=masks)
    initialise_(plain, generator=seeded(3))
    for key, factor in (("conv", 4), ("dense", 1), ("empty", 1)):
        assert torch.equal(scaled[key].weight, factor * plain[key].weight)


def test_a_bare_lenet_under_a_sparse_random_mask_keeps_its_signal_only_if_the_weights_are_scaled():
    model = build("lenet_s", MNIST, 10)
    x = torch.randn(64, *MNIST, generator=seeded(1))
    dense = model(x).std()
    masks = {n: torch.rand(p.shape, generator=seeded(2)) < 0.05 for n, p in model.named_parameters() if p.ndim > 1}
    signal = {}
    for name, options in (("kaiming_normal_fan_in", {}), ("density_scaled", {"masks": masks})):
        initialise_(model, name, generator=seeded(0), **options)
        for key, mask in masks.items():
            model.get_parameter(key).data *= mask
        signal[name] = (model(x).std() / dense).item()
    assert signal["kaiming_normal_fan_in"] < 0.01
    assert 0.2 < signal["density_scaled"] < 5


@pytest.mark.parametrize(
    ("name", "masks", "message"),
    [
        ("density_scaled", None, r"'density_scaled' needs the masks of a pruned network: .*prune it"),
        ("lecun", {}, "masks were given, but init='lecun' does not depend on them"),
        ("density_scaled", {"dense": torch.ones(900, 600).bool()}, "'dense' is torch.bool .* no weight of a layer"),
        ("density_scaled", {"dense.bias": torch.ones(900).bool()}, "'dense.bias' is .* no weight of a layer"),
        ("density_scaled", {"dense.weight": torch.ones(900, 600)}, "'dense.weight' is torch.float32"),
        ("density_scaled", {"dense.weight": torch.ones(600, 900).bool()}, r"shape \(600, 900\).*shape \(900, 600\)"),
        ("density_scaled", {"dense.weight": [True]}, "the mask 'dense.weight' is a builtins.list"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_anything_is_drawn(name, masks, message):
    model, generator = pruned()[0], seeded(0)
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        initialise_(model, name, generator=generator, masks=masks)
    assert equal(bits(model), before)
    assert torch.equal(generator.get_state(), seeded(0).get_state())


@pytest.mark.parametrize(("name", "linear", "conv", "law"), STDS)
def test_weights_follow_the_documented_law(name, linear, conv, law):
    model = nn.ModuleList([nn.Linear(600, 900), nn.Conv2d(64, 128, 3)])
    initialise_(model, name, generator=seeded(7))
    for module, std in zip(model, (linear, conv), strict=True):
        weight = module.weight.detach()
        assert weight.std().item() == pytest.approx(std, rel=0.015)  # five standard errors of the convolution
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
        largest = weight.abs().max().item() / std
        assert largest < math.sqrt(3) + 0.05 if law == "uniform" else largest > 3.5
        if name == "torch_default":
            assert module.bias.abs().max() > 0
        else:
            assert not module.bias.any()


@pytest.mark.parametrize("name", ["mlp", "resnet8", "vgg11"])
def test_torch_default_gives_the_bits_of_pytorchs_own_construction(name):
    ours = build(name, DIGITS, 10, init="torch_default", generator=seeded(21))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        theirs = MODELS[name](DIGITS, 10)
    assert equal(bits(ours), bits(theirs))


def norms(affine=True):
    return nn.ModuleDict(
        {
            "bn1": nn.BatchNorm1d(200, affine=affine),
            "bn2": nn.BatchNorm2d(200, affine=affine),
            "bn3": nn.BatchNorm3d(200, affine=affine),
            "instance": nn.InstanceNorm2d(200, affine=affine, track_running_stats=True),
            "layer": nn.LayerNorm(200, elementwise_affine=affine),
            "group": nn.GroupNorm(4, 200, affine=affine),
            "rms": nn.RMSNorm(200, elementwise_affine=affine),
        }
    )


@pytest.mark.parametrize("name", INITS)
def test_norms_start_at_scale_one_except_the_two_dimensional_batch_norm_of_fsp2023(name):
    model = norms()
    for tensor in model.state_dict().values():
        tensor.fill_(3)
    initialise_(model, name, generator=seeded(0), masks={} if name in WITH_MASKS else None)
    for key, module in model.items():
        assert (module.weight == (0.5 if name == "fsp2023" and key == "bn2" else 1)).all()
    for key, tensor in model.state_dict().items():
        if key.endswith(("bias", "running_mean", "num_batches_tracked")):
            assert not tensor.any(), key
        if key.endswith("running_var"):
            assert (tensor == 1).all(), key


@pytest.mark.parametrize("name", ["kaiming_normal_fan_in", "fsp2023"])
def test_bn_gamma_uniform_draws_the_scale_of_batch_norms_only(name):
    model = initialise_(norms(), name, generator=seeded(0), bn_gamma="uniform")
    for key in ("bn1", "bn2", "bn3"):
        gamma = model[key].weight
        assert 0 <= gamma.min() < 0.05
        assert 0.95 < gamma.max() < 1
        assert gamma.mean().item() == pytest.approx(0.5, abs=0.1)  # five standard errors
    assert all((model[key].weight == 1).all() for key in ("instance", "layer", "group", "rms"))


def test_norms_without_parameters_and_layers_without_bias_are_accepted():
    model = nn.Sequential(norms(affine=False), nn.Conv1d(3, 4, 2, bias=False), nn.Conv3d(3, 4, 2, groups=1))
    initialise_(model, generator=seeded(0))
    assert model[1].weight.any()


def test_the_numbers_do_not_depend_on_the_dtype_of_the_model():
    single = build("resnet8", DIGITS, 10, bn_gamma="uniform", generator=seeded(4))
    double = initialise_(build("resnet8", DIGITS, 10).double(), generator=seeded(4), bn_gamma="uniform")
    assert equal(bits(single.double()), bits(double))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_numbers_do_not_depend_on_the_device_of_the_model():
    there = initialise_(build("resnet8", DIGITS, 10).cuda(), bn_gamma="uniform", generator=seeded(4))
    assert all(p.is_cuda for p in there.parameters())
    here = build("resnet8", DIGITS, 10, bn_gamma="uniform", generator=seeded(4))
    assert equal(bits(here), bits(there.cpu()))
    with torch.device("cuda"):
        assert equal(bits(build("resnet8", DIGITS, 10)), bits(build("resnet8", DIGITS, 10, generator=seeded(0))))


def test_initialising_keeps_frozen_parameters_frozen():
    model = build("mlp", DIGITS, 10)
    model.linear1.weight.requires_grad_(False)
    initialise_(model, generator=seeded(1))
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Embedding(3, 2), TypeError, r"^1 \(Embedding\) has the parameter 'weight'"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), TypeError, r"^1\.0 \(ConvTranspose2d\)"),
        (lambda: nn.MultiheadAttention(2, 1), TypeError, "'in_proj_weight'"),
        (Scaled, TypeError, r"^1 \(Scaled\) has the parameter 'scale'"),
        (lambda: prune.identity(nn.Linear(2, 2), "weight"), TypeError, "'weight_orig'"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), TypeError, "'original0'"),
        (lambda: nn.Linear(2, 2, device="meta"), ValueError, "'weight' of 1 .* has no data"),
        (lambda: nn.LazyLinear(2), ValueError, "'weight' of 1 .* has no data"),
    ],
)
def test_a_model_that_cannot_be_seeded_in_full_is_refused_and_left_alone(make, error, message):
    model = nn.Sequential(nn.Linear(2, 2), make())
    before = bits(model[0])
    with pytest.raises(error, match=message):
        initialise_(model, generator=seeded(0))
    assert equal(bits(model[0]), before)


mlp, cnn, resnet8, resnet18, vgg11 = (
    partial(build, name, DIGITS, 10) for name in ("mlp", "cnn", "resnet8", "resnet18", "vgg11")
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(build, "resnet19", COLOUR, 10), ValueError, "model='resnet19': expected one of .*'resnet18'"),
        (partial(build, "lenet300", MNIST, 10, hidden=(3,)), TypeError, "lenet300 has no option hidden; it takes none"),
        (partial(mlp, width=3), TypeError, "mlp has no option width; it takes hidden, norm"),
        (partial(resnet8, stem="7x7"), TypeError, "no option stem; it takes width, shortcut, skip, block"),
        (partial(mlp, init="he"), ValueError, "init='he': expected one of .*'lecun', 'fsp2023'"),
        (partial(mlp, init="density_scaled"), ValueError, "init='density_scaled' needs .*: build it with another init"),
        (partial(mlp, bn_gamma=0.5), ValueError, "bn_gamma=0.5: expected one of 'default', 'uniform'"),
        (partial(mlp, generator=3), ValueError, "generator=3: expected a torch.Generator on the CPU"),
        (partial(build, "mlp", (8, 8), 10), ValueError, r"shape=\(8, 8\): expected \(channels, height, width\)"),
        (partial(build, "mlp", DIGITS, 1), ValueError, "classes=1: expected an integer of at least 2"),
        (partial(mlp, hidden=256), ValueError, "hidden=256"),
        (partial(mlp, hidden=(256, 0)), ValueError, "hidden="),
        (partial(mlp, norm=1), ValueError, "norm=1: expected one of True, False"),
        (partial(resnet18, width=1.5), ValueError, "width=1.5"),
        (partial(resnet8, shortcut="C"), ValueError, "shortcut='C': expected one of 'A', 'B'"),
        (partial(resnet8, skip=1), ValueError, "skip=1"),
        (partial(resnet18, stem=7), ValueError, "stem=7"),
        (partial(vgg11, head=4096), ValueError, "head=4096: expected one of 'linear', '512', '4096'"),
        (partial(vgg11, conv_bias=None), ValueError, "conv_bias=None"),
        (partial(cnn, widths=()), ValueError, r"widths=\(\): expected a sequence of positive integers"),
        (partial(cnn, widths=(32, 0)), ValueError, "widths="),
        (partial(cnn, kernel=4), ValueError, "kernel=4: expected an odd integer"),
        (partial(cnn, strides=(1, 2)), ValueError, r"strides=\(1, 2\): expected 4 positive integers"),
        (partial(cnn, strides=(1, 2, 2, 0)), ValueError, "strides="),
        (partial(cnn, norm=0), ValueError, "norm=0: expected one of True, False"),
        (partial(build, "lenet_s", MNIST, 10, norm="yes"), ValueError, "norm='yes'"),
        (partial(build, "lenet_s", (1, 15, 28), 10), ValueError, "at least 16 pixels, or of exactly 1"),
        (partial(MODELS["lenet_s"].func, "xl", COLOUR, 10), ValueError, "size='xl': expected one of 's', 'm', 'l'"),
        (partial(MODELS["resnet20"].func, 21, COLOUR, 10), ValueError, "depth=21: expected 6n . 2"),
        (partial(MODELS["resnet18"].func, 101, COLOUR, 10), ValueError, "depth=101: expected one of 18, 34, 50"),
        (partial(MODELS["vgg11"].func, 13, COLOUR, 10), ValueError, "depth=13: expected one of 11, 16, 19"),
    ],
)
def test_bad_input_is_named_with_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
