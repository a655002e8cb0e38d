"""Zooms and elastic warps of batches."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness.draws import uniforms
from secondorder.robustness.kernels import gaussian_kernel
from secondorder.robustness.pixels import Batch


def clipped_zoom(images: Batch, factor: float) -> Batch:
    """The centre of the images enlarged by `factor` >= 1 to their size: `scipy.ndimage.zoom` of order 1, cut to the middle."""
    return from_planes(zoomed_planes(to_planes(images), factor))


def to_planes(images: Batch) -> Batch:
    """Images ``[N, H, W, C]`` as planes ``[N, C, H, W]``, one channel after the other in memory."""
    return np.ascontiguousarray(np.moveaxis(images, 3, 1))


def from_planes(planes: Batch) -> Batch:
    """Planes ``[N, C, H, W]`` as images ``[N, H, W, C]``."""
    return np.ascontiguousarray(np.moveaxis(planes, 1, 3))


def zoomed_planes(planes: Batch, factor: float, centred: bool = False) -> Batch:
    """Zoom of planes ``[N, C, H, W]`` as products with the sparse matrices of `zoom_matrix`.

    Much faster than scipy on a batch. One product for each plane, so that the batch does not change how a library sums.
    """
    H, W = planes.shape[2:]
    return np.matmul(zoom_matrix(H, factor, centred), np.matmul(planes, zoom_matrix(W, factor, centred).T))


def zoom_matrix(side: int, factor: float, centred: bool = False) -> NDArray[np.float32]:
    """Weights ``[side, side]`` with which pixel i of a linear zoom along one axis reads the pixels.

    On the published grid the middle c = ceil(side / factor) pixels become m = round(c factor), of which the first lies on the
    first and the last on the last; the middle `side` of them stay. Rounding to whole pixels makes that another factor, and
    another centre, by up to a pixel. A centred zoom reads at (i - M) / factor + M with the middle M = (side - 1) / 2.
    """
    pixel = np.arange(side)
    if centred:
        middle = (side - 1) / 2
        position = (pixel - middle) / factor + middle
    else:
        c = math.ceil(side / factor)
        m = round(c * factor)
        position = (side - c) // 2 + (pixel + (m - side) // 2) * ((c - 1) / (m - 1))
    left = np.minimum(position.astype(int), side - 2)
    matrix = np.zeros((side, side))
    matrix[pixel, left] = 1 - (position - left)
    matrix[pixel, left + 1] = position - left
    return matrix.astype(np.float32)


def elastic(images: Batch, corners: NDArray[np.float64], displacements: NDArray[np.float32]) -> Batch:
    """A random affine map, then a random displacement, each with linear interpolation, as the published code does.

    Args:
        images: ``[N, H, W, C]``.
        corners: displacements (x, y) of three points around the centre ``[N, 3, 2]``, pixels (`corner_points`).
        displacements: of every pixel along (x, y) ``[N, 2, H, W]``, pixels.
    """
    N, H, W, _ = images.shape
    rows, columns = np.arange(H, dtype=np.float32)[:, None], np.arange(W, dtype=np.float32)
    points = corner_points(H, W)
    # the affine map takes points to points + corners; the result at a pixel is read where its inverse leads
    moved = np.concatenate([points + corners, np.ones((N, 3, 1))], axis=2)
    inverse = np.linalg.solve(moved, points[None])  # [N, 3, 2]: (x, y, 1) inverse = (x', y')
    x, y = (inverse[:, :, i, None, None].astype(np.float32) for i in (0, 1))  # [N, 3, 1, 1]
    affine = sample(
        images,
        y[:, 0] * columns + y[:, 1] * rows + y[:, 2],
        x[:, 0] * columns + x[:, 1] * rows + x[:, 2],
        "mirror",
    )
    return sample(affine, rows + displacements[:, 1], columns + displacements[:, 0], "reflect")


def sample(images: Batch, rows: NDArray[np.float32], columns: NDArray[np.float32], border: str) -> Batch:
    """Images read by linear interpolation at (row, column), each ``[N, h, w]``, as ``[N, h, w, C]``.

    The same as `scipy.ndimage.map_coordinates` of order 1 on every channel, in one go.

    Args:
        images: ``[N, H, W, C]``, H and W of at least 2.
        rows: pixels from the centre of the first.
        columns: likewise.
        border: scipy's name of what is beyond: "mirror" does not repeat the pixel at the border, "reflect" does.
    """
    N, H, W, C = images.shape
    top, down = _neighbours(rows, H, border)
    left, right = _neighbours(columns, W, border)
    pixels = images.reshape(-1, C)
    corner = (np.arange(0, N * H, H)[:, None, None] + top) * W + left

    def across(first: NDArray[np.intp]) -> Batch:
        value = pixels.take(first, axis=0)
        return value + right[..., None] * (pixels.take(first + 1, axis=0) - value)

    above = across(corner)
    return above + down[..., None] * (across(corner + W) - above)


def _neighbours(position: NDArray[np.float32], size: int, border: str) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The pixel before each position, at most size - 2, and how far the position is behind it, in [0, 1]."""
    shift, period = {"mirror": (0.0, 2 * size - 2), "reflect": (0.5, 2 * size)}[border]
    folded = np.mod(position + np.float32(shift), np.float32(period))
    folded = np.minimum(folded, period - folded) - np.float32(shift)
    folded = np.clip(folded, 0, size - 1)
    before = np.minimum(folded.astype(np.intp), size - 2)
    return before, folded - before.astype(np.float32)


def corner_points(H: int, W: int) -> NDArray[np.float64]:
    """Three points (x, y) ``[3, 2]``: the centre plus (q, q), (q, -q) and (-q, -q), q a third of the shorter side."""
    q = min(H, W) // 3
    return np.array([[q, q], [q, -q], [-q, -q]]) + np.array([W // 2, H // 2], dtype=np.float64)


def smooth_displacements(
    generators: Sequence[Generator], H: int, W: int, alpha: float, sigma: float, ratio: float = 1.0
) -> NDArray[np.float32]:
    """Displacements (x, y) of every pixel ``[N, 2, H, W]``: alpha times Gaussian-filtered uniform numbers of [-1, 1).

    Args:
        generators: one an image.
        H: rows.
        W: columns.
        alpha: largest displacement, pixels of the published side.
        sigma: standard deviation of the filter, pixels of the published side; it ends at 3 sigma and mirrors at the border.
        ratio: side / published side.
    """
    fields = 2 * uniforms(generators, (2, H, W)) - 1
    return filtered_noise(fields, sigma, 3.0, "reflect", ratio) * np.float32(alpha * ratio)


def filtered_noise(
    noise: NDArray[np.float32], sigma: float, truncate: float = 4.0, mode: str = "nearest", ratio: float = 1.0
) -> NDArray[np.float32]:
    """Gaussian-filtered white noise of mean 0 ``[..., H, W]``, with the standard deviation that it has at the published side.

    A filter with the weights k multiplies the standard deviation by |k| along each axis, and the shorter filters of smaller
    images by more: the result is multiplied by |k published| / |k| for each.

    Args:
        noise: of mean 0.
        sigma: standard deviation of the filter, pixels of the published side.
        truncate: standard deviations after which it ends.
        mode: scipy's name of what is beyond the border.
        ratio: side / published side.
    """
    published, taps = gaussian_kernel(sigma, truncate), gaussian_kernel(sigma, truncate, ratio)
    taps *= math.sqrt(np.square(published).sum() / np.square(taps).sum())
    for axis in (-2, -1):
        noise = ndimage.correlate1d(noise, taps, axis, mode=mode)
    return noise
