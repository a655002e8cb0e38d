"""Pictures that sequences are made of, and how far frames are from what is expected."""

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def pictures(count: int, side: int, channels: int = 3) -> Tensor:
    """Smooth pictures with all grey levels."""
    coarse = np.random.default_rng(side).random((count, channels, side, side))
    smooth = ndimage.gaussian_filter(coarse, (0, 0, 1.5, 1.5), mode="wrap")
    smooth -= smooth.min((2, 3), keepdims=True)
    return torch.from_numpy((smooth / smooth.max((2, 3), keepdims=True) * 255).round().astype(np.uint8))


PICTURES = pictures(3, 32)


def levels_apart(found: Tensor, expected: Any) -> int:
    return int((found.int() - torch.as_tensor(np.asarray(expected)).int()).abs().max())
