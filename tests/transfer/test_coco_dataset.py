"""The data set of a COCO file and its random transforms: targets as torchvision's detectors take them, a function of the seed."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import HEIGHT, RECTANGLE, WIDTH, content, pixels, rectangle, write
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from secondorder.errors import InputError
from secondorder.transfer import CocoAnnotations, CocoDataset, Target, collate, read_coco, training_transform

X, Y, W, H = RECTANGLE
BOX = [X, Y, X + W, Y + H]


@pytest.fixture
def annotations(tmp_path: Path) -> CocoAnnotations:
    return read_coco(*write(tmp_path, content()), masks=True)


def sample(masks: bool = True, side: int = 40, objects: int = 12, seed: int = 0) -> tuple[Any, Target]:
    """Random ellipses in an image whose three channels are row, column and a sum of the masks."""
    numbers = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    centres, radii = numbers.uniform(4, side - 4, (objects, 2)), numbers.uniform(1.5, 8, (objects, 2))
    shapes = [
        ((rows - a) / r) ** 2 + ((columns - b) / q) ** 2 <= 1 for (a, b), (r, q) in zip(centres, radii, strict=True)
    ]
    stack = torch.from_numpy(np.stack(shapes).astype(np.uint8))
    boxes = torch.tensor(
        [[m.any(0).nonzero()[0][0], m.any(1).nonzero()[0][0], m.any(0).nonzero()[0][-1] + 1, m.any(1).nonzero()[0][-1] + 1]
         for m in shapes], dtype=torch.float32,
    )  # fmt: skip
    image = np.stack([rows, columns, np.sum(shapes, 0)]).astype(np.uint8)
    target: Target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(side, side)),
        "labels": torch.arange(1, objects + 1),
        "area": stack.sum((1, 2)).float(),
        "iscrowd": torch.zeros(objects, dtype=torch.int64),
        "image_id": 3,
    }
    if masks:
        target["masks"] = tv_tensors.Mask(stack)
    return tv_tensors.Image(torch.from_numpy(image)), target


def plain(value: Any) -> Tensor:
    return value.as_subclass(Tensor)


def same(a: tuple[Any, Target], b: tuple[Any, Target]) -> bool:
    return torch.equal(plain(a[0]), plain(b[0])) and all(
        torch.equal(plain(a[1][key]), plain(b[1][key])) if isinstance(a[1][key], Tensor) else a[1][key] == b[1][key]
        for key in a[1] | b[1]
    )


def test_targets_are_those_of_torchvision(annotations: CocoAnnotations) -> None:
    data = CocoDataset(annotations, masks=True)
    assert len(data) == 3
    assert data.classes == ("cat", "dog")
    image, target = data[0]
    assert type(image) is tv_tensors.Image
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(5))
    assert type(target["boxes"]) is tv_tensors.BoundingBoxes
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [BOX] * 3
    assert target["labels"].dtype == target["iscrowd"].dtype == torch.int64
    assert target["labels"].tolist() == [2, 1, 2]
    assert target["area"].tolist() == [12.0] * 3
    assert target["image_id"] == 5
    assert type(target["masks"]) is tv_tensors.Mask
    assert target["masks"].dtype == torch.uint8
    assert np.array_equal(target["masks"].numpy(), np.stack([rectangle(*RECTANGLE)] * 3))
    assert "masks" not in CocoDataset(annotations)[0][1]
    assert same(data[-3], data[0])


def test_an_image_without_objects(annotations: CocoAnnotations) -> None:
    for size in (None, (4, 6)):
        _, target = CocoDataset(annotations, masks=True, size=size, transform=training_transform(3))[1]
        assert target["boxes"].shape == (0, 4)
        assert target["masks"].shape == (0, 3, 3)
        assert [target[key].shape for key in ("labels", "area", "iscrowd")] == [(0,)] * 3


def test_crowds_are_evaluated_and_not_learnt(annotations: CocoAnnotations) -> None:
    data = CocoDataset(annotations, masks=True)
    assert data[2][1]["boxes"].shape == (0, 4)
    assert data[2][1]["masks"].shape == (0, HEIGHT, WIDTH)
    kept = CocoDataset(annotations, masks=True, crowds=True)[2][1]
    truth = list(data.truth())[2]
    for target in (kept, truth):
        assert target["iscrowd"].tolist() == [1]
        assert target["boxes"].tolist() == [[0.5, 0.0, 6.5, 10.0]]
        assert int(target["masks"].sum()) == 60


def test_truth_reads_no_image_and_has_no_transform(annotations: CocoAnnotations) -> None:
    for image in annotations.images:
        image.file.unlink()
    data = CocoDataset(annotations, transform=training_transform(2), size=(20, 24))
    truth = list(data.truth())
    assert [target["image_id"] for target in truth] == [5, 2, 9]
    assert truth[0]["boxes"].dtype == torch.float64
    assert truth[0]["boxes"].tolist() == [[2.0 * x for x in BOX]] * 3


def test_resizing(annotations: CocoAnnotations) -> None:
    data = CocoDataset(annotations, masks=True, size=(20, 36))
    image, target = data[0]
    assert image.shape == (3, 20, 36)
    assert target["boxes"].canvas_size == (20, 36)
    assert target["boxes"].tolist() == [[3 * X, 2 * Y, 3 * (X + W), 2 * (Y + H)]] * 3
    assert target["area"].tolist() == [72.0] * 3
    expected = np.kron(rectangle(*RECTANGLE), np.ones((2, 3), np.uint8))
    assert np.array_equal(target["masks"].numpy(), np.stack([expected] * 3))
    assert data[1][0].shape == (3, 20, 36)
    for height, width in ((7, 5), (10, 31), (23, 12)):  # every pixel of a mask is that under its centre
        rows, columns = ((np.arange(n) + 0.5) * old / n for n, old in ((height, HEIGHT), (width, WIDTH)))
        expected = rectangle(*RECTANGLE)[np.ix_(rows.astype(int), columns.astype(int))]
        resized = CocoDataset(annotations, masks=True, size=(height, width))[0][1]["masks"]
        assert np.array_equal(resized[0].numpy(), expected)


def test_a_sample_is_a_function_of_seed_epoch_and_index(annotations: CocoAnnotations) -> None:
    drawn: list[tuple[float, float, float]] = []

    def draw(image: Any, target: Target) -> tuple[Any, Target]:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002
        return image, target

    data = CocoDataset(annotations, transform=draw)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for seed, epoch, index in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, -3), (0, 0, 0)]:
        data.set_epoch(seed, epoch)
        data[index]
    assert drawn[0] == drawn[4] == drawn[5]
    assert len({number for numbers in drawn for number in numbers}) == 12
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_batches_are_lists_for_the_detector(annotations: CocoAnnotations) -> None:
    transform = v2.Compose([v2.RandomHorizontalFlip(1.0), training_transform(6)])
    data = CocoDataset(annotations, transform=transform)
    (images, targets), *rest = DataLoader(data, batch_size=2, collate_fn=collate)
    assert len(rest) == 1
    assert [tuple(image.shape) for image in images] == [(3, 6, 6), (3, 6, 6)]
    assert [target["image_id"] for target in targets] == [5, 2]
    assert same((images[0], targets[0]), data[0])


def test_bad_arguments(annotations: CocoAnnotations, tmp_path: Path) -> None:
    without = read_coco(tmp_path / "annotations" / "instances_train.json", tmp_path / "train")
    for arguments, words in (
        ({"annotations": "a.json"}, "annotations are 'a.json'; give read_coco"),
        ({"annotations": without, "masks": True}, "masks=True, but the annotations have none; read them with"),
        ({"crowds": 1}, "crowds must be True or False"),
        ({"size": 64}, "size must be .height, width. or None, got 64"),
        ({"size": (64, 0)}, "image_size must be a whole number"),
        ({"transform": 3}, "transform must be a function"),
    ):
        with pytest.raises(InputError, match=words):
            CocoDataset(**({"annotations": annotations} | arguments))
    data = CocoDataset(annotations)
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(InputError, match="whole number"):
        data[[0, 1]]  # type: ignore[index]
    with pytest.raises(InputError, match="seed"):
        data.set_epoch(-1, 0)
    (tmp_path / "train" / "a.png").write_bytes((tmp_path / "train" / "b.png").read_bytes())
    with pytest.raises(InputError, match=r"a\.png has changed: image 5 is of another size"):
        data[0]


@pytest.mark.parametrize("flips", [(), ("horizontal",), ("vertical",), ("vertical", "horizontal")])
def test_image_boxes_and_masks_go_together(flips: tuple[str, ...]) -> None:
    """Boxes end where masks do, areas are pixels, and every pixel says where it comes from."""
    before = sample()
    kept = copy.deepcopy(before)
    transform = training_transform(24, flips)
    seen, objects = set(), 0
    for n in range(40):
        image, target = transform(*before, torch.Generator().manual_seed(n))
        rows, columns = plain(image)[:2].long()
        masks = plain(target["masks"])
        assert image.shape == (3, 24, 24)
        assert target["boxes"].canvas_size == (24, 24)
        assert target["image_id"] == 3
        window = plain(before[1]["masks"])[:, rows, columns]  # [n, 24, 24], of all objects
        visible = window.flatten(1).any(1)
        assert torch.equal(masks, window[target["labels"] - 1])
        assert torch.equal(plain(image)[2], window.sum(0).byte())
        for mask, box, area in zip(masks, target["boxes"].tolist(), target["area"].tolist(), strict=True):
            down, across = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == [int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1]
            assert area == pytest.approx(float(mask.sum()), rel=1e-6)
        assert target["labels"].tolist() == (visible.nonzero()[:, 0] + 1).tolist()
        objects += len(masks)
        seen.add((bool(rows[0, 0] > rows[-1, 0]), bool(columns[0, 0] > columns[0, -1])))
    assert 0 < objects < 40 * 12
    assert len(seen) == 2 ** len(flips)
    assert same(before, kept)


def test_boxes_alone_end_at_the_crop() -> None:
    image, target = sample(masks=False, objects=3)
    target["boxes"] = tv_tensors.wrap(
        torch.tensor([[0.0, 0, 40, 40], [10, 10, 12, 14], [38, 38, 40.4, 40.4]]), like=target["boxes"]
    )
    target["area"] = torch.tensor([800.0, 8.0, 4.0])
    for n in range(20):
        window, cropped = training_transform(16, ())(image, target, torch.Generator().manual_seed(n))
        assert cropped["boxes"][0].tolist() == [0, 0, 16, 16]
        assert float(cropped["area"][0]) == pytest.approx(800 * 16**2 / 40**2)
        for label, (x1, y1, x2, y2) in zip(cropped["labels"].tolist(), cropped["boxes"].tolist(), strict=True):
            assert 0 <= x1 < x2 <= 16
            assert 0 <= y1 < y2 <= 16
            top, left = plain(window)[:2, 0, 0].tolist()
            if label == 2 and top <= 10 and left <= 10 and top + 16 >= 14 and left + 16 >= 12:
                assert [x1, y1, x2, y2] == [10 - left, 10 - top, 12 - left, 14 - top]
    whole = training_transform(None, ())(image, target)[1]
    assert whole["boxes"].tolist() == [[0, 0, 40, 40], [10, 10, 12, 14], [38, 38, 40, 40]]


def test_crops_without_objects_and_small_images() -> None:
    image, target = sample(objects=1)
    found = {len(training_transform(8)(image, target, torch.Generator().manual_seed(n))[1]["boxes"]) for n in range(30)}
    assert found == {0, 1}
    whole, same_target = training_transform(99, ())(image, target)
    assert same((whole, same_target), (image, target))
    wide = tv_tensors.Image(torch.zeros(3, 6, 30, dtype=torch.uint8))
    target["boxes"] = tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0, 30, 6]]), format="XYXY", canvas_size=(6, 30))
    target["masks"] = tv_tensors.Mask(torch.ones(1, 6, 30, dtype=torch.uint8))
    assert training_transform(10)(wide, target)[0].shape == (3, 6, 10)


def test_slivers_are_left_out() -> None:
    image, target = sample(objects=1)
    width = float(target["boxes"][0, 2] - target["boxes"][0, 0])
    assert len(training_transform(None, (), min_size=width)(image, target)[1]["labels"]) == 1
    after = training_transform(None, (), min_size=width + 1)(image, target)[1]
    assert [len(after[key]) for key in ("boxes", "labels", "area", "iscrowd", "masks")] == [0] * 5


def test_bad_transforms() -> None:
    for arguments, words in (
        ({"crop": 0}, "crop must be a whole number of at least 1, got 0; None for the whole image"),
        ({"flips": "horizontal"}, "flips must be different names of horizontal, vertical, got 'horizontal'"),
        ({"flips": ("vertical", "vertical")}, "flips must be different names"),
        ({"flips": ("diagonal",)}, "unknown flip 'diagonal'; choose one of: horizontal, vertical"),
        ({"min_size": 0.5}, "min_size must be a finite number of at least 1, got 0.5"),
    ):
        with pytest.raises(InputError, match=words):
            training_transform(**arguments)  # type: ignore[arg-type]
