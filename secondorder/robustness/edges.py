"""Canny's edges and distances to them, on batches of 8-bit layers ``[N, H, W]``: integer arithmetic that equals OpenCV's."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Layers = NDArray[np.uint8]
ONE = 1 << 16
"""One pixel, in the whole numbers of `distances`."""
STEPS = (ONE, int(1.4 * ONE), int(2.1969 * ONE))
"""Lengths of a step to the side, of a diagonal one and of a knight's move (Borgefors 1986)."""
TANGENT = round((2**0.5 - 1) * 2**15)
"""The tangent of 22.5 degrees, times 2^15."""


def canny(layers: Layers, low: int, high: int) -> NDArray[np.bool_]:
    """Canny's edges: ridges of the gradient above `low` that are connected to one above `high`.

    The gradient is Sobel's, its size |gx| + |gy|, and a ridge is larger than its two neighbours along the nearest of four
    directions (of two equal neighbours along an axis the first is the ridge).
    """
    signed = layers.astype(np.int32)
    gx, gy = (_sobel(signed, axis) for axis in (2, 1))
    size = np.abs(gx) + np.abs(gy)

    padded = np.pad(size, ((0, 0), (1, 1), (1, 1)))
    H, W = size.shape[1:]

    def at(row: int, column: int) -> NDArray[np.int32]:
        return padded[:, 1 + row : 1 + row + H, 1 + column : 1 + column + W]

    flat, steep = np.abs(gy) << 15, np.abs(gx) * TANGENT
    across = flat < steep  # the gradient is within 22.5 degrees of a row
    along = flat > steep + (np.abs(gx) << 16)  # of a column: tan 67.5 = tan 22.5 + 2
    falling = (gx ^ gy) >= 0  # a diagonal down to the right
    ridge = np.select(
        [across, along, falling],
        [
            (size > at(0, -1)) & (size >= at(0, 1)),
            (size > at(-1, 0)) & (size >= at(1, 0)),
            (size > at(-1, -1)) & (size > at(1, 1)),
        ],
        (size > at(-1, 1)) & (size > at(1, -1)),
    )
    candidates = ridge & (size > low)
    eight = np.zeros((3, 3, 3), dtype=bool)
    eight[1] = True  # neighbours within one layer
    groups, count = ndimage.label(candidates, eight)
    strong = np.zeros(count + 1, dtype=bool)
    strong[groups[candidates & (size > high)]] = True
    return strong[groups]


def _sobel(layers: NDArray[np.int32], axis: int) -> NDArray[np.int32]:
    """Derivative [-1, 0, 1] along the axis, smoothed by [1, 2, 1] across it, borders repeated."""
    change = ndimage.correlate1d(layers, [-1, 0, 1], axis, mode="nearest")
    return ndimage.correlate1d(change, [1, 2, 1], 3 - axis, mode="nearest")


def distances(edges: NDArray[np.bool_], most: int) -> NDArray[np.int32]:
    """Lengths of the shortest paths to an edge, in 2^-16 pixels, at most `most` pixels; paths are of the STEPS.

    A path that leads down or to the right at every row is found in one sweep over the rows, all others in the sweep back. Along a
    row, d[j] = min over i <= j of v[i] + j - i is a running minimum of v[i] - i.
    """
    far = most * ONE
    found = np.where(edges, 0, far).astype(np.int32)
    for rows in (found, found[:, ::-1, ::-1]):  # a view, swept from its own first row
        _sweep(rows, far)
    return found


def _sweep(rows: NDArray[np.int32], far: int) -> None:
    """The minimum over paths from above and from the left, in place."""
    side, diagonal, knight = STEPS
    N, H, W = rows.shape
    ramp = side * np.arange(W, dtype=np.int32)
    beyond = np.full((N, W + 4), far, dtype=np.int32)
    above, second = beyond.copy(), beyond.copy()  # the last two rows, with two columns on either side
    for h in range(H):
        row = rows[:, h]
        for previous, length, columns in (
            (above, side, (0,)),
            (above, diagonal, (-1, 1)),
            (above, knight, (-2, 2)),
            (second, knight, (-1, 1)),
        ):
            for column in columns:
                np.minimum(row, previous[:, 2 + column : 2 + column + W] + length, out=row)
        np.minimum(row, np.minimum.accumulate(row - ramp, axis=1) + ramp, out=row)
        above, second = second, above
        above[:, 2:-2] = row
