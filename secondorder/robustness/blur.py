"""Blurs of batches: Gaussian, defocus, motion, zoom, glass.

Lengths are in pixels of the published side; `ratio` is side / published side (kernels).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness.draws import uniforms
from secondorder.robustness.geometry import from_planes, to_planes, zoomed_planes
from secondorder.robustness.kernels import disk_kernel, gaussian_kernel, motion_kernel
from secondorder.robustness.pixels import Batch, cut_to_levels, round_to_levels


def gaussian_blur(images: Batch, sigma: float, truncate: float = 4.0, ratio: float = 1.0) -> Batch:
    """Gaussian filter of rows and columns, the border repeated: `scipy.ndimage.gaussian_filter` at ratio 1.

    Args:
        images: ``[N, H, W, C]``.
        sigma: standard deviation.
        truncate: standard deviations after which the kernel ends.
        ratio: side / published side.
    """
    taps = gaussian_kernel(sigma, truncate, ratio)
    return ndimage.correlate1d(ndimage.correlate1d(images, taps, 1, mode="nearest"), taps, 2, mode="nearest")


def defocus_blur(images: Batch, radius: float, alias_sigma: float, ratio: float = 1.0) -> Batch:
    """Mean over a disk with a softened edge (kernels.disk_kernel), mirrored at the pixel of the border."""
    return ndimage.correlate(images, disk_kernel(radius, alias_sigma, ratio)[None, :, :, None], mode="mirror")


def motion_blur(images: Batch, radius: float, sigma: float, angles: Sequence[float], ratio: float = 1.0) -> Batch:
    """Image n smeared along angles[n] degrees (kernels.motion_kernel), its border repeated; rounded to 8 bits as by ImageMagick.

    Args:
        images: ``[N, H, W, C]``.
        radius: half the length at which the kernel ends.
        sigma: standard deviation of the one-sided Gaussian.
        angles: degrees, one an image.
        ratio: side / published side.
    """
    kernels = [motion_kernel(radius, sigma, angle, ratio).astype(np.float32) for angle in angles]
    most = max((len(kernel) // 2 for kernel in kernels), default=0)
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    blurred = np.zeros_like(images)
    H, W = images.shape[1:3]
    for image, smeared, kernel in zip(padded, blurred, kernels, strict=True):
        first = most - len(kernel) // 2
        rows, columns = kernel.nonzero()
        for weight, top, left in zip(kernel[rows, columns], first + rows, first + columns, strict=True):
            smeared += weight * image[top : top + H, left : left + W]
    return round_to_levels(blurred)


def zoom_blur(images: Batch, factors: Sequence[float] | NDArray[np.float64], centred: bool = False) -> Batch:
    """Mean of the image and of its zooms by the factors, the first of which is 1 in the published sets.

    Args:
        images: ``[N, H, W, C]``.
        factors: at least 1.
        centred: zoom about the exact centre, not on the published grid (geometry.zoom_matrix).
    """
    planes = to_planes(images)
    total = planes.copy()
    for factor in factors:
        total += zoomed_planes(planes, factor, centred)
    total /= len(factors) + 1
    return from_planes(total)


def glass_blur(
    images: Batch, sigma: float, reach: int, times: int, generators: Sequence[Generator], ratio: float = 1.0
) -> Batch:
    """Gaussian blur, 8 bits, pixels scattered `times` times, the same Gaussian blur again.

    Moves are whole numbers of [-reach, reach) on each axis. At another side than the published one they are times the ratio,
    rounded up or down at random so that the mean is kept.

    Args:
        images: ``[N, H, W, C]``.
        sigma: standard deviation of the Gaussian.
        reach: largest move.
        times: how often the pixels are scattered.
        generators: one an image.
        ratio: side / published side.
    """
    scattered = cut_to_levels(gaussian_blur(images, sigma, ratio=ratio))
    H, W = images.shape[1:3]
    margin = max(math.ceil(reach * ratio), math.ceil((reach - 1) * ratio) + 1)  # moves are in [-margin, margin)
    box = (times, H - 2 * margin, W - 2 * margin, 2)
    moves = np.stack([generator.integers(-reach, reach, box, dtype=np.int8) for generator in generators])
    if ratio != 1:
        moves = np.floor(moves * np.float32(ratio) + uniforms(generators, box))
    for t in range(times):
        scattered = scatter(scattered, moves[:, t].astype(np.intp), margin)
    return gaussian_blur(scattered, sigma, ratio=ratio)


def scatter(images: Batch, moves: NDArray[np.intp], margin: int) -> Batch:
    """Pixels take turns, from the last to the first, to copy the pixel at their move, which may have been overwritten before.

    The published code means to exchange the two pixels, but swaps two views of one array, which copies. The pixels of rows
    H - margin, ..., margin + 1 and of such columns take turns; the others keep their colour. Copies in turn make chains: who
    copies a pixel that had its turn gets what that one got. All chains are followed at once, by doubling: the source of p becomes
    the source of the source of p, until no source has had its turn before p.

    Args:
        images: ``[N, H, W, C]``.
        moves: (columns, rows) ``[N, H - 2 margin, W - 2 margin, 2]`` in [-margin, margin), in the order of turns.
        margin: pixels.
    """
    N, H, W, C = images.shape
    turns = np.s_[..., H - margin : margin : -1, W - margin : margin : -1]
    move = np.zeros((N, H, W), dtype=np.intp)
    move[turns] = moves[..., 1] * W + moves[..., 0]
    source = np.arange(N * H * W) + move.ravel()
    had_turn = move.ravel() > 0  # the source, before p; where it takes no turn, it is its own source
    chained = np.flatnonzero(had_turn)
    while chained.size:
        previous = source[chained]
        had_turn[chained], source[chained] = had_turn[previous], source[previous]
        chained = chained[had_turn[chained]]
    return images.reshape(-1, C)[source].reshape(images.shape)
