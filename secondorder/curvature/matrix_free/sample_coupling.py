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
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.samples import Samples, floating_tensors, tensors_of
from secondorder.curvature.matrix_free.trial import has_numbers, random_like, sample_scales
from secondorder.errors import failures_of
from secondorder.untouched import same_randomness

COUPLED = "the network lets images act on one another's outputs"
COMPANY = 4
"""Images of a large batch that are asked: neighbours, and others."""
DIFFERENT = 64
"""Powers of two among the scales c."""
ROUNDING = 2**13
"""Rounding units of an image's largest gradient: more than sums in another order make on a GPU; on a CPU they are the same."""
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""Of networks that do not take such images."""


def sample_coupling(network: FrozenNetwork, images: Samples) -> str | None:
    """Why images cannot be evaluated apart, or None."""
    if len(images) < 2:
        return None
    x = images.detach()
    try:
        with torch.enable_grad():
            for tensor in floating_tensors(x):
                tensor.requires_grad_()
            z = network.outputs(x)
    except FAILURES:
        return f"the network cannot be evaluated for {len(images)} images"
    network.check_finite(z.detach(), x.detach())
    if _gradients_are_mixed(network, z, x) or _company_matters(network, z.detach(), x.detach()):
        return COUPLED
    return None if network.random.drawn else _matters_alone(network, z.detach(), x.detach())


def _gradients_are_mixed(network: FrozenNetwork, z: Tensor, x: Samples) -> bool:
    numbers = [t for t in floating_tensors(x) if t.numel()]
    if not (numbers and z.requires_grad):
        return False
    source = torch.Generator().manual_seed(0)
    u, c = (
        random_like(z, source),
        sample_scales(z.detach()[(...,) + (0,) * (z.ndim - 1)], source, min(len(x), DIFFERENT)),
    )
    with network.in_place(), same_randomness(), failures_of("a derivative of this network"):
        alike, scaled = (
            torch.autograd.grad(z, numbers, s, retain_graph=True, allow_unused=True) for s in (u, _by_sample(c, z) * u)
        )
    return any(
        _differ(g, h / _by_sample(c, h), z.dtype)
        for g, h in zip(alike, scaled, strict=True)
        if g is not None and h is not None
    )


def layers_mix(part: Linearisation) -> bool:
    """Whether gradients at an image's outputs reach other images in recorded calls of layers, asked of all images of a part."""
    n, source = len(part.z), torch.Generator().manual_seed(0)
    called = [use for use in part.uses if use.output_shape[0] == n]
    if n < 2 or not called or not part.network.has_numbers:
        return False
    u = random_like(part.z, source)
    c = sample_scales(u[:, 0], source, min(n, DIFFERENT))
    with same_randomness():
        alike, scaled = (part.output_gradients(s, called) for s in (u, _by_sample(c, u) * u))
    return any(_differ(g, h / _by_sample(c, h), u.dtype) for g, h in zip(alike, scaled, strict=True))


def _by_sample(c: Tensor, x: Tensor) -> Tensor:
    """One number for each sample `[n]`, for products with x `[n, ...]`."""
    return c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _differ(alike: Tensor, scaled: Tensor, dtype: torch.dtype) -> bool:
    """Whether any image's gradient has changed. What is no number at one image alone is none of its own."""
    alike, scaled = (torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in (alike, scaled))
    return bool((_largest(scaled - alike) > ROUNDING * torch.finfo(dtype).eps * _largest(alike)).any())


def _company_matters(network: FrozenNetwork, z: Tensor, x: Samples) -> bool:
    """Whether outputs change with the other images, each of which is replaced by one of those that stay."""
    for stay in splits(len(x)):
        kept = torch.tensor(stay, device=tensors_of(x)[0].device)
        places = torch.arange(len(x), device=kept.device)
        places[~kept] = places[kept][places[: len(x) - sum(stay)] % sum(stay)]
        # Of equal shape, images take the same way through the same kernels, and as places are kept, through the same masks.
        again = _evaluated(network, x[places])
        eps = torch.finfo(z.dtype).eps
        if again is None or not _close(again[kept], z[kept], eps**0.5 * _largest(z[kept]) + 16 * eps * z.abs().max()):
            return True
    return False


def _matters_alone(network: FrozenNetwork, z: Tensor, x: Samples) -> str | None:
    """Of another shape, images take another way: rounding differs, also to 16 bits. Random masks would be others."""
    again = _evaluated(network, x[:1])
    if again is None:
        return "the network cannot be evaluated for a single image"
    return None if same_alone(again, z[:1]) else COUPLED


def same_alone(alone: Tensor, z: Tensor) -> bool:
    """Whether outputs of images evaluated without the others are those with them, up to the rounding of other kernels."""
    return not has_numbers(z) or _close(alone, z, torch.finfo(z.dtype).eps ** 0.25 * z.abs().max())


def splits(count: int) -> Iterator[list[bool]]:
    """Who stays: those whose place has a certain binary digit, then the others; all digits separate every two places."""
    for digit in range((count - 1).bit_length()):
        stay = [bool(n >> digit & 1) for n in range(count)]
        yield stay
        yield [not one for one in stay]


def _evaluated(network: FrozenNetwork, images: Samples) -> Tensor | None:
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
