"""Random crops and flips as functions of given uniform numbers: no hidden generator.

Index letters: ``B`` images of a batch, ``C`` channels, ``H`` rows, ``W`` columns.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PaddedCrop:
    """Crop of the original size from the image padded with ``padding`` black pixels, mirrored half of the time.

    The standard augmentation of CIFAR (He et al. 2016, section 4.2).
    """

    padding: int = 4
    flip: bool = True
    draws: ClassVar[int] = 3

    def __call__(self, images: Tensor, u: NDArray[np.float64]) -> Tensor:
        """Images ``[B, C, H, W]`` and uniform numbers ``u`` ``[B, 3]`` (row, column, flip) to ``[B, C, H, W]``."""
        p, (H, W) = self.padding, images.shape[-2:]
        top, left = torch.from_numpy((u[:, :2] * (2 * p + 1)).astype(np.int64)).unbind(1)
        windows = F.pad(images, (p, p, p, p)).unfold(2, H, 1).unfold(3, W, 1)  # [B, C, 2p+1, 2p+1, H, W], a view
        crops = windows[torch.arange(len(images)), :, top, left]
        if not self.flip:
            return crops
        mirrored = torch.from_numpy(u[:, 2] < 0.5)
        crops[mirrored] = crops[mirrored].flip(-1)
        return crops


@dataclass(frozen=True)
class ResizedCrop:
    """Box of random area and aspect ratio, resized to the network's input and flipped left-right half of the time.

    The standard augmentation of ImageNet (Szegedy et al. 2015, section 6): the area is uniform on ``scale`` times the
    image's, the aspect ratio log-uniform on ``ratio``; of ``tries`` boxes the first that fits is taken, and when none
    does the central box of the nearest ratio that fits.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    tries: ClassVar[int] = 10
    draws: ClassVar[int] = 2 * tries + 3

    def box(self, height: int, width: int, u: NDArray[np.float64]) -> tuple[int, int, int, int]:
        """Top, left, height and width (pixels) of the box in a ``height`` x ``width`` image, from ``u`` ``[23]``."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area_draw, ratio_draw in u[: 2 * self.tries].reshape(self.tries, 2):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * area_draw)
            ratio = math.exp(low + (high - low) * ratio_draw)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int((height - h + 1) * u[-3]), int((width - w + 1) * u[-2]), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def mirrored(self, u: NDArray[np.float64]) -> bool:
        """Whether the image is flipped left-right, half of the time, by the last of its uniform numbers u ``[23]``."""
        return bool(u[-1] < 0.5)
