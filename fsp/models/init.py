"""Weight initialisers: a name, a model and a CPU generator give the same numbers on every device.

Scores at initialisation (magnitude, SynFlow ...) and the weighted spectra depend on the initialiser, so it has a
name that goes into the run record. Values are drawn in float32 on the CPU, module by module in the order of
registration, weight before bias, then copied to where the parameter lives.
"""

import copy
import math
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.utils import parametrize, prune

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OTHER_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
BN_GAMMAS = ("default", "uniform")


def _kaiming_normal_fan_in(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """N(0, 2 / fan_in); biases stay 0."""
    init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu", generator=generator)


def _kaiming_normal_fan_out(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """N(0, 2 / fan_out); biases stay 0."""
    init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)


def _torch_default(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """U(-b, b) with b = 1 / sqrt(fan_in) for weights and biases, as PyTorch's own ``reset_parameters``."""
    init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        init.uniform_(bias, -bound, bound, generator=generator)


def _xavier_normal(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """N(0, 2 / (fan_in + fan_out)); biases stay 0."""
    init.xavier_normal_(weight, generator=generator)


def _xavier_uniform(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """U(-b, b) with b = sqrt(6 / (fan_in + fan_out)); biases stay 0."""
    init.xavier_uniform_(weight, generator=generator)


def _lecun(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """N(0, 1 / fan_in), not truncated; biases stay 0."""
    init.kaiming_normal_(weight, mode="fan_in", nonlinearity="linear", generator=generator)


def _fsp2023(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """Convolutions N(0, 2 / fan_out), linear layers N(0, 0.01^2); biases stay 0."""
    if weight.ndim == 2:
        init.normal_(weight, std=0.01, generator=generator)
    else:
        init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)


# Each fills the weight of one convolution or linear layer; the bias arrives as zeros, or None.
INITS: dict[str, Callable[[Tensor, Tensor | None, torch.Generator], None]] = {
    "kaiming_normal_fan_in": _kaiming_normal_fan_in,
    "kaiming_normal_fan_out": _kaiming_normal_fan_out,
    "torch_default": _torch_default,
    "xavier_normal": _xavier_normal,
    "xavier_uniform": _xavier_uniform,
    "lecun": _lecun,
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
        Unknown `name` or `bn_gamma`; a parameter without data (meta device, lazy layer).
    TypeError
        `generator` is not a CPU generator; a module holds parameters of a kind not listed above (an embedding,
        a transposed convolution, a pruned or re-parametrised layer, a bare ``nn.Parameter``). Every error comes
        before the first change to the model.

    Examples
    --------
    >>> layer = initialise_(nn.Linear(400, 300), "lecun", generator=torch.Generator().manual_seed(0))
    >>> round(layer.weight.std().item(), 3), layer.bias.abs().max().item()      # 1 / sqrt(400)
    (0.05, 0.0)

    Notes
    -----
    "fsp2023" is the random initialisation of full-spectrum.md §10. Its authors write :math:`k_w^2` for the kernel
    area, which is the same for the square kernels they use (D30). The fans of grouped convolutions follow PyTorch.
    """
    if name not in INITS:
        raise ValueError(f"unknown initialiser {name!r}; expected one of {', '.join(INITS)}")
    if bn_gamma not in BN_GAMMAS:
        raise ValueError(f"bn_gamma must be one of {', '.join(BN_GAMMAS)}, got {bn_gamma!r}")
    _check_generator(generator)
    for path, module in model.named_modules():
        _check(path, module)
    for module in model.modules():
        if isinstance(module, AFFINE):
            _fill_affine(module, INITS[name], generator)
        elif isinstance(module, BATCH_NORMS + OTHER_NORMS):
            _fill_norm(module, name, bn_gamma, generator)
    return model


@torch.no_grad()
def reinitialised(model: nn.Module, *, generator: torch.Generator) -> nn.Module:
    """A copy of any model with fresh weights, drawn as its modules draw them when they are made.

    The control that keeps a mask and forgets the weights it was found on.  The law of the weights is that of each
    module's ``reset_parameters``, so a model whose weights were drawn otherwise gets another law: make a network of
    `fsp.models` anew with `fsp.models.build`, by the name of its initialiser, and use `initialise_` for a network
    whose weights came from there.

    Parameters
    ----------
    model : nn.Module
        It is not changed.
    generator : torch.Generator
        On the CPU; it is advanced by one draw.  The global random state is neither read nor changed.

    Returns
    -------
    nn.Module
        On the model's devices, pruned nowhere: put masks on with `fsp.masks.apply_`.  The numbers do not depend on
        the devices.

    Raises
    ------
    TypeError
        `generator` is not a CPU generator; a parameter that no ``reset_parameters`` draws anew (all are named): a
        bare ``nn.Parameter``, an ``nn.MultiheadAttention``, a weight that is pruned by torch or parametrised.
    ValueError
        A parameter without data (meta device, lazy layer).

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> other = reinitialised(model, generator=torch.Generator().manual_seed(0))
    >>> torch.equal(model[0].weight, other[0].weight)
    False

    References
    ----------
    Frankle et al., Pruning neural networks at initialization: why are we missing the mark? ICLR 2021, section 5.
    """
    _check_generator(generator)
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"the parameter {name!r} has no data; give it some first")
    if prune.is_pruned(model) or any(parametrize.is_parametrized(module) for module in model.modules()):
        raise TypeError(
            "the model holds weights that are computed from others, so no reset_parameters draws them: make them plain "
            "first, with torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
        )
    new = copy.deepcopy(model)
    drawn = copy.deepcopy(model).cpu()
    for parameter in drawn.parameters():
        parameter.fill_(torch.nan)  # what is still nan afterwards was not drawn
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        drawn.apply(_reset)  # a module after its children, which it may overrule
    left = [name for name, parameter in drawn.named_parameters() if parameter.isnan().any()]
    if left:
        raise TypeError(
            f"no reset_parameters draws {', '.join(left)}: give the modules that own them one, or make the model anew"
        )
    for target, source in zip(
        chain(new.parameters(), new.buffers()), chain(drawn.parameters(), drawn.buffers()), strict=True
    ):
        target.copy_(source)
    return new


def _reset(module: nn.Module) -> None:
    """Draw what a module owns, if it can."""
    if callable(getattr(module, "reset_parameters", None)):
        module.reset_parameters()


def _check_generator(generator: torch.Generator) -> None:
    """Raise for anything but a CPU generator: results must not depend on the device."""
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise TypeError(
            f"generator must be a torch.Generator on the CPU, got {generator!r}; "
            "make one with torch.Generator().manual_seed(seed)"
        )


def _check(path: str, module: nn.Module) -> None:
    """Raise unless every parameter that `module` itself owns is one we can fill."""
    where = f"{path or 'the model itself'} ({type(module).__name__})"
    for key, parameter in module.named_parameters(recurse=False):
        if not isinstance(module, AFFINE + BATCH_NORMS + OTHER_NORMS) or key not in ("weight", "bias"):
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


def _fill_affine(module: nn.Module, fill: Callable, generator: torch.Generator) -> None:
    """Draw weight and bias on the CPU in float32, whatever the parameter's device and dtype, and copy them."""
    weight = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
    bias = None if module.bias is None else torch.zeros(module.bias.shape, dtype=torch.float32, device="cpu")
    fill(weight, bias, generator)
    module.weight.copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)


def _fill_norm(module: nn.Module, name: str, bn_gamma: str, generator: torch.Generator) -> None:
    """Scale, shift and running statistics of one normalisation layer; any of them may be absent."""
    if hasattr(module, "reset_running_stats"):
        module.reset_running_stats()
    if module.weight is not None:
        if bn_gamma == "uniform" and isinstance(module, BATCH_NORMS):
            module.weight.copy_(torch.rand(module.weight.shape, generator=generator, dtype=torch.float32, device="cpu"))
        else:
            module.weight.fill_(0.5 if name == "fsp2023" and isinstance(module, nn.BatchNorm2d) else 1.0)
    if getattr(module, "bias", None) is not None:  # RMSNorm has no bias attribute
        module.bias.zero_()
