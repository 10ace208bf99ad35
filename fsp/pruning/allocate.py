r"""Density per layer: how a total budget of weights is shared out before positions are chosen.

Each function takes the shapes of the prunable tensors (PyTorch order: ``outputs, inputs, *kernel``) and a network
density, and returns real-valued layer densities that spend the budget; `counts` rounds them to whole weights.  All are
called as ``allocation(shapes, density, **options)`` and raise a ValueError for a density outside (0, 1], for no shapes
and for a shape that is none.
Shapes come in forward order, as `fsp.masks.prunable` gives them for the networks of `fsp.models`: `uniform_plus`,
`pyramidal` and `smart_ratio` depend on it.

Notation: layer :math:`\ell` of :math:`L` has :math:`N_\ell` weights and density :math:`d_\ell`, the network has
:math:`N = \sum_\ell N_\ell` and density :math:`d`; to spend the budget is :math:`\sum_\ell d_\ell N_\ell = d N`.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real

import torch
from scipy.optimize import brentq

from fsp.checks import is_count
from fsp.masks import Masks, check_density, kept_count

Shapes = Mapping[str, tuple[int, ...]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """Every layer has the network's density.

    Parameters
    ----------
    shapes : dict of name to shape
    density : float, in (0, 1]

    Returns
    -------
    dict of name to float
    """
    return dict.fromkeys(_sizes(shapes, density), float(density))


def uniform_plus(shapes: Shapes, density: float) -> dict[str, float]:
    """Uniform, except that a first convolution is dense and the last layer keeps a fifth or more.

    The first layer is dense if it is a convolution (a tensor with a kernel), the last has the density
    ``max(density, 0.2)``, and all others share what is left at one density.

    Parameters
    ----------
    shapes : dict of name to shape
        In forward order.
    density : float, in (0, 1]

    Returns
    -------
    dict of name to float, in [0, 1]

    Raises
    ------
    ValueError
        If the first and the last layer alone cost more than the budget.

    Notes
    -----
    The reference leaves the first convolution outside its masks; here it is in them and counts, like any weight.

    Examples
    --------
    Of 1000 weights 200 are kept: all 100 of the stem and 20 of the head, so 80 of the 800 between.

    >>> uniform_plus({"stem": (10, 10, 1, 1), "body": (10, 80), "head": (10, 10)}, 0.2)
    {'stem': 1.0, 'body': 0.1, 'head': 0.2}

    References
    ----------
    Gale et al., The state of sparsity in deep neural networks, 2019; Liu et al., The unreasonable effectiveness of
    random pruning, ICLR 2022.
    """
    sizes = _sizes(shapes, density)
    names = list(sizes)
    ends = {names[-1]: max(float(density), 0.2)}
    if len(shapes[names[0]]) > 2:
        ends[names[0]] = 1.0
    cost = sum(d * sizes[name] for name, d in ends.items())
    if math.floor(cost) > kept_count(sum(sizes.values()), density):  # a part of a weight is rounding
        raise ValueError(
            f"uniform_plus keeps {cost:.1f} weights of {', '.join(ends)}, but density {density} pays for "
            f"{kept_count(sum(sizes.values()), density)}: use a higher density or `uniform`"
        )
    between = sum(n for name, n in sizes.items() if name not in ends)
    shared = max(0.0, density * sum(sizes.values()) - cost) / between if between else 0.0
    return {name: ends.get(name, min(1.0, shared)) for name in sizes}


def er(shapes: Shapes, density: float) -> dict[str, float]:
    r"""Erdős–Rényi: layer density proportional to :math:`(n_{in} + n_{out}) / (n_{in} n_{out})`, kernels ignored.

    Layers that would exceed 1 are dense, and the rest share what is left.

    Parameters
    ----------
    shapes : dict of name to shape
    density : float, in (0, 1]

    Returns
    -------
    dict of name to float, in (0, 1]

    References
    ----------
    Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018;
    Evci et al., Rigging the lottery, ICML 2020.
    """
    return _proportional(shapes, density, lambda shape: sum(shape[:2]) / math.prod(shape[:2]))


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    r"""Erdős–Rényi kernel: layer density proportional to the sum of all dimensions over their product.

    .. math:: d_\ell \propto \frac{n_{in} + n_{out} + k_h + k_w}{n_{in}\, n_{out}\, k_h\, k_w}

    Layers that would exceed 1 are dense, and the rest share what is left.

    Parameters
    ----------
    shapes : dict of name to shape
    density : float, in (0, 1]

    Returns
    -------
    dict of name to float, in (0, 1]

    Examples
    --------
    LeNet-300-100 at density 0.05:

    >>> shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    >>> {name: round(d, 4) for name, d in erk(shapes, 0.05).items()}
    {'fc1': 0.0385, 'fc2': 0.1113, 'fc3': 0.9185}

    References
    ----------
    Evci et al., Rigging the lottery, ICML 2020, section 3.
    """
    return _proportional(shapes, density, lambda shape: sum(shape) / math.prod(shape))


def igq(shapes: Shapes, density: float) -> dict[str, float]:
    r"""Ideal-gas quota: the larger a layer, the sparser, and no layer is quite full or empty.

    .. math:: d_\ell = \frac{1}{1 + F N_\ell}, \qquad F \ge 0 \text{ such that the budget is spent}

    Parameters
    ----------
    shapes : dict of name to shape
    density : float, in (0, 1]

    Returns
    -------
    dict of name to float, in (0, 1]

    Examples
    --------
    Sizes 10 and 90, F = 0.1: 5 and 9 of 100 weights.

    >>> {name: round(d, 6) for name, d in igq({"a": (5, 2), "b": (10, 9)}, 0.14).items()}
    {'a': 0.5, 'b': 0.1}

    References
    ----------
    Vysogorets and Kempe, Connectivity matters: neural network pruning through the lens of effective sparsity,
    JMLR 2023.
    """
    sizes = _sizes(shapes, density)
    odds = (1 - density) / density
    # In G = F / odds the overspending is (1 - d) sum N (1 - G N) / (1 + odds G N): the root lies between 1/max N and
    # 1/min N whatever the density, and nothing cancels near 0 or 1.  The factors 2 keep rounding off the signs.
    log_g = _root(
        lambda x: math.fsum(n * (1 - math.exp(x) * n) / (1 + odds * math.exp(x) * n) for n in sizes.values()),
        -math.log(2 * max(sizes.values())),
        -math.log(min(sizes.values()) / 2),
    )
    return {name: 1 / (1 + odds * math.exp(log_g) * n) for name, n in sizes.items()}


def balanced(shapes: Shapes, density: float, *, redistribute: bool = True) -> dict[str, float]:
    r"""The same number of weights in every layer, :math:`d_\ell = \min(1, q / N_\ell)`.

    Parameters
    ----------
    shapes : dict of name to shape
    density : float, in (0, 1]
    redistribute : bool
        With True the quota q is such that the budget is spent: what small, full layers cannot take goes to the others
        in equal parts.  With False q = d N / L as in the reference, and what they cannot take is lost: the budget is
        *not* spent as soon as a layer is full, and `counts` refuses these densities at `density`, with the density
        that they do reach.

    Returns
    -------
    dict of name to float, in (0, 1]

    Examples
    --------
    Half of 220 weights: 110, of which the small layer takes 20.

    >>> shapes = {"a": (10, 10), "b": (2, 10), "c": (10, 10)}
    >>> balanced(shapes, 0.5)
    {'a': 0.45, 'b': 1.0, 'c': 0.45}

    To the letter of the reference the two large layers keep 37 weights each, and 16 of the budget are lost:

    >>> {name: round(d, 4) for name, d in balanced(shapes, 0.5, redistribute=False).items()}
    {'a': 0.3667, 'b': 1.0, 'c': 0.3667}

    References
    ----------
    Gadhikar et al., Why random pruning is all we need to start sparse, ICML 2023.
    """
    sizes = _sizes(shapes, density)
    if redistribute:
        return _proportional(shapes, density, lambda shape: 1 / math.prod(shape))
    quota = density * sum(sizes.values()) / len(sizes)
    return {name: min(1.0, quota / n) for name, n in sizes.items()}


def pyramidal(shapes: Shapes, density: float) -> dict[str, float]:
    r"""Sparser layer by layer: :math:`d_\ell = p^\ell` with :math:`\ell = 1 \dots L` in forward order.

    Parameters
    ----------
    shapes : dict of name to shape
        In forward order.
    density : float, in (0, 1]

    Returns
    -------
    dict of name to float, in (0, 1]

    Examples
    --------
    Sizes 100 and 200, p = 1/2: 50 weights each.

    >>> {name: round(d, 6) for name, d in pyramidal({"a": (10, 10), "b": (10, 20)}, 1 / 3).items()}
    {'a': 0.5, 'b': 0.25}

    References
    ----------
    Gadhikar et al., Why random pruning is all we need to start sparse, ICML 2023.
    """
    sizes = _sizes(shapes, density)
    depths = dict(zip(sizes, range(1, len(sizes) + 1), strict=True))
    budget = density * sum(sizes.values())
    log_p = _root(  # too little at p = d / e, too much at p = 1
        lambda x: math.fsum(n * math.exp(x * depths[name]) for name, n in sizes.items()) - budget,
        math.log(density) - 1,
        0.0,
    )
    return {name: math.exp(log_p * depth) for name, depth in depths.items()}


def smart_ratio(shapes: Shapes, density: float, *, vgg: bool = False, classifier: float = 0.3) -> dict[str, float]:
    r"""Smart-ratio: densities that decay with depth, and a classifier at 0.3.

    .. math:: d_i \propto k^2 + k, \qquad k = L - i + 1, \quad i = 1 \dots L - 1

    The last tensor is the classifier, with i = L and a density of its own; the others spend the rest of the budget.
    What a layer that would exceed 1 cannot take is pushed to the next ones in forward order.

    Parameters
    ----------
    shapes : dict of name to shape
        In forward order, the classifier last.
    density : float, in (0, 1]
    vgg : bool
        Divide the ratios by :math:`i^2`, as the reference does for VGG.
    classifier : float, in (0, 1]
        Density of the classifier.

    Returns
    -------
    dict of name to float, in [0, 1]

    Raises
    ------
    ValueError
        If the classifier alone costs more than the budget, if all other layers are full and the budget is not spent
        (as at density 1), or for a classifier density outside (0, 1].

    Notes
    -----
    The reference ranks convolutions and holds every linear layer at 0.3.  That is the same for networks whose only
    linear layer is the last; where there are more (an MLP has nothing else) only the last is held here.  The reference
    drops a surplus that all layers together cannot take; here that is an error.

    Examples
    --------
    Of 40 weights 27 are kept, 3 of them in the classifier.  Ratios 12 and 6 would give the others 12 of 10 and 12 of
    20 weights: the surplus of 2 goes to the second.

    >>> densities = smart_ratio({"fc1": (5, 2), "fc2": (4, 5), "fc3": (5, 2)}, 0.675)
    >>> {name: round(d, 6) for name, d in densities.items()}
    {'fc1': 1.0, 'fc2': 0.7, 'fc3': 0.3}

    References
    ----------
    Su et al., Sanity-checking pruning methods: random tickets can win the jackpot, NeurIPS 2020.
    """
    sizes = _sizes(shapes, density)
    check_density(classifier)
    *others, last = sizes
    room = sum(sizes[name] for name in others)
    cost = classifier * sizes[last]
    kept = kept_count(sum(sizes.values()), density)
    if not math.floor(cost) <= kept < room + cost + 1:  # a part of a weight is rounding
        raise ValueError(
            f"smart_ratio keeps from {cost:.1f} weights ({classifier} of the {sizes[last]} of the classifier {last!r}) "
            f"to {room + cost:.1f}, but density {density} keeps {kept}: use another density or another classifier="
        )
    ratios = {}
    for i, name in enumerate(others, start=1):
        k = len(sizes) - i + 1
        ratios[name] = (k**2 + k) / (i**2 if vgg else 1)
    rest = max(0.0, density * sum(sizes.values()) - cost)
    scale = rest / sum(ratios[name] * sizes[name] for name in others) if others else 0.0
    densities, surplus = {}, 0.0
    for name in others:
        quota = scale * ratios[name] * sizes[name] + surplus
        densities[name] = min(1.0, quota / sizes[name])
        # Ratios fall with depth, so only the first layers fill up and the surplus always finds a place.
        surplus = max(0.0, quota - sizes[name])
    return {**densities, last: float(classifier)}


def ratio_of(shapes: Shapes, density: float, *, like: Masks) -> dict[str, float]:
    """Layer densities of other masks, so that only the positions differ: SNIP-ratio, GraSP-ratio, SynFlow-ratio.

    Parameters
    ----------
    shapes : dict of name to shape
    density : float, in (0, 1]
        At the density that `like` was made for `counts` gives exactly its counts.  At another one its layer densities
        are scaled by a common factor; layers that would exceed 1 are dense, and the rest share what is left.
    like : Masks
        From any method, for the same tensors.

    Returns
    -------
    dict of name to float, in [0, 1]
        0 where `like` is empty.

    Raises
    ------
    ValueError
        If names or shapes differ, a mask is not bool, all are empty, or the layers that are not empty have fewer
        weights than are to be kept.

    Notes
    -----
    k / N of `like`, as a quotient in floating point, may lie above the true one, and a density just above k / N keeps
    k + 1 weights.  Give the decimal that `like` was made with or, for masks made otherwise,
    ``math.nextafter(density(like), 0)``.

    Examples
    --------
    >>> like = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[True, True], [True, False]])}
    >>> ratio_of({"a": (1, 2), "b": (2, 2)}, 0.5, like=like)
    {'a': 0.375, 'b': 0.5625}

    References
    ----------
    Liu et al., The unreasonable effectiveness of random pruning, ICLR 2022.
    """
    sizes = _sizes(shapes, density)
    if like.keys() != sizes.keys():
        only = [sorted(sizes.keys() - like.keys()), sorted(like.keys() - sizes.keys())]
        raise ValueError(f"like= has other tensors than the network: {only[0]} have no mask, {only[1]} no tensor")
    for name, mask in like.items():
        if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shapes[name]):
            raise ValueError(f"like[{name!r}] is {mask.dtype} {tuple(mask.shape)}: expected bool {tuple(shapes[name])}")
    ratios = {name: int(like[name].sum()) / n for name, n in sizes.items()}
    alive = {name: n for name, n in sizes.items() if ratios[name] > 0}
    # The budget is the whole count, not d N: the same total then gives the very densities of `like`.
    kept = kept_count(sum(sizes.values()), density)
    if kept > sum(alive.values()):
        raise ValueError(
            f"the {len(alive)} of {len(sizes)} layers that are not empty in like= have {sum(alive.values())} weights, "
            f"density {density} keeps {kept}: use a lower density or other masks"
        )
    # Empty layers stay out of the solver, which divides by the ratios of those not yet dense.
    return dict.fromkeys(sizes, 0.0) | _fill(alive, kept, ratios)


_ALL = (uniform, uniform_plus, er, erk, igq, balanced, pyramidal, smart_ratio, ratio_of)
ALLOCATIONS: dict[str, Callable[..., dict[str, float]]] = {allocation.__name__: allocation for allocation in _ALL}


def _sizes(shapes: Shapes, density: float) -> dict[str, int]:
    """Weights per layer; raises a ValueError if there are none, a shape is none or the density is none."""
    check_density(density)
    if not shapes:
        raise ValueError("shapes is empty: expected name to shape of at least one prunable tensor")
    for name, shape in shapes.items():
        if not isinstance(shape, tuple | list) or len(shape) < 2 or not all(is_count(side, 1) for side in shape):
            raise ValueError(
                f"shapes[{name!r}] is {shape!r}: expected (outputs, inputs, *kernel), integers of at least 1"
            )
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one variable, of different signs at both ends, is 0."""
    return brentq(function, low, high, xtol=1e-15, maxiter=500)


