"""COCO's numbers: those of pycocotools on random detections, and by hand where a hand is enough."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import content, write
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError
from secondorder.transfer import NUMBERS, CocoDataset, DetectionMetrics, detection_metrics, read_coco

SIDE = 128
CLASSES = ("a", "b", "c")  # of c there is no object
Images = list[dict[str, Any]]


def corners(*boxes: tuple[float, ...]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def filled(boxes: Tensor) -> Tensor:
    """Masks ``[n, H, W]`` of the pixels inside of boxes."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    return ((columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)).to(torch.uint8)


def random_images(seed: int, count: int = 8) -> tuple[Images, Images]:
    """Objects of many sizes, crowds among them, and detections near to them, elsewhere and of the wrong class."""
    random = np.random.default_rng(seed)
    truth, predictions = [], []
    for image in range(count):
        n = 0 if image == 3 else int(random.integers(1, 25))
        sides = np.exp(random.uniform(np.log(4), np.log(120), (n, 2)))
        start = random.uniform(0, 1, (n, 2)) * (SIDE - sides)
        boxes = np.concatenate([start, start + sides], 1).round(1)
        labels = random.integers(1, 3, n)
        jitter = np.concatenate([boxes, boxes[: n // 2], random.uniform(0, 60, (4, 2)).repeat(2, 1)[:, [0, 2, 1, 3]]])
        jitter[-4:] += [0, 0, 30, 40]
        jitter += random.normal(0, 2.0, jitter.shape)
        jitter[:, 2:] = np.maximum(jitter[:, 2:], jitter[:, :2] + 1)
        guesses = np.where(
            random.random(len(jitter)) < 0.15, 2, np.concatenate([labels, labels[: n // 2], [1, 2, 3, 1]])
        )
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels), "image_id": 100 - image}
        target |= {
            "iscrowd": torch.from_numpy((random.random(n) < 0.15).astype(np.int64)),
            "masks": filled(target["boxes"]),
        }
        target["masks"][:, ::3, ::2] = 0
        target["area"] = target["masks"].sum((1, 2)).double()
        found = torch.from_numpy(jitter).float()
        probabilities = 0.3 + 0.4 * filled(found)
        predictions.append(
            {"boxes": found, "labels": torch.from_numpy(guesses), "masks": probabilities[:, None],
             "scores": torch.from_numpy(random.random(len(jitter))).float()}
        )  # fmt: skip
        truth.append(target)
    return truth, predictions


def xywh(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def rle(mask: Tensor) -> dict[str, Any]:
    return pycocotools_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))


def by_pycocotools(truth: Images, predictions: Images, task: str) -> COCOeval:
    """The evaluation of the reference, on records written out for it."""
    objects, found = [], []
    for image, (target, prediction) in enumerate(zip(truth, predictions, strict=True), start=1):
        for i, box in enumerate(target["boxes"].double().tolist()):
            objects.append(
                {"id": len(objects) + 1, "image_id": image, "category_id": int(target["labels"][i]), "bbox": xywh(box),
                 "area": float(target["area"][i]), "iscrowd": int(target["iscrowd"][i]), "segmentation": rle(target["masks"][i])}
            )  # fmt: skip
        for i, box in enumerate(prediction["boxes"].double().tolist()):
            one = {
                "image_id": image,
                "category_id": int(prediction["labels"][i]),
                "score": float(prediction["scores"][i]),
            }
            found.append(
                one
                | ({"bbox": xywh(box)} if task == "boxes" else {"segmentation": rle(prediction["masks"][i, 0] > 0.5)})
            )
    reference = COCO()
    reference.dataset = {
        "images": [{"id": n + 1, "height": SIDE, "width": SIDE} for n in range(len(truth))],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)],
        "annotations": objects,
    }
    reference.createIndex()
    return COCOeval(reference, reference.loadRes(found), "bbox" if task == "boxes" else "segm")


@pytest.mark.parametrize("task", ["boxes", "masks"])
@pytest.mark.parametrize("seed", range(4))
def test_the_numbers_of_pycocotools(task: str, seed: int) -> None:
    truth, predictions = random_images(seed)
    ours = detection_metrics(truth, predictions, classes=CLASSES, masks=True)[task]
    evaluation = by_pycocotools(truth, predictions, task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = np.where(evaluation.stats == -1, math.nan, evaluation.stats)
    assert tuple(ours.numbers) == NUMBERS
    np.testing.assert_allclose(list(ours.numbers.values()), expected, rtol=0, atol=1e-12)
    assert len(set(expected.tolist())) > 9  # sizes and numbers of detections matter
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    categories = [precision[:, :, k].mean() for k in range(2)]
    np.testing.assert_allclose(list(ours.categories.values()), [*categories, math.nan], rtol=0, atol=1e-12)
    assert tuple(ours.categories) == CLASSES


@pytest.mark.parametrize("task", ["boxes", "masks"])
def test_size_terciles_are_those_of_pycocotools_given_their_bounds(task: str) -> None:
    truth, predictions = random_images(5)
    ours = detection_metrics(truth, predictions, classes=CLASSES, masks=True)[task]
    areas = np.sort(np.concatenate([t["area"][t["iscrowd"] == 0].numpy() for t in truth]))
    first, second = ours.boundaries
    assert (areas <= first).mean() == pytest.approx(1 / 3, abs=0.03)
    assert (areas <= second).mean() == pytest.approx(2 / 3, abs=0.03)
    evaluation = by_pycocotools(truth, predictions, task)
    evaluation.params.areaRng = [[0, first], [first + 1e-6, second], [second + 1e-6, 1e10]]
    evaluation.params.areaRngLbl = ["1", "2", "3"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]
    expected = [precision[:, :, :, size][precision[:, :, :, size] > -1].mean() for size in range(3)]
    np.testing.assert_allclose(ours.size_terciles, expected, rtol=0, atol=1e-12)
    assert len(set(expected)) == 3


def test_nothing_that_is_given_changes() -> None:
    truth, predictions = random_images(6, count=3)
    kept = copy.deepcopy((truth, predictions))
    first = detection_metrics(truth, predictions, classes=CLASSES, masks=True)
    for images, before in zip((truth, predictions), kept, strict=True):
        for image, same in zip(images, before, strict=True):
            assert image.keys() == same.keys()
            assert all(torch.equal(torch.as_tensor(image[key]), torch.as_tensor(same[key])) for key in same)
    assert repr(detection_metrics(iter(truth), iter(predictions), classes=CLASSES, masks=True)) == repr(first)


def found(*detections: tuple[tuple[float, ...], float], label: int = 1) -> dict[str, Tensor]:
    boxes = corners(*(box for box, _ in detections))
    return {
        "boxes": boxes,
        "scores": torch.tensor([score for _, score in detections]),
        "labels": torch.full((len(boxes),), label),
    }


def there(*boxes: tuple[float, ...], **values: Tensor) -> dict[str, Tensor]:
    return {"boxes": corners(*boxes), "labels": torch.ones(len(boxes), dtype=torch.int64)} | values


def of_boxes(truth: Images, predictions: Images, classes: tuple[str, ...] = ("a",)) -> DetectionMetrics:
    return detection_metrics(truth, predictions, classes=classes)["boxes"]


A, B, FAR = (0, 0, 20, 20), (40, 40, 60, 60), (80, 80, 100, 100)


def test_by_hand() -> None:
    def ap(*detections: tuple[tuple[float, ...], float], **values: Tensor) -> float:
        return of_boxes([there(A, B, **values)], [found(*detections)]).numbers["AP"]

    assert ap((A, 0.9), (B, 0.8)) == 1  # a perfect detector
    assert ap((A, 0.9), (B, 0.8), (FAR, 0.1)) == 1  # a false positive below
    assert ap((A, 0.9), (B, 0.8), (FAR, 0.95)) == pytest.approx(
        2 / 3
    )  # and above: 1/2 and 2/3, the larger from the right
    assert ap((A, 0.9)) == pytest.approx(51 / 101)  # precision 1 at recalls 0, 0.01, ..., 0.5
    assert ap((A, 0.9), (FAR, 0.8), (B, 0.7)) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert ap((A, 0.9), (A, 0.8), (B, 0.7)) == pytest.approx((51 + 50 * 2 / 3) / 101)  # a double counts against
    crowd = torch.tensor([0, 1])
    assert ap((A, 0.9), (B, 0.95), (B, 0.94), iscrowd=crowd) == 1  # the crowd's do not
    assert ap((A, 0.9), (FAR, 0.95), iscrowd=crowd) == pytest.approx(1 / 2)
    half = (0, 0, 20, 12)  # of A: a match at 0.5, 0.55 and 0.6
    assert of_boxes([there(A)], [found((half, 0.9))]).numbers["AP"] == pytest.approx(0.3)
    assert of_boxes([there(A)], [found((half, 0.9))]).numbers["AP50"] == 1
    assert of_boxes([there(A)], [found((half, 0.9))]).numbers["AP75"] == 0


def test_areas_are_those_of_the_truth_else_of_the_boxes() -> None:
    large = (0, 0, 100, 100)
    numbers = of_boxes([there(A, large)], [found((A, 0.5))]).numbers
    assert [numbers[f"AP_{size}"] for size in "SML"] == pytest.approx([1, math.nan, 0], nan_ok=True)
    numbers = of_boxes([there(A, large, area=torch.tensor([400.0, 2000.0]))], [found((A, 0.5))]).numbers
    assert [numbers[f"AP_{size}"] for size in "SML"] == pytest.approx([1, 0, math.nan], nan_ok=True)


def test_no_detections_and_no_objects() -> None:
    nothing = found()
    metrics = of_boxes([there(A), there()], [nothing, nothing], ("a", "b"))
    assert metrics.numbers == pytest.approx(
        dict.fromkeys(NUMBERS, 0.0) | dict.fromkeys(("AP_M", "AP_L", "AR_M", "AR_L"), math.nan), nan_ok=True
    )
    assert metrics.categories == pytest.approx({"a": 0.0, "b": math.nan}, nan_ok=True)
    assert metrics.boundaries == (400, 400)
    assert metrics.size_terciles == pytest.approx((0.0, math.nan, math.nan), nan_ok=True)
    for predictions in (nothing, found((A, 0.9))):
        metrics = of_boxes([there()], [predictions])
        values = [*metrics.numbers.values(), *metrics.size_terciles, *metrics.boundaries, *metrics.categories.values()]
        assert all(map(math.isnan, values))


def test_terciles_keep_equal_areas_together() -> None:
    boxes = [(0, 0, 5, 2), (20, 0, 30, 1), (40, 0, 45, 2), (60, 0, 65, 2), (80, 0, 84, 5), (100, 0, 105, 6)]
    metrics = of_boxes([there(*boxes)], [found(*((box, 0.9) for box in boxes[:-1]))])
    assert metrics.boundaries == (10, 10)
    assert metrics.size_terciles == pytest.approx((1.0, math.nan, 51 / 101), nan_ok=True)
    metrics = of_boxes([there(*boxes[3:])], [found((boxes[3], 0.9), (boxes[5], 0.8))])
    assert metrics.boundaries == (10, 20)
    assert metrics.size_terciles == (1, 0, 1)
    crowd = there(*boxes[3:], FAR, iscrowd=torch.tensor([0, 0, 0, 1]))
    assert of_boxes([crowd], [found((boxes[3], 0.9), (boxes[5], 0.8))]).boundaries == (10, 20)


def test_a_data_set_is_compared_as_a_whole(tmp_path: Path) -> None:
    """In the data set's size and with its crowds, whatever it trains on."""
    data = CocoDataset(read_coco(*write(tmp_path, content()), masks=True), masks=True, size=(20, 24))
    predictions = []
    for target in data.truth():
        scores = torch.linspace(0.9, 0.8, len(target["labels"]))
        masks = target["masks"][:, None].float()
        predictions.append({"boxes": target["boxes"], "labels": target["labels"], "scores": scores, "masks": masks})
    metrics = detection_metrics(data, predictions)
    assert metrics.keys() == {"boxes", "masks"}
    for task in metrics.values():
        assert task.categories == {"cat": 1.0, "dog": pytest.approx(1.0)}
        assert task.boundaries == (48, 48)
    assert detection_metrics(data, predictions, masks=False).keys() == {"boxes"}
    predictions[2]["labels"] = predictions[2]["labels"] + 1  # out of the crowd of cats, a false dog
    predictions[2]["scores"] = torch.tensor([0.99])
    assert detection_metrics(data, predictions)["boxes"].categories["dog"] == pytest.approx(2 / 3)


def bad() -> Iterator[tuple[str, Images, Images, dict[str, Any], type[InputError], str]]:
    """What is wrong, truth and predictions, arguments, the error and its words."""
    truth, good = [there(A) | {"image_id": 7}], [found((A, 0.9))]
    mask = torch.ones(1, 4, 4)

    def of(**values: Any) -> Images:
        return [{key: value for key, value in (good[0] | values).items() if value is not None}]

    who = r"the prediction of image 0 \(image_id 7\) has "
    yield (
        "a missing image",
        truth * 2,
        good,
        {},
        InputError,
        "image 1 has truth and no prediction; give a prediction for each",
    )
    yield "an image too many", truth, good * 2, {}, InputError, "image 1 has a prediction and no truth"
    yield "no images", [], [], {}, InputError, "no image to evaluate"
    yield (
        "a score of nan",
        truth,
        of(scores=torch.tensor([math.nan])),
        {},
        NonFiniteError,
        who + "scores that are not finite",
    )
    yield (
        "a box of nan",
        truth,
        of(boxes=corners((0, 0, math.nan, 2))),
        {},
        NonFiniteError,
        who + "a box that is not finite",
    )
    yield (
        "background",
        truth,
        of(labels=torch.tensor([0])),
        {},
        InputError,
        who + r"the label 0; labels are 1 to 1: \['a'\]",
    )
    yield "a label too large", truth, of(labels=torch.tensor([2])), {}, InputError, who + "the label 2"
    yield "labels of another kind", truth, of(labels=torch.tensor([1.0])), {}, InputError, who + "labels torch.float32"
    yield (
        "too few labels",
        truth,
        of(labels=torch.tensor([], dtype=torch.int64)),
        {},
        InputError,
        "1 whole numbers are needed",
    )
    yield (
        "too many scores",
        truth,
        of(scores=torch.rand(2)),
        {},
        InputError,
        who + r"scores of shape \[2\]; \[1\] is needed",
    )
    yield "no scores", truth, of(scores=None), {}, InputError, who + "no scores"
    yield "scores in a list", truth, of(scores=[0.9]), {}, InputError, r"image_id 7\): scores \[0.9\]: must be a tensor"
    yield "boxes of another shape", truth, of(boxes=torch.rand(1, 5)), {}, InputError, who + r"boxes of shape \[1, 5\]"
    yield "a box that is inside out", truth, of(boxes=corners((5, 0, 2, 2))), {}, InputError, who + "a box with x2 < x1"
    yield "no prediction", truth, [None], {}, InputError, r"image_id 7\) is None; a dict"  # type: ignore[list-item]
    yield (
        "an object without area",
        [there((5, 5, 5, 9))],
        good,
        {},
        InputError,
        "the truth of image 0 has a box without area",
    )
    yield (
        "an object of no class",
        [there(A) | {"labels": torch.tensor([4])}],
        good,
        {},
        InputError,
        "truth of image 0 has the label 4",
    )
    yield (
        "an area of nan",
        [there(A, area=torch.tensor([math.nan]))],
        good,
        {},
        NonFiniteError,
        "has area that are not finite",
    )
    yield "truth without masks", truth, good, {"masks": True}, InputError, "the truth of image 0 .* has no masks"
    yield (
        "no masks",
        [there(A, masks=mask)],
        good,
        {"masks": True},
        InputError,
        "the prediction of image 0 has no masks",
    )
    yield (
        "masks of another size",
        [there(A, masks=mask)],
        of(masks=torch.ones(1, 1, 4, 5)),
        {"masks": True},
        InputError,
        r"\[4, 5\] pixels",
    )
    yield (
        "masks of another shape",
        [there(A, masks=mask)],
        of(masks=mask),
        {"masks": True},
        InputError,
        r"\[1, 1, H, W\] is needed",
    )
    yield (
        "masks of nan",
        [there(A, masks=mask)],
        of(masks=mask[None] / 0 * 0),
        {"masks": True},
        NonFiniteError,
        "masks that are not",
    )
    yield "no classes", truth, good, {"classes": None}, InputError, "classes must be the names"
    yield "a class twice", truth, good, {"classes": ("a", "a")}, InputError, "classes must be different names"
    yield "one prediction", truth, good[0], {}, InputError, "predictions must be a list, one entry an image"  # type: ignore[misc]
    yield "masks by word", truth, good, {"masks": "yes"}, InputError, "masks must be True or False"


BAD = {case[0]: case[1:] for case in bad()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    truth, predictions, arguments, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        detection_metrics(truth, predictions, **({"classes": ("a",)} | arguments))
    assert type(caught.value) is error
