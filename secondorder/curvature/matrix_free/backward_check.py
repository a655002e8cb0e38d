"""Whether the backward pass of a network is linear in what comes in, as J^T u is in u.

A hook on a gradient may clip or normalise it, or add noise, and a checkpoint that keeps no random state has other masks when it
is evaluated again: such a pass is the derivative of no function.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.graph import graph_nodes
from secondorder.curvature.matrix_free.trial import random_like
from secondorder.errors import InputError, failures_of
from secondorder.untouched import same_randomness

ROUNDING = 2**10
"""Units of rounding of what arrives at a parameter that sums of it may be off."""


def check_backward(network: FrozenNetwork, z: Tensor) -> None:
    """InputError unless J^T (u + v) = J^T u + J^T v for random u and v at the outputs z, whose graph is kept."""
    if not z.requires_grad:
        return
    source = torch.Generator().manual_seed(0)
    u, v = random_like(z, source), random_like(z, source)
    with same_randomness():
        before = torch.get_rng_state()
        both = zip(_pulled_back(network, z, u), _pulled_back(network, z, v), strict=True)
        terms = [a + b for a, b in both]  # not in place: a gradient may be u itself
        whole = _pulled_back(network, z, u + v)
        drawn = not torch.equal(before, torch.get_rng_state())
    size = max((float(t.abs().max()) for t in (*terms, *whole) if t.numel()), default=0.0)
    differences = (a - b for a, b in zip(terms, whole, strict=True) if a.numel())
    error = max((float(d.abs().max()) for d in differences), default=0.0)
    eps = torch.finfo(z.dtype).eps
    if drawn or (error > eps**0.5 * size and error > ROUNDING * eps * _arriving(network, z, u + v)):
        raise InputError(
            "the backward pass of the network is not linear (a hook that clips a gradient) or draws random numbers (a checkpoint "
            "with preserve_rng_state=False), and so the derivative of no function; leave that out"
        )


def _arriving(network: FrozenNetwork, z: Tensor, u: Tensor) -> float:
    """The largest number in what arrives at the functions of parameters, of which their gradients are sums.

    In these everything may cancel out but rounding, as for a bias before batch norm in training mode.
    """
    largest = 0.0

    def note(gradients: Sequence[Tensor | None]) -> None:
        nonlocal largest
        largest = max(largest, *(float(g.abs().max()) for g in gradients if g is not None and g.numel()))

    weights = {id(w) for w in network.weights.values()}
    reading = [
        node
        for node in graph_nodes([z])
        if any(id(getattr(function, "variable", None)) in weights for function, _ in node.next_functions)
    ]
    handles = [node.register_prehook(note) for node in reading]
    try:
        _pulled_back(network, z, u)
    finally:
        for handle in handles:
            handle.remove()
    return largest


def _pulled_back(network: FrozenNetwork, z: Tensor, u: Tensor) -> list[Tensor]:
    weights = list(network.weights.values())
    with network.in_place(), failures_of("a derivative of this network"):
        return list(torch.autograd.grad(z, weights, u, retain_graph=True, materialize_grads=True))
