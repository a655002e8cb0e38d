"""COCO-format data sets: an annotations file and a folder of images, read whole and checked before anything is trained.

Of the JSON file

    {"categories": [{"id", "name"}], "images": [{"id", "file_name", "height", "width"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, w, h], "area", "iscrowd", "segmentation"}]}

``iscrowd`` may be left out (0), ``segmentation`` where no masks are asked for; other keys are not looked at. Category ids may
have gaps: labels are 1..K in the order of the ids, 0 is torchvision's background. Images are upright, as their EXIF orientation
has them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secondorder.data.datasets import VARIABLE
from secondorder.data.files import expanded, is_folder, open_regular, reason, shown
from secondorder.errors import InputError, check_flag, check_known, check_whole, short
from secondorder.transfer.records import (
    CHECKS,
    REQUIRED,
    CocoImage,
    CocoObject,
    category_parser,
    check_file,
    image_parser,
    object_parser,
    parsed,
)

PRESETS = {"bccd": ("train", "val", "test"), "nuclei": ("train", "val")}
"""Data sets that have a folder of their name in the data root -> their splits. Of nuclei there are masks."""

_PREFIX, _SUFFIX = "instances_", ".json"


@dataclass(frozen=True)
class CocoAnnotations:
    """A checked file: images, the objects of each (some have none), and category id -> name in the order of labels 1..K."""

    file: Path
    images: tuple[CocoImage, ...]
    objects: tuple[tuple[CocoObject, ...], ...]
    categories: dict[int, str]
    masks: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 1..K, in the order of the category ids."""
        return tuple(self.categories.values())

    def subset(self, indices: Sequence[int]) -> "CocoAnnotations":
        """The annotations of some of the images, in the order of the indices, with all classes.

        InputError for an index that is outside, or none.
        """
        chosen = [*indices]
        for n in chosen:
            check_whole("index of an image", n, 0, len(self.images) - 1)
        if not chosen:
            raise InputError("a subset has at least 1 image; there are none among the indices")
        images = tuple(self.images[n] for n in chosen)
        return replace(self, images=images, objects=tuple(self.objects[n] for n in chosen))


def find_splits(root: str | Path | None = None, name: str | None = None) -> dict[str, tuple[Path, Path]]:
    """The splits of a COCO-format folder -> (annotations file, folder of images), for `read_coco`.

    A split lies in ``annotations/instances_<split>.json`` and ``<split>/``, as in COCO itself.

    Args:
        root: the folder, or with a name the data root that holds it; None: the folder of ``SECONDORDER_DATA``.
        name: row of `PRESETS`, or None.

    Raises:
        InputError: for an unknown name, a folder that is not there or holds no split, and a split without images.
    """
    if name is not None:
        check_known("COCO-format data set", name, PRESETS)
    root = root if root is not None else os.environ.get(VARIABLE)
    way_out = f"pass --data-root or set {VARIABLE}"
    if root is None or root == "":
        raise InputError(f"a COCO-format data set needs the folder that holds it; {way_out}")
    folder = expanded(root, "data root") / (name or "")
    if not is_folder(folder / "annotations"):
        raise InputError(f"{shown(folder)} holds no folder annotations; {way_out}")
    files = sorted((folder / "annotations").glob(f"{_PREFIX}*{_SUFFIX}"))
    splits = {file.name.removeprefix(_PREFIX).removesuffix(_SUFFIX): file for file in files}
    missing = [split for split in PRESETS[name] if split not in splits] if name else []
    if missing or not splits:
        wanted = f"{_PREFIX}{missing[0] if missing else '<split>'}{_SUFFIX}"
        raise InputError(f"{shown(folder / 'annotations')} holds no {wanted}; unpack the data again")
    for split in splits:
        if not is_folder(folder / split):
            raise InputError(
                f"{shown(folder / split)} is no folder, but its annotations are there; put its images there"
            )
    return {split: (file, folder / split) for split, file in splits.items()}


def read_coco(
    annotations: str | Path, images: str | Path, *, masks: bool = False, check: str = "headers"
) -> CocoAnnotations:
    """Read an annotations file and look at its images; everything bad in them is an error here, not in training.

    Args:
        annotations: the JSON file.
        images: the folder that its ``file_name`` start from.
        masks: whether every object must have a segmentation, which is read.
        check: what is looked at of each image, of `CHECKS`. For "headers" a PNG or TIFF is decoded, too.

    Raises:
        InputError: in one line that names the file and record, of several the first and how many: no JSON, missing keys,
            duplicate ids, annotations of unknown images or categories, boxes outside of the image (by more than half a pixel),
            sides and areas that are no positive numbers, bad segmentations, missing and damaged images or of another size, no
            images, no annotations.
    """
    check_flag("masks", masks)
    check_known("check", check, CHECKS)
    file, folder = expanded(annotations, "the annotations file"), expanded(images, "the image folder")
    if not is_folder(folder):
        raise InputError(f"the image folder {shown(folder)} is no folder")
    table = _lists(file)
    categories = dict(sorted(parsed(file, "categories", table["categories"], category_parser())))
    found = parsed(file, "images", table["images"], image_parser(folder))
    labels = {category: label for label, category in enumerate(categories, start=1)}
    objects: list[list[CocoObject]] = [[] for _ in found]
    for n, one in parsed(file, "annotations", table["annotations"], object_parser(found, labels, masks)):
        objects[n].append(one)
    in_order = iter(found)
    parsed(file, "images", table["images"], lambda record: check_file(next(in_order), check))
    return CocoAnnotations(file, tuple(found), tuple(map(tuple, objects)), categories, masks)


def _lists(file: Path) -> dict[str, Any]:
    """The JSON file, with its three lists, none empty."""
    with open_regular(file) as stream:
        content = stream.read()
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(file)} is truncated or no JSON ({reason(error)}); copy it again") from error
    if not isinstance(table, dict):
        raise InputError(f"{shown(file)} holds {short(type(table).__name__)}, not an object with {', '.join(REQUIRED)}")
    for key in REQUIRED:
        if not isinstance(table.get(key), list):
            what = f"{key} of type {type(table[key]).__name__}" if key in table else f"no {key}"
            raise InputError(f"{shown(file)} has {what}; a COCO file has the lists {', '.join(REQUIRED)}")
        if not table[key]:
            raise InputError(f"{shown(file)} has an empty list of {key}; nothing can be trained or evaluated on it")
    return table
