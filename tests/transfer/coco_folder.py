"""A tiny COCO-format folder: three images, category ids with gaps, a mask in each of the three forms, a crowd."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 12, 10  # of image 5, which has the objects
RECTANGLE = (2, 1, 4, 3)  # x, y, w, h of annotations 11 to 13


def rectangle(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs down the columns, the first of zeros, counted one pixel after the other."""
    lengths, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


def content() -> dict[str, Any]:
    x, y, w, h = RECTANGLE
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    size = [HEIGHT, WIDTH]
    common = {"image_id": 5, "bbox": list(RECTANGLE), "area": 12, "iscrowd": 0}
    return {
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": 5, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
            {"id": 2, "file_name": "b.png", "height": 8, "width": 9},
            {"id": 9, "file_name": "c.jpg", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            common | {"id": 11, "category_id": 7, "segmentation": [corners]},
            common | {"id": 12, "category_id": 3, "segmentation": {"size": size, "counts": runs(rectangle(*RECTANGLE))}},
            common | {"id": 13, "category_id": 7, "segmentation": {"size": size, "counts": "e03700000k1"}},
            {"id": 14, "image_id": 9, "category_id": 3, "bbox": [0.5, 0, 6, 10], "area": 60.0, "iscrowd": 1,
             "segmentation": {"size": size, "counts": [0, 60, 60]}},
        ],
    }  # fmt: skip


def pixels(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(root: Path, table: object) -> tuple[Path, Path]:
    """The annotations file and the folder of images, split train of the root."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "train").mkdir(exist_ok=True)
    file = root / "annotations" / "instances_train.json"
    file.write_text(table if isinstance(table, str) else json.dumps(table))
    Image.fromarray(pixels(5)).save(root / "train" / "a.png")
    Image.fromarray(pixels(2, 8, 9)).save(root / "train" / "b.png")
    Image.fromarray(pixels(9)).save(root / "train" / "c.jpg")
    return file, root / "train"
