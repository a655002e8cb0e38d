"""Kernels of blurs: weights for the offsets -r to r in pixels, of both axes ``[2r+1, 2r+1]`` or one ``[2r+1]``.

Lengths are those of the published side, and `ratio` is side / published side. Larger images have kernels of as many times larger
parameters. For smaller ones the published kernel is shrunk: its taps lie closer together than pixels, and each is split between
the pixels beside it. That is the published blur of the image interpolated linearly to the published side, read at the image's own
pixels. A kernel of smaller parameters, sampled at whole pixels, would blur nothing: at 8 pixels the strongest Gaussian of CIFAR
has a standard deviation of a quarter pixel.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Kernel = NDArray[np.float64]
NEGLIGIBLE = 2.0**-26
"""Weights below it change no number of float32."""


def gaussian_kernel(sigma: float, truncate: float = 4.0, ratio: float = 1.0) -> Kernel:
    """exp(-i^2 / (2 sigma^2)) for |i| <= truncate sigma, rounded, as `scipy.ndimage.gaussian_filter` has it; sigma 0: [1]."""
    sigma *= max(ratio, 1)
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-9)) ** 2)
    return shrunk(weights / weights.sum(), ratio)


def disk_kernel(radius: float, alias_sigma: float, ratio: float = 1.0) -> Kernel:
    """Pixels at most `radius` from the centre, alike, then smoothed by a small Gaussian of 3 taps (5 beyond radius 8).

    The smoothing mirrors at the border of the published grid, which has 17 x 17 pixels up to radius 8 and just holds the disk
    beyond it. A disk that touches the border, of radius 8 or 10, is mirrored there and its weights have a sum of 1.01: as
    published, the image becomes 1 % brighter.
    """
    radius, alias_sigma = radius * max(ratio, 1), alias_sigma * max(ratio, 1)
    reach, half = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    squares = np.arange(-reach, reach + 1) ** 2
    inside = squares[:, None] + squares <= radius**2
    disk = inside / inside.sum()
    taps = np.exp(-0.5 * (np.arange(-half, half + 1) / alias_sigma) ** 2)
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps / taps.sum(), axis, mode="mirror")
    margin = reach - np.abs(np.argwhere(disk > NEGLIGIBLE) - reach).max()
    return shrunk(disk[margin : len(disk) - margin, margin : len(disk) - margin], ratio)


def motion_kernel(radius: float, sigma: float, angle: float, ratio: float = 1.0) -> Kernel:
    """One-sided Gaussian along a line at `angle` degrees: ImageMagick's MotionBlurImage.

    Tap i = 0, ..., 2 ceil(radius) has the weight exp(-i^2 / (2 sigma^2)) and lies at the pixel nearest to
    (column, row) = (i cos angle, i sin angle), half pixels towards zero or up: ceil(i cos angle - 1/2). Rows count downwards.
    """
    radius, sigma = radius * max(ratio, 1), sigma * max(ratio, 1)
    weights = np.exp(-0.5 * (np.arange(2 * math.ceil(radius) + 1) / sigma) ** 2)
    weights /= weights.sum()
    weights = weights[weights > NEGLIGIBLE]
    i, direction = np.arange(len(weights)), np.array([math.sin(math.radians(angle)), math.cos(math.radians(angle))])
    offsets = np.ceil(i * direction[:, None] - 0.5).astype(int)  # rows and columns [2, taps]
    reach = np.abs(offsets).max()
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, tuple(reach + offsets), weights)  # near 45 degrees two taps share a pixel
    return shrunk(kernel, ratio)


def shrunk(kernel: Kernel, ratio: float) -> Kernel:
    """The kernel with its taps at `ratio` < 1 times their offsets, each split linearly between the pixels beside it."""
    if ratio >= 1:
        return kernel
    radius = kernel.shape[0] // 2
    reach = math.ceil(ratio * radius)
    offsets = ratio * np.arange(-radius, radius + 1)
    hats = np.maximum(1 - np.abs(np.arange(-reach, reach + 1)[:, None] - offsets), 0)  # [2 reach + 1, 2r + 1]
    return hats @ kernel if kernel.ndim == 1 else hats @ kernel @ hats.T
