"""What images and their numbers must be."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secondorder.errors import InputError, short

Indices = Sequence[int] | NDArray[np.integer] | Tensor


def check_images(images: object, least_side: int) -> Tensor:
    """The images, or InputError unless they are a uint8 Tensor ``[N, C, H, W]``, C 1 or 3, H and W of at least `least_side`."""
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch Tensor [N, C, H, W] of uint8, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        hint = (
            "; numbers x in [0, 1] become grey levels by (255 * x).round().byte()" if images.is_floating_point() else ""
        )
        raise InputError(f"images must be grey levels 0 to 255 of dtype uint8, got {images.dtype}{hint}")
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise InputError(f"images must have the shape [N, C, H, W], got {shape}")
    if shape[1] not in (1, 3):
        hint = "; move the channels with images.permute(0, 3, 1, 2)" if shape[3] in (1, 3) else ""
        raise InputError(f"images must have 1 or 3 channels in the shape [N, C, H, W], got {shape}{hint}")
    if min(shape[2:]) < least_side:
        raise InputError(
            f"images must have sides of at least {least_side} pixels, got {shape[2]} x {shape[3]}; enlarge them first"
        )
    return images


def checked_indices(indices: Indices | None, count: int) -> list[int]:
    """The images' numbers in their data set: whole numbers in [0, 2^63), one for each of `count` images, 0, 1, ... by default."""
    if indices is None:
        return list(range(count))
    try:
        numbers = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
    ) as error:  # ragged lists; tensors that numpy cannot have
        raise InputError(f"indices must be whole numbers, one an image, got {short(indices)}") from error
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise InputError(f"indices must be one row of whole numbers, one an image, got {short(indices)}")
    if len(numbers) != count:
        raise InputError(f"indices must be one number for each of the {count} images, got {len(numbers)} of them")
    if count and not 0 <= int(numbers.min()) <= int(numbers.max()) < 2**63:
        raise InputError(f"indices must be whole numbers in [0, 2^63), got {numbers.min()} to {numbers.max()}")
    return numbers.tolist()
