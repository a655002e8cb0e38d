"""Kernels of blurs: weights of sum 1 for the offsets -r to r in pixels, of both axes ``[2r+1, 2r+1]`` or one ``[2r+1]``.

An image smaller than the one that a kernel was published for is blurred in proportion by a shrunk kernel (`shrunk`): its taps
lie closer together than pixels, and each is split between the pixels beside it. This is the published blur of the image
interpolated linearly to the published side, read at the image's own pixels. A kernel of scaled parameters sampled at whole pixels
would be the identity instead: at 8 pixels the strongest Gaussian of CIFAR has a standard deviation of a quarter pixel.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Kernel = NDArray[np.float64]
NEGLIGIBLE = 2.0**-26
"""Weights below it change no number of float32."""


def gaussian_kernel(sigma: float, truncate: float = 4.0) -> Kernel:
    """exp(-i^2 / (2 sigma^2)) for |i| <= truncate sigma, rounded, as `scipy.ndimage.gaussian_filter` has it; sigma 0: [1]."""
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-9)) ** 2)
    return weights / weights.sum()


def disk_kernel(radius: float, alias_sigma: float) -> Kernel:
    """Pixels at most `radius` from the centre, alike, then smoothed by a small Gaussian of 3 taps (5 beyond radius 8).

    The smoothing mirrors at the border of the published grid, which has 17 x 17 pixels up to radius 8 and just holds the disk
    beyond it, so that weights of a disk that touches the border fall back inside.
    """
    reach, half = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    squares = np.arange(-reach, reach + 1) ** 2
    disk = (squares[:, None] + squares <= radius**2).astype(np.float64)
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / alias_sigma) ** 2)
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps / taps.sum(), axis, mode="mirror")
    offsets = np.abs(np.argwhere(disk > NEGLIGIBLE) - reach)
    margin = reach - offsets.max()
    return disk[margin : len(disk) - margin, margin : len(disk) - margin] / disk.sum()


def motion_kernel(radius: float, sigma: float, angle: float) -> Kernel:
    """One-sided Gaussian along a line at `angle` degrees: ImageMagick's MotionBlurImage.

    Tap i = 0, ..., 2 ceil(radius) has the weight exp(-i^2 / (2 sigma^2)) and lies at the pixel nearest to
    (column, row) = (i cos angle, i sin angle), half pixels towards zero or up: ceil(i cos angle - 1/2). Rows count downwards.
    """
    i = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-0.5 * (i / sigma) ** 2)
    weights /= weights.sum()
    i, weights = i[weights > NEGLIGIBLE], weights[weights > NEGLIGIBLE]
    columns, rows = (np.ceil(i * f(math.radians(angle)) - 0.5).astype(int) for f in (math.cos, math.sin))
    reach = max(np.abs(columns).max(), np.abs(rows).max())
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, (reach + rows, reach + columns), weights)  # near 45 degrees two taps share a pixel
    return kernel


def shrunk(kernel: Kernel, factor: float) -> Kernel:
    """The kernel with its taps at `factor` <= 1 times their offsets, each split linearly between the pixels beside it."""
    if factor == 1:
        return kernel
    radius = kernel.shape[0] // 2
    reach = math.ceil(factor * radius)
    offsets = factor * np.arange(-radius, radius + 1)
    hats = np.maximum(1 - np.abs(np.arange(-reach, reach + 1)[:, None] - offsets), 0)  # [2 reach + 1, 2r + 1]
    return hats @ kernel if kernel.ndim == 1 else hats @ kernel @ hats.T
