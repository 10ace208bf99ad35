"""Masks to and from ``torch.nn.utils.prune``."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fsp.masks.algebra import Masks, check_masks, check_plain


def to_torch_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune the model with ``torch.nn.utils.prune``, in place, for tools that know its masks.

    Every masked ``weight`` becomes a parameter ``weight_orig`` and a buffer ``weight_mask``, multiplied before each
    forward pass.  ``torch.nn.utils.prune.remove`` makes it a plain weight again, with zeros.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
        On any device.  A weight that several modules share is pruned in each of them.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter, or its parameter is parametrised or pruned by torch already.
        Nothing has been changed then.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 1))
    >>> to_torch_(model, {"0.weight": torch.tensor([[True, False]])})
    >>> [name for name, _ in model[0].named_parameters()], from_torch(model)
    (['bias', 'weight_orig'], {'0.weight': tensor([[ True, False]])})
    """
    parameters = check_masks(model, masks)
    check_plain(model, masks)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in names:
                prune.custom_from_mask(module, key, masks[names[id(parameter)]].to(parameter.device))


def from_torch(model: nn.Module) -> Masks:
    """Masks of a model that was pruned with ``torch.nn.utils.prune``.

    Parameters
    ----------
    model : nn.Module
        It is not changed.

    Returns
    -------
    Masks
        Of every parameter that is pruned there, biases too if some are.  Names are those that the parameters have
        again after ``torch.nn.utils.prune.remove``; one that several modules share appears once.

    Raises
    ------
    ValueError
        If nothing is pruned there, or modules that share a parameter prune it differently.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    masks: Masks = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        mask = buffers.get(f"{name.removesuffix('_orig')}_mask")
        if not name.endswith("_orig") or mask is None:
            continue
        plain = name.removesuffix("_orig")
        shared = first.setdefault(id(parameter), plain)
        if shared == plain:
            masks[plain] = mask != 0
        elif not torch.equal(masks[shared], mask != 0):
            raise ValueError(f"{shared!r} and {plain!r} are one parameter with two different masks")
    if not masks:
        raise ValueError("the model holds no masks of torch.nn.utils.prune; fsp.masks.to_torch_ puts some there")
    return masks
