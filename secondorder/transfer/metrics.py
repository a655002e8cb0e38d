"""Average precision of detections as COCO defines it (Lin et al., ECCV 2014, arXiv 1405.0312), by faster-coco-eval.

With T = {0.5, 0.55, ..., 0.95} thresholds of the intersection over union and p_kt(r) the largest precision of class k at
threshold t that any recall of at least r has,

    AP = mean over t in T, classes k and r in {0, 0.01, ..., 1} of p_kt(r)      AP50, AP75: at one threshold
    AR100 = mean over t and k of the recall by the 100 best-scored detections of each image      AR1, AR10: by 1 and 10

``_S``, ``_M`` and ``_L``: of objects of at most 32^2, 32^2 to 96^2 and at least 96^2 pixels. Detections of a crowd region count
neither for nor against. All are fractions; nan where there is no such object, which COCO's own code calls -1.

Where all objects are small COCO's sizes say nothing, so there are thirds of the evaluated truth (size terciles), too: with
a_1 <= ... <= a_n the areas of its objects without crowds, the first third is up to b_1 = a_ceil(n/3), the second above it up to
b_2 = a_ceil(2n/3), the last above b_2. Equal areas stay together, so a third may be larger than another, or empty (nan).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secondorder.errors import InputError, check_flag, short
from secondorder.optional import needed_by
from secondorder.transfer.dataset import CocoDataset, Target
from secondorder.transfer.evaluated import Evaluated, Prediction, Record, evaluated

NUMBERS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")
"""COCO's twelve numbers, in its order."""

_LARGEST = 1e10  # pixels, as in COCO's code
_SIZES = ([0.0, _LARGEST], [0.0, 32.0**2], [32.0**2, 96.0**2], [96.0**2, _LARGEST])  # all, S, M, L


@dataclass(frozen=True)
class DetectionMetrics:
    """COCO's numbers of one task, fractions or nan.

    ``numbers`` are those of `NUMBERS`; ``size_terciles`` AP of objects up to the first area of ``boundaries`` (pixels), between,
    and above the second; ``categories`` AP of each class.
    """

    numbers: dict[str, float]
    size_terciles: tuple[float, float, float]
    boundaries: tuple[float, float]
    categories: dict[str, float]


def detection_metrics(
    truth: CocoDataset | Iterable[Target],
    predictions: Iterable[Prediction],
    *,
    classes: Sequence[str] | None = None,
    masks: bool | None = None,
) -> dict[str, DetectionMetrics]:
    """COCO's numbers of a detector, for "boxes" and, with masks, for "masks"; images are read one at a time.

    Args:
        truth: a data set, all objects of which count, in its size, whatever its transform; or targets of images: ``boxes``
            (x1, y1, x2, y2) ``[n, 4]``, ``labels`` ``[n]`` 1..K, ``masks`` ``[n, H, W]``, ``area`` (that of the box where it is
            left out) and ``iscrowd`` (0) ``[n]``.
        predictions: what a detector of torchvision gives for each image, in their order: ``boxes`` ``[n, 4]``, ``scores`` and
            ``labels`` ``[n]``, ``masks`` ``[n, 1, H, W]`` of probabilities, of which those above 0.5 count. There may be none.
        classes: names of the labels 1..K; None: those of the data set.
        masks: whether masks are evaluated; None: where the data set has them, for targets not.

    Raises:
        InputError: for fewer predictions than images or more, labels outside of 1..K, wrong shapes, and masks that are missing.
        NonFiniteError: for scores, boxes and masks that are not finite.
    """
    if isinstance(truth, CocoDataset):
        masks = truth.masks if masks is None else masks
        classes = truth.classes if classes is None else classes
        truth = truth.truth()
    masks = bool(masks) if masks is None else masks
    check_flag("masks", masks)
    for name, value in (("truth", truth), ("predictions", predictions)):
        if isinstance(value, str | dict) or not isinstance(value, Iterable):
            raise InputError(f"{name} must be a list, one entry an image, got {short(value)}")
    with needed_by("detection_metrics"):
        import faster_coco_eval  # noqa: F401  before a network is run over all images
    records = evaluated(truth, predictions, _checked_classes(classes), masks)
    return {task: _metrics(records, task) for task in (("boxes", "masks") if masks else ("boxes",))}


def _checked_classes(classes: Sequence[str] | None) -> tuple[str, ...]:
    """Different names, at least one."""
    if classes is None or isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise InputError(f"classes must be the names of the labels 1..K in their order, got {short(classes)}")
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        raise InputError(f"classes must be different names, got {short(classes)}")
    return tuple(classes)


def _metrics(records: Evaluated, task: str) -> DetectionMetrics:
    """The numbers of one task, from the precisions and recalls at every threshold, class and size."""
    boundaries = _boundaries([one["area"] for one in records.truth if not one["iscrowd"]])
    precision, recall = _curves(records, task, [*_SIZES, *_thirds(boundaries)])

    def ap(size: int = 0, threshold: slice | int = slice(None)) -> float:
        return _mean(precision[threshold, :, :, size, -1])

    values = [ap(), ap(0, 0), ap(0, 5), ap(1), ap(2), ap(3)]
    values += [_mean(recall[:, :, 0, best]) for best in range(3)] + [
        _mean(recall[:, :, size, -1]) for size in (1, 2, 3)
    ]
    return DetectionMetrics(
        numbers=dict(zip(NUMBERS, values, strict=True)),
        size_terciles=(ap(4), ap(5), ap(6)),
        boundaries=boundaries,
        categories={name: _mean(precision[:, :, k, 0, -1]) for k, name in enumerate(records.classes)},
    )


def _curves(
    records: Evaluated, task: str, ranges: list[list[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision [thresholds, recalls, classes, sizes, 1 | 10 | 100 detections] and recall, without recalls; -1 for no object."""
    from faster_coco_eval import COCO, COCOeval_faster

    categories = [{"id": k, "name": name} for k, name in enumerate(records.classes, start=1)]

    def coco(annotations: list[Record]) -> Any:
        copies = [dict(record) for record in annotations]  # the evaluation writes into them
        return COCO(
            {"images": [dict(image) for image in records.images], "categories": categories, "annotations": copies}
        )

    predictions = records.predictions
    if task == "masks":  # an unmatched detection has the size of its mask, not of its box
        predictions = [one | {"area": one["pixels"]} for one in predictions]
    evaluation = COCOeval_faster(
        coco(records.truth), coco(predictions), "bbox" if task == "boxes" else "segm", rle_iou_max_workers=1
    )
    evaluation.params.areaRng = ranges
    evaluation.params.areaRngLbl = [str(n) for n in range(len(ranges))]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _boundaries(areas: list[float]) -> tuple[float, float]:
    """Areas b_1 and b_2 of the objects that end the first and second third, nan where there are none."""
    if not areas:
        return math.nan, math.nan
    areas = sorted(areas)
    return areas[-(-len(areas) // 3) - 1], areas[-(-2 * len(areas) // 3) - 1]


def _thirds(boundaries: tuple[float, float]) -> list[list[float]]:
    """COCO's closed intervals of the thirds: no area lies in two of them."""
    if math.isnan(boundaries[0]):
        return [[0.0, _LARGEST]] * 3
    first, second = boundaries
    return [[0.0, first], [math.nextafter(first, math.inf), second], [math.nextafter(second, math.inf), _LARGEST]]


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what is there, nan where nothing is."""
    there = values[values > -1]
    return float(there.mean()) if there.size else math.nan
