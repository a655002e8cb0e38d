"""Snow, fog and frost over batches."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from secondorder.robustness.draws import normals
from secondorder.robustness.geometry import clipped_zoom
from secondorder.robustness.pixels import Batch, cut_to_levels, luma
from secondorder.robustness.plasma import Maps


def snow_layer(
    generators: Sequence[Generator], H: int, W: int, mean: float, sd: float, zoom: float, threshold: float
) -> Batch:
    """Flakes ``[N, H, W, 1]``: normal noise, enlarged `zoom` times, black below the threshold; 8 bits.

    Blurred along the fall with `blur.motion_blur`, and laid on images with `add_snow`.
    """
    noise = normals(generators, (H, W, 1)) * np.float32(sd) + np.float32(mean)
    flakes = clipped_zoom(noise, zoom)
    return cut_to_levels(np.where(flakes < threshold, np.float32(0), flakes))


def add_snow(images: Batch, layer: Batch, blend: float) -> Batch:
    """b x + (1 - b) max(x, 1.5 luma(x) + 0.5), whitened, plus the layer and the layer turned by 180 degrees; not clipped."""
    whitened = np.maximum(images, 1.5 * luma(images) + 0.5)
    return blend * images + (1 - blend) * whitened + (layer + layer[:, ::-1, ::-1])


def add_fog(images: Batch, maps: Maps, weight: float) -> Batch:
    """(x + w p) m / (m + w) with height maps p ``[N, H, W]`` in [0, 1] (`plasma`) and the image's maximum m."""
    brightest = images.max((1, 2, 3), keepdims=True)
    return (images + weight * maps[..., None]) * (brightest / (brightest + weight))
