"""Random masks that keep something of other masks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fsp.checks import check_generator, plain_settings
from fsp.masks.algebra import Masks, check_masks, check_scope, unflattened


@plain_settings()
def shuffle(masks: Mapping[str, Tensor], *, scope: str = "layer", generator: torch.Generator) -> Masks:
    """Masks with their entries permuted at random: the topology goes, the counts stay.

    Parameters
    ----------
    masks : Masks
    scope : {"layer", "global"}
        Permute within each tensor (keeps its count), or over all tensors together (keeps the total).
    generator : torch.Generator on the CPU

    Returns
    -------
    Masks
        New tensors on the devices of the old ones.

    References
    ----------
    Frankle et al., Pruning neural networks at initialization: why are we missing the mark? ICLR 2021, section 5.
    """
    check_generator(generator)
    if scope == "layer":
        return {name: _permuted(m.flatten(), generator).view_as(m) for name, m in masks.items()}
    check_scope(scope)
    flat = _permuted(torch.cat([m.flatten() for m in masks.values()]), generator)
    return unflattened(flat, masks)


@plain_settings()
def scattered(
    masks: Mapping[str, Tensor], model: nn.Module, *, generator: torch.Generator
) -> tuple[Masks, dict[str, Tensor]]:
    """Random masks with the same count in every layer, and the kept weights in random order on them.

    The control for a topology: neither densities nor the distribution of weights change, only positions.

    Parameters
    ----------
    masks : Masks
    model : nn.Module
        Gives the weights; it is not changed.
    generator : torch.Generator on the CPU

    Returns
    -------
    masks : Masks
    weights : dict of name to Tensor
        Zero off the new masks.

    Raises
    ------
    ValueError
        If a mask fits no parameter of the model.
    """
    new, weights = shuffle(masks, generator=generator), {}
    for name, parameter in check_masks(model, masks).items():
        weight = parameter.detach()
        kept = _permuted(weight[masks[name]], generator)
        weights[name] = torch.zeros_like(weight).masked_scatter_(new[name], kept)
    return new, weights


def _permuted(flat: Tensor, generator: torch.Generator) -> Tensor:
    """Entries in random order, the order drawn on the CPU."""
    return flat[torch.randperm(len(flat), generator=generator, device="cpu").to(flat.device)]
