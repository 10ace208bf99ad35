"""One large training spread over the processes that torchrun starts, a GPU each: a hook of `fsp.training.fit`."""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsp.data import Data, Split
from fsp.masks import Masks, check_masks
from fsp.training.train import TrainConfig


def part(data: Data, config: TrainConfig) -> tuple[Data, TrainConfig]:
    """The training examples of this process, as many as of every other, and a seed of its own.

    Parameters
    ----------
    data : fsp.data.Data
    config : TrainConfig
        ``batch_size`` is that of one process.

    Returns
    -------
    data : fsp.data.Data
        Every n-th training example of n processes, an equal number in each; validation and test whole.
    config : TrainConfig
        With a seed of its own for their order and augmentation.

    Raises
    ------
    ValueError
        If this process is in no group, or there are fewer examples than processes.
    """
    processes, number = _processes(), dist.get_rank()
    count = len(data.train.labels) // processes
    if count == 0:
        raise ValueError(f"{len(data.train.labels)} training examples for {processes} processes: start fewer")
    own = Split(*(of_all[number::processes][:count] for of_all in data.train))
    return replace(data, train=own), replace(config, seed=config.seed * processes + number)


class Averaged:
    """A hook that makes the trainings of all processes one: the same weights, statistics and masks at every step.

    Gradients are averaged before each step, statistics of batch norm after it.  Give it before other hooks.

    Parameters
    ----------
    model : nn.Module
        The one that `fit` gets, not wrapped, on this process's device.  Takes the weights of process 0.
    masks : Masks, optional
        Those that `fit` gets.  Entries are replaced by those of process 0.

    Raises
    ------
    ValueError
        If this process is in no group, a mask fits no parameter, or names or shapes of two processes differ.

    Notes
    -----
    A step is that of one process on the batches of all, but that batch norm normalises over the batch of each.  The
    ``train_loss`` is that of a process's own examples; all else that `fit` returns is the same in all.  Masks may move
    (`fsp.training.dynamic`) if all draw from generators of one seed.  Give no `checkpoint`: they would be written at
    different steps.
    """

    dense_gradients = True  # averaging does not look at them

    def __init__(self, model: nn.Module, masks: Masks | None = None):
        processes, masks = _processes(), {} if masks is None else masks
        check_masks(model, masks)
        own = {name: list(t.shape) for name, t in model.state_dict().items()}
        own |= {f"mask of {name}": list(mask.shape) for name, mask in masks.items()}
        others: list[dict] = [{}] * processes
        dist.all_gather_object(others, own)
        for number, other in enumerate(others):
            if other != others[0]:
                name = next(n for n in {**others[0], **other} if other.get(n) != others[0].get(n))
                raise ValueError(
                    f"{name!r} has shape {other.get(name)} in process {number} and {others[0].get(name)} in process 0: "
                    "make the same model and masks in all processes"
                )
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(found := tensor.detach().contiguous(), src=0)
                tensor.copy_(found)
        device = next(model.parameters()).device
        for name, mask in masks.items():
            dist.broadcast(found := mask.to(device, torch.uint8, copy=True), src=0)
            masks[name] = found.to(mask.device, torch.bool)
        self.model, self.processes = model, processes

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients."""
        self._average_(p.grad for p in self.model.parameters() if p.grad is not None)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Average the statistics of batch norm."""
        self._average_(buffer for buffer in self.model.buffers() if buffer.is_floating_point())

    @torch.no_grad()
    def _average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over all processes, those of one type in one message."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for alike in by_type.values():
            flat = torch.cat([tensor.flatten() for tensor in alike])
            dist.all_reduce(flat)
            for tensor, total in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(total.view(tensor.shape) / self.processes)


def _processes() -> int:
    """Number of processes in the group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("no group of processes: start with torchrun, and call torch.distributed.init_process_group()")
    return dist.get_world_size()
