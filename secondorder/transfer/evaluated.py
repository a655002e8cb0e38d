"""Truth and predictions of images as COCO's records, checked one by one; what is given does not change.

Index letters: ``n`` objects or detections of an image, ``H`` rows, ``W`` columns, ``K`` classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError, short
from secondorder.transfer.checks import REAL, check_tensor
from secondorder.transfer.dataset import Target
from secondorder.transfer.segmentation import encoded

Record = dict[str, Any]
Prediction = Mapping[str, Tensor]

THRESHOLD = 0.5
"""The probability above which a pixel belongs to a predicted mask."""


@dataclass
class Evaluated:
    """Records of all images: ids count from 1, since COCO's code takes an id of 0 for none."""

    classes: tuple[str, ...]
    masks: bool
    images: list[Record] = field(default_factory=list)
    truth: list[Record] = field(default_factory=list)
    predictions: list[Record] = field(default_factory=list)

    def add(self, target: Target, prediction: Prediction) -> None:
        """Add the truth and the prediction of the next image; raises InputError naming it."""
        name = f"image {len(self.images)}"
        if isinstance(target, Mapping) and "image_id" in target:
            name += f" (image_id {short(target['image_id'])})"
        image = len(self.images) + 1
        objects, size = self._truth_records(f"the truth of {name}", target)
        detections = self._prediction_records(f"the prediction of {name}", prediction, size)
        self.images.append({"id": image} | ({"height": size[0], "width": size[1]} if size else {}))
        for records, of_image in ((self.truth, objects), (self.predictions, detections)):
            for record in of_image:
                records.append(record | {"id": len(records) + 1, "image_id": image})

    def _truth_records(self, what: str, target: Target) -> tuple[list[Record], tuple[int, int] | None]:
        """Records of an image's objects, and its height and width where masks say them."""
        boxes, labels = self._boxes_and_labels(what, target)
        n = len(boxes)
        sides = boxes[:, 2:] - boxes[:, :2]
        if (sides <= 0).any():
            raise InputError(f"{what} has a box without area; x1 < x2 and y1 < y2 are needed")
        areas = _numbers(what, target, "area", n) if "area" in target else sides.prod(1)
        crowds = _numbers(what, target, "iscrowd", n) if "iscrowd" in target else np.zeros(n)
        columns: Record = {"area": areas.tolist(), "iscrowd": (crowds != 0).astype(int).tolist()}
        size = None
        if self.masks:
            masks = _masks(what, target, n, 3)
            size = masks.shape[1], masks.shape[2]
            columns["segmentation"], _ = encoded(masks)
        return _records(boxes, labels, columns), size

    def _prediction_records(self, what: str, prediction: Prediction, size: tuple[int, int] | None) -> list[Record]:
        """Records of an image's detections."""
        boxes, labels = self._boxes_and_labels(what, prediction)
        n = len(boxes)
        sides = boxes[:, 2:] - boxes[:, :2]
        if (sides < 0).any():
            raise InputError(f"{what} has a box with x2 < x1 or y2 < y1; boxes are (x1, y1, x2, y2)")
        columns: Record = {"score": _numbers(what, prediction, "scores", n).tolist(), "area": sides.prod(1).tolist()}
        if size is not None:
            masks = _masks(what, prediction, n, 4)[:, 0]
            if masks.shape[1:] != size:
                raise InputError(f"{what} has masks of {list(masks.shape[1:])} pixels, the truth of {list(size)}")
            columns["segmentation"], columns["pixels"] = encoded(masks)
        return _records(boxes, labels, columns)

    def _boxes_and_labels(self, what: str, of_image: Mapping[str, Any]) -> tuple[NDArray[np.float64], list[int]]:
        """Finite boxes ``[n, 4]`` and labels ``[n]`` in 1..K."""
        if not isinstance(of_image, Mapping):
            raise InputError(f"{what} is {short(of_image)}; a dict with boxes and labels is needed")
        boxes = _tensor(what, of_image, "boxes").double().numpy()
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise InputError(f"{what} has boxes of shape {list(boxes.shape)}; [n, 4] is needed, [0, 4] for none")
        if not np.isfinite(boxes).all():
            raise NonFiniteError(f"{what} has a box that is not finite; look at the training's loss")
        labels = _tensor(what, of_image, "labels")
        if labels.is_floating_point() or labels.shape != boxes.shape[:1]:
            raise InputError(
                f"{what} has labels {labels.dtype} {list(labels.shape)}; {len(boxes)} whole numbers are needed"
            )
        K = len(self.classes)
        if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= K:
            outside = int(labels.min()) if int(labels.min()) < 1 else int(labels.max())
            raise InputError(f"{what} has the label {outside}; labels are 1 to {K}: {short(list(self.classes))}")
        return boxes, labels.tolist()


