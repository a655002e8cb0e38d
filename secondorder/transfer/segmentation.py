"""Segmentations of COCO files: polygons and run lengths, plain or compressed, to masks ``[n, H, W]``.

Run lengths go down the columns, the first run is of zeros. Compressed, a run is a number of 5 bits a character (48 + bits, 32 set
where more follow, 16 of the last one the sign), from the third run on as the difference to the run two before it.

Index letters: ``n`` objects of an image, ``H`` rows, ``W`` columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secondorder.errors import short
from secondorder.optional import needed_by

RLE = dict[str, Any]
"""A compressed mask, ``{"size": [H, W], "counts": str}``."""

SLACK = 0.5
"""Pixels that a box or polygon may reach beyond its image, by rounding."""

LARGEST = 1e9
"""Numbers of a record are smaller."""

_MOST_CHARACTERS = 7  # of a run: 35 bits


class RecordError(ValueError):
    """What is wrong with a record of a COCO file, as the rest of a sentence that begins with its name."""


def compressed(segmentation: object, height: int, width: int) -> RLE:
    """The mask of a segmentation as COCO files have it.

    Raises:
        RecordError: for a polygon of fewer than 3 points or outside of the image, run lengths of another size, damaged ones,
            what is neither, and a mask without a pixel.
    """
    if isinstance(segmentation, list):
        return _of_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise RecordError(
            f"has the segmentation {short(segmentation)}, neither polygons nor run lengths; write one of them"
        )
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise RecordError(
            f"has run lengths of the size {short(size)}, its image [{height}, {width}]; encode the mask again"
        )
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise RecordError(f"has the run lengths {short(runs)}; whole numbers of at least 0 are needed")
    if sum(runs) != height * width:
        raise RecordError(f"has run lengths of {sum(runs)} pixels, its image {height * width}; encode the mask again")
    if not any(runs[1::2]):
        raise RecordError("has a mask without a pixel; delete it")
    return {"size": [height, width], "counts": counts if isinstance(counts, str) else _compressed_runs(runs)}


def run_lengths(counts: str) -> list[int]:
    """The run lengths of a compressed mask; RecordError where the string is damaged."""
    runs: list[int] = []
    value = characters = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or characters == _MOST_CHARACTERS:
            raise RecordError(f"has damaged run lengths {short(counts)}; encode the mask again")
        value |= (bits & 31) << (5 * characters)
        characters += 1
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << (5 * characters)
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = characters = 0
    if characters:
        raise RecordError(f"has run lengths that end too early, {short(counts)}; encode the mask again")
    return runs


def _compressed_runs(runs: Sequence[int]) -> str:
    """The inverse of `run_lengths`."""
    text = []
    for n, run in enumerate(runs):
        value = run - runs[n - 2] if n > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)


def _of_polygons(polygons: list[Any], height: int, width: int) -> RLE:
    """The union of polygons ``[x, y, x, y, ...]``, as COCO's own code draws it."""
    if not polygons:
        raise RecordError("has no polygon in its segmentation; delete it, or read without masks")
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(map(is_number, polygon)):
            raise RecordError(f"has the polygon {short(polygon)}; give a list of numbers x, y, x, y, ...")
        if len(polygon) < 6 or len(polygon) % 2:
            raise RecordError(f"has a polygon of {len(polygon)} numbers; 3 points, 6 numbers, are the least")
        for points, side in ((polygon[0::2], width), (polygon[1::2], height)):
            if min(points) < -SLACK or max(points) > side + SLACK:
                raise RecordError(f"has the polygon {short(polygon)} outside of its image of {width}x{height} pixels")
    with needed_by("a mask of a COCO file"):
        from faster_coco_eval.core import mask as api
    union = api.merge(api.frPyObjects([[float(x) for x in polygon] for polygon in polygons], height, width))
    if not api.area(union):
        raise RecordError("has polygons that cover no pixel; delete it")
    return _as_text(union)


def _as_text(rle: RLE) -> RLE:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def decoded(masks: Sequence[RLE], height: int, width: int) -> NDArray[np.uint8]:
    """Compressed masks of one image as an array of 0 and 1 ``[n, H, W]``."""
    if not masks:
        return np.zeros((0, height, width), np.uint8)
    with needed_by("a mask of a COCO file"):
        from faster_coco_eval.core import mask as api
    return np.ascontiguousarray(api.decode(list(masks)).transpose(2, 0, 1))


def encoded(masks: NDArray[np.uint8]) -> tuple[list[RLE], list[float]]:
    """Masks of 0 and 1 ``[n, H, W]`` compressed, and the pixels of each ``[n]``."""
    if not len(masks):
        return [], []
    with needed_by("a mask of a COCO file"):
        from faster_coco_eval.core import mask as api
    rles = api.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    return [_as_text(rle) for rle in rles], [float(pixels) for pixels in masks.sum(axis=(1, 2), dtype=np.int64)]


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number, and no absurd one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
