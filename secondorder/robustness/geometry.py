"""Zooms and elastic warps of batches."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness.draws import uniforms
from secondorder.robustness.kernels import gaussian_kernel, shrunk
from secondorder.robustness.pixels import Batch


def clipped_zoom(images: Batch, factor: float) -> Batch:
    """The centre of the images enlarged by `factor` >= 1 to their size: `scipy.ndimage.zoom` of order 1, cut to the middle.

    As two products with the sparse matrices of `zoom_matrix`. Every number of the result is a sum of two products that are not
    zero, so that it does not depend on how a library splits the product.
    """
    N, H, W, C = images.shape
    rows, columns = zoom_matrix(H, factor), zoom_matrix(W, factor)
    zoomed = np.matmul(rows, images.reshape(N, H, W * C))
    return np.matmul(columns, zoomed.reshape(N * H, W, C)).reshape(images.shape)


def zoom_matrix(side: int, factor: float) -> NDArray[np.float32]:
    """Weights ``[side, side]`` with which pixel i of the clipped linear zoom along one axis reads the pixels.

    The middle c = ceil(side / factor) pixels become m = round(c factor), of which the first lies on the first and the last on the
    last; the middle `side` of them stay.
    """
    c = math.ceil(side / factor)
    m = round(c * factor)
    position = (np.arange(side) + (m - side) // 2) * ((c - 1) / (m - 1))  # among the c pixels
    left = np.minimum(position.astype(int), c - 2)
    right_weight = position - left
    matrix = np.zeros((side, side))
    pixel, first = np.arange(side), (side - c) // 2
    matrix[pixel, first + left] = 1 - right_weight
    matrix[pixel, first + left + 1] = right_weight
    return matrix.astype(np.float32)


def elastic(images: Batch, corners: NDArray[np.float64], displacements: NDArray[np.float32]) -> Batch:
    """A random affine map, then a random displacement, each with linear interpolation, as the published code does.

    Args:
        images: ``[N, H, W, C]``.
        corners: displacements (x, y) of three points around the centre ``[N, 3, 2]``, pixels (`corner_points`).
        displacements: of every pixel along (x, y) ``[N, 2, H, W]``, pixels.
    """
    H, W = images.shape[1:3]
    grid_rows, grid_columns = np.arange(H)[:, None], np.arange(W)
    points = corner_points(H, W)
    warped = np.empty_like(images)
    for image, result, corner, (dx, dy) in zip(images, warped, corners, displacements, strict=True):
        # the affine map takes points to points + corner; the result at a pixel is read where its inverse leads
        inverse = np.linalg.solve(np.column_stack([points + corner, np.ones(3)]), points).T  # [2, 3], of (x, y, 1)
        matrix, offset = inverse[::-1, 1::-1], inverse[::-1, 2]  # of (row, column)
        where = np.stack([grid_rows + dy, grid_columns + dx])
        for c in range(images.shape[-1]):
            moved = ndimage.affine_transform(image[..., c], matrix, offset, order=1, mode="mirror")
            ndimage.map_coordinates(moved, where, order=1, mode="reflect", output=result[..., c])
    return warped


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
    """Gaussian-filtered noise ``[..., H, W]`` of mean 0, which at every side has the standard deviation of the published side.

    A filter divides the standard deviation of white noise by the length of its weights, and shorter filters, of smaller images,
    by less. Sigma is given in pixels of the published side and applied as `ratio` times it.
    """
    published = gaussian_kernel(sigma, truncate)
    taps = shrunk(gaussian_kernel(sigma * max(ratio, 1), truncate), min(ratio, 1))
    gain = np.square(published).sum() / np.square(taps).sum()  # of two axes, each the square root
    taps = taps * math.sqrt(gain)
    for axis in (-2, -1):
        noise = ndimage.correlate1d(noise, taps, axis, mode=mode)
    return noise
