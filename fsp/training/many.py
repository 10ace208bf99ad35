"""Many networks of one architecture trained at the same time, for a GPU that one of them leaves idle."""

import copy
import math
import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from fsp.checks import check_has_values, is_count, plain_precision
from fsp.data import Data, augment
from fsp.masks import PRUNABLE, Masks, check_masks, hold_
from fsp.progress import bar
from fsp.training.train import History, TrainConfig, check_last_batch, optimizer_of, schedule_of, steps

ONE_BY_ONE = "train them one by one with fsp.training.fit"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
State = dict[str, Tensor]  # parameters and buffers by name, of all members: the first dimension counts them


@torch.inference_mode(False)
@torch.enable_grad()
@plain_precision()
def fit_many(
    models: Sequence[nn.Module],
    data: Data,
    config: TrainConfig,
    *,
    masks_list: Sequence[Masks | None] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[History]:
    """Train networks of one architecture at the same time, each as `fsp.training.fit` would train it alone.

    All weights lie in one stack, so that a step is one forward pass, one backward pass and one update for all.  Each
    network has its own weights, statistics of batch norm, masks, order of the data and augmentation.

    Parameters
    ----------
    models : sequence of K nn.Module
        Of one architecture, on the device of the data; trained in place, left in eval mode with the weights of the
        last epoch.
    data : fsp.data.Data
    config : TrainConfig
        Of all; `channels_last` and `compiled` have no effect here.
    masks_list : sequence of K Masks or None, optional
        Masks of each network; None for one that is dense.
    seeds : sequence of K int, optional
        Takes the place of ``config.seed``: order of the data and augmentation of each network.

    Returns
    -------
    list of K History
        In the order of `models`.  ``seconds`` is the time of all together.

    Raises
    ------
    ValueError
        If there is no network, or networks differ in architecture (the message names what differs first), lie on
        different devices, share a weight, have hooks or are compiled or data-parallel; lists differ in length; a seed
        is no whole number >= 0; a mask fits no parameter; the last batch of an epoch has one example and the networks
        cannot be trained on one; the networks cannot be stacked, because they draw random numbers (dropout), or
        compute with a number that they read back (batch norm with ``momentum=None``).  No weight has changed then.

    Notes
    -----
    Equal to K calls of `fsp.training.fit` but for rounding: sums are in another order.  In double precision weights
    agree to 1e-8 after some epochs; in single precision as far as training does not amplify the last bit.  But for
    one thing: the gradient of a bias before batch norm is rounding, which Adam makes steps of; no other weight differs
    for it.  A network that diverges ends at the epoch at which it would end alone, and the others go on.

    With ``bfloat16`` convolutions and linear layers compute in bfloat16, normalisations and the loss in float32, as
    under autocast, which has no effect in a stack.

    There are no hooks, no checkpoints and no start at a later step: train one by one where they are needed.  Memory
    grows with K; split a long list.  Convolutions of K networks become one grouped convolution, so it pays for small
    networks on a GPU; on a CPU it does not.

    Examples
    --------
    >>> from fsp import data, models, pruning, training
    >>> digits = data.load("digits")
    >>> family, masks = [], []
    >>> for seed in range(3):
    ...     generator = torch.Generator().manual_seed(seed)
    ...     family.append(models.build("mlp", digits.shape, digits.classes, hidden=(16,), generator=generator))
    ...     masks.append(pruning.prune(family[-1], "erk", 0.3, generator=generator))
    >>> found = training.fit_many(family, digits, training.TrainConfig(epochs=2), masks_list=masks, seeds=range(3))
    >>> [history.status for history in found]
    ['finished', 'finished', 'finished']
    """
    start = time.perf_counter()
    models = list(models)
    check_members(models, ONE_BY_ONE)
    _check_apart(models)
    masks_list = [None] * len(models) if masks_list is None else list(masks_list)
    seeds = [config.seed] * len(models) if seeds is None else list(seeds)
    for name, found in (("masks_list", masks_list), ("seeds", seeds)):
        if len(found) != len(models):
            raise ValueError(f"{name} has {len(found)} entries for {len(models)} networks: expected one for each")
    for seed in seeds:
        if not is_count(seed, 0):
            raise ValueError(f"seeds: {seed!r} is not a whole number >= 0")
    by_parameter = [_by_parameter(model, masks or {}) for model, masks in zip(models, masks_list, strict=True)]
    check_last_batch(models[0], data, config)
    parameters = {name: nn.Parameter(t, t.requires_grad) for name, t in _stack(models, "named_parameters").items()}
    buffers = _stack(models, "named_buffers")
    state: State = {**parameters, **buffers}
    network = copy.deepcopy(models[0]).train()
    low = _in_bfloat16(network, config, data.train.images.device)
    if low:
        _cast_in_training(network)
    _check_stackable(network, parameters, buffers, low, data)

    device = data.train.images.device
    kept = _stacked_masks(parameters, by_parameter)
    stacked = nn.ParameterList(parameters.values())
    places = {str(place): kept[name] for place, name in enumerate(parameters) if name in kept}
    optimizer = optimizer_of(stacked, config)
    schedule = schedule_of(optimizer, config, steps(data, config))
    held = hold_(optimizer, stacked, places, dense_gradients=True)
    augmented = data.augmented if config.augmented is None else config.augmented
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    histories, size, step = [History() for _ in models], len(data.train.labels), 0
    best_accuracy = [-math.inf] * len(models)
    best, last = ({name: t.detach().clone() for name, t in state.items()} for _ in range(2))
    total_loss = torch.zeros(len(models), dtype=torch.float32, device=device)
    loss_of_each = vmap(lambda *of_one: _loss(network, low, config.label_smoothing, *of_one))

    with bar(total=config.epochs * size * len(models), unit="img", unit_scale=True, delay=3, leave=False) as progress:
        for epoch in range(1, config.epochs + 1):
            network.train()
            lr = schedule.get_last_lr()[0]
            total_loss.zero_()
            orders = torch.stack([_permutation(size, generator) for generator in generators]).to(device)
            for index in orders.split(config.batch_size, dim=1):  # (K, batch)
                images, labels = data.train.images[index.flatten()], data.train.labels[index]
                if augmented:
                    images = augment(images, generator=generators)
                progress.update(labels.numel())
                optimizer.zero_grad(set_to_none=True)
                inputs = data.normalise(images).unflatten(0, index.shape)
                losses = loss_of_each(parameters, buffers, inputs, labels)
                losses.sum().backward()
                optimizer.step()
                schedule.step()
                step += 1
                total_loss += losses.detach() * index.shape[1]

            sound = torch.stack([p.detach().isfinite().flatten(1).all(1) for p in stacked]).all(0).tolist()
            accuracies, validation_losses = _evaluated(network, state, data, "validation")
            improved, running = [], []
            for number, history in enumerate(histories):
                if history.status == "diverged":
                    continue
                running.append(number)
                train_loss, accuracy = total_loss[number].item() / size, accuracies[number]
                history.steps = step
                entry = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "validation_accuracy": accuracy}
                history.epochs.append(entry | {"validation_loss": validation_losses[number]})
                if not (math.isfinite(train_loss) and sound[number]):
                    history.status = "diverged"
                elif accuracy > best_accuracy[number] or math.isnan(accuracy):
                    best_accuracy[number], history.best_epoch = accuracy, epoch
                    improved.append(number)
            _keep_(best, state, improved)
            _keep_(last, state, running)
            if all(history.status == "diverged" for history in histories):
                break
    held.remove()

    at_best, _ = _evaluated(network, best, data, "test")
    for history, accuracy in zip(histories, at_best, strict=True):
        history.test_accuracy_best = accuracy if history.best_epoch else math.nan
    accuracies, test_losses = _evaluated(network, last, data, "test")
    _put_(models, last)
    for history, accuracy, loss in zip(histories, accuracies, test_losses, strict=True):
        if history.status == "finished":
            history.test_accuracy, history.test_loss = accuracy, loss
        history.seconds = time.perf_counter() - start
    return histories


