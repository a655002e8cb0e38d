"""Whether products with J and J^T are adjoint in the whole batch, of which `adjoint_check` has tried few images.

A network may do with other images what it does not with those: use another expert, leave saturation, see a larger batch. Every
product J^T M J v has u = M J v with (J^T u) . v = u . (J v), which costs nothing to look at. Where J v or u is as good as 0, as
J v would be where forward mode does not see a part of J, or M takes it, a random u is tried, too, by one pull-back more.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.adjoint_check import POSSIBLE
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.trial import inner, random_like
from secondorder.curvature.operators.symmetric import norm_at_any_scale

ROUNDING = 2**10
"""Rounding units of |J| |u| |v| that are no difference: all that is left where everything cancels out."""


@dataclass(frozen=True)
class PulledBack:
    """A random u at a part of a batch, J^T u by name, and |J^T u| of all parameters: those of a block may have rounding only."""

    u: Tensor
    gradients: Mapping[str, Tensor]
    size: float


class ProductCheck:
    """The check of one operator's products; it keeps J^T u for a random u at one part, or as many as fit into `most_bytes`."""

    def __init__(self, most_bytes: int = 0) -> None:
        self._most_bytes = most_bytes
        self._random: dict[int, PulledBack] = {}
        """By the part's first sample."""

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
        if _reaches_all(u, Jv, part.outputs) and _equal(u, Jv, gradients, v, _norm(gradients) * size):
            return True
        random = self._random_at(part, list(v))
        return _equal(random.u, Jv, random.gradients, v, random.size * size) and _equal(
            u, Jv, gradients, v, random.size * float(norm_at_any_scale(u)) * size
        )

    def _random_at(self, part: Linearisation, names: list[str]) -> PulledBack:
        first = part.rows.start
        if first not in self._random:
            u = random_like(part.z, torch.Generator().manual_seed(0))
            weights = list(part.network.weights)
            whole = dict(zip(weights, part.pull_back(u, weights), strict=True))
            size = _norm({name: g for name, g in whole.items() if bool(g.isfinite().all())})
            pulled = {name: whole[name] for name in names}
            nbytes = u.nbytes + sum(g.nbytes for g in pulled.values())
            if (len(self._random) + 1) * nbytes > self._most_bytes:
                self._random.clear()
            self._random[first] = PulledBack(u, pulled, size)
        return self._random[first]


def _reaches_all(u: Tensor, Jv: Tensor, outputs: torch.Size) -> bool:
    """Whether J v is zero at no output, and u = M J v negligible at no position of a sample, whose outputs `[K, ...]` are.

    What J v lacked there would go unnoticed.
    """
    sizes = torch.linalg.vector_norm(u.reshape(len(u), *(outputs or (1,))), dim=1)
    return bool((Jv != 0).all() and sizes.min() > torch.finfo(u.dtype).eps ** 0.5 * sizes.max())


def _equal(u: Tensor, Jv: Tensor, gradients: Mapping[str, Tensor], v: Mapping[str, Tensor], largest: float) -> bool:
    """Whether both sides are the same but for rounding: u . J v is of the size |u| |J v|, and at most `largest`."""
    terms = torch.stack([inner(gradients[name], v[name]) for name in v])
    error = float((inner(u, Jv) - terms.sum()).abs())
    if not math.isfinite(error):
        return True  # nor is the product
    eps = torch.finfo(u.dtype).eps
    size = float(norm_at_any_scale(u)) * float(norm_at_any_scale(Jv)) + float(norm_at_any_scale(terms))
    return error <= max(eps**POSSIBLE * size, ROUNDING * eps * largest, torch.finfo(terms.dtype).tiny)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    """The norm of all tensors as one vector."""
    return math.hypot(*(float(norm_at_any_scale(t)) for t in tensors.values()))
