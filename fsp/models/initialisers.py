"""Weight initialisers: a name, a model and a CPU generator give the same numbers on every device.

Scores at initialisation (magnitude, SynFlow ...) and the weighted spectra depend on the initialiser, so it has a
name that goes into the run record. Values are drawn in float32 on the CPU, module by module in the order of
registration, weight before bias, then copied to where the parameter lives.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fsp.checks import check_choice, check_generator, check_tensors

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
    "density_scaled": partial(init.kaiming_normal_, mode="fan_in", nonlinearity="relu"),  # of a layer of density 1
}
WITH_MASKS = ("density_scaled",)  # of a pruned network: not for `build`


@torch.no_grad()
def initialise_(
    model: nn.Module,
    name: str = "kaiming_normal_fan_in",
    *,
    generator: torch.Generator,
    bn_gamma: str = "default",
    masks: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    r"""Draw every parameter of `model` afresh, in place.

    With :math:`k` the kernel area (1 for a linear layer), :math:`f_{in} = k\,C_{in}` per group,
    :math:`f_{out} = k\,C_{out}` and :math:`d` the density of the layer's mask:

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
    density_scaled             :math:`N(0, 2/(d f_{in}))`                                  0
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
    masks : dict of parameter name to bool Tensor, optional
        For "density_scaled", and for nothing else: which weights are kept, on any device. A layer without a mask counts
        as dense, and so does one of which nothing is kept.

    Returns
    -------
    nn.Module
        `model` itself.

    Raises
    ------
    ValueError
        Unknown `name` or `bn_gamma`; `generator` is not a CPU generator; a parameter without data (meta device,
        lazy layer); "density_scaled" without masks, masks with another `name`, or a mask that is not a bool tensor of
        the shape of a layer's weight.
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

    "density_scaled" gives a sparse layer the gain that "kaiming_normal_fan_in" gives a dense one: :math:`d f_{in}` is
    the mean number of weights kept of an output. From the same state of the generator it draws the very numbers of
    "kaiming_normal_fan_in", each divided by :math:`\sqrt d`. Pruned weights are drawn too: apply the masks afterwards.
    """
    check_choice("init", name, INITS)
    check_choice("bn_gamma", bn_gamma, ("default", "uniform"))
    check_generator(generator)
    for path, module in model.named_modules():
        _check(path, module)
    densities = _densities(model, name, masks)
    for module in model.modules():
        if isinstance(module, AFFINE):
            _fill_affine(module, name, generator, densities.get(module.weight, 1.0))
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


def _densities(model: nn.Module, name: str, masks: Mapping[str, Tensor] | None) -> dict[nn.Parameter, float]:
    """Fraction kept of every weight that has a mask, 1 where nothing is; empty where the law does not ask for it."""
    if name not in WITH_MASKS:
        if masks is not None:
            raise ValueError(f"masks were given, but init={name!r} does not depend on them: leave them out")
        return {}
    if masks is None:
        raise ValueError(
            f"init={name!r} needs the masks of a pruned network: build it with another init, prune it, and call "
            f"initialise_(model, {name!r}, generator=..., masks=masks)"
        )
    check_tensors("the mask", masks)
    parameters = dict(model.named_parameters())
    weights = {module.weight for module in model.modules() if isinstance(module, AFFINE)}
    found = {}
    for key, mask in masks.items():
        weight = parameters.get(key)
        if weight not in weights or mask.dtype != torch.bool or mask.shape != weight.shape:
            here = f"a weight of shape {tuple(weight.shape)}" if weight in weights else "no weight of a layer"
            raise ValueError(
                f"the mask {key!r} is {mask.dtype} of shape {tuple(mask.shape)}, the model has {here} of this name: "
                "expected bool masks in the shapes of the model's weights, as pruning.prune returns them"
            )
        found[weight] = int(mask.count_nonzero()) / mask.numel() or 1.0
    return found


def _fill_affine(module: nn.Module, name: str, generator: torch.Generator, density: float) -> None:
    """Draw weight and bias on the CPU in float32, whatever the parameter's device and dtype, and copy them."""
    weight = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
    INITS[name](weight, generator=generator)
    if density != 1:
        weight /= math.sqrt(density)
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
