"""Geometric maps of batches with linear interpolation: where each pixel of the result is read, and the product that reads it.

Coordinates are (x, y) = (column, row), whole numbers at the centres of pixels, rows counted downwards. A map is given backwards:
for a pixel of the result, the point of the image that it shows. All images of a batch share it, so that it becomes one sparse
matrix, with the four weights of each pixel of the result in a row.

Index letters: ``N`` images, ``H`` rows, ``W`` columns of the images, ``h`` rows, ``w`` columns of the result, ``C`` channels.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from secondorder.robustness.pixels import Batch

Points: TypeAlias = NDArray[np.float64]
"""Homogeneous coordinates (x, y, 1) ``[3, h w]``."""


def crop_corner(H: int, W: int, h: int, w: int) -> tuple[int, int]:
    """First row and column of the central crop of h x w pixels."""
    return round((H - h) / 2), round((W - w) / 2)


def crop_points(H: int, W: int, h: int, w: int) -> Points:
    """The pixels of the central crop of h x w pixels, row by row."""
    top, left = crop_corner(H, W, h, w)
    y, x = np.mgrid[top : top + h, left : left + w]
    return np.stack([x.ravel(), y.ravel(), np.ones(h * w)])


def translation(shift: float) -> NDArray[np.float64]:
    """The map ``[3, 3]`` from places in the new image to those in the old one that moves the image right by so many pixels."""
    return np.array([[1, 0, -shift], [0, 1, 0], [0, 0, 1]], dtype=np.float64)


def rotation(H: int, W: int, degrees: float) -> NDArray[np.float64]:
    """The map ``[3, 3]``, from places in the new image to those in the old one, that turns it clockwise about its centre."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _about_centre(H, W, np.array([[c, s], [-s, c]]))


def scaling(H: int, W: int, factor: float) -> NDArray[np.float64]:
    """The map ``[3, 3]``, from places in the new image to those in the old one, that enlarges it by a factor about its centre."""
    return _about_centre(H, W, np.eye(2) / factor)


def shearing(H: int, W: int, degrees: float) -> NDArray[np.float64]:
    """The map ``[3, 3]``, from places in the new image to those in the old one, by which columns lean by the angle.

    Rows move to the left in proportion to their distance below the centre.
    """
    return _about_centre(H, W, np.array([[1, math.tan(math.radians(degrees))], [0, 1]]))


def tilting(H: int, W: int, degrees: float, depth: float = 1.0) -> NDArray[np.float64]:
    """The image plane turned about its vertical and its horizontal axis, both by the angle, and seen from its diagonal away.

    With (u, v) relative to (W/2, H/2) and depth d, the point (u, v, d) in space is turned, (p, q, r) = R_x R_y (u, v, d), and
    appears at (W/2, H/2) + f (p, q) / (f + r), f = sqrt(W^2 + H^2). R_y takes (u, ., z) to (u c - z s, ., u s + z c), R_x takes
    (., v, z) to (., v c - z s, v s + z c), c and s being cosine and sine. As in the published sets the image lies one pixel
    behind the axes, so that it is shrunk by f / (f + 1) when it is not turned, and the axes meet half a pixel off its centre.
    """
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    f, d = math.hypot(W, H), depth
    to_axes = np.array([[1, 0, -W / 2], [0, 1, -H / 2], [0, 0, 1]])
    turned = np.array(
        [[c, 0, -d * s], [-s * s, c, -d * s * c], [s * c, s, f + d * c * c]]
    )  # (u, v, 1) -> (p, q, f + r)
    picture = np.array([[f, 0, W / 2], [0, f, H / 2], [0, 0, 1]])
    return np.linalg.inv(picture @ turned @ to_axes)


def _about_centre(H: int, W: int, linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """The linear map [2, 2] with the centre of the image as its origin, [3, 3]."""
    centre = np.array([(W - 1) / 2, (H - 1) / 2])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, centre - linear @ centre
    return matrix


def reading(matrix: NDArray[np.float64], points: Points, H: int, W: int, *, blend: bool) -> sparse.csr_array:
    """The weights ``[h w, H W]``, four in a row, with which the result's pixels read those of the image. Beyond it is black.

    Args:
        matrix: [3, 3], from the result's points to the image's, by their first two coordinates over the third.
        points: of the result, as of `crop_points`.
        H: rows of the image.
        W: its columns.
        blend: whether points less than a pixel outside fade to black, as of OpenCV; otherwise pixels end half a pixel beyond
            their centres, and further out is black, as of Pillow.
    """
    x, y, z = matrix @ points
    x, y = x / z, y / z
    left, top = np.floor(x), np.floor(y)
    right_weight, bottom_weight = x - left, y - top
    columns, rows = np.stack([left, left + 1]), np.stack([top, top + 1])  # [2, h w]
    across, down = np.stack([1 - right_weight, right_weight]), np.stack([1 - bottom_weight, bottom_weight])
    if blend:
        across, down = across * _inside(columns, W), down * _inside(rows, H)
    else:
        across = across * ((x >= -0.5) & (x < W - 0.5))
        down = down * ((y >= -0.5) & (y < H - 0.5))
    columns, rows = np.clip(columns, 0, W - 1), np.clip(rows, 0, H - 1)
    weights = down[:, None] * across  # [2, 2, h w]
    sources = rows[:, None] * W + columns
    size = x.size
    return sparse.csr_array(
        (
            weights.reshape(4, size).T.ravel().astype(np.float32),
            sources.reshape(4, size).T.ravel().astype(np.int32),
            np.arange(0, 4 * size + 1, 4, dtype=np.int32),
        ),
        shape=(size, H * W),
    )


def _inside(index: NDArray[np.float64], side: int) -> NDArray[np.bool_]:
    """Whether there is such a row or column."""
    return (index >= 0) & (index < side)


def read(weights: sparse.csr_array, images: Batch, h: int, w: int) -> Batch:
    """The images ``[N, H, W, C]`` read with these weights, ``[N, h, w, C]``."""
    N, H, W, C = images.shape
    pixels = np.ascontiguousarray(images.reshape(N, H * W, C).transpose(1, 0, 2)).reshape(H * W, N * C)
    return (weights @ pixels).reshape(h * w, N, C).transpose(1, 0, 2).reshape(N, h, w, C)
