"""Blurs of batches: Gaussian, defocus, motion, zoom, glass. `shrink` is the factor of `kernels.shrunk`, 1 at published sides."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness.geometry import clipped_zoom
from secondorder.robustness.kernels import disk_kernel, gaussian_kernel, motion_kernel, shrunk
from secondorder.robustness.pixels import Batch, cut_to_levels, round_to_levels


def gaussian_blur(
    images: Batch, sigma: float, truncate: float = 4.0, mode: str = "nearest", shrink: float = 1.0
) -> Batch:
    """Gaussian filter of rows and columns, `scipy.ndimage.gaussian_filter` at shrink 1.

    Args:
        images: ``[N, H, W, C]``.
        sigma: standard deviation in pixels.
        truncate: standard deviations after which the kernel ends.
        mode: scipy's name of what is beyond the border; "nearest" repeats the pixel there.
        shrink: factor by which the kernel is shrunk.
    """
    taps = shrunk(gaussian_kernel(sigma, truncate), shrink)
    if len(taps) == 1:
        return images
    return ndimage.correlate1d(ndimage.correlate1d(images, taps, 1, mode=mode), taps, 2, mode=mode)


def defocus_blur(images: Batch, radius: float, alias_sigma: float, shrink: float = 1.0) -> Batch:
    """Mean over a disk with a softened edge, mirrored at the border pixel (kernels.disk_kernel)."""
    kernel = shrunk(disk_kernel(radius, alias_sigma), shrink)
    return ndimage.correlate(images, kernel[None, :, :, None], mode="mirror")


def motion_blur(images: Batch, radius: float, sigma: float, angles: Sequence[float], shrink: float = 1.0) -> Batch:
    """Image n smeared along angles[n] degrees (kernels.motion_kernel), its border repeated; rounded to 8 bits as by ImageMagick.

    Args:
        images: ``[N, H, W, C]``.
        radius: pixels; the kernel ends at twice as many.
        sigma: standard deviation of the one-sided Gaussian, pixels.
        angles: degrees, one an image.
        shrink: factor by which the kernel is shrunk.
    """
    blurred = np.zeros_like(images)
    H, W = images.shape[1:3]
    for image, smeared, angle in zip(images, blurred, angles, strict=True):
        kernel = shrunk(motion_kernel(radius, sigma, angle), shrink)
        r = len(kernel) // 2
        padded = np.pad(image, ((r, r), (r, r), (0, 0)), mode="edge")
        for row, column in np.argwhere(kernel):
            smeared += np.float32(kernel[row, column]) * padded[row : row + H, column : column + W]
    return round_to_levels(blurred)


def zoom_blur(images: Batch, factors: Sequence[float]) -> Batch:
    """Mean of the image and of its clipped zooms by the factors, the first of which is 1 in the published sets."""
    total = images.copy()
    for factor in factors:
        total += clipped_zoom(images, factor)
    total /= len(factors) + 1
    return total


def glass_blur(
    images: Batch, sigma: float, reach: int, times: int, generators: Sequence[Generator], shrink: float = 1.0
) -> Batch:
    """Gaussian blur, 8 bits, pixels scattered `times` times, the same Gaussian blur again.

    Args:
        images: ``[N, H, W, C]``.
        sigma: standard deviation of the Gaussian, pixels.
        reach: a pixel takes its colour from at most as many rows and columns away.
        times: how often all pixels do.
        generators: one an image.
        shrink: factor by which the Gaussian is shrunk.
    """
    scattered = cut_to_levels(gaussian_blur(images, sigma, shrink=shrink))
    H, W = images.shape[1:3]
    box = (times, H - 2 * reach, W - 2 * reach, 2)
    moves = np.stack([g.integers(-reach, reach, box, dtype=np.int8) for g in generators])
    for t in range(times):
        scattered = scatter(scattered, moves[:, t], reach)
    return gaussian_blur(scattered, sigma, shrink=shrink)


def scatter(images: Batch, moves: NDArray[np.int8], reach: int) -> Batch:
    """Pixels take turns, from the last to the first, to copy the pixel at their move, which may have been overwritten before.

    The published code means to exchange the two pixels, but swaps two views of one array, which copies. The pixels of rows
    H - reach, ..., reach + 1 and of such columns take turns; the others keep their colour. Copies in turn make chains: who copies
    a pixel that had its turn gets what that one got. All chains are followed at once, by doubling: the source of p becomes the
    source of the source of p, until no source has had its turn before p.

    Args:
        images: ``[N, H, W, C]``.
        moves: (columns, rows) ``[N, H - 2 reach, W - 2 reach, 2]`` in [-reach, reach), in the order of turns.
        reach: largest move, pixels.
    """
    N, H, W, C = images.shape
    turns = np.s_[..., H - reach : reach : -1, W - reach : reach : -1]
    source = np.arange(N * H * W)
    takes_turn = np.zeros(N * H * W, dtype=bool)
    move = np.zeros((N, H, W), dtype=np.intp)
    move[turns] = moves[..., 1].astype(np.intp) * W + moves[..., 0]
    takes_turn.reshape(N, H, W)[turns] = True
    source += move.ravel()
    had_turn = (move.ravel() > 0) & takes_turn[source]  # the source, before p
    chained = np.flatnonzero(had_turn)
    while chained.size:
        previous = source[chained]
        had_turn[chained], source[chained] = had_turn[previous], source[previous]
        chained = chained[had_turn[chained]]
    return images.reshape(-1, C)[source].reshape(images.shape)
