"""Networks of the pruning literature, built to their published parameter counts.

`MODELS` maps a name to its builder, `build` makes one with seeded weights, `initialise_` draws the weights of any
network anew. Modules are registered in the order in which a forward pass calls them and carry readable names
(``stem.conv``, ``blocks.3.conv1``, ``classifier``): parameter names are the keys of masks and the labels of axes.
Every ReLU is a module of its own, so a method may replace one.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from fsp.models.init import INITS, initialise_, reinitialised
from fsp.models.mlp import lenet300, mlp
from fsp.models.resnet import cifar_resnet, resnet
from fsp.models.vgg import vgg

__all__ = [
    "INITS",
    "MODELS",
    "build",
    "cifar_resnet",
    "initialise_",
    "lenet300",
    "mlp",
    "reinitialised",
    "resnet",
    "vgg",
]

# builder(shape, classes, **options) -> nn.Module, with PyTorch's own, unseeded, initial weights
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet300": lenet300,
    "resnet8": partial(cifar_resnet, 8),
    "resnet20": partial(cifar_resnet, 20),
    "resnet32": partial(cifar_resnet, 32),
    "resnet56": partial(cifar_resnet, 56),
    "resnet110": partial(cifar_resnet, 110),
    "resnet18": partial(resnet, 18),
    "resnet34": partial(resnet, 34),
    "vgg11": partial(vgg, 11),
    "vgg16": partial(vgg, 16),
    "vgg19": partial(vgg, 19),
}


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
        A key of `INITS`; see `initialise_`.
    bn_gamma : {"default", "uniform"}
        Start of the batch-norm scale; see `initialise_`.
    generator : torch.Generator, optional
        On the CPU; it is advanced. Without it a fresh one with seed 0 is used, so every such call gives the same
        weights. The global random state is neither read nor changed.
    **options
        Of the builder: ``hidden`` and ``norm`` (`mlp`), ``width``, ``shortcut`` and ``skip`` (`cifar_resnet` and
        `resnet`), ``stem`` (`resnet`), ``conv_bias`` and ``head`` (`vgg`).

    Returns
    -------
    nn.Module
        On the CPU, in training mode. Its input has shape (N, channels, height, width), its output (N, classes).

    Raises
    ------
    ValueError
        Unknown `name`, `init` or `bn_gamma`; `shape`, `classes` or an option's value out of range.
    TypeError
        An option the builder does not have; `generator` is not a CPU generator.

    Examples
    --------
    >>> model = build("mlp", (1, 8, 8), 10, generator=torch.Generator().manual_seed(1))
    >>> sum(parameter.numel() for parameter in model.parameters())
    85002
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
    parameters = inspect.signature(MODELS[name]).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [option for option in options if option not in valid]
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it takes {', '.join(valid) or 'none'}")
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(type(n) is int and n >= 1 for n in shape):
        raise ValueError(
            f"shape must be (channels, height, width), three positive integers such as (3, 32, 32), got {shape!r}"
        )
    if type(classes) is not int or classes < 2:
        raise ValueError(f"classes must be an integer of at least 2, got {classes!r}")
    if generator is None:
        generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("meta"):  # no memory, and no draw from the global generator
        model = MODELS[name](shape, classes, **options)
    return initialise_(model.to_empty(device="cpu"), init, generator=generator, bn_gamma=bn_gamma)
