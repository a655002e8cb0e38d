"""Pillow's JPEG and box filter, image by image, on batches."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from secondorder.optional import needed_by
from secondorder.robustness.pixels import Batch, to_levels, to_unit

if TYPE_CHECKING:
    from PIL.Image import Image


def jpeg(images: Batch, quality: int) -> Batch:
    """The images after a way through JPEG of a quality from 1 to 95; colour is halved in resolution, as is Pillow's habit."""
    with needed_by("the corruption jpeg_compression"):
        from PIL import Image

    def compressed(picture: "Image.Image") -> "Image.Image":
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _each(images, compressed)


def pixelate(images: Batch, share: float) -> Batch:
    """Means over boxes: reduced to `share` of the rows and columns, rounded down, and enlarged again."""
    with needed_by("the corruption pixelate"):
        from PIL.Image import Resampling
    H, W = images.shape[1:3]
    small = max(int(W * share), 1), max(int(H * share), 1)
    return _each(images, lambda picture: picture.resize(small, Resampling.BOX).resize((W, H), Resampling.BOX))


def _each(images: Batch, change: "Callable[[Image], Image]") -> Batch:
    """Every image of the batch changed as a picture of 8 bits, grey or RGB."""
    from PIL import Image

    levels = to_levels(images)
    for pixels in levels:
        picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        pixels[...] = np.asarray(change(picture)).reshape(pixels.shape)
    return to_unit(levels)
