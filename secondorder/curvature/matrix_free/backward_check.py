"""Whether the backward pass of a network is linear in what comes in, as J^T u is in u.

A hook on a gradient may clip or normalise it, or add noise, and a checkpoint that keeps no random state has other masks when it
is evaluated again: such a pass is the derivative of no function.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.trial import random_like
from secondorder.errors import InputError
from secondorder.untouched import same_randomness

ROUNDING = 2**10
"""Units of rounding of what arrives at a parameter that sums of it may be off."""


def check_backward(part: Linearisation) -> None:
    """InputError unless J^T (u + v) = J^T u + J^T v for random u and v at the outputs of some samples."""
    if not part.graph.requires_grad:
        return
    source, names = torch.Generator().manual_seed(0), list(part.network.weights)
    u, v = random_like(part.z, source), random_like(part.z, source)
    with same_randomness():
        before = torch.get_rng_state()
        both = zip(part.pull_back(u, names), part.pull_back(v, names), strict=True)
        terms = [a + b for a, b in both]  # not in place: a gradient may be u itself
        whole = part.pull_back(u + v, names)
        drawn = not torch.equal(before, torch.get_rng_state())
    size = max((float(t.abs().max()) for t in (*terms, *whole) if t.numel()), default=0.0)
    differences = (a - b for a, b in zip(terms, whole, strict=True) if a.numel())
    error = max((float(d.abs().max()) for d in differences), default=0.0)
    eps = torch.finfo(part.z.dtype).eps
    if drawn or (error > eps**0.5 * size and error > ROUNDING * eps * _arriving(part, u + v)):
        raise InputError(
            "the backward pass of the network is not linear (a hook that clips a gradient) or draws random numbers (a checkpoint "
            "with preserve_rng_state=False), and so the derivative of no function; leave that out"
        )


def _arriving(part: Linearisation, u: Tensor) -> float:
    """The largest number in what arrives at the functions of parameters, of which their gradients are sums.

    In these everything may cancel out but rounding, as for a bias before batch norm in training mode.
    """
    largest = 0.0

    def note(gradients: Sequence[Tensor | None]) -> None:
        nonlocal largest
        largest = max(largest, *(float(g.abs().max()) for g in gradients if g is not None and g.numel()))

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
