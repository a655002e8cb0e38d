"""Whether products with J and J^T are adjoint in the whole batch, of which `adjoint_check` has tried few images.

A network may do with other images what it does not with those: use another expert, leave saturation, see a larger batch. Every
product J^T M J v has u = M J v with (J^T u) . v = u . (J v), which costs nothing to look at. Where u is as good as 0 at a sample,
as J v would be that forward mode does not see, or M takes it, a random u is tried once, by one pull-back more.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.adjoint_check import POSSIBLE
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.trial import inner, random_like

ROUNDING = 2**10
"""Rounding units of |J| |u| |v| that are no difference: all that is left where everything cancels out."""


class ProductCheck:
    """What has been found out about the parts of a batch, by their first sample."""

    def __init__(self) -> None:
        self._sizes: dict[int, float] = {}

    def holds(
        self,
        part: Linearisation,
        u: Tensor,
        Jv: Tensor,
        gradients: Mapping[str, Tensor],
        v: Mapping[str, Tensor],
        random_state: Tensor,
    ) -> bool:
        """Whether u . J v = J^T u . v, with J^T u by name as `gradients`, and where that says little the same for a random u.

        Not so if J^T u has drawn random numbers, of which the state was `random_state` before.
        """
        if not part.network.has_numbers:
            return True
        if not torch.equal(random_state, torch.get_rng_state()):
            return False
        size = _norm(v)
        if size == 0:
            return True
        first, of_u = part.rows.start, float(u.norm())
        if first not in self._sizes:
            if _reaches_all(u) and _equal(u, of_u, Jv, gradients, v, _norm(gradients) * size):
                return True
            if not self._tried(part, Jv, v, size):
                return False
        return _equal(u, of_u, Jv, gradients, v, self._sizes[first] * of_u * size)

    def _tried(self, part: Linearisation, Jv: Tensor, v: Mapping[str, Tensor], size: float) -> bool:
        random = random_like(part.z, torch.Generator().manual_seed(0))
        names = list(part.network.weights)
        pulled = dict(zip(names, part.pull_back(random, names), strict=True))
        whole = _norm({name: g for name, g in pulled.items() if bool(g.isfinite().all())})
        if not _equal(random, 1.0, Jv, pulled, v, whole * size):
            return False
        self._sizes[part.rows.start] = whole
        return True


def _reaches_all(u: Tensor) -> bool:
    """Whether u is not negligible at any sample, where J v = 0 would go unnoticed."""
    sizes = u.square().sum(1)
    return bool(sizes.min() > torch.finfo(u.dtype).eps * sizes.max())


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
