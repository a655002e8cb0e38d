"""Random crops and flips of an image with its boxes and masks.

Index letters: ``n`` objects of an image, ``H`` rows, ``W`` columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import MOST, InputError, check_known, check_number, check_whole, short
from secondorder.optional import needed_by
from secondorder.transfer.dataset import Target

FLIPS = {"horizontal": "horizontal_flip", "vertical": "vertical_flip"}
"""Name -> the function of torchvision.transforms.v2.functional, done half of the time."""

_PER_OBJECT = ("labels", "area", "iscrowd")


@dataclass(frozen=True)
class TrainingTransform:
    """A random window, then each flip half of the time; made by `training_transform`."""

    crop: int | None
    flips: tuple[str, ...]
    min_size: float

    def __call__(self, image: Any, target: Target, generator: torch.Generator | None = None) -> tuple[Any, Target]:
        """Image ``[C, H, W]`` and target, both of `CocoDataset`, transformed; they themselves do not change.

        Args:
            image: a `tv_tensors.Image`.
            target: its target; other keys than those of `CocoDataset` go through as they are.
            generator: of the draws, one for each side of the window and each flip; None: torch's global one, which `CocoDataset`
                seeds for each sample.
        """
        with needed_by("a transform of boxes and masks"):
            from torchvision.transforms.v2 import SanitizeBoundingBoxes, functional
        u = torch.rand(2 + len(self.flips), generator=generator, dtype=torch.float64).tolist()
        before = target
        image, target = _cropped(image, target, self.crop, u[:2])
        for flip, draw in zip(self.flips, u[2:], strict=True):
            if draw < 0.5:
                image, target = _of_spatial(getattr(functional, FLIPS[flip]), image, target)
        target["boxes"] = functional.clamp_bounding_boxes(target["boxes"])
        target["area"] = before["area"] * (_extent(target) / _extent(before))
        return SanitizeBoundingBoxes(min_size=self.min_size, labels_getter=_per_object)(image, _with_pixels(target))


def training_transform(
    crop: int | None = None, flips: Sequence[str] = ("horizontal",), *, min_size: float = 1.0
) -> TrainingTransform:
    """Random crops and flips for the ``transform`` of a `CocoDataset`.

    After a crop boxes end at its edge, or where there are masks at what is left of the mask; areas shrink in proportion. Objects
    with a side below ``min_size``, or of whose mask nothing is left, are taken out; a crop may leave no object.

    Args:
        crop: side of the window in pixels, the image's where that is shorter; None: the whole image.
        flips: of `FLIPS`, each done half of the time.
        min_size: least side of a box in pixels, at least 1.

    Raises:
        InputError: for values out of range and unknown or repeated flips.
    """
    if crop is not None:
        check_whole("crop", crop, most=MOST, hint="; None for the whole image")
    if isinstance(flips, str) or not isinstance(flips, Sequence) or len(set(map(str, flips))) != len(flips):
        raise InputError(f"flips must be different names of {', '.join(FLIPS)}, got {short(flips)}")
    for flip in flips:
        check_known("flip", flip, FLIPS)
    check_number("min_size", min_size, 1, float("inf"))
    return TrainingTransform(crop, tuple(flips), float(min_size))


def _per_object(sample: tuple[Any, Target]) -> tuple[Tensor, ...]:
    return tuple(sample[1][key] for key in _PER_OBJECT)


def _of_spatial(function: Any, image: Any, target: Target, *arguments: int) -> tuple[Any, Target]:
    """A function of torchvision's of the image, its boxes and masks."""
    changed = {key: function(target[key], *arguments) for key in ("boxes", "masks") if key in target}
    return function(image, *arguments), target | changed


def _cropped(image: Any, target: Target, crop: int | None, u: list[float]) -> tuple[Any, Target]:
    """The window of side ``crop`` whose place is drawn by ``u``."""
    from torchvision.transforms.v2 import functional

    height, width = image.shape[-2:]
    rows, columns = (side if crop is None else min(crop, side) for side in (height, width))
    if (rows, columns) == (height, width):
        return image, dict(target)
    top, left = int(u[0] * (height - rows + 1)), int(u[1] * (width - columns + 1))
    image, target = _of_spatial(functional.crop, image, target, top, left, rows, columns)
    return image, _tight(target) if "masks" in target else target


def _tight(target: Target) -> Target:
    """Boxes around the pixels of masks ``[n, H, W]``; an empty mask keeps its box."""
    from torchvision import tv_tensors

    masks = target["masks"].as_subclass(Tensor).bool()
    boxes = target["boxes"].as_subclass(Tensor).clone()
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = (mask.any(dim).nonzero()[:, 0] for dim in (1, 0))
        if len(rows):
            box[:] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return target | {"boxes": tv_tensors.wrap(boxes, like=target["boxes"])}


def _extent(target: Target) -> Tensor:
    """Pixels of the masks, or areas of the boxes where there are none, ``[n]``, at least a trace."""
    if "masks" in target:
        extent = target["masks"].as_subclass(Tensor).sum((1, 2)).double()
    else:
        boxes = target["boxes"].as_subclass(Tensor).double()
        extent = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return extent.clamp(min=1e-9).to(target["area"].dtype)


def _with_pixels(target: Target) -> Target:
    """The target without objects of whose mask nothing is left."""
    from torchvision import tv_tensors

    if "masks" not in target:
        return target
    there = target["masks"].as_subclass(Tensor).flatten(1).bool().any(1)
    wrapped = {key: tv_tensors.wrap(target[key][there], like=target[key]) for key in ("boxes", "masks")}
    return target | wrapped | {key: target[key][there] for key in _PER_OBJECT}
