"""Records of a COCO file, one by one: categories, images and annotations checked and parsed, faults named by their record."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from secondorder.data.decoding import decode, upright_size
from secondorder.data.files import check_regular, exists, shown
from secondorder.errors import InputError, short
from secondorder.transfer.segmentation import RLE, SLACK, RecordError, compressed, is_number

CHECKS = ("files", "headers", "pixels")
"""What is looked at of every image: that the file is there; also the size in its header; all of its pixels."""

REQUIRED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
}
_SINGULAR = {"categories": "category", "images": "image", "annotations": "annotation"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image of the file: its id, path and size in pixels."""

    id: int
    file: Path
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class CocoObject:
    """An object: box (x, y, w, h) in pixels, label 1..K, area of the annotation, whether a crowd, and its mask if it was read."""

    id: int
    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool
    mask: RLE | None


def parsed(file: Path, kind: str, records: Iterable[Any], parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Every record of a kind parsed; InputError with the first fault and how many there are."""
    results, first, count = [], "", 0
    for position, record in enumerate(records):
        try:
            _check_keys(kind, record)
            results.append(parse(record))
        except RecordError as fault:
            count += 1
            first = first or f"{_name(kind, position, record)} {fault}"
    if count:
        raise InputError(f"{shown(file)}: {first}{f' (the first of {count} bad {kind})' if count > 1 else ''}")
    return results


def _name(kind: str, position: int, record: object) -> str:
    """How a message calls a record: by its id, or by its position where it has none."""
    known = isinstance(record, dict) and _is_id(record.get("id"))
    return f"{_SINGULAR[kind]} {record['id']}" if known else f"{kind}[{position}]"  # type: ignore[index]


def _check_keys(kind: str, record: object) -> None:
    """RecordError unless the record has the keys of its kind and an id."""
    if not isinstance(record, dict):
        raise RecordError(f"is {short(record)}; a record with {', '.join(REQUIRED[kind])} is needed")
    missing = [key for key in REQUIRED[kind] if key not in record]
    if missing:
        raise RecordError(f"has no {', '.join(missing)}; add it")
    if not _is_id(record["id"]):
        raise RecordError(f"has the id {short(record['id'])}; a whole number is needed")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _check_new(value: Any, seen: set[Any], what: str) -> None:
    """RecordError for a value that was seen before."""
    if value in seen:
        raise RecordError(f"has {what} of another record before it; give it one of its own")
    seen.add(value)


def category_parser() -> Callable[[dict[str, Any]], tuple[int, str]]:
    """A function of a record to its id and name; it raises RecordError for one that is not new or has no name."""
    ids: set[int] = set()
    names: set[str] = set()

    def parse(record: dict[str, Any]) -> tuple[int, str]:
        _check_new(record["id"], ids, "the id")
        name = record["name"]
        if not isinstance(name, str) or not name:
            raise RecordError(f"has the name {short(name)}; a word is needed")
        _check_new(name, names, f"the name {short(name)}")
        return record["id"], name

    return parse


def image_parser(folder: Path) -> Callable[[dict[str, Any]], CocoImage]:
    """A function of a record to the image below the folder; the file is not looked at. It raises RecordError for a bad record."""
    ids: set[int] = set()

    def parse(record: dict[str, Any]) -> CocoImage:
        _check_new(record["id"], ids, "the id")
        name, height, width = record["file_name"], record["height"], record["width"]
        if not isinstance(name, str) or not name or "\0" in name:
            raise RecordError(f"has the file_name {short(name)}; a file below the image folder is needed")
        if not all(_is_id(side) and side > 0 for side in (height, width)):
            raise RecordError(f"has height {short(height)} and width {short(width)}; positive whole numbers are needed")
        return CocoImage(record["id"], folder / name, height, width)

    return parse


def object_parser(
    images: list[CocoImage], labels: dict[int, int], masks: bool
) -> Callable[[dict[str, Any]], tuple[int, CocoObject]]:
    """Record -> the position of its image and the object; ``labels`` are those of the category ids."""
    ids: set[int] = set()
    by_id = {image.id: n for n, image in enumerate(images)}

    def parse(record: dict[str, Any]) -> tuple[int, CocoObject]:
        _check_new(record["id"], ids, "the id")
        for key, known in (("image_id", by_id), ("category_id", labels)):
            if not _is_id(record[key]) or record[key] not in known:
                raise RecordError(
                    f"has the {key} {short(record[key])}, which no record of the file has; correct or delete it"
                )
        n = by_id[record["image_id"]]
        box, area, crowd = record["bbox"], record["area"], record.get("iscrowd", 0)
        _check_box(box, images[n])
        if not is_number(area) or area <= 0:
            raise RecordError(f"has the area {short(area)}; a positive number is needed, w * h where there is no mask")
        if crowd not in (0, 1):
            raise RecordError(f"has iscrowd {short(crowd)}; 0 or 1 is needed")
        if masks and record.get("segmentation") is None:
            raise RecordError("has no segmentation; add it, or read without masks")
        mask = compressed(record["segmentation"], images[n].height, images[n].width) if masks else None
        x, y, w, h = map(float, box)
        return n, CocoObject(record["id"], (x, y, w, h), labels[record["category_id"]], float(area), bool(crowd), mask)

    return parse


def _check_box(box: object, image: CocoImage) -> None:
    """RecordError unless the box is [x, y, w, h] with positive sides, inside of the image."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise RecordError(f"has the bbox {short(box)}; 4 finite numbers [x, y, w, h] are needed")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise RecordError(f"has the bbox {short(box)} without area; w and h must be positive: correct or delete it")
    if min(x, y) < -SLACK or x + w > image.width + SLACK or y + h > image.height + SLACK:
        raise RecordError(
            f"has the bbox {short(box)} outside of image {image.id} of {image.width}x{image.height} pixels; "
            "correct or delete it ([x, y, w, h], no corners)"
        )


def check_file(image: CocoImage, check: str) -> None:
    """RecordError unless the image's file is there and, where it is looked at, decodes to the size of the record."""
    try:
        if not exists(image.file):
            raise RecordError(
                f"is not there: {shown(image.file)}; put it there or delete the record and its annotations"
            )
        check_regular(image.file)
        if check == "files":
            return
        size = upright_size(str(image.file)) if check == "headers" else decode(str(image.file)).size
    except InputError as error:
        raise RecordError(f"cannot be used: {error}") from error
    if size != (image.width, image.height):
        raise RecordError(
            f"is {shown(image.file)} of {size[0]}x{size[1]} upright pixels, its record says {image.width}x{image.height}; "
            "correct the record"
        )
