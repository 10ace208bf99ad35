"""Weight initialisers: a name, a model and a CPU generator give the same numbers on every device.

Scores at initialisation (magnitude, SynFlow ...) and the weighted spectra depend on the initialiser, so it has a
name that goes into the run record. Values are drawn in float32 on the CPU, module by module in the order of
registration, weight before bias, then copied to where the parameter lives.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fsp.checks import check_choice, check_generator

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _fsp2023(weight: Tensor, *, generator: torch.Generator) -> None:
    """Convolutions N(0, 2 / fan_out), linear layers N(0, 0.01^2)."""
    if weight.ndim == 2:
        init.normal_(weight, std=0.01, generator=generator)
    else:
        init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)


# Each fills the weight of one convolution or linear layer; `initialise_` has the laws.
INITS: dict[str, Callable[..., object]] = {
    "kaiming_normal_fan_in": partial(init.kaiming_normal_, mode="fan_in", nonlinearity="relu"),
    "kaiming_normal_fan_out": partial(init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "torch_default": partial(init.kaiming_uniform_, a=math.sqrt(5)),
    "xavier_normal": init.xavier_normal_,
    "xavier_uniform": init.xavier_uniform_,
    "lecun": partial(init.kaiming_normal_, mode="fan_in", nonlinearity="linear"),  # not truncated
    "fsp2023": _fsp2023,
}


@torch.no_grad()
def initialise_(
    model: nn.Module,
    name: str = "kaiming_normal_fan_in",
    *,
    generator: torch.Generator,
    bn_gamma: str = "default",
) -> nn.Module:
    r"""Draw every parameter of `model` afresh, in place.

    With :math:`k` the kernel area (1 for a linear layer), :math:`f_{in} = k\,C_{in}` per group and
    :math:`f_{out} = k\,C_{out}`:

    =========================  ==========================================================  ============
    name                       weight                                                      bias
    =========================  ==========================================================  ============
    kaiming_normal_fan_in      :math:`N(0, 2/f_{in})`                                      0
    kaiming_normal_fan_out     :math:`N(0, 2/f_{out})`                                     0
    torch_default              :math:`U(\pm 1/\sqrt{f_{in}})`                              same law
    xavier_normal              :math:`N(0, 2/(f_{in}+f_{out}))`                            0
    xavier_uniform             :math:`U(\pm\sqrt{6/(f_{in}+f_{out})})`                     0
    lecun                      :math:`N(0, 1/f_{in})`                                      0
    fsp2023                    conv :math:`N(0, 2/f_{out})`, linear :math:`N(0, 0.01^2)`   0
    =========================  ==========================================================  ============

    Normalisation layers start at scale :math:`\gamma = 1`, shift :math:`\beta = 0` and fresh running statistics.
    "fsp2023" alone gives ``BatchNorm2d`` (not ``BatchNorm1d``) the scale 0.5.

    Parameters
    ----------
    model : nn.Module
        Made of ``Linear``, ``Conv1d/2d/3d``, batch, instance, layer, group or RMS norms, and modules without
        parameters of their own. Any device; any floating dtype.
    name : str
        A key of `INITS`.
    generator : torch.Generator
        On the CPU; it is advanced.
    bn_gamma : {"default", "uniform"}
        "uniform" draws the scale of every batch norm from :math:`U(0, 1)`, as OpenLTH does.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        Unknown `name` or `bn_gamma`; `generator` is not a CPU generator; a parameter without data (meta device,
        lazy layer).
    TypeError
        A module holds parameters of a kind not listed above (an embedding, a transposed convolution, a pruned or
        re-parametrised layer, a bare ``nn.Parameter``). Every error comes before the first change to the model.

    Examples
    --------
    >>> layer = initialise_(nn.Linear(400, 300), "lecun", generator=torch.Generator().manual_seed(0))
    >>> round(layer.weight.std().item(), 3), layer.bias.abs().max().item()      # 1 / sqrt(400)
    (0.05, 0.0)

    Notes
    -----
    "fsp2023" is the random initialisation of the NeurIPS paper's code. Its authors write :math:`k_w^2` for the kernel
    area, which is the same for the square kernels they use (D30). The fans of grouped convolutions follow PyTorch.
    """
    check_choice("init", name, INITS)
    check_choice("bn_gamma", bn_gamma, ("default", "uniform"))
    check_generator(generator)
    for path, module in model.named_modules():
        _check(path, module)
    for module in model.modules():
        if isinstance(module, AFFINE):
            _fill_affine(module, name, generator)
        elif isinstance(module, NORMS):
            _fill_norm(module, name, bn_gamma, generator)
    return model


def _check(path: str, module: nn.Module) -> None:
    """Raise unless every parameter that `module` itself owns is one we can fill."""
    where = f"{path or 'the model itself'} ({type(module).__name__})"
    for key, parameter in module.named_parameters(recurse=False):
        if not isinstance(module, AFFINE + NORMS) or key not in ("weight", "bias"):
            raise TypeError(
                f"{where} has the parameter {key!r}, for which no initialiser is defined; supported are weight and "
                "bias of Linear, Conv1d/2d/3d and normalisation layers. Initialise such a model yourself, before "
                "any pruning or re-parametrisation hook is attached"
            )
        if nn.parameter.is_lazy(parameter) or parameter.is_meta:
            raise ValueError(
                f"the parameter {key!r} of {where} has no data; give it some first "
                "(meta device: model.to_empty(device='cpu'); lazy layer: one forward pass)"
            )


def _fill_affine(module: nn.Module, name: str, generator: torch.Generator) -> None:
    """Draw weight and bias on the CPU in float32, whatever the parameter's device and dtype, and copy them."""
    weight = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
    INITS[name](weight, generator=generator)
    module.weight.copy_(weight)
    if module.bias is not None:
        bias = torch.zeros(module.bias.shape, dtype=torch.float32, device="cpu")
        if name == "torch_default":
            bound = 1 / math.sqrt(weight[0].numel())
            init.uniform_(bias, -bound, bound, generator=generator)
        module.bias.copy_(bias)


def _fill_norm(module: nn.Module, name: str, bn_gamma: str, generator: torch.Generator) -> None:
    """Scale, shift and running statistics of one normalisation layer; any of them may be absent."""
    if hasattr(module, "reset_running_stats"):
        module.reset_running_stats()
    if module.weight is not None:
        if bn_gamma == "uniform" and isinstance(module, _BatchNorm):
            module.weight.copy_(torch.rand(module.weight.shape, generator=generator, dtype=torch.float32, device="cpu"))
        else:
            module.weight.fill_(0.5 if name == "fsp2023" and isinstance(module, nn.BatchNorm2d) else 1.0)
    if getattr(module, "bias", None) is not None:  # RMSNorm has no bias attribute
        module.bias.zero_()
