"""Acceptance: which layers of a candidate take the place of the incumbent's."""

from collections.abc import Callable

import torch
from torch import Tensor


def norms(values: Tensor) -> Tensor:
    """Layer norms of coordinates (..., 4), an undefined entry counted as 0, as published."""
    return torch.linalg.vector_norm(values.nan_to_num(nan=0.0), dim=-1)


def _published(new: Tensor, best: Tensor) -> Tensor:
    """IMDB and norm do not fall; an undefined IMDB counts as 0."""
    return (_known(new, 2) >= _known(best, 2)) & (norms(new) >= norms(best))


def _alt(new: Tensor, best: Tensor) -> Tensor:
    """The Ramanujan gap falls, the norm does not; comparisons with nan are false, so both gaps have to be valid."""
    return (new[:, 0] < best[:, 0]) & (norms(new) >= norms(best))


def _strict(new: Tensor, best: Tensor) -> Tensor:
    """As published, and IMSG does not rise."""
    return _published(new, best) & (_known(new, 3) <= _known(best, 3))


def _norm(new: Tensor, best: Tensor) -> Tensor:
    """The norm does not fall."""
    return norms(new) >= norms(best)


def _gap(new: Tensor, best: Tensor) -> Tensor:
    """The Ramanujan gap does not fall, whatever becomes of the rest; a layer without one has the smallest."""
    new, best = (values[:, 0].nan_to_num(nan=-torch.inf) for values in (new, best))
    return new >= best


def _known(values: Tensor, k: int) -> Tensor:
    """One quantity of each layer, 0 where undefined."""
    return values[:, k].nan_to_num(nan=0.0)


# (candidate, incumbent), both (L, 4) -> which layers of the candidate are taken, (L,)
ACCEPTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "published": _published,
    "alt": _alt,
    "strict": _strict,
    "norm": _norm,
    "gap": _gap,
}
