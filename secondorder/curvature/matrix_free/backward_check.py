"""Whether the backward pass of a network is linear in what comes in, as J^T u is in u.

A hook on a gradient may clip or normalise it, or add noise, and a checkpoint that keeps no random state has other masks when it
is evaluated again: such a pass is the derivative of no function.
"""

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.trial import random_like
from secondorder.errors import InputError, failures_of
from secondorder.untouched import same_randomness


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
    if drawn or error > torch.finfo(z.dtype).eps ** 0.5 * size:
        raise InputError(
            "the backward pass of the network is not linear (a hook that clips a gradient) or draws random numbers (a checkpoint "
            "with preserve_rng_state=False), and so the derivative of no function; leave that out"
        )


def _pulled_back(network: FrozenNetwork, z: Tensor, u: Tensor) -> list[Tensor]:
    weights = list(network.weights.values())
    with network.in_place(), failures_of("a derivative of this network"):
        return list(torch.autograd.grad(z, weights, u, retain_graph=True, materialize_grads=True))
