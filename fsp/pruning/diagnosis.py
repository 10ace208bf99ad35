"""What is left of a pruned network: empty layers, weights on complete paths, multiply-adds.

A layer may keep weights that do nothing, because no path of kept weights leads from the input through them to the
output.  `diagnose` counts the others, the *effective* weights.  Connectivity is a property of the masks and the
architecture, so the values of the weights, shifts and running statistics play no part.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fsp.checks import check_has_values, device_of, is_count
from fsp.masks import Masks, check_masks, layers_of, unpruned
from fsp.pruning.gradients import put_weights, undisturbed, with_tensors


class Diagnosis(NamedTuple):
    """What `diagnose` finds: a table with one row a masked layer, and numbers of the whole network."""

    layers: pd.DataFrame
    network: dict[str, int | float | bool]


def diagnose(model: nn.Module, masks: Mapping[str, Tensor], shape: Sequence[int]) -> Diagnosis:
    r"""Count what masks leave of a network: weights, weights on complete paths, multiply-adds.

    Parameters
    ----------
    model : nn.Module
        Maps one tensor to one tensor.  It is left bit-identical, pruned or not.
    masks : Masks
    shape : sequence of int
        Of one input, such as (channels, height, width).

    Returns
    -------
    layers : pandas.DataFrame
        One row a mask, in their order:

        * layer, shape, weights : name, shape and size of the weight
        * kept, density : weights kept, and as a fraction of `weights`
        * empty : whether none is kept (the layer has collapsed)
        * effective, effective_density : kept weights on a complete path of kept weights, from an input to an output;
          as a fraction of `weights`
        * flops, flops_kept : multiply-adds of one input, dense and with the kept weights alone
    network : dict of name to int, float or bool
        weights, kept, density, effective, effective_density of all masked weights together; empty, the number of
        empty layers; disconnected, whether no path at all leads from input to output; parameters and
        parameters_kept, biases and norms included; flops and flops_kept, convolutions and linear layers without a
        mask included.

    Raises
    ------
    ValueError
        If there are no masks, or a mask has no entries, is not bool or fits no parameter; `shape` is no sequence of
        positive integers; a weight is computed in a way that masks cannot follow (see `fsp.masks.prunable`), or has no
        values; a max-pool is dilated; a sequence is packed.
    TypeError
        If the model does not return one tensor.

    Notes
    -----
    *Effective weights.*  With the kept weights set to 1, the pruned ones and all biases to 0, an input of ones and R
    the sum of the outputs, they are those with :math:`m \odot \partial R / \partial m \ne 0`: the SynFlow score
    without the weights' values.  R itself overflows float64 in deep networks, so what enters a convolution or linear
    layer is clipped to 0 or 1, and so are the gradients on their way back: nothing that can be reached is lost, at any
    depth, and no rounding makes a path.  Activations and norms pass everything on; max-pools become averages, because
    their gradient goes to one of several equals.  Spatial positions count: the outer weights of a 3×3 kernel on a map
    of 1×1 meet only padding, so they are never effective, even in a dense network.

    This is exact for networks of convolutions, linear layers, element-wise activations, batch norms, pooling, sums and
    concatenations.  Elsewhere it is a convention:

    * sigmoid, hard sigmoid and softmax are gates, open whatever reaches them (as in squeeze-and-excitation); as the
      activation of a hidden unit that no input reaches they make the weights behind it count;
    * recurrent layers and cells of torch pass everything on from step to step, and their sigmoids are gates;
    * in attention every token reads every token, and through `nn.MultiheadAttention` every feature as well;
    * a parameter that is neither bias, weight nor scale of a layer (class token, position embedding) counts as input;
    * group, layer and instance norms mix their features; that is no path here;
    * reductions such as ``amax``, differences and unknown element-wise functions are taken as they are.

    *Multiply-adds.*  A multiplication with the addition that follows it is one flop.  Each weight of a convolution
    counts once for every output position (transposed: every input position), those where it meets padding included,
    each weight of a linear layer once for every row.  Biases, norms, activations, pooling and the products inside
    attention are not counted; nor is a weight that the forward pass uses otherwise than in a convolution or linear
    layer.

    Examples
    --------
    >>> from torch import tensor
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> masks = {
    ...     "0.weight": tensor([[True, True], [True, False], [False, False]]),
    ...     "2.weight": tensor([[True, False, True]]),  # the second unit is not read, the third has no input
    ... }
    >>> layers, network = diagnose(model, masks, (2,))
    >>> layers[["layer", "weights", "kept", "effective", "flops_kept"]]
          layer  weights  kept  effective  flops_kept
    0  0.weight        6     3          2           3
    1  2.weight        3     2          1           2
    >>> network["disconnected"], network["parameters"], network["parameters_kept"]
    (False, 13, 9)

    References
    ----------
    Tanaka, Kunin, Yamins, Ganguli: Pruning neural networks without any data by iteratively conserving synaptic flow.
    NeurIPS 2020, section 3 (layer-collapse).
    Vysogorets, Kempe: Connectivity matters: neural network pruning through the lens of effective sparsity.
    JMLR 24, 2023 (effective weights).
    """
    paths = follow_paths(model, masks, shape)
    rows = []
    for name, mask in masks.items():
        weights, kept, effective = mask.numel(), int(mask.count_nonzero()), int(paths.effective[name].sum())
        rows.append(
            {
                "layer": name,
                "shape": tuple(mask.shape),
                "weights": weights,
                "kept": kept,
                "density": kept / weights,
                "empty": kept == 0,
                "effective": effective,
                "effective_density": effective / weights,
                "flops": weights * paths.positions[name],
                "flops_kept": kept * paths.positions[name],
            }
        )
    layers = pd.DataFrame(rows)
    total = {column: int(layers[column].sum()) for column in ("weights", "kept", "effective", "flops", "flops_kept")}
    parameters = sum(p.numel() for p in model.parameters())
    network = {
        "weights": total["weights"],
        "kept": total["kept"],
        "density": total["kept"] / total["weights"],
        "effective": total["effective"],
        "effective_density": total["effective"] / total["weights"],
        "empty": int(layers["empty"].sum()),
        "disconnected": paths.disconnected,
        "parameters": parameters,
        "parameters_kept": parameters - total["weights"] + total["kept"],
        "flops": paths.flops,
        "flops_kept": paths.flops - total["flops"] + total["flops_kept"],
    }
    return Diagnosis(layers, network)


# ---- one pass forward and back -----------------------------------------------------------------------------------


class Paths(NamedTuple):
    """What one pass through the network finds."""

    effective: Masks  # subsets of the masks, on the devices of the parameters
    positions: dict[str, int]  # how often each weight of a masked tensor is multiplied
    flops: int  # of all convolutions and linear layers, dense
    disconnected: bool


def follow_paths(model: nn.Module, masks: Mapping[str, Tensor], shape: Sequence[int]) -> Paths:
    """Follow all paths through a network forward and back in one pass; parameters and errors as for `diagnose`."""
    if not isinstance(shape, Sequence) or not shape or not all(is_count(n, 1) for n in shape):
        raise ValueError(f"shape={shape!r}: expected the shape of one input, positive integers such as (3, 32, 32)")
    if not masks:
        raise ValueError("there are no masks: fsp.pruning.prune makes them")
    check_has_values(model)
    parameters = check_masks(model, masks)
    for name, parameter in parameters.items():
        if parameter.numel() == 0:
            raise ValueError(f"{name!r} has the shape {tuple(parameter.shape)}: it holds no weight")
    device = device_of(model)
    with undisturbed(model, training=False):
        weights = {name: m.to(parameters[name].device, torch.float64) for name, m in masks.items()}
        for layer in layers_of(model, only={id(parameter) for parameter in parameters.values()}):
            for name, parameter in parameters.items():
                if parameter is layer.parameter:
                    weights[name] = weights[name] * unpruned(layer)
        weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
        given = put_weights(model, masks, weights)
        tensors = _ones_and_zeros(model) | given
        ones = torch.ones((1, *shape), dtype=torch.float64, device=device, requires_grad=True)
        passed = _OnlyPaths()

        def gradients_of_paths(model: nn.Module) -> Sequence[Tensor]:
            with passed:
                output = model(ones)
                if not isinstance(output, Tensor):
                    kind = type(output).__name__
                    raise TypeError(f"the model returns a {kind}: wrap it so that it returns its logits alone")
                passed.counting = False  # a model with activation checkpointing is run again
                return torch.autograd.grad(output.sum(), [ones, *weights.values()], materialize_grads=True)

        gradients = with_tensors(model, tensors, gradients_of_paths)
    return Paths(
        {name: (w.detach() * g) != 0 for (name, w), g in zip(weights.items(), gradients[1:], strict=True)},
        {name: sum(times for used, times in passed.uses if used is w) for name, w in weights.items()},
        sum(used.numel() * times for used, times in passed.uses),
        not gradients[0].any().item(),
    )


@torch.no_grad()
def _ones_and_zeros(model: nn.Module) -> dict[int, Tensor]:
    """Tensors for a model, by the identities of its own: parameters 1, biases 0, buffers as they are, in float64.

    Parametrised tensors are 1 where they are not 0 now; this is set in ``vars`` of their modules.
    """
    found = {}
    for buffer in model.buffers():
        found[id(buffer)] = buffer.detach().to(torch.float64 if buffer.is_floating_point() else None, copy=True)
    for name, p in model.named_parameters():
        found[id(p)] = torch.full_like(p, 0.0 if "bias" in name.rpartition(".")[2] else 1.0, dtype=torch.float64)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for key, parametrization in module.parametrizations.items():
                if "forward" not in vars(parametrization):  # else it has a mask
                    value = (getattr(module, key) != 0).to(torch.float64) * ("bias" not in key)
                    vars(parametrization)["forward"] = partial(Tensor.detach, value)
    return found


class _Clip(torch.autograd.Function):
    """1 where an entry is not 0, else 0; gradients are clipped in the same way."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x != 0).to(torch.float64)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return (gradient != 0).to(torch.float64)


