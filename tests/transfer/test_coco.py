"""Reading COCO-format folders: what comes back is what was written, and everything bad is one line with file and record."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_folder import HEIGHT, RECTANGLE, WIDTH, content, pixels, rectangle, runs, write
from PIL import Image
from pycocotools import mask as pycocotools_mask

from secondorder.errors import InputError
from secondorder.transfer import CHECKS, find_splits, read_coco
from secondorder.transfer.segmentation import RecordError, compressed, decoded, run_lengths

Change = Callable[[dict[str, Any]], None]


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    data = read_coco(*write(tmp_path, content()), masks=True, check="pixels")
    assert data.categories == {3: "cat", 7: "dog"}
    assert data.classes == ("cat", "dog")
    assert [(image.id, image.height, image.width) for image in data.images] == [(5, 10, 12), (2, 8, 9), (9, 10, 12)]
    assert data.images[0].file == tmp_path / "train" / "a.png"
    assert [[one.id for one in objects] for objects in data.objects] == [[11, 12, 13], [], [14]]
    assert [one.label for one in data.objects[0]] == [2, 1, 2]
    crowd = data.objects[2][0]
    assert (crowd.box, crowd.area, crowd.crowd, crowd.label) == ((0.5, 0.0, 6.0, 10.0), 60.0, True, 1)
    masks = decoded([one.mask for one in data.objects[0] if one.mask], HEIGHT, WIDTH)
    assert masks.shape == (3, HEIGHT, WIDTH)
    for mask in masks:  # polygon, plain and compressed run lengths of one rectangle
        assert np.array_equal(mask, rectangle(*RECTANGLE))


def test_masks_are_not_looked_at_where_none_are_asked_for(tmp_path: Path) -> None:
    table = content()
    del table["annotations"][0]["segmentation"]
    table["annotations"][1]["segmentation"] = "nonsense"
    data = read_coco(*write(tmp_path, table))
    assert not data.masks
    assert {one.mask for objects in data.objects for one in objects} == {None}


def test_a_file_with_what_is_optional_left_out(tmp_path: Path) -> None:
    table = content()
    for record in table["annotations"]:
        del record["iscrowd"]
    data = read_coco(*write(tmp_path, table))
    assert not any(one.crowd for objects in data.objects for one in objects)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (300, 2), (17, 23), (200, 150)])
@pytest.mark.parametrize("density", [0.02, 0.5, 0.98])
def test_run_lengths_are_those_of_pycocotools(shape: tuple[int, int], density: float) -> None:
    mask = (np.random.default_rng(shape[0]).random(shape) < density).astype(np.uint8)
    mask[0, 0] = 1
    text = pycocotools_mask.encode(np.asfortranarray(mask))["counts"].decode()
    assert run_lengths(text) == runs(mask)
    size = list(shape)
    assert compressed({"size": size, "counts": runs(mask)}, *shape) == {"size": size, "counts": text}
    assert np.array_equal(decoded([compressed({"size": size, "counts": text}, *shape)], *shape)[0], mask)


def test_polygons_are_those_of_pycocotools() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 3):
        polygons = [(random.random(2 * (3 + n)) * 20).tolist() for n in range(count)]
        expected = pycocotools_mask.merge(pycocotools_mask.frPyObjects(polygons, 20, 20))
        assert compressed(polygons, 20, 20)["counts"] == expected["counts"].decode()


@pytest.mark.parametrize(
    "text", ["e03700000k", "", "Q", "e03700000k1\x00", "\x7f", "o" * 9 + "0", "é", "e03700000k1100", "e03700000kQ1"]
)
def test_damaged_run_lengths(text: str) -> None:
    with pytest.raises(RecordError):
        compressed({"size": [HEIGHT, WIDTH], "counts": text}, HEIGHT, WIDTH)


def put(kind: str, position: int, **values: Any) -> Change:
    """A change of a record: of its keys, or without those that are `...`."""

    def change(table: dict[str, Any]) -> None:
        record = table[kind][position]
        record |= values
        for key in [key for key, value in values.items() if value is ...]:
            del record[key]

    return change


def again(kind: str, **values: Any) -> Change:
    """A change: the first record once more, with other values."""
    return lambda table: table[kind].append(table[kind][0] | values)


def segmented(**values: Any) -> Change:
    """A change of the plain run lengths of annotation 12."""
    return put("annotations", 1, segmentation={"size": [HEIGHT, WIDTH], "counts": [60, 60]} | values)


BAD: dict[str, tuple[Change, str]] = {
    "annotation without a box": (put("annotations", 1, bbox=...), "annotation 12 has no bbox; add it"),
    "annotation without an id": (put("annotations", 1, id=...), "annotations[1] has no id"),
    "annotation without an area": (put("annotations", 1, area=...), "annotation 12 has no area"),
    "annotation that is none": (lambda table: table["annotations"].insert(1, 4), "annotations[1] is 4"),
    "image without a width": (put("images", 1, width=...), "image 2 has no width"),
    "category without a name": (put("categories", 1, name=...), "category 3 has no name"),
    "annotation twice": (again("annotations"), "annotation 11 has the id of another record"),
    "image twice": (again("images"), "image 5 has the id of another record"),
    "category twice": (again("categories", name="cow"), "category 7 has the id of another record"),
    "name twice": (again("categories", id=8), "category 8 has the name 'dog' of another record"),
    "id that is a word": (put("images", 0, id="five"), "images[0] has the id 'five'"),
    "id that is true": (put("annotations", 0, id=True), "annotations[0] has the id True"),
    "unknown image": (put("annotations", 2, image_id=4), "annotation 13 has the image_id 4, which no record"),
    "unknown category": (put("annotations", 2, category_id=1), "annotation 13 has the category_id 1, which no record"),
    "image that is a list": (put("annotations", 2, image_id=[5]), "annotation 13 has the image_id [5]"),
    "box to the right": (put("annotations", 0, bbox=[9, 1, 4, 3]), "annotation 11 has the bbox [9, 1, 4, 3] outside of"),
    "box below": (put("annotations", 0, bbox=[2, 8, 4, 3]), "outside of image 5 of 12x10 pixels"),
    "box to the left": (put("annotations", 0, bbox=[-1, 1, 4, 3]), "outside of image 5"),
    "box above": (put("annotations", 0, bbox=[1, -0.6, 4, 3]), "outside of image 5"),
    "corners for sides": (put("annotations", 0, bbox=[6, 5, 10, 8]), "[x, y, w, h], no corners"),
    "box without width": (put("annotations", 0, bbox=[2, 1, 0, 3]), "annotation 11 has the bbox [2, 1, 0, 3] without area"),
    "box of negative height": (put("annotations", 0, bbox=[2, 4, 4, -3]), "without area"),
    "box with nan": (put("annotations", 0, bbox=[2, math.nan, 4, 3]), "annotation 11 has the bbox [2, nan, 4, 3]; 4 finite"),
    "box of infinity": (put("annotations", 0, bbox=[2, 1, 4, math.inf]), "4 finite numbers"),
    "box of an absurd number": (put("annotations", 0, bbox=[2, 1, 4, 10**400]), "4 finite numbers"),
    "box of three": (put("annotations", 0, bbox=[2, 1, 4]), "annotation 11 has the bbox [2, 1, 4]; 4 finite"),
    "box of words": (put("annotations", 0, bbox=["2", 1, 4, 3]), "4 finite numbers"),
    "no area": (put("annotations", 0, area=0), "annotation 11 has the area 0"),
    "negative area": (put("annotations", 0, area=-2.5), "annotation 11 has the area -2.5"),
    "area that is nan": (put("annotations", 0, area=math.nan), "annotation 11 has the area nan"),
    "crowd that is a word": (put("annotations", 0, iscrowd="no"), "annotation 11 has iscrowd 'no'"),
    "no segmentation": (put("annotations", 1, segmentation=...), "annotation 12 has no segmentation; add it, or read without"),
    "no polygon": (put("annotations", 1, segmentation=[]), "annotation 12 has no polygon"),
    "two points": (put("annotations", 1, segmentation=[[1, 1, 4, 4]]), "annotation 12 has a polygon of 4 numbers; 3 points"),
    "half a point": (put("annotations", 1, segmentation=[[1, 1, 4, 4, 1, 4, 2]]), "annotation 12 has a polygon of 7 numbers"),
    "polygon outside": (put("annotations", 1, segmentation=[[1, 1, 40, 4, 1, 4]]), "outside of its image of 12x10"),
    "polygon above": (put("annotations", 1, segmentation=[[1, -3, 4, 4, 1, 4]]), "outside of its image of 12x10"),
    "polygon with nan": (put("annotations", 1, segmentation=[[1, 1, math.nan, 4, 1, 4]]), "a list of numbers"),
    "polygon of nothing": (put("annotations", 1, segmentation=[[2.1, 2.1] * 3]), "annotation 12 has polygons that cover no"),
    "run lengths of another size": (segmented(size=[12, 10]), "annotation 12 has run lengths of the size [12, 10], its"),
    "run lengths of another sum": (segmented(counts=[60, 61]), "annotation 12 has run lengths of 121 pixels, its image 120"),
    "negative run": (segmented(counts=[130, -10]), "annotation 12 has the run lengths [130, -10]"),
    "run lengths without a pixel": (segmented(counts=[120]), "annotation 12 has a mask without a pixel"),
    "damaged run lengths": (segmented(counts="e03700000"), "annotation 12 has run lengths of"),
    "segmentation that is none": (put("annotations", 1, segmentation=3), "annotation 12 has the segmentation 3"),
    "image of half a pixel": (put("images", 1, height=8.5), "image 2 has height 8.5 and width 9"),
    "image without pixels": (put("images", 1, width=0), "image 2 has height 8 and width 0"),
    "image without a file": (put("images", 1, file_name=""), "image 2 has the file_name ''"),
    "image of another size": (put("images", 1, width=10, height=8), "of 9x8 upright pixels, its record says 10x8; correct"),
    "missing image": (put("images", 1, file_name="z.png"), "image 2 is not there: "),
    "folder for an image": (put("images", 1, file_name="."), "image 2 cannot be used: "),
}  # fmt: skip


def refusal(file: Path, images: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_coco(file, images, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(case: str, tmp_path: Path) -> None:
    change, words = BAD[case]
    table = copy.deepcopy(content())
    change(table)
    message = refusal(*write(tmp_path, table), masks=True)
    assert words in message
    assert "instances_train.json: " in message
    assert "the first of" not in message


def test_of_several_the_first_and_how_many(tmp_path: Path) -> None:
    table = content()
    table["annotations"][0]["bbox"] = [0, 0, 0, 0]
    table["annotations"][2]["area"] = -1
    table["annotations"][3]["category_id"] = 4
    message = refusal(*write(tmp_path, table))
    assert ": annotation 11 has the bbox [0, 0, 0, 0] without area" in message
    assert message.endswith("(the first of 3 bad annotations)")


@pytest.mark.parametrize("kind", ["categories", "images", "annotations"])
def test_files_without_a_list(kind: str, tmp_path: Path) -> None:
    table = content()
    table[kind] = []
    assert f"instances_train.json has an empty list of {kind}" in refusal(*write(tmp_path, table))
    table[kind] = {}
    assert f"has {kind} of type dict; a COCO file has the lists" in refusal(*write(tmp_path, table))
    del table[kind]
    assert f"instances_train.json has no {kind}; a COCO file has the lists" in refusal(*write(tmp_path, table))


@pytest.mark.parametrize("text", [json.dumps(content())[:-40], "", "\x00", "[" * 100_000, "{'images': 1}"])
def test_files_that_are_no_json(text: str, tmp_path: Path) -> None:
    assert "instances_train.json is truncated or no JSON (" in refusal(*write(tmp_path, text))


def test_other_files(tmp_path: Path) -> None:
    file, images = write(tmp_path, "[1, 2]")
    assert "instances_train.json holds 'list', not an object" in refusal(file, images)
    assert "does not exist" in refusal(tmp_path / "no.json", images)
    assert "is a folder, which is not opened" in refusal(images, images)
    assert "the image folder" in refusal(file, tmp_path / "nowhere")
    assert "check" in refusal(file, images, check="all")
    assert "masks must be True or False" in refusal(file, images, masks="yes")


def test_damaged_images(tmp_path: Path) -> None:
    file, images = write(tmp_path, content())
    (images / "a.png").write_bytes(b"no image")
    assert re.search(r"image 5 cannot be used: .*a\.png does not decode", refusal(file, images))
    whole = (images / "c.jpg").read_bytes()
    write(tmp_path, content())
    (images / "c.jpg").write_bytes(whole[: len(whole) - 100])  # its header is there
    read_coco(file, images)
    assert re.search(r"image 9 cannot be used: .*c\.jpg does not decode", refusal(file, images, check="pixels"))
    (images / "b.png").unlink()
    for check in CHECKS:
        assert "image 2 is not there" in refusal(file, images, check=check)


def test_images_are_upright(tmp_path: Path) -> None:
    """A camera held sideways: the record has the size of the upright image, as the pixels that are trained on."""
    table = content()
    file, images = write(tmp_path, table)
    for name in ("a.png", "c.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels(0, WIDTH, HEIGHT)).save(images / name, exif=exif)
    for check in CHECKS:
        read_coco(file, images, check=check)
    for name in ("a.png", "c.jpg"):
        Image.fromarray(pixels(0, WIDTH, HEIGHT)).save(images / name)
    assert "image 5 is " in refusal(file, images)
    assert "of 10x12 upright pixels, its record says 12x10" in refusal(file, images)
    read_coco(file, images, check="files")


def test_splits_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, images = write(tmp_path / "bccd", content())
    assert find_splits(tmp_path / "bccd") == {"train": (file, images)}
    for split in ("val", "test"):
        with pytest.raises(InputError, match=f"holds no instances_{split}.json; unpack the data again"):
            find_splits(tmp_path, "bccd")
        file.with_name(f"instances_{split}.json").write_bytes(file.read_bytes())
        with pytest.raises(InputError, match=f"bccd/{split} is no folder, but its annotations are there"):
            find_splits(tmp_path / "bccd")
        (tmp_path / "bccd" / split).mkdir()
    monkeypatch.setenv("SECONDORDER_DATA", str(tmp_path))
    assert list(find_splits(name="bccd")) == ["test", "train", "val"]
    read_coco(*find_splits(name="bccd")["train"])
    for arguments, words in (
        ((tmp_path, "coco"), "unknown COCO-format data set 'coco'; choose one of: bccd, nuclei"),
        ((tmp_path, "nuclei"), "nuclei holds no folder annotations; pass --data-root"),
        ((3,), "data root is 3"),
    ):
        with pytest.raises(InputError, match=words):
            find_splits(*arguments)  # type: ignore[arg-type]
    monkeypatch.delenv("SECONDORDER_DATA")
    with pytest.raises(InputError, match="needs the folder that holds it; pass --data-root or set SECONDORDER_DATA"):
        find_splits()
