"""Transfer: probes, metrics, COCO-format data and detectors with good, bad and absurd arguments."""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secondorder.networks import network
from secondorder.transfer import (
    CocoDataset,
    FeaturePyramid,
    dense_probe,
    detection_metrics,
    detector,
    few_shot,
    linear_probe,
    pooled_features,
    read_coco,
    training_transform,
)

from .call import Call, arguments
from .values import absurd, bad_tensor, named, normal

SIDE = 24


def transfer(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((probe, bad_probe, metrics, bad_metrics, records, transformed, bad_detector))(random)


def probe(random: Random) -> Call:
    """Features that tell two classes apart are found by a linear probe."""
    n, width = random.randint(4, 12), random.randint(1, 6)
    labels = torch.arange(2 * n) % 2
    features = normal(random, 2 * n, width) * 0.01 + labels[:, None]
    scale = 10.0 ** random.randint(-20, 20)
    shots = few_shot(labels, random.randint(1, n), random.getrandbits(20))

    def run() -> float:
        x = features * scale
        return linear_probe(x[shots], labels[shots], x, labels)

    return Call(
        f"linear_probe({list(features.shape)} times {scale:g}, {len(shots)} shots)",
        run,
        check=lambda accuracy: None if accuracy == 1.0 or len(shots) < 4 else f"accuracy {accuracy}",
        pure=True,
    )


def bad_probe(random: Random) -> Call:
    """One thing that is no feature, label, map, mask or number."""
    maps, masks = normal(random, 4, 3, 6, 6, dtype=torch.float32), torch.zeros(4, 8, 8, dtype=torch.int64)
    masks[:, :4] = 1
    labels = torch.arange(4) % 2
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "pooled_features": (pooled_features, {"maps": maps, "kind": "mean_and_covariance"}),
        "few_shot": (few_shot, {"labels": labels, "shots": 1, "seed": 0}),
        "linear_probe": (
            linear_probe,
            {
                "features": maps[:, :, 0, 0],
                "labels": labels,
                "test_features": maps[:, :, 1, 1],
                "test_labels": labels,
                "strength": 0.1,
            },
        ),
        "dense_probe": (
            dense_probe,
            {
                "maps": maps,
                "masks": masks,
                "test_maps": maps.clone(),
                "test_masks": masks.clone(),
                "seed": 0,
                "width": 4,
                "steps": 2,
                "batch_size": 2,
                "learning_rate": 0.01,
            },
        ),
    }
    name = random.choice(list(calls))
    function, settings = calls[name]
    field = random.choice(list(settings))
    value = settings[field]
    if isinstance(value, Tensor):
        settings[field] = bad_tensor(random, value) if random.random() < 0.7 else absurd(random)
    else:
        value = absurd(random)
        settings[field] = 3 if isinstance(value, int) and value > 100 else value
    return Call(f"{name}({arguments(settings)})", lambda: function(**settings), pure=True)


def objects(random: Random, n: int, scores: bool) -> dict[str, Any]:
    """Boxes inside an image, labels 1 or 2, masks and perhaps scores."""
    corner = torch.tensor([[random.randint(0, 12), random.randint(0, 12)] for _ in range(n)]).reshape(n, 2)
    sides = torch.tensor([[random.randint(1, 11), random.randint(1, 11)] for _ in range(n)]).reshape(n, 2)
    masks = torch.zeros(n, SIDE, SIDE)
    for mask, (x, y), (w, h) in zip(masks, corner.tolist(), sides.tolist(), strict=True):
        mask[y : y + h, x : x + w] = 1
    found: dict[str, Any] = {
        "boxes": torch.cat([corner, corner + sides], 1).float(),
        "labels": torch.tensor([random.randint(1, 2) for _ in range(n)], dtype=torch.int64),
        "masks": masks[:, None] if scores else masks.to(torch.uint8),
    }
    return found | ({"scores": torch.tensor([random.random() for _ in range(n)])} if scores else {})


def metrics(random: Random) -> Call:
    """The truth itself, found with any scores, is found without a mistake."""
    masks = random.random() < 0.5
    truth = [objects(random, random.randint(0, 4), scores=False) for _ in range(random.randint(1, 4))]
    found = [
        t | {"masks": t["masks"][:, None].float(), "scores": torch.tensor([random.random() for _ in t["labels"]])}
        for t in truth
    ]
    objects_there = any(len(t["labels"]) for t in truth)

    def check(result: Any) -> str | None:
        values = [result[task].numbers["AP"] for task in result]
        right = all(abs(value - 1) < 1e-9 for value in values) if objects_there else all(v != v for v in values)
        return None if right else f"AP {values}"

    return Call(
        f"detection_metrics of the truth of {len(truth)} images, masks={masks}",
        lambda: detection_metrics(truth, found, classes=("a", "b"), masks=masks),
        check=check,
        pure=True,
    )