def evaluated(
    truth: Iterable[Target], predictions: Iterable[Prediction], classes: Sequence[str], masks: bool
) -> Evaluated:
    """The records of all images, read one image at a time.

    Raises:
        InputError: for fewer predictions than images or more, none at all, and what is no target or prediction.
        NonFiniteError: for numbers that are not finite.
    """
    records, absent = Evaluated(tuple(classes), masks), object()
    for target, prediction in zip_longest(truth, predictions, fillvalue=absent):
        if target is absent or prediction is absent:
            has, lacks = ("truth", "prediction") if prediction is absent else ("a prediction", "truth")
            raise InputError(
                f"image {len(records.images)} has {has} and no {lacks}; give a prediction for each image, in their order"
            )
        records.add(target, prediction)  # type: ignore[arg-type]
    if not records.images:
        raise InputError("there is no image to evaluate; give truth and predictions of at least 1")
    return records


def _records(boxes: NDArray[np.float64], labels: list[int], columns: Record) -> list[Record]:
    """One record an object: box (x, y, w, h), label and its entry of every column."""
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return [
        {"bbox": box, "category_id": label} | {key: column[i] for key, column in columns.items()}
        for i, (box, label) in enumerate(zip(xywh, labels, strict=True))
    ]


def _tensor(what: str, of_image: Mapping[str, Any], key: str) -> Tensor:
    """A tensor of an image, on the CPU."""
    if key not in of_image:
        raise InputError(f"{what} has no {key}")
    value = check_tensor(f"{what}: {key}", of_image[key], REAL, "a tensor of real numbers")
    return value.detach().as_subclass(Tensor).cpu()


def _numbers(what: str, of_image: Mapping[str, Any], key: str, n: int) -> NDArray[np.float64]:
    """Finite numbers ``[n]``."""
    values = _tensor(what, of_image, key).double()
    if values.shape != (n,):
        raise InputError(f"{what} has {key} of shape {list(values.shape)}; [{n}] is needed, one for each box")
    if not values.isfinite().all():
        raise NonFiniteError(f"{what} has {key} that are not finite; look at the training's loss")
    return values.numpy()


def _masks(what: str, of_image: Mapping[str, Any], n: int, dimensions: int) -> NDArray[np.uint8]:
    """Masks of 0 and 1 ``[n, H, W]``, or ``[n, 1, H, W]`` of probabilities."""
    masks = _tensor(what, of_image, "masks")
    shape = tuple(masks.shape)
    if len(shape) != dimensions or shape[0] != n or (dimensions == 4 and shape[1] != 1):
        wanted = f"[{n}, H, W]" if dimensions == 3 else f"[{n}, 1, H, W]"
        raise InputError(f"{what} has masks of shape {list(shape)}; {wanted} is needed")
    if masks.is_floating_point() and not masks.isfinite().all():
        raise NonFiniteError(f"{what} has masks that are not finite; look at the training's loss")
    return (masks > THRESHOLD).to(torch.uint8).numpy()