def _proportional(shapes: Shapes, density: float, ratio: Callable[[tuple[int, ...]], float]) -> dict[str, float]:
    """Densities proportional to a ratio of each shape that spend the budget of a density, capped at 1."""
    sizes = _sizes(shapes, density)
    return _fill(sizes, density * sum(sizes.values()), {name: ratio(shape) for name, shape in shapes.items()})


def _fill(sizes: dict[str, int], budget: float, ratios: dict[str, float]) -> dict[str, float]:
    """Densities epsilon * ratio that spend the budget, capped at 1 by making saturated layers dense."""
    dense: set[str] = set()
    while len(dense) < len(sizes):
        free = [name for name in sizes if name not in dense]
        left = budget - sum(sizes[name] for name in dense)
        epsilon = left / sum(ratios[name] * sizes[name] for name in free)
        largest = max(ratios[name] for name in free)
        if epsilon * largest <= 1:
            return {name: 1.0 if name in dense else epsilon * ratios[name] for name in sizes}
        dense |= {name for name in free if ratios[name] == largest}
    return dict.fromkeys(sizes, 1.0)


# ---- whole weights -----------------------------------------------------------------------------------------------


def counts(densities: Mapping[str, float], shapes: Shapes, density: float) -> dict[str, int]:
    """Whole numbers of weights per layer by largest remainder: the total is exact.

    Parameters
    ----------
    densities : dict of name to float, in [0, 1]
        From one of the functions above, for the same `density`.  A layer of density 0 stays empty; a small positive
        quota may round to 0 as well.
    shapes : dict of name to shape
    density : float, in (0, 1]

    Returns
    -------
    dict of name to int
        Sums to N - floor((1 - density) N); each within 1 of its layer's quota.

    Raises
    ------
    ValueError
        If densities and shapes are of other layers, a layer's density is outside [0, 1], or the densities do not spend
        the budget to within one weight a layer.

    Examples
    --------
    >>> counts({"a": 0.25, "b": 0.25}, {"a": (3, 2), "b": (2, 3)}, 0.25)
    {'a': 2, 'b': 1}
    """
    sizes = _sizes(shapes, density)
    if different := sorted(sizes.keys() ^ densities.keys()):
        raise ValueError(f"densities and shapes are of other layers: {different} are in one only")
    for name in sizes:
        if not isinstance(densities[name], Real) or not 0 <= densities[name] <= 1:
            raise ValueError(f"layer {name!r} has density {densities[name]!r}: expected one in [0, 1]")
    total = kept_count(sum(sizes.values()), density)
    quotas = {name: densities[name] * sizes[name] for name in sizes}
    rounded = {name: math.floor(q) for name, q in quotas.items()}
    spare = total - sum(rounded.values())
    by_remainder = sorted(
        (name for name in sizes if densities[name] > 0 and rounded[name] < sizes[name]),
        key=lambda name: rounded[name] - quotas[name],
    )
    if not 0 <= spare <= len(by_remainder):
        own = sum(quotas.values()) / sum(sizes.values())
        raise ValueError(
            f"layer densities keep {sum(quotas.values()):.1f} weights, density {density} keeps {total}: "
            f"they were made for another density or do not spend it; they spend {own:.6g}"
        )
    for name in by_remainder[:spare]:
        rounded[name] += 1
    return rounded
