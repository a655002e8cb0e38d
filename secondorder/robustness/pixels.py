"""Grey levels: 8-bit images and the batches of numbers in [0, 1] on which corruptions are computed.

Index letters, in every file of this package: ``N`` images, ``H`` rows, ``W`` columns, ``C`` channels (1 or 3: red, green, blue).
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Batch: TypeAlias = NDArray[np.float32]
"""Images ``[N, H, W, C]`` in [0, 1]."""

LUMA = (np.float32(0.299), np.float32(0.587), np.float32(0.114))
"""Weights of red, green and blue in the brightness of a grey image (ITU-R BT.601)."""

TOLERANCE = np.float32(2**-10)
"""Grey levels by which a number may lie under a whole level and still be cut off to it.

Float32 has an error of 2^-15 levels or so. Without the tolerance a flat area, whose blur is itself, could lose a level.
"""


def to_unit(levels: NDArray[np.uint8]) -> Batch:
    """Grey levels 0 to 255 as numbers in [0, 1]."""
    return levels.astype(np.float32) / np.float32(255)


def to_levels(images: Batch) -> NDArray[np.uint8]:
    """Numbers as grey levels, clipped to [0, 1] and cut off, not rounded: the published sets are made so."""
    levels = np.clip(images, 0, 1)
    levels *= 255
    levels += TOLERANCE
    return levels.astype(np.uint8)


def cut_to_levels(images: Batch) -> Batch:
    """The images after a way through 8 bits that cuts off."""
    return to_unit(to_levels(images))


def round_to_levels(images: Batch) -> Batch:
    """The images after a way through 8 bits that rounds to the nearest level."""
    levels = np.clip(images, 0, 1)
    levels *= 255
    np.rint(levels, out=levels)
    levels /= 255
    return levels


def luma(images: Batch) -> Batch:
    """Brightness ``[N, H, W, 1]`` of images of one or three channels."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = (weight * images[..., c : c + 1] for c, weight in enumerate(LUMA))
    return red + green + blue
