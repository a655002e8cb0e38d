"""Streams of 8-bit images: batches (uint8 ``[B, C, H, W]`` on 0..255, labels int64 ``[B]``) of arrays and of a data set's split.

Corruptions and perturbations are defined on 8-bit images whose white is 255. Where a data set has another white w (16 for
scikit-learn's digits), or is resized, its images become round(255 x / w).

Index letters: ``N`` images, ``B`` images of a batch, ``C`` channels, ``H`` rows, ``W`` columns.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from secondorder.data.images import ImageArray, ImageFiles, ImageSplit, Normalisation
from secondorder.data.sampling import Indices, checked_indices
from secondorder.errors import InputError, check_whole, short

Batch = tuple[Tensor, Tensor]
"""Images uint8 ``[B, C, H, W]`` on 0..255 and labels int64 ``[B]``."""

NEARLY_HALF = 0.499
"""Fraction of a grey level from which it is rounded up: interpolated levels that end in .5 come out alike on every processor."""


def array_batches(images: Tensor, labels: Tensor, batch_size: int = 256) -> Iterator[Batch]:
    """Images uint8 ``[N, C, H, W]`` and labels ``[N]`` in memory, ``batch_size`` at a time.

    Raises:
        InputError: for other images, labels or batch sizes.
    """
    check_whole("batch_size", batch_size)
    images, labels = checked_batch((images, labels))
    return zip(images.split(batch_size), labels.split(batch_size), strict=True)


def split_batches(split: ImageSplit, batch_size: int = 256, indices: Indices | None = None) -> Iterator[Batch]:
    """A split of this package without augmentation, resized or cropped as in testing, its white at 255.

    Args:
        split: images in memory or in files; a user's own data set gives no 8-bit images and is refused.
        batch_size: images at a time.
        indices: of the images, in this order; None: all.

    Raises:
        InputError: for another split and indices that are no whole numbers.
        IndexError: for indices outside of the split.
    """
    check_whole("batch_size", batch_size)
    if not isinstance(split, ImageArray | ImageFiles):
        raise InputError(
            f"{type(split).__name__} has no 8-bit images; give batches (uint8 [B, C, H, W], labels [B]) instead"
        )
    chosen = torch.from_numpy(checked_indices(range(len(split)) if indices is None else indices, len(split)))
    unit = copy.copy(split)  # the same images on [0, 1]: of mean 0 and standard deviation 1
    channels, white = len(split.normalisation.mean), split.normalisation.maximum
    unit.normalisation = Normalisation((0.0,) * channels, (1.0,) * channels, white)

    def batches() -> Iterator[Batch]:
        for part in chosen.split(batch_size):
            images, labels = unit.plain(part)
            yield images.mul_(255).add_(1 - NEARLY_HALF).floor_().clamp_(0, 255).to(torch.uint8), labels

    return batches()


def checked_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, each checked by `checked_batch`; InputError where there is no image at all."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise InputError(f"batches are {short(batches)}; give array_batches(images, labels) or split_batches(split)")
    empty = True
    for batch in batches:
        images, labels = checked_batch(batch)
        if len(labels):
            empty = False
            yield images, labels
    if empty:
        raise InputError("the batches have no images; at least 1 is needed")


def checked_batch(batch: Batch) -> Batch:
    """The batch, labels as int64; InputError for anything but 8-bit images and as many whole numbers."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise InputError(
            f"a batch is {short(type(batch).__name__)}; give tensors (images uint8 [B, C, H, W], labels [B])"
        )
    images, labels = batch
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(f"images are {images.dtype} of shape {list(images.shape)}; give uint8 [B, C, H, W] on 0..255")
    kinds = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    if kinds or labels.shape != images.shape[:1]:
        raise InputError(
            f"labels are {labels.dtype} {list(labels.shape)}; give a whole number for each of {len(images)} images"
        )
    return images, labels.to(torch.int64)
