"""Whether products with J and J^T are adjoint in the whole batch, of which `adjoint_check` has tried few images.

A network may do with other images what it does not with those: use another expert, leave saturation, see a larger batch. Every
product J^T M J v has u = M J v with (J^T u) . v = u . (J v), which costs nothing to look at; with the first one of a block a
random u is tried, from which M has taken nothing, by one pull-back more.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.adjoint_check import POSSIBLE
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.trial import inner, random_like
from secondorder.untouched import same_randomness

ROUNDING = 2**10
"""Rounding units of |J| |u| |v| that are no difference: all that is left where everything cancels out."""


class ProductCheck:
    """What has been found out about the parts of a batch, by their first sample."""

    def __init__(self) -> None:
        self._sizes: dict[int, float] = {}

    def holds(
        self, part: Linearisation, u: Tensor, Jv: Tensor, gradients: Mapping[str, Tensor], v: Mapping[str, Tensor]
    ) -> bool:
        """Whether u . J v = J^T u . v, with J^T u by name as `gradients`, and on the first call the same for a random u."""
        if not part.network.has_numbers:
            return True
        first, size = part.rows.start, _norm(v)
        if first not in self._sizes:
            with same_randomness():
                before = torch.get_rng_state()
                random = random_like(part.z, torch.Generator().manual_seed(0))
                names = list(part.network.weights)
                pulled = dict(zip(names, part.pull_back(random, names), strict=True))
                drawn = not torch.equal(before, torch.get_rng_state())
            whole = _norm({name: g for name, g in pulled.items() if bool(g.isfinite().all())})
            if drawn or not _equal(random, 1.0, Jv, pulled, v, whole * size):
                return False
            self._sizes[first] = whole
        of_u = float(u.norm())
        return _equal(u, of_u, Jv, gradients, v, self._sizes[first] * of_u * size)


def _equal(
    u: Tensor, size: float, Jv: Tensor, gradients: Mapping[str, Tensor], v: Mapping[str, Tensor], largest: float
) -> bool:
    """Whether both sides are the same but for rounding: u . J v is of the size `size` |J v|, and at most `largest`."""
    terms = torch.stack([inner(gradients[name], v[name]) for name in v])
    error = float((inner(u, Jv) - terms.sum()).abs())
    if not math.isfinite(error):
        return True  # nor is the product
    eps = torch.finfo(u.dtype).eps
    return error <= max(eps**POSSIBLE * float(size * Jv.norm() + terms.norm()), ROUNDING * eps * largest)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    """The norm of all tensors as one vector."""
    return math.hypot(*(float(t.norm()) for t in tensors.values()))
