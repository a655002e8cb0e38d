"""A small COCO-format folder: bright rectangles of two classes, with masks, on dark noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 32
CLASSES = ("low", "high")
"""Wider than high, and higher than wide."""
SIZES = {1: (12, 6), 2: (6, 12)}
"""Label -> width and height in pixels."""


def write_scenes(root: Path, images: int = 6, splits: tuple[str, ...] = ("train", "val"), objects: int = 2) -> Path:
    """The folder: for each split as many images, each with a rectangle of label 1 and one of 2 (or of 1 alone)."""
    (root / "annotations").mkdir(parents=True)
    for number, split in enumerate(splits):
        (root / split).mkdir()
        random = np.random.default_rng(number)
        table: dict[str, list[dict[str, Any]]] = {
            "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES, start=1)],
            "images": [],
            "annotations": [],
        }
        for n in range(images):
            pixels = random.integers(0, 40, (SIDE, SIDE, 3), dtype=np.uint8)
            table["images"].append({"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE})
            for label in range(1, objects + 1):
                w, h = SIZES[label]
                x, y = int(random.integers(1, 15 - w)), int(random.integers(1, SIDE - h - 1))
                x += 16 * (label - 1)
                pixels[y : y + h, x : x + w] = 200 + 20 * label
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                one = {"image_id": n, "category_id": label, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                table["annotations"].append(
                    one | {"id": len(table["annotations"]), "segmentation": [list(map(float, corners))]}
                )
            Image.fromarray(pixels).save(root / split / f"{n}.png")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))
    return root
