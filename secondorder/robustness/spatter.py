"""Spatter: drops of water and splashes of mud over batches."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness.blur import gaussian_blur
from secondorder.robustness.draws import normals
from secondorder.robustness.edges import ONE, canny, distances
from secondorder.robustness.geometry import filtered_noise
from secondorder.robustness.pixels import Batch, luma

WATER = np.array([175, 238, 238], dtype=np.float32) / np.float32(255)
"""Pale turquoise."""
MUD = np.array([63, 42, 20], dtype=np.float32) / np.float32(255)
"""Brown."""
RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
"""Light from the lower right."""
EDGE_THRESHOLDS = (50, 150)
REACH = 20
"""Pixels beyond which the distance to an edge counts no more."""


def liquid_layer(
    generators: Sequence[Generator],
    H: int,
    W: int,
    mean: float,
    sd: float,
    sigma: float,
    threshold: float,
    ratio: float = 1.0,
) -> Batch:
    """Thickness of the liquid ``[N, H, W, 1]``: Gaussian-filtered normal noise, 0 below the threshold.

    Args:
        generators: one an image.
        H: rows.
        W: columns.
        mean: of the noise.
        sd: of the noise before the filter, at the published side.
        sigma: standard deviation of the filter, pixels of the published side.
        threshold: below which there is no liquid.
        ratio: side / published side.
    """
    noise = filtered_noise(normals(generators, (H, W)), sigma, ratio=ratio)
    layer = np.float32(mean) + np.float32(sd) * noise
    return np.where(layer < threshold, np.float32(0), layer)[..., None]


def add_water(images: Batch, layer: Batch, opacity: float) -> Batch:
    """Drops of pale turquoise added, with the relief of their rims; not clipped.

    The drops' thickness in 8 bits is multiplied by an equalised map of the distance to their edges, lit from a side, and divided
    by its maximum in the image. An image without a drop stays as it is (the published code divides zero by zero there).
    """
    levels = (np.minimum(layer[..., 0], 1) * 255).astype(np.uint8)
    mask = levels * _rim_light(levels)
    most = mask.max((1, 2), keepdims=True)
    mask = mask / np.maximum(most, 1) * opacity
    return images + mask[..., None].astype(np.float32) * _color(WATER, images)


def _rim_light(levels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Light 0 to 255 on the rims of drops ``[N, H, W]``: a relief of the distance to their edges; as OpenCV's 8 bits have it."""
    far = distances(canny(levels, *EDGE_THRESHOLDS), REACH)
    box = np.ones((1, 3, 3), dtype=np.int32)
    smooth = ndimage.correlate(far, box, mode="mirror") // (9 * ONE)
    relief = np.clip(ndimage.correlate(_equalized(smooth), RELIEF[None], mode="mirror"), 0, 255)
    return ((ndimage.correlate(relief, box, mode="mirror") + 4) // 9).astype(np.float32)  # rounded: no sum is halfway


def _equalized(levels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Whole numbers 0 to REACH of each layer with the levels' ranks, stretched over 0 to 255; a flat layer stays as it is."""
    counts = (levels[..., None] == np.arange(REACH + 1)).sum((1, 2))  # [N, REACH + 1]
    total = counts.sum(1, keepdims=True)
    lowest = np.take_along_axis(
        counts, (counts > 0).argmax(1)[:, None], 1
    )  # pixels at the lowest level, which becomes 0
    others = (total - lowest).astype(np.float32)
    table = np.rint((counts.cumsum(1) - lowest) * (np.float32(255) / np.maximum(others, 1))).astype(np.int32)
    table = np.where(others > 0, table, np.arange(REACH + 1))
    return np.take_along_axis(table, levels.reshape(len(levels), -1), 1).reshape(levels.shape)


def add_mud(images: Batch, layer: Batch, sigma: float, ratio: float = 1.0) -> Batch:
    """Brown splashes of opacity a in the place of the image, (1 - a) x + a brown.

    The opacity is the Gaussian-filtered outline of the liquid, 0 where that is below 0.8.

    Args:
        images: ``[N, H, W, C]``.
        layer: thickness of the liquid ``[N, H, W, 1]``.
        sigma: standard deviation of the filter, pixels of the published side.
        ratio: side / published side.
    """
    opacity = gaussian_blur((layer > 0).astype(np.float32), sigma, ratio=ratio)
    opacity = np.where(opacity < 0.8, np.float32(0), opacity)
    return images * (1 - opacity) + opacity * _color(MUD, images)


def _color(color: Batch, images: Batch) -> Batch:
    """The colour in as many channels as the images have."""
    return color if images.shape[-1] == 3 else luma(color[None, None, None]).reshape(1)
