"""One training loop, visible from top to bottom."""

import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from fsp.checks import check_count, device_of
from fsp.data import Data, Split, augment, batches, is_count
from fsp.files import digest
from fsp.masks import Masks, hold_
from fsp.progress import bar
from fsp.training.hooks import check_hooks, copied_state, methods
from fsp.training.resume import Checkpoint, State, identity
from fsp.training.settings import check_settings, is_number

SCHEDULES = ("cosine", "multistep", "one_cycle", "constant", "pat_parent")
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; SGD with momentum, unless `optimizer` says otherwise.

    Attributes
    ----------
    epochs : int
        Passes over the training split.
    batch_size : int
        Examples a step; the last batch of an epoch may be smaller.
    lr : float
        Peak learning rate.
    momentum : float
        Of Adam, the first of its two betas; the second is .999.
    nesterov : bool
        Without effect where `momentum` is 0, and with Adam.
    weight_decay : float
        L2 coefficient, on every parameter.
    schedule : {"cosine", "multistep", "one_cycle", "constant", "pat_parent"}
        Changes the learning rate at every step.  "one_cycle" rises from lr / 100 to lr and falls to lr / 1e6, while the
        momentum goes from .95 to .85 and back (D73); in a training of one or two steps it is "constant".  "pat_parent"
        stays at lr for half of the training, falls in a line to lr / 100 at nine tenths, and stays there (D71).
    milestones : tuple of float
        "multistep": fractions of the training after which the learning rate is multiplied by `gamma`.
    gamma : float
    warm_up : float
        "one_cycle": fraction of the training in which the learning rate rises.
    label_smoothing : float
        As in `torch.nn.functional.cross_entropy`; training loss only.
    augmented : bool, optional
        Random crop and flip; default what the data set's standard recipe says.
    bfloat16, channels_last, compiled : bool
        Autocast, memory format, and `torch.compile` of the network; on CUDA only.  Compiling takes a minute, once for
        an architecture and batch size in a process: other weights and masks are not compiled again.
    seed : int
        Order of the data and augmentation.
    optimizer : {"sgd", "adam"}
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warm_up: float = 0.1
    label_smoothing: float = 0.0
    augmented: bool | None = None
    bfloat16: bool = False
    channels_last: bool = False
    compiled: bool = False
    seed: int = 0
    optimizer: str = "sgd"

    def __post_init__(self):
        fractions = isinstance(self.milestones, Sequence) and all(is_number(m) and 0 < m < 1 for m in self.milestones)
        rules = [
            ("epochs", is_count(self.epochs, 1), "a whole number >= 1"),
            ("batch_size", is_count(self.batch_size, 1), "a whole number >= 1"),
            ("lr", is_number(self.lr) and self.lr > 0, "a number > 0"),
            ("momentum", is_number(self.momentum) and 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", is_number(self.weight_decay) and self.weight_decay >= 0, "a number >= 0"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("milestones", fractions, "a list of fractions in (0, 1)"),
            ("gamma", is_number(self.gamma) and 0 < self.gamma <= 1, "in (0, 1]"),
            ("warm_up", is_number(self.warm_up) and 0 < self.warm_up < 1, "in (0, 1)"),
            ("label_smoothing", is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("seed", is_count(self.seed, 0), "a whole number >= 0"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("augmented", self.augmented in (None, True, False), "True, False or None"),
        ]
        for name in ("nesterov", "bfloat16", "channels_last", "compiled"):
            rules.append((name, isinstance(getattr(self, name), bool), "True or False"))
        check_settings(self, rules)


@dataclass
class History:
    """What a training run did.

    Attributes
    ----------
    epochs : list of dict
        One entry an epoch: epoch, lr (of its first step), train_loss, validation_accuracy, validation_loss.  Epochs
        that `start_step` skips have no entry; if it skips part of an epoch, train_loss is the mean over the rest.
    status : {"finished", "diverged"}
        "diverged": after the last epoch listed, the training loss or a weight was not finite, so training stopped.
    best_epoch : int
        Epoch with the highest validation accuracy, the earliest of equals; 0 if the training diverged before any that
        could be selected had ended.
    test_accuracy : float
        In [0, 1], at the last epoch; ``nan`` if diverged.
    test_accuracy_best : float
        In [0, 1], at the best epoch on validation.
    test_loss : float
        Mean cross entropy at the last epoch, in nats.
    steps : int
        Steps made, those included that RigL replaces by topology updates; those that `start_step` skips do not count.
    seconds : float
        Wall time of training and evaluation.  After a resume from a checkpoint: the time up to the checkpoint and the
        time since the resume.
    """

    epochs: list[dict] = field(default_factory=list)
    status: str = "finished"
    best_epoch: int = 0
    test_accuracy: float = math.nan
    test_accuracy_best: float = math.nan
    test_loss: float = math.nan
    steps: int = 0
    seconds: float = 0.0


def steps(data: Data, config: TrainConfig) -> int:
    """Optimiser steps of a whole training.

    Parameters
    ----------
    data : fsp.data.Data
    config : TrainConfig

    Returns
    -------
    int
    """
    return config.epochs * math.ceil(len(data.train.labels) / config.batch_size)


def check_last_batch(model: nn.Module, data: Data, config: TrainConfig) -> None:
    """Raise a ValueError if the last batch of an epoch has one example, and the model cannot be trained on one.

    Batch norm cannot where it is given one number a channel.  Tried out on a copy of the model, and only where there
    is such a batch; model and random states stay as they are.

    Parameters
    ----------
    model : nn.Module
    data : fsp.data.Data
    config : TrainConfig
    """
    n = len(data.train.labels)
    if n % config.batch_size != 1 and config.batch_size != 1:
        return
    error = _error_on(1, model, data)
    if error is None or _error_on(2, model, data) is not None:  # what is wrong for two is not the batch's fault
        return
    better = next((size for size in range(config.batch_size + 1, n + 1) if n % size != 1), "one of more examples")
    raise ValueError(
        f"the last batch of every epoch, with batch_size={config.batch_size}, has one of {n} training examples, and "
        f"the model cannot be trained on one alone: choose another batch_size, such as {better} ({error})"
    ) from error


def _error_on(count: int, model: nn.Module, data: Data) -> Exception | None:
    """What goes wrong where a copy of the model is trained on so many examples; None if nothing does."""
    images = data.train.images[:1].repeat_interleave(count, dim=0)
    labels = data.train.labels[:1].repeat_interleave(count, dim=0)
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        try:
            cross_entropy(copy.deepcopy(model).train()(data.normalise(images)), labels).backward()
        except Exception as error:  # whatever a model raises
            return error
    return None


def _in_own_modes(function: Callable) -> Callable:
    """Gradients on and autocast off inside a function of a model, whatever is switched on or off around the call."""

    @functools.wraps(function)
    def run(model, *args, **options):
        kind = device_of(model).type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False):
            return function(model, *args, **options)

    return run


@_in_own_modes
def fit(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    masks: Masks | None = None,
    hooks: Sequence[object] = (),
    start_step: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 300.0,
) -> History:
    """Train a model, keep its masks, select on validation, read the test split once at the end.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits; trained in place, left in eval mode with the weights of the last epoch.  May be compiled
        or in ``DataParallel``.
    data : fsp.data.Data
        On the model's device.
    config : TrainConfig
    masks : Masks, optional
        Pruned weights are 0 throughout.  Replacing an entry during training changes the topology.
    hooks : sequence of objects
        What happens beside the optimiser steps, such as `fsp.training.Snapshots` and
        `fsp.training.dynamic.DynamicTraining`; see `fsp.training.hooks` for the methods that are called.
    start_step : int, from 0 to ``steps(data, config) - 1``
        Skip this many steps: the model has the weights that follow them, and meets from there on the batches, the
        augmentation and the learning rates that a whole training meets.  See `fsp.pruning.lottery`.
    checkpoint : path, optional
        File of the training's state (``.safetensors``), written while it runs and removed when it ends.  If it exists
        at the start, the training goes on from there, with the masks of that moment put into `masks`.  One training
        at a time writes to one path.
    checkpoint_every_s : float, at least 0
        Seconds between two checkpoints; 0 for one after every step.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If a mask fits no parameter; the last batch of an epoch has one example and the model cannot be trained on one
        (batch norm); `start_step` leaves no step to train; a hook has none of the methods of a hook or only one of
        ``state_dict`` and ``load_state_dict``; two hooks have ``take_step``; `checkpoint_every_s` is out of range.
    fsp.files.CannotResume
        A ValueError: `checkpoint` is the file of another training (the message names what differs: a setting, the
        data, the initial weights or masks ...).
    TypeError
        If ``state_dict()`` of a hook holds what is neither a tensor nor JSON, and there is a `checkpoint`.
    OSError
        If the checkpoint cannot be written; the one before it stays.

    Warns
    -----
    UserWarning
        If the checkpoint is damaged.  It is set aside as ``<name>.corrupt``, and training starts anew.

    Notes
    -----
    On CUDA data and augmentation stay on the device, the optimiser takes a step in one kernel, masks are held in two,
    and nothing inside an epoch waits for the device.

    Bit-repeatable on the CPU for one seed and one number of threads, whatever is set for the whole process: default
    dtype and device, gradients, autocast.  Without a validation split the best epoch is the last one.

    What hooks find in the gradients of pruned weights, before they clip them by norm for example: see
    `fsp.training.hooks`.

    A training that is killed and goes on from its checkpoint is, on the CPU, bit-equal to one that is not: also with
    momentum, batch norm, dropout (the global random state of torch, and that of the CUDA device, are put back to what
    they were), augmentation and masks that move.  Call it again with the same settings and data, and the model,
    masks and hooks as they were before the first call.  Buffers that a model leaves out of its ``state_dict`` are not
    saved, and a hook without a ``state_dict`` counts as one that remembers nothing.

    After `start_step` the optimiser is fresh.  Without momentum the weights end bit-equal to those of the whole
    training.  With momentum or Adam they do not, for its buffers at that step are unknown; nor in a model with dropout,
    which draws from the global random state.
    """
    last_step = steps(data, config)
    if not is_count(start_step, 0) or start_step >= last_step:
        raise ValueError(
            f"start_step={start_step!r}: expected a whole number from 0 to {last_step - 1}, for this training has "
            f"{last_step} steps"
        )
    check_hooks(hooks)
    check_last_batch(model, data, config)
    take_step = methods(hooks, "take_step") or [lambda step, optimizer: optimizer.step()]
    at_each_step = methods(hooks, "before_step") + take_step + methods(hooks, "after_step")

    device = device_of(model)
    on_cuda = is_cuda(device)
    layout = torch.channels_last if config.channels_last and on_cuda else torch.preserve_format
    model.to(memory_format=layout)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
    network = compiled_for(config.batch_size, model) if config.compiled and on_cuda else model
    optimizer = optimizer_of(model, config)
    schedule = schedule_of(optimizer, config, last_step)
    generator = torch.Generator().manual_seed(config.seed)
    augmented = data.augmented if config.augmented is None else config.augmented
    history, total_loss = History(), torch.zeros((), dtype=torch.float32, device=device)
    at = State(model, optimizer, schedule, masks, hooks, history, generator.get_state(), total_loss)
    saved = None
    if checkpoint is not None:  # before the masks are applied: it asks for the initial weights
        training = identity(model, data, config) | {
            "masks": None if masks is None else digest(masks)[:16],
            "hooks": [getattr(hook, "identity", type(hook).__qualname__) for hook in hooks] or None,
            "start_step": start_step,
        }
        saved = Checkpoint(checkpoint, checkpoint_every_s, training)
        saved.restore(at)
        generator.set_state(at.order)
    nobody_looks = not (methods(hooks, "before_step") or methods(hooks, "take_step"))
    dense = nobody_looks or any(getattr(hook, "dense_gradients", hasattr(hook, "take_step")) for hook in hooks)
    held = hold_(optimizer, model, masks or {}, dense_gradients=dense)

    start = time.perf_counter() - history.seconds
    # images of floats that no augmentation moves are normalised once; others a batch at a time, which takes less memory
    once = not augmented and data.train.images.is_floating_point()
    train = (data.normalise(data.train.images), data.train.labels) if once else data.train
    size, steps_an_epoch = len(data.train.labels), last_step // config.epochs
    look: dict[str, Any] = {"unit": "img", "unit_scale": True, "delay": 3, "leave": False}
    with bar(total=config.epochs * size, initial=(at.epoch - 1) * size, **look) as progress:
        for epoch in range(at.epoch, config.epochs + 1):
            model.train()
            if at.seen == 0:  # otherwise a checkpoint was written in the middle of this epoch
                at.epoch, at.lr, at.order = epoch, schedule.get_last_lr()[0], generator.get_state()  # type: ignore[assignment]  # a float, since the rate is one
            epoch_batches = batches(train, config.batch_size, generator=generator)
            for step, (images, labels) in enumerate(epoch_batches, start=(epoch - 1) * steps_an_epoch + 1):
                if augmented:
                    images = augment(images, generator=generator)
                progress.update(len(labels))
                if step <= at.step:  # made before the checkpoint; its batch moves the generator on
                    continue
                optimizer.zero_grad(set_to_none=True)
                if step <= start_step:  # without gradients a step moves nothing; the schedule wants to see one
                    optimizer.step()
                    schedule.step()
                    continue
                inputs = (images if once else data.normalise(images)).to(memory_format=layout)
                with autocast() if config.bfloat16 and on_cuda else nullcontext():
                    loss = cross_entropy(network(inputs), labels, label_smoothing=config.label_smoothing)
                loss.backward()
                for call in at_each_step:
                    call(step, optimizer)
                if step < last_step:
                    schedule.step()
                history.steps += 1
                at.step = step
                at.total_loss += loss.detach() * len(labels)
                at.seen += len(labels)
                if saved is not None and saved.due():
                    history.seconds = time.perf_counter() - start
                    saved.save(at)
            if at.seen == 0:  # start_step skips this epoch
                continue

            # one look an epoch: reading the loss at every step would stall a GPU, and a nan stays a nan
            train_loss = at.total_loss.item() / at.seen
            at.total_loss.zero_()
            at.seen = 0
            validation = {f"validation_{name}": value for name, value in evaluate(model, data, "validation").items()}
            accuracy = validation["validation_accuracy"]
            history.epochs.append({"epoch": epoch, "lr": at.lr, "train_loss": train_loss, **validation})
            progress.set_postfix(refresh=False, loss=f"{train_loss:.3f}", validation=f"{accuracy:.3f}")
            if not (math.isfinite(train_loss) and all(p.isfinite().all() for p in model.parameters())):
                history.status = "diverged"
                break
            selectable = all(selects(epoch) for selects in methods(hooks, "selects"))
            if selectable and (accuracy > at.best_accuracy or math.isnan(accuracy)):
                at.best_accuracy, history.best_epoch = accuracy, epoch
                at.best_state = copied_state(model)
            for call in methods(hooks, "epoch_end"):
                call(epoch)
    held.remove()

    if at.best_state is not None:
        last_state = copied_state(model)
        model.load_state_dict(at.best_state)
        history.test_accuracy_best = evaluate(model, data, "test")["accuracy"]
        model.load_state_dict(last_state)
    if history.status == "finished":
        test = evaluate(model, data, "test")
        history.test_accuracy, history.test_loss = test["accuracy"], test["loss"]
    history.seconds = time.perf_counter() - start
    if saved is not None:
        saved.remove()
    return history


@_in_own_modes
@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: str | Split, *, batch_size: int = 1000) -> dict[str, float]:
    """Accuracy and loss of a model on one split; leaves the model in eval mode.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.
    data : fsp.data.Data
        Normalises the images.
    split : {"train", "validation", "test"} or fsp.data.Split
        A split of `data`, or other examples with images as `data` holds them: not normalised.
    batch_size : int

    Returns
    -------
    dict
        ``accuracy`` in [0, 1] and ``loss``, the mean cross entropy in nats; both ``nan`` for an empty split.
    """
    model.eval()
    examples = getattr(data, split) if isinstance(split, str) else split
    device = examples.labels.device
    correct = torch.zeros((), dtype=torch.int64, device=device)  # read once: at every batch it would stall a GPU
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for images, labels in batches(examples, batch_size):
        logits = model(data.normalise(images)).float()
        correct += (logits.argmax(1) == labels).sum()
        loss += cross_entropy(logits, labels, reduction="sum")
    n = len(examples.labels) or math.nan
    return {"accuracy": correct.item() / n, "loss": loss.item() / n}


@_in_own_modes
@torch.no_grad()
def predict(model: nn.Module, data: Data, split: str | Split | Tensor, *, batch_size: int = 1000) -> Tensor:
    """Class probabilities; leaves the model in eval mode.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.
    data : fsp.data.Data
        Normalises the images.
    split : {"train", "validation", "test"}, fsp.data.Split or Tensor
        A split of `data`, or other images as `data` holds them: (N, C, H, W), not normalised.
    batch_size : int, at least 1

    Returns
    -------
    Tensor, float32, shape (N, classes)
        Softmax of the logits, on the model's device; each row sums to 1.

    Raises
    ------
    ValueError
        For a `batch_size` below 1.

    Examples
    --------
    >>> from fsp.data import load
    >>> model, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), load("digits")
    >>> predict(model, data, data.test.images[:3]).shape
    torch.Size([3, 10])
    """
    check_count("batch_size", batch_size, 1)
    model.eval()
    examples = getattr(data, split) if isinstance(split, str) else split
    images = examples if isinstance(examples, Tensor) else examples.images
    return torch.cat([model(data.normalise(part)).float().softmax(1) for part in images.split(batch_size)])


def is_cuda(device: torch.device) -> bool:
    """Whether a training on this device may use what is for CUDA only."""
    return device.type == "cuda"


def compiled_for(batch_size: int, model: nn.Module, backend: str | Callable = "inductor") -> Callable[[Tensor], Tensor]:
    """The model, compiled for batches of one size; others pass through it as it is, or each size would be compiled."""
    if hasattr(model, "_orig_mod"):  # is compiled
        return model
    whole = torch.compile(model, backend=backend, dynamic=False)
    return lambda inputs: whole(inputs) if len(inputs) == batch_size else model(inputs)


def optimizer_of(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Optimiser of all parameters, all layers together; on CUDA a step is one kernel."""
    on_cuda = all(p.is_cuda and p.is_floating_point() for p in model.parameters())
    options: dict[str, Any] = {"weight_decay": config.weight_decay, "fused" if on_cuda else "foreach": True}
    if config.optimizer == "adam":
        return Adam(model.parameters(), config.lr, (config.momentum, 0.999), **options)
    nesterov = config.nesterov and config.momentum > 0
    return SGD(model.parameters(), config.lr, config.momentum, nesterov=nesterov, **options)


def schedule_of(optimizer: Optimizer, config: TrainConfig, steps: int) -> lr_scheduler.LRScheduler:
    """Learning rate schedule over all optimiser steps."""
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if config.schedule == "multistep":
        return lr_scheduler.MultiStepLR(optimizer, [round(m * steps) for m in config.milestones], config.gamma)
    if config.schedule == "one_cycle" and steps > 2:
        rise = max(config.warm_up, 2 / steps)  # the peak is no sooner than the second step
        return lr_scheduler.OneCycleLR(
            optimizer, config.lr, steps, pct_start=rise, div_factor=100, final_div_factor=1e4
        )
    if config.schedule == "pat_parent":
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.99 * min(1.0, max(0.0, (step / steps - 0.5) / 0.4)))
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)