def bad_metrics(random: Random) -> Call:
    """One record that is damaged, or one argument."""
    truth = [objects(random, random.randint(1, 3), scores=False) for _ in range(2)]
    found = [objects(random, random.randint(1, 3), scores=True) for _ in range(2)]
    settings: dict[str, Any] = {"classes": ("a", "b"), "masks": random.random() < 0.5}
    where = random.choice(("truth", "found", "settings"))
    if where == "settings":
        field = random.choice(list(settings))
        settings[field] = absurd(random)
    else:
        one = random.choice(truth if where == "truth" else found)
        field = random.choice(list(one))
        one[field] = bad_tensor(random, one[field]) if random.random() < 0.7 else absurd(random)
    words = f"detection_metrics with {where}, {field} changed, {arguments(settings)}"
    return Call(words, lambda: detection_metrics(truth, found, **settings), pure=True)


def write(root: Path, table: Any) -> tuple[Path, Path]:
    """The files of a COCO-format folder with two images."""
    (root / "images").mkdir()
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{n}.png")
    file = root / "annotations.json"
    file.write_text(json.dumps(table), encoding="utf-8")
    return file, root / "images"


def good_table() -> dict[str, Any]:
    images = [{"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE} for n in range(2)]
    square = [2, 3, 10, 3, 10, 9, 2, 9]
    of_first = {"image_id": 0, "bbox": [2, 3, 8, 6], "area": 48, "iscrowd": 0, "segmentation": [square]}
    annotations = [of_first | {"id": n, "category_id": 1 + n} for n in range(2)]
    return {"images": images, "annotations": annotations, "categories": [{"id": n, "name": str(n)} for n in (1, 2)]}


PLAIN = (
    None, True, "", "1", "x", -1, 0, 1, 2, 3, 0.5, -0.5, 1e300, float("nan"), float("inf"), [], [1], [[]], {}, [1, 2, 3, 4],
    [1, 2, 3, "4"], [0, 0, 0, 0], [[1, 2, 3, 4]], {"size": [SIDE, SIDE], "counts": [1, 2]}, 10**30, "../0.png", "a\nb",
)  # fmt: skip
"""Values that JSON can hold."""


def records(random: Random) -> Call:
    """A COCO file with one value that should not be there, read, and its samples taken."""
    table = good_table()
    part = random.choice(list(table))
    record = random.choice(table[part])
    field = random.choice([*record, "new"])
    value = random.choice(PLAIN)
    way = random.choice(("change", "change", "change", "remove", "part"))
    if way == "change":
        record[field] = value
    elif way == "remove":
        record.pop(field, None)
    else:
        table[part] = value
    masks = random.random() < 0.5

    def run() -> list[Any]:
        with tempfile.TemporaryDirectory() as name:
            data = CocoDataset(read_coco(*write(Path(name), table), masks=masks), masks=masks)
            return [data[n] for n in range(len(data))]

    return Call(f"read_coco with {way} {part}.{field} {value!r:.40}, masks={masks}", run, pure=True)


def transformed(random: Random) -> Call:
    """Crops and flips keep boxes within the image, and masks within boxes."""
    settings: dict[str, Any] = {"crop": random.choice((None, 1, 5, 24, 100)), "flips": ("horizontal", "vertical")}
    extra: dict[str, Any] = {"size": random.choice((None, None, (12, 30))), "contrast": random.choice((None, (1, 99)))}
    if odd := random.random() < 0.5:
        changed = random.choice((settings, extra))
        field = random.choice(list(changed))
        changed[field] = absurd(random)
        if isinstance(changed[field], int) and changed[field] > 1000:
            changed[field] = 2.5

    def run() -> list[Any]:
        with tempfile.TemporaryDirectory() as name:
            annotations = read_coco(*write(Path(name), good_table()), masks=True)
            data = CocoDataset(annotations, masks=True, transform=training_transform(**settings), **extra)
            return [data[n] for n in range(2)]

    def check(samples: list[Any]) -> str | None:
        for image, target in samples:
            boxes = target["boxes"]
            height, width = image.shape[-2:]
            inside = (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
            if not inside or target["masks"].shape != (len(boxes), height, width):
                return f"boxes {boxes.tolist()} of an image {list(image.shape)}"
        return None

    words = f"CocoDataset({arguments(extra)}, transform=training_transform({arguments(settings)}))"
    return Call(words, run, check=check, pure=True, expected="either" if odd else "accept")


_NETWORK: list[Any] = []


def bad_detector(random: Random) -> Call:
    """One absurd argument of a detector or a pyramid."""
    if not _NETWORK:
        _NETWORK.append(network("digits_tiny", "gap", num_classes=2))
    settings: dict[str, Any] = {"width": 8, "adaptation": "none", "frozen": False}
    of = random.choice((FeaturePyramid, detector))
    if of is detector:
        settings |= {
            "classes": 2, "task": "boxes", "kind": "rcnn", "hidden": 4, "roi_size": 2, "anchors": None, "normalisation": None,
            "image_size": None,
        }  # fmt: skip
    field = random.choice(list(settings))
    value = absurd(random)
    settings[field] = 3 if isinstance(value, int) and value > 64 else value
    model = copy.deepcopy(_NETWORK[0])
    if random.random() < 0.1:
        model = absurd(random)
    names = () if of is detector else (field, named(value), "network")
    return Call(f"{of.__name__}({arguments(settings)})", lambda: of(model, **settings), names=names)
