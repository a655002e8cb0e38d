"""Splits of a data set: map-style `torch.utils.data.Dataset`s of (normalised image, label), in memory or on disk.

Index letters: ``N`` images, ``B`` images of a batch, ``C`` channels, ``H`` rows, ``W`` columns.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from secondorder.data.augmentation import PaddedCrop, ResizedCrop
from secondorder.data.decoding import MAX_PIXELS, decode
from secondorder.data.files import shown
from secondorder.data.sampling import Indices, check_seed_and_epoch, checked_indices, epoch_order, uniforms
from secondorder.errors import InputError, check_whole
from secondorder.optional import needed_by

# How far the short side of a test image exceeds the central crop: 256 pixels for 224, as is usual for ImageNet.
TEST_RESIZE = 256 / 224

MAX_IMAGE_SIZE = 4096
"""The largest side, in pixels, that images are resized to."""


def check_image_size(image_size: object) -> None:
    """Raise `InputError` unless ``image_size`` is a whole number of pixels from 1 to MAX_IMAGE_SIZE."""
    check_whole("image_size", image_size, 1, MAX_IMAGE_SIZE, hint="; in pixels")


@dataclass(frozen=True)
class Normalisation:
    """x -> (x / maximum - mean) / std for each channel, ``maximum`` being the value of white."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: int = 255

    def to_unit(self, images: Tensor) -> Tensor:
        """Pixel values ``[B, C, H, W]`` (uint8) as float32 on [0, 1]."""
        return images.to(torch.float32, memory_format=torch.contiguous_format).div_(self.maximum)

    def standardise_(self, images: Tensor) -> Tensor:
        """Images on [0, 1] ``[B, C, H, W]`` to zero mean and unit variance over the training set, in place."""
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)


class ImageSplit(Dataset[tuple[Tensor, int]], ABC):
    """One split: sample i is (image float32 ``[C, H, W]``, label), a pure function of (seed, epoch, i).

    `set_epoch` chooses the augmentation (none in a test split); `batch` is the fast way to many samples and gives
    exactly those that indexing gives. A `DataLoader` takes it without being told.

    Args:
        labels: ``[N]`` int64.
        draws: uniform numbers that the augmentation of a sample takes.
    """

    augmentation: Any = None

    def __init__(self, labels: Tensor, draws: int) -> None:
        self.labels = labels  # [N] int64
        self._draws = draws
        # In shared memory, so that workers that live on from epoch to epoch see a change of epoch too.
        self._seed_and_epoch = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw the augmentation of epoch ``epoch`` of the run with seed ``seed`` from now on."""
        check_seed_and_epoch(seed, epoch)
        self._seed_and_epoch[0], self._seed_and_epoch[1] = seed, epoch

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]`` float32 and labels ``[B]`` int64; errors as of `checked_indices`."""
        positions = checked_indices(indices, len(self))
        seed, epoch = self._seed_and_epoch.tolist()
        u = uniforms("augmentation", seed, epoch, positions, self._draws)
        return self._images(positions, u), self.labels[torch.from_numpy(positions)]

    def plain(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """`batch` without augmentation, as in a test split."""
        same = copy.copy(self)
        same.augmentation, same._draws = None, 0
        return same.batch(indices)

    def order(self, seed: int, epoch: int) -> Tensor:
        """Order ``[N]`` (int64) in which epoch ``epoch`` visits the samples, a function of (N, seed, epoch)."""
        return epoch_order(len(self), seed, epoch)

    @abstractmethod
    def _images(self, positions: NDArray[np.int64], u: NDArray[np.float64]) -> Tensor:
        """Normalised images ``[B, C, H, W]`` at ``positions`` ``[B]``, augmented by the numbers ``u`` ``[B, D]``."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if len(positions := checked_indices([index], len(self))) != 1:
            raise InputError(f"the index of a sample is {shown(repr(index))}; use batch(...) for several")
        images, labels = self.batch(positions)
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        images, labels = self.batch(indices)
        return list(zip(images.unbind(), labels.tolist(), strict=True))


class ImageArray(ImageSplit):
    """Images held in memory; augmented at their own size, then resized.

    Args:
        images: ``[N, C, H, W]`` uint8.
        labels: ``[N]`` int64.
        normalisation: of the pixels.
        augmentation: None: none.
        image_size: side in pixels that images are resized to; None: their own width.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalisation: Normalisation,
        augmentation: PaddedCrop | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__(labels, augmentation.draws if augmentation else 0)
        self.images = images
        self.normalisation = normalisation
        self.augmentation = augmentation
        self.image_size = image_size or images.shape[-1]

    def _images(self, positions: NDArray[np.int64], u: NDArray[np.float64]) -> Tensor:
        images = self.images[torch.from_numpy(positions)]
        if self.augmentation is not None:
            images = self.augmentation(images, u)
        images = self.normalisation.to_unit(images)
        if images.shape[-2:] != (self.image_size, self.image_size) and len(images):
            images = F.interpolate(images, size=(self.image_size,) * 2, mode="bilinear", antialias=True)
        return self.normalisation.standardise_(images)


class ImageFiles(ImageSplit):
    """Image files decoded when asked for; a random resized crop in training, a central crop in testing.

    Args:
        files: N paths.
        labels: ``[N]`` int64.
        normalisation: of the pixels.
        augmentation: the crop in training; None: the central one.
        image_size: side in pixels.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        labels: Tensor,
        normalisation: Normalisation,
        augmentation: ResizedCrop | None = None,
        image_size: int = 224,
    ) -> None:
        super().__init__(labels, augmentation.draws if augmentation else 0)
        self.files = np.asarray([str(file) for file in files])  # one array: workers share it without copying each path
        self.normalisation = normalisation
        self.augmentation = augmentation
        self.image_size = image_size

    def _images(self, positions: NDArray[np.int64], u: NDArray[np.float64]) -> Tensor:
        images = [self._pixels(self.files[n], row) for n, row in zip(positions, u, strict=True)]
        empty = torch.empty(0, len(self.normalisation.mean), self.image_size, self.image_size, dtype=torch.uint8)
        return self.normalisation.standardise_(self.normalisation.to_unit(torch.stack(images) if images else empty))

    def _pixels(self, file: str, u: NDArray[np.float64]) -> Tensor:
        """Decoded, cropped and resized image ``[C, H, W]`` uint8."""
        with needed_by("a data set of image files"):
            import torchvision.transforms.v2.functional as image_transforms
        image, size = decode(file), self.image_size
        if self.augmentation is None:
            short = round(size * TEST_RESIZE)
            if short**2 * max(image.size) > MAX_PIXELS * min(image.size):
                raise InputError(
                    f"{shown(file)} has {image.width}x{image.height} pixels: too long a strip to be resized to a short side "
                    f"of {short}; crop or remove it"
                )
            resized = image_transforms.resize(image, [short])
            return image_transforms.pil_to_tensor(image_transforms.center_crop(resized, [size, size]))
        box = self.augmentation.box(image.height, image.width, u)
        image = image_transforms.resized_crop(image, *box, size=[size, size])
        if self.augmentation.mirrored(u):
            image = image_transforms.horizontal_flip(image)
        return image_transforms.pil_to_tensor(image)