# ---- networks in one stack ---------------------------------------------------------------------------------------


def _stack(models: Sequence[nn.Module], of: str) -> State:
    """All parameters or buffers, copied."""
    found = [dict(getattr(model, of)()) for model in models]
    stacked = {}
    for name, first in found[0].items():
        stacked[name] = torch.stack([one[name].detach() for one in found])
        stacked[name].requires_grad_(first.requires_grad)
    return stacked


def _by_parameter(model: nn.Module, masks: Masks) -> Masks:
    """Masks under the names of their parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: masks[name] for name, p in check_masks(model, masks).items()}


def _stacked_masks(parameters: Mapping[str, Tensor], masks_list: Sequence[Masks]) -> Masks:
    """Masks of all, for every parameter that one of them has a mask of."""
    kept = {}
    for number, masks in enumerate(masks_list):
        for name, mask in masks.items():
            if name not in kept:
                kept[name] = torch.ones_like(parameters[name], dtype=torch.bool)
            kept[name][number] = mask.to(kept[name].device)
    return kept


@torch.no_grad()
def _keep_(kept: State, state: State, members: Sequence[int]) -> None:
    """Copy the state of some members."""
    if members:
        index = torch.tensor(members, device=next(iter(state.values())).device)
        for name, tensor in state.items():
            kept[name][index] = tensor.detach()[index]


@torch.no_grad()
def _put_(models: Sequence[nn.Module], state: State) -> None:
    """Give every model its weights and statistics, in eval mode."""
    for number, model in enumerate(models):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(state[name][number])
        model.eval()


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    """Order of an epoch, as `fsp.data.batches` draws it."""
    return torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")


def _in_bfloat16(network: nn.Module, config: TrainConfig, device: torch.device) -> set[str]:
    """Parameters that compute in bfloat16: none, or those of convolutions and linear layers."""
    if not (config.bfloat16 and device.type == "cuda"):
        return set()
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, PRUNABLE)]
    return {f"{name}.{key}".lstrip(".") for name, module in layers for key, _ in module.named_parameters()}


def _cast_in_training(network: nn.Module) -> None:
    """Give layers bfloat16, and all other modules with weights of their own float32: vmap switches autocast off."""

    def cast(module: nn.Module, inputs: tuple) -> tuple:
        if not module.training:
            return inputs
        dtype = torch.bfloat16 if isinstance(module, PRUNABLE) else torch.float32
        return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    for module in network.modules():
        if isinstance(module, PRUNABLE) or next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(cast)


def _loss(
    network: nn.Module,
    low: Collection[str],
    label_smoothing: float,
    parameters: State,
    buffers: State,
    inputs: Tensor,
    labels: Tensor,
) -> Tensor:
    """Training loss of one network."""
    if low:
        parameters = {name: p.bfloat16() if name in low else p for name, p in parameters.items()}
    logits = functional_call(network, (parameters, buffers), (inputs,))
    return cross_entropy(logits.float() if low else logits, labels, label_smoothing=label_smoothing)


@torch.no_grad()
def _evaluated(network: nn.Module, state: State, data: Data, split: str) -> tuple[list[float], list[float]]:
    """Accuracy and mean loss of every network on a split, as `fsp.training.evaluate` gives them."""
    network.eval()
    images, labels = getattr(data, split)
    logits_of_each = vmap(lambda state, inputs: functional_call(network, state, (inputs,)), in_dims=(0, None))
    members = len(next(iter(state.values())))
    correct = torch.zeros(members, dtype=torch.int64, device=images.device)
    loss = torch.zeros(members, dtype=torch.float64, device=images.device)
    for part, of_part in zip(images.split(1000), labels.split(1000), strict=True):
        if len(part):
            logits = logits_of_each(state, data.normalise(part)).float()  # (K, batch, classes)
            correct += (logits.argmax(2) == of_part).sum(1)
            every = cross_entropy(logits.flatten(0, 1), of_part.repeat(members), reduction="none")
            loss += every.view(members, -1).sum(1)
    n = len(labels) or math.nan
    return [right / n for right in correct.tolist()], [total / n for total in loss.tolist()]


# ---- what cannot be stacked --------------------------------------------------------------------------------------


def check_members(members: Sequence[nn.Module], otherwise: str) -> None:
    """Raise a ValueError unless these are networks of one architecture; `otherwise` says what to do where not."""
    if not members:
        raise ValueError("members is empty: expected at least one network")
    remedy = f"expected members of one architecture; {otherwise}"
    first = {name: tuple(value.shape) for name, value in members[0].state_dict().items()}
    for number, member in enumerate(members):
        own = {name: tuple(value.shape) for name, value in member.state_dict().items()}
        if own != first:
            name = next(name for name in {**first, **own} if own.get(name) != first.get(name))
            raise ValueError(
                f"{name!r} has shape {own.get(name)} in member {number} and {first.get(name)} in member 0: {remedy}"
            )
        if repr(member) != repr(members[0]):  # strides, padding and the like leave no trace in a state
            lines = zip(repr(member).splitlines(), repr(members[0]).splitlines(), strict=False)
            different = next(((a, b) for a, b in lines if a != b), ("more modules", "fewer"))
            raise ValueError(
                f"member {number} has {different[0].strip()!r} where member 0 has {different[1].strip()!r}: {remedy}"
            )


def _check_apart(models: Sequence[nn.Module]) -> None:
    """Raise a ValueError for networks that share weights, lie apart or do more than their forward pass."""
    owner: dict[int, int] = {}
    wanted = {name: (p.device, p.dtype, p.requires_grad) for name, p in models[0].named_parameters()}
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for number, model in enumerate(models):
        if hasattr(model, "_orig_mod") or isinstance(model, parallel):
            raise ValueError(f"member {number} is compiled or data-parallel: pass the plain network, or {ONE_BY_ONE}")
        check_has_values(model)
        for name, p in model.named_parameters():
            if owner.setdefault(id(p), number) != number:
                raise ValueError(f"{name!r} of member {number} is a weight of member {owner[id(p)]}, too: copy it")
            own = (p.device, p.dtype, p.requires_grad)
            if own != wanted[name]:
                raise ValueError(
                    f"{name!r} of member {number} has device, dtype and requires_grad {own}, and that of member 0 "
                    f"{wanted[name]}: make them alike, or {ONE_BY_ONE}"
                )
        for name, module in model.named_modules():
            if any(getattr(module, hooks, None) for hooks in HOOKS):
                raise ValueError(
                    f"module {name!r} of member {number} has forward or backward hooks, which a stack would call once "
                    f"for all: remove them, or {ONE_BY_ONE}"
                )


def _check_stackable(
    network: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    low: Collection[str],
    data: Data,
) -> None:
    """Raise a ValueError if a step of all together fails, tried out on two examples; nothing changes."""
    members = len(next(iter(parameters.values())))
    images, labels = data.train.images[:2], data.train.labels[:2]
    inputs = data.normalise(images).expand(members, *images.shape)
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    trained = [p for p in parameters.values() if p.requires_grad]
    try:
        losses = vmap(lambda *of_one: _loss(network, low, 0.0, *of_one))(
            parameters, copies, inputs, labels.expand(members, -1)
        )
        torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    except Exception as error:  # whatever a model or vmap raises
        random = "called random operation" in str(error)
        why = "they draw random numbers in their forward pass, as dropout does" if random else str(error)
        raise ValueError(f"these networks cannot be trained together: {why}; {ONE_BY_ONE}") from error
