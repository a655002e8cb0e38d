"""Whether a network lets the images of a batch act on one another's outputs, as far as few of them show it.

Then neither can the batch be divided nor is a row of J that of one image. Asked in three ways, the first exact for every ordered
pair of images and the others for what a network hides from gradients (detach, whole numbers as input):

    gradients    of sum_n c_n u_n . z_n at image j are c_j times those of sum_n u_n . z_n, with random u and different c
    company      the outputs of an image do not change with the other images
    alone        nor when there are no others
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.plain_attention import plain_attention
from secondorder.curvature.matrix_free.trial import random_like, sample_scales
from secondorder.errors import failures_of

COUPLED = "the network lets images act on one another's outputs"
COMPANY = 4
"""Images of a large batch that are asked: neighbours, and others."""
DIFFERENT = 64
"""Powers of two among the scales c."""
ROUNDING = 2**13
"""Rounding units of an image's largest gradient: more than sums in another order make on a GPU; on a CPU they are the same."""
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""Of networks that do not take such images."""


def sample_coupling(network: FrozenNetwork, images: Tensor) -> str | None:
    """Why images cannot be evaluated apart, or None."""
    if len(images) < 2:
        return None
    x = images.detach()
    try:
        with torch.enable_grad():
            x = x.requires_grad_() if x.is_floating_point() else x
            z = network.outputs(x)
    except FAILURES:
        return f"the network cannot be evaluated for {len(images)} images"
    network.check_finite(z.detach(), x.detach())
    if _gradients_are_mixed(z, x) or _company_matters(network, z.detach(), x.detach()):
        return COUPLED
    return None if network.random.drawn else _matters_alone(network, z.detach(), x.detach())


@plain_attention()
def _gradients_are_mixed(z: Tensor, x: Tensor) -> bool:
    if not (x.requires_grad and z.requires_grad and x.numel()):
        return False
    source = torch.Generator().manual_seed(0)
    u, c = random_like(z, source), sample_scales(x, source, min(len(x), DIFFERENT))
    scales = c.reshape(len(x), -1)[:, 0].view(-1, *[1] * (z.ndim - 1))
    with failures_of("a derivative of this network"):
        alike, scaled = (torch.autograd.grad(z, x, s, retain_graph=True, allow_unused=True)[0] for s in (u, scales * u))
    if alike is None or scaled is None:
        return False
    # What is no number at one image alone is none of its own.
    alike, scaled = (torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in (alike, scaled / c))
    return bool((_largest(scaled - alike) > ROUNDING * torch.finfo(z.dtype).eps * _largest(alike)).any())


def _company_matters(network: FrozenNetwork, z: Tensor, x: Tensor) -> bool:
    """Whether outputs change with the other images, each of which is replaced by one of those that stay."""
    for stay in splits(len(x), complete=not x.is_floating_point()):
        kept = torch.tensor(stay, device=x.device)
        others = x.clone()
        others[~kept] = x[kept][torch.arange(len(x) - sum(stay), device=x.device) % sum(stay)]
        # Of equal shape, images take the same way through the same kernels, and as places are kept, through the same masks.
        again = _evaluated(network, others)
        eps = torch.finfo(z.dtype).eps
        if again is None or not _close(again[kept], z[kept], eps**0.5 * _largest(z[kept]) + 16 * eps * z.abs().max()):
            return True
    return False


def _matters_alone(network: FrozenNetwork, z: Tensor, x: Tensor) -> str | None:
    """Of another shape, images take another way: rounding differs, also to 16 bits. Random masks would be others."""
    again = _evaluated(network, x[:1])
    if again is None:
        return "the network cannot be evaluated for a single image"
    return None if _close(again, z[:1], torch.finfo(z.dtype).eps ** 0.25 * z.abs().max()) else COUPLED


def splits(count: int, complete: bool) -> Iterator[list[bool]]:
    """Who stays: those whose place has an odd number of ones in binary, then the others.

    Neighbours of which the first has an even place are separated, and halves of the batch. If `complete`, so are all two places,
    by each binary digit.
    """
    digits = range((count - 1).bit_length() if complete else 0)
    for mask in (-1, *(2**k for k in digits)):
        stay = [(n & mask).bit_count() % 2 == 1 for n in range(count)]
        yield stay
        yield [not one for one in stay]


def _evaluated(network: FrozenNetwork, images: Tensor) -> Tensor | None:
    try:
        with torch.enable_grad():  # for derivatives within the network
            return network.outputs(images).detach()
    except FAILURES:
        return None


def _close(a: Tensor, b: Tensor, tolerance: Tensor) -> bool:
    return a.shape == b.shape and bool((_largest(a - b) <= tolerance).all())


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each image's numbers `[N]`."""
    return x.abs().reshape(len(x), -1).amax(1)