LAYERS = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
POOLS = {f"max_pool{n}d": getattr(F, f"avg_pool{n}d") for n in (1, 2, 3)}
ADAPTIVE_POOLS = {f"adaptive_max_pool{n}d": getattr(F, f"adaptive_avg_pool{n}d") for n in (1, 2, 3)}
GATES = {"sigmoid", "hardsigmoid", "softmax", "softmin", "exp", "exp2"}
PASSED_ON = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
    *("tanh", "hardtanh", "tanhshrink", "softplus", "softsign", "softshrink", "hardshrink", "threshold", "clamp"),
    *("erf", "atan", "arctan", "asinh", "arcsinh", "sinh", "sin", "log1p", "expm1"),
    *("log_sigmoid", "logsigmoid", "log_softmax", "normalize", "local_response_norm"),
    *("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
}


class _OnlyPaths(TorchFunctionMode):
    """While active, functions of torch give 0 where no path leads to a place and not 0 where one does.

    Functions are known by their names, so modules, ``torch.nn.functional`` and methods of tensors are all met.
    """

    def __init__(self):
        super().__init__()
        self.uses: list[tuple[Tensor, int]] = []  # each weight met, and how often its entries are multiplied
        self.counting = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", "").strip("_"), kwargs or {}
        if name in LAYERS:
            return self._layer(function, *args, **kwargs)
        if name in PASSED_ON:
            return args[0] if args else kwargs["input"]
        if name in GATES:
            return 1 + _Clip.apply(args[0] if args else kwargs["input"])
        if name in POOLS:
            return _pooled(POOLS[name], *args, **kwargs)
        if name in ADAPTIVE_POOLS:
            return ADAPTIVE_POOLS[name](*args[:2], **{key: kwargs[key] for key in kwargs if key != "return_indices"})
        if name == "scaled_dot_product_attention":
            query, key, value = args[:3] if args else (kwargs["query"], kwargs["key"], kwargs["value"])
            return (1 + _Clip.apply(query @ key.mT)) @ value
        if name in CELLS:
            return _cell(CELLS[name], *args)
        if name in RECURRENT:
            return _recurrent(RECURRENT[name], *args)
        if name == "multi_head_attention_forward":
            return self._multihead(*args, **kwargs), None
        return function(*args, **kwargs)

    def _layer(self, function, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        """A convolution or linear layer of what reaches it; remembers how often its weights are used."""
        output = function(_Clip.apply(input), weight, *args, **kwargs)
        counted = input if "transpose" in function.__name__ else output
        if self.counting:
            self.uses.append((weight, counted.numel() // len(weight)))  # (out, in / groups, ...), transposed (in, ...)
        return output

    def _multihead(self, query, key, value, width, heads, w, b, bias_k, bias_v, zeros, dropout, projection, *_, **__):
        """Every feature of every token reads every other, then comes the output projection."""
        everything = sum(x.mean((0, -1), keepdim=True) for x in (query, key, value))
        return self._layer(F.linear, everything.expand_as(query), projection)


# ---- recurrent layers --------------------------------------------------------------------------------------------

CHUNKS = {"rnn": 1, "gru": 3, "lstm": 4}  # gates, and what they are applied to, in the weights of a cell
CELLS = {"rnn_tanh_cell": "rnn", "rnn_relu_cell": "rnn", "gru_cell": "gru", "lstm_cell": "lstm"}
RECURRENT = {"rnn_tanh": "rnn", "rnn_relu": "rnn", "gru": "gru", "lstm": "lstm"}


def _step(kind: str, x: Tensor, state: Sequence[Tensor], from_x: Tensor, from_h: Tensor) -> tuple[Tensor, ...]:
    """One step of a cell: its new state, 0 or 1; sigmoids are gates that are open, tanh and relu pass everything on."""
    h = state[0]
    here = F.linear(_Clip.apply(x), from_x).chunk(CHUNKS[kind], -1)
    before = F.linear(_Clip.apply(h), from_h).chunk(CHUNKS[kind], -1)
    if kind == "rnn":
        return (_Clip.apply(here[0] + before[0]),)
    if kind == "gru":
        reset, update = (1 + _Clip.apply(a + b) for a, b in islice(zip(here, before, strict=True), 2))
        return (_Clip.apply(update * (here[2] + reset * before[2]) + update * h),)
    enter, forget, new, leave = (a + b for a, b in zip(here, before, strict=True))
    c = _Clip.apply((1 + _Clip.apply(forget)) * state[1] + (1 + _Clip.apply(enter)) * new)
    return _Clip.apply((1 + _Clip.apply(leave)) * c), c


def _cell(kind: str, x: Tensor, state: Tensor | Sequence[Tensor], from_x: Tensor, from_h: Tensor, *_) -> object:
    """A cell as a model calls it: the state is a tensor, or two for an LSTM."""
    found = _step(kind, x, [state] if isinstance(state, Tensor) else state, from_x, from_h)
    return found if kind == "lstm" else found[0]


def _recurrent(
    kind: str, x: Tensor, state: object, weights: Sequence[Tensor], biased: bool, layers: int, *more: object
) -> tuple[Tensor, ...]:
    """A recurrent layer, step by step; `more`: dropout, train mode, whether both directions, batch first."""
    if not isinstance(biased, bool):
        raise ValueError("paths are not followed through packed sequences: wrap the model so that it gets padded ones")
    _, _, both, batch_first = more
    states = [state] if isinstance(state, Tensor) else list(state)
    steps = list(x.unbind(1 if batch_first else 0))
    sides = 2 if both else 1
    of_each = len(weights) // (layers * sides)  # weights, biases, and the projection of an LSTM
    last = []
    for layer in range(layers):
        outputs = []
        for side in range(sides):
            number = layer * sides + side
            from_x, from_h, *others = weights[number * of_each : (number + 1) * of_each]
            now, found = [s[number] for s in states], []
            for step in reversed(steps) if side else steps:
                now = list(_step(kind, step, now, from_x, from_h))
                if len(others) % 2:
                    now[0] = _Clip.apply(F.linear(now[0], others[-1]))
                found.append(now[0])
            outputs.append(found[::-1] if side else found)
            last.append(now)
        steps = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    return torch.stack(steps, 1 if batch_first else 0), *(torch.stack(parts) for parts in zip(*last, strict=True))


def _pooled(average, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """The average in place of the maximum: not 0 where any entry of the window is not 0."""
    if any(d != 1 for d in (dilation if isinstance(dilation, Sequence) else [dilation])):
        raise ValueError(f"a max-pool has dilation {dilation}: paths are followed through windows without gaps alone")
    return average(input, kernel_size, stride, padding, ceil_mode)
