r"""Density per layer: how a total budget of weights is shared out before positions are chosen.

Each function takes the shapes of the prunable tensors (PyTorch order: outputs, inputs, *kernel) and a network
density, and returns real-valued layer densities that spend the budget; `counts` rounds them to whole weights.
"""

import math
from collections.abc import Callable, Mapping

from fsp.masks import check_density, kept_count

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
    check_density(density)
    return dict.fromkeys(shapes, float(density))


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
    return _proportional(shapes, density, {name: sum(s[:2]) / math.prod(s[:2]) for name, s in shapes.items()})


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
    return _proportional(shapes, density, {name: sum(s) / math.prod(s) for name, s in shapes.items()})


ALLOCATIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "er": er,
    "erk": erk,
}


def _proportional(shapes: Shapes, density: float, ratios: dict[str, float]) -> dict[str, float]:
    """Densities epsilon * ratio that spend the budget, capped at 1 by making saturated layers dense."""
    check_density(density)
    sizes = {name: math.prod(s) for name, s in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(sizes):
        free = [name for name in sizes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        epsilon = budget / sum(ratios[name] * sizes[name] for name in free)
        largest = max(ratios[name] for name in free)
        if epsilon * largest <= 1:
            return {name: 1.0 if name in dense else epsilon * ratios[name] for name in sizes}
        dense |= {name for name in free if ratios[name] == largest}
    return dict.fromkeys(sizes, 1.0)


def counts(densities: Mapping[str, float], shapes: Shapes, density: float) -> dict[str, int]:
    """Whole numbers of weights per layer by largest remainder: the total is exact.

    Parameters
    ----------
    densities : dict of name to float
        From one of the functions above, for the same `density`.
    shapes : dict of name to shape
    density : float, in (0, 1]

    Returns
    -------
    dict of name to int
        Sums to N - floor((1 - density) N); each within 1 of its layer's quota.

    Raises
    ------
    ValueError
        If the densities do not spend the budget to within one weight a layer.

    Examples
    --------
    >>> counts({"a": 0.25, "b": 0.25}, {"a": (3, 2), "b": (2, 3)}, 0.25)
    {'a': 2, 'b': 1}
    """
    sizes = {name: math.prod(s) for name, s in shapes.items()}
    total = kept_count(sum(sizes.values()), density)
    quotas = {name: densities[name] * sizes[name] for name in sizes}
    rounded = {name: math.floor(q) for name, q in quotas.items()}
    spare = total - sum(rounded.values())
    by_remainder = sorted(
        (name for name in sizes if rounded[name] < sizes[name]), key=lambda name: rounded[name] - quotas[name]
    )
    if not 0 <= spare <= len(by_remainder):
        raise ValueError(f"layer densities keep {sum(quotas.values()):.1f} weights, density {density} keeps {total}")
    for name in by_remainder[:spare]:
        rounded[name] += 1
    return rounded
