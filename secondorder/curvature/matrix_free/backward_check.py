"""Whether the backward pass of a network is linear in what comes in, as J^T u is in u.

A hook on a gradient may clip or normalise it, or add noise, and a checkpoint that keeps no random state has other masks when it
is evaluated again: such a pass is the derivative of no function.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.linearisation import Linearisation, RandomPullBack
from secondorder.curvature.matrix_free.trial import random_like
from secondorder.errors import InputError
from secondorder.untouched import same_randomness

ROUNDING = 2**10
"""Units of rounding of what arrives at a parameter that sums of it may be off."""
SCALES = (2.0**30, 2.0**-30)
"""Powers of two, which change no rounding: what clips or drops gradients from some size on does so at one of them."""


def check_backward(part: Linearisation, tried: RandomPullBack) -> None:
    """InputError unless J^T u + J^T (c v) / c = J^T (d (u + v)) / d for random v and the u that has been `tried`.

    c and d are SCALES, or 1 where numbers of such a size would leave the range of their format.
    """
    if not part.graph.requires_grad:
        return
    names, u, v = list(tried.weights), tried.u, random_like(part.z, torch.Generator().manual_seed(1))
    with same_randomness():
        before = torch.get_rng_state()
        first, limits = list(tried.weights.values()), torch.finfo(part.z.dtype)
        allowed = limits.tiny / limits.eps, limits.max * limits.eps
        c, d = (s if allowed[0] < _largest(first) * s < allowed[1] else 1.0 for s in SCALES)
        terms = [a + b / c for a, b in zip(first, part.pull_back(c * v, names), strict=True)]
        whole = [t / d for t in part.pull_back(d * (u + v), names)]
        drawn = not torch.equal(before, torch.get_rng_state())
    size, error, eps = _largest([*terms, *whole]), _difference(terms, whole), limits.eps
    if drawn or (error > eps**0.5 * size and error > ROUNDING * eps * _arriving(part, u + v)):
        raise InputError(
            "the backward pass of the network is not linear (a hook that clips a gradient) or draws random numbers (a checkpoint "
            "with preserve_rng_state=False), and so the derivative of no function; leave that out"
        )


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude in tensors, 0 without any; one that is not finite is that of no product, and left out."""
    sizes = [float(t.abs().max()) for t in tensors if t.numel()]
    return max(filter(math.isfinite, sizes), default=0.0)


def _difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest magnitude of the differences of as many tensors."""
    return _largest([a - b for a, b in zip(some, others, strict=True)])


def _arriving(part: Linearisation, u: Tensor) -> float:
    """The largest number in what arrives at the functions of parameters, of which their gradients are sums.

    In these everything may cancel out but rounding, as for a bias before batch norm in training mode.
    """
    largest = 0.0

    def note(gradients: Sequence[Tensor | None]) -> None:
        nonlocal largest
        largest = max(largest, _largest([g for g in gradients if g is not None]))

    weights = {id(w) for w in part.network.weights.values()}
    reading = [
        node
        for node in part.nodes
        if any(id(getattr(function, "variable", None)) in weights for function, _ in node.next_functions)
    ]
    handles = [node.register_prehook(note) for node in reading]
    try:
        part.pull_back(u, list(part.network.weights))
    finally:
        for handle in handles:
            handle.remove()
    return largest
