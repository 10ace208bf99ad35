"""Networks of the pruning literature, built to their published parameter counts.

`MODELS` maps a name to its builder, `build` makes one with seeded weights, `initialise_` draws the weights of any
network anew. Modules are registered in the order in which a forward pass calls them and carry readable names
(``stem.conv``, ``blocks.3.conv1``, ``classifier``): parameter names are the keys of masks and the labels of axes.
Every ReLU is a module of its own, so a method may replace one. On an image one pixel high (a signal) every convolution
has a kernel one pixel high, and likewise for the width.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fsp.checks import check_choice, check_count, check_options, check_shape, given_or_seed_0
from fsp.models.cnn import cnn
from fsp.models.densenet import densenet
from fsp.models.ecn import ecn, ecn_plan
from fsp.models.initialisers import INITS, WITH_MASKS, initialise_
from fsp.models.lenet import lenet
from fsp.models.mlp import lenet300, mlp
from fsp.models.mobilenet import mobilenet
from fsp.models.resnet import cifar_resnet, resnet
from fsp.models.vgg import vgg
from fsp.models.wide_resnet import wide_resnet

# builder(shape, classes, **options) -> nn.Module, with PyTorch's own, unseeded, initial weights
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet300": lenet300,
    "cnn": cnn,
    **{f"lenet_{size}": partial(lenet, size) for size in ("s", "m", "l")},
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in (8, 20, 32, 56, 104, 110)},
    "resnet104b": partial(cifar_resnet, 104, block="bottleneck"),
    **{f"resnet{depth}": partial(resnet, depth) for depth in (18, 34, 50)},
    **{f"wrn{d}_{k}": partial(wide_resnet, d, k) for d, k in ((16, 4), (22, 2), (28, 2), (28, 10))},
    **{f"vgg{depth}": partial(vgg, depth) for depth in (11, 16, 19)},
    "mobilenet": mobilenet,
    "densenet121": partial(densenet, 121),
    "ecn3": partial(ecn, layers=3, width=6, growth=6),  # small, for small images and signals
    "ecn6_fig1": ecn,
    "ecn6_s": partial(ecn, width=14, growth=14),  # the largest with width = growth and fewer than 500,000 parameters
    "ecn6_l": partial(ecn, width=36, growth=36),  # 3 million
}


@torch.inference_mode(False)
def build(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    init: str = "kaiming_normal_fan_in",
    bn_gamma: str = "default",
    generator: torch.Generator | None = None,
    **options,
) -> nn.Module:
    """Make a network with seeded weights: the same arguments and generator state give the same bits.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    shape : (channels, height, width)
        Of one input, each >= 1.
    classes : int, >= 2
        Number of outputs (logits).
    init : str
        A key of `INITS`, but not "density_scaled", which needs masks; see `initialise_`.
    bn_gamma : {"default", "uniform"}
        Start of the batch-norm scale; see `initialise_`.
    generator : torch.Generator, optional
        On the CPU; it is advanced. Without it a fresh one with seed 0 is used, so every such call gives the same
        weights. The global random state is neither read nor changed.
    **options
        Of the builder: ``hidden`` and ``norm`` (`mlp`), ``widths``, ``kernel``, ``strides`` and ``norm`` (`cnn`),
        ``norm`` (`lenet`), ``width``, ``shortcut`` and ``skip`` (`cifar_resnet` and `resnet`), ``block``
        (`cifar_resnet`), ``stem`` (`resnet`), ``variant`` (`wide_resnet`), ``conv_bias`` and ``head`` (`vgg`),
        ``width`` (`mobilenet`), ``growth`` and ``stem`` (`densenet`), ``layers``, ``width``, ``growth``, ``rate``,
        ``convs`` and ``low_stream`` (`ecn`).

    Returns
    -------
    nn.Module
        On the CPU, in float32, in training mode. Its input has shape (N, channels, height, width), its output
        (N, classes).

    Raises
    ------
    ValueError
        Unknown `name`, `init` or `bn_gamma`; an `init` that needs masks; `shape`, `classes` or an option's value out
        of range; `generator` is not a CPU generator.
    TypeError
        An option the builder does not have.

    Examples
    --------
    >>> model = build("mlp", (1, 8, 8), 10, generator=torch.Generator().manual_seed(1))
    >>> sum(parameter.numel() for parameter in model.parameters())
    85002
    """
    check_choice("model", name, MODELS)
    parameters = inspect.signature(MODELS[name]).parameters.values()
    check_options(name, options, [p.name for p in parameters if p.kind is p.KEYWORD_ONLY])
    check_shape(shape)
    check_count("classes", classes, 2)
    generator = given_or_seed_0(generator)
    with torch.device("meta"):  # no memory, and no draw from the global generator
        model = MODELS[name](shape, classes, **options)
    model = model.float().to_empty(device="cpu")  # float32 whatever torch's default is
    return initialise_(model, init, generator=generator, bn_gamma=bn_gamma)
