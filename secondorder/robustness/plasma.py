"""Plasma: random height maps whose roughness falls with the scale, by the diamond-square algorithm."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from secondorder.robustness.draws import uniforms

Maps = NDArray[np.float32]


def plasma(generators: Sequence[Generator], H: int, W: int, decay: float) -> Maps:
    """Height maps ``[N, H, W]``, cut from square maps of a power of two that lie in [0, 1] and wrap around.

    Starting with one point, level k = 0, 1, ... sets the points midway between those that are there: first the centres of the
    squares, then the middles of the sides, each to the mean of its four neighbours plus decay^(-2k) U(-1, 1). The structure is
    relative to the side: a smaller map lacks the finest levels.
    """
    side = 1 << (max(H, W, 2) - 1).bit_length()
    draws = 2 * uniforms(generators, (side * side - 1,)) - 1  # as many as points are set
    maps = np.zeros((len(draws), side, side), dtype=np.float32)
    used, step, size = 0, side, 1.0
    while step > 1:
        half, cells = step // 2, side // step
        noise = np.float32(size) * draws[:, used : used + 3 * cells**2].reshape(-1, 3, cells, cells)
        corners = maps[:, ::step, ::step]
        below = corners + np.roll(corners, -1, 1)
        centres = maps[:, half::step, half::step]
        centres[...] = (below + np.roll(below, -1, 2)) / np.float32(4) + noise[:, 0]
        maps[:, ::step, half::step] = _mean_of_four(centres, corners, 1) + noise[:, 1]
        maps[:, half::step, ::step] = _mean_of_four(centres, corners, 2) + noise[:, 2]
        used, step, size = used + 3 * cells**2, half, size / decay**2
    maps -= maps.min((1, 2), keepdims=True)
    maps /= maps.max((1, 2), keepdims=True)
    return maps[:, :H, :W]


def _mean_of_four(centres: Maps, corners: Maps, axis: int) -> Maps:
    """Means on the sides between cells along `axis`: two centres and, across, two corners."""
    return (centres + np.roll(centres, 1, axis) + corners + np.roll(corners, -1, 3 - axis)) / np.float32(4)
