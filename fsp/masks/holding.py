"""How a model gets its masks, and how its pruned weights stay pruned while it trains."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fsp.masks.algebra import Masks, check_masks


@torch.no_grad()
def apply_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of the model to 0, in place.

    Parameters
    ----------
    model : nn.Module
    masks : Masks
        On any device.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter.
    """
    for name, parameter in check_masks(model, masks).items():
        parameter.masked_fill_(~masks[name].to(parameter.device), 0)


def hold_(optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks) -> RemovableHandle:
    """Keep pruned weights at exactly 0 while `optimizer` trains the model, momentum and weight decay included.

    Applies the masks now and again after every optimiser step, to the weights and to every optimiser state of a
    weight's shape (momentum buffers), so that a weight that is grown later starts without momentum.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : nn.Module
    masks : Masks
        Read anew at every step: replacing an entry (dynamic sparse training) takes effect at the next one.

    Returns
    -------
    handle
        ``handle.remove()`` lets go.

    Raises
    ------
    ValueError
        If a mask is not bool or fits no parameter.
    """
    parameters = check_masks(model, masks)

    @torch.no_grad()
    def zero_pruned(optimizer, *_):
        for name, parameter in parameters.items():
            pruned = ~masks[name].to(parameter.device)
            parameter.masked_fill_(pruned, 0)  # not a product: an infinite gradient times 0 would be nan
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.masked_fill_(pruned, 0)

    apply_(model, masks)
    return optimizer.register_step_post_hook(zero_pruned)
