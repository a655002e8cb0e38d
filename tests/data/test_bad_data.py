"""Missing, damaged and forbidden data sets: one clear line before any training."""

import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from image_sets import (
    WRITERS,
    picture,
    write_fashion_mnist,
    write_image_folder,
    write_jpeg_archives,
    write_jpeg_folders,
)

from secondorder.data import DATASETS, epoch_order, load_dataset
from secondorder.data.own import OwnSplit
from secondorder.errors import InputError

# Bad input: (data set, how it is written, how it is damaged, options, what the line must say)


def truncate(file: str, keep: float = 0.6) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        content = (root / file).read_bytes()
        (root / file).write_bytes(content[: int(len(content) * keep)])

    return damage


def flip_bit(file: str, position: int | None = None) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        content = bytearray((root / file).read_bytes())
        content[len(content) // 2 if position is None else position] ^= 1
        (root / file).write_bytes(content)

    return damage


def remove(path: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for file in [root / path] if (root / path).is_file() else list((root / path).iterdir()):
            file.unlink()

    return damage


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)

    return damage


def png(width: int, height: int) -> bytes:
    buffer = BytesIO()
    picture(0, width, height).save(buffer, "png")
    return buffer.getvalue()


FOLDERS, ARCHIVES, IMAGES = write_jpeg_folders, write_jpeg_archives, write_image_folder
CIFAR, FASHION = WRITERS["cifar10"], write_fashion_mnist
RAW = "FashionMNIST/raw"

BAD_SETS = {
    "empty root": (
        "cifar10",
        None,
        None,
        r"cifar10 is not in .*cifar-10-batches-py, or for CIFAR-10 \(JPEG\): train,.*",
    ),
    "empty root, images": ("imagefolder", None, None, "imagefolder is not in .*looked for train; pass --data-root"),
    "cut archive": ("cifar10", ARCHIVES, truncate("train.tar.xz"), "train.tar.xz is truncated or corrupt"),
    "nearly whole archive": ("cifar10", ARCHIVES, truncate("test.tar.xz", 0.99), "test.tar.xz is truncated or corrupt"),
    "no archive": ("cifar10", ARCHIVES, overwrite("train.tar.xz", b"x" * 999), "train.tar.xz is truncated or corrupt"),
    "empty archive": ("cifar10", ARCHIVES, overwrite("train.tar.xz", b""), "train.tar.xz is truncated or corrupt"),
    "flipped bit": (
        "cifar10",
        ARCHIVES,
        flip_bit("train.tar.xz"),
        "train.tar.xz.* (is truncated or corrupt|not decode)",
    ),
    "wrong checksum": ("cifar10", ARCHIVES, flip_bit("train.tar.xz", -28), "train.tar.xz is truncated or corrupt"),
    "one archive": ("cifar10", ARCHIVES, remove("test.tar.xz"), "test.tar.xz is not beside it"),
    "missing image": ("cifar10", FOLDERS, remove("train/cat/0003.jpg"), "train has 29 images, expected 30"),
    "empty class": ("cifar10", FOLDERS, remove("test/dog"), "test holds no images of class dog"),
    "other class": ("cifar10", FOLDERS, overwrite("train/pig/0.jpg", b"x"), "holds the class folder 'pig'"),
    "cut image": ("cifar10", FOLDERS, truncate("train/cat/0003.jpg"), "cat/0003.jpg in .*train does not decode"),
    "no image": ("cifar10", FOLDERS, overwrite("test/cat/0003.jpg", b"x"), "cat/0003.jpg in .*test does not decode"),
    "other size": ("cifar10", FOLDERS, overwrite("test/cat/0003.jpg", png(31, 32)), "cat/0003.jpg .* has 31x32 pixels"),
    "cut pickle": ("cifar10", CIFAR, truncate("cifar-10-batches-py/data_batch_2"), "CIFAR-10 .*corrupt.*--download"),
    "lost pickle": ("cifar10", CIFAR, remove("cifar-10-batches-py/data_batch_2"), "CIFAR-10 .*corrupt.*--download"),
    "cut idx": ("fashion_mnist", FASHION, truncate(f"{RAW}/train-images-idx3-ubyte"), "Fashion.*corrupt.*--download"),
    "lost idx": ("fashion_mnist", FASHION, remove(f"{RAW}/t10k-labels-idx1-ubyte"), "Fashion.*corrupt.*--download"),
    "no val": (
        "imagefolder",
        FOLDERS,
        lambda root: (root / "test").rename(root / "x"),
        "is no image folder: looked for",
    ),
    "empty folder": ("imagefolder", IMAGES, remove("train/n02"), "train is no folder of class folders.*n02"),
    "no classes": (
        "imagefolder",
        IMAGES,
        lambda root: (root / "val").rename(root / "train/n01/val"),
        "no image folder",
    ),
    "extra class": ("imagefolder", IMAGES, overwrite("val/n03/0.png", png(5, 5)), "in one only: n03"),
    "no first image": ("imagefolder", IMAGES, overwrite("train/n01/0000.jpg", b"x"), "n01/0000.jpg does not decode"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_damaged_set_is_one_clear_line(tmp_path: Path, case: str) -> None:
    name, write, damage, pattern = BAD_SETS[case]
    root = tmp_path / "data"
    root.mkdir()
    if write is not None:
        write(root)
    if damage is not None:
        damage(root)
    with pytest.raises(InputError, match=pattern) as caught:
        load_dataset(name, root)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_image_that_fails_during_training_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    truncate("train/n02/0003.jpg")(tmp_path)
    with pytest.raises(InputError, match=r"n02/0003.jpg does not decode \(.*\); replace or remove it"):
        load_dataset("imagefolder", tmp_path).train.batch(range(8))


BAD_OPTIONS = {
    "data set": (("cifar11", None), {}, "unknown data set 'cifar11'; choose one of: digits, "),
    "no name": ((["digits"], None), {}, "unknown data set .*digits"),
    "long name": (("x" * 900, None), {}, "unknown data set 'xxx"),
    "no root": (("cifar10", None), {}, "cifar10 needs the folder .* pass --data-root or set SECONDORDER_DATA"),
    "absent root": (("cifar100", "absent"), {}, "data root absent is no folder; .* --download"),
    "limit 0": (("digits", None), {"limit": 0}, "limit must be .* from 1 to 1437, got 0;"),
    "limit above": (("digits", None), {"limit": 1438}, "limit must be .* from 1 to 1437, got 1438;"),
    "limit 2.5": (("digits", None), {"limit": 2.5}, "limit must be a whole number .*, got 2.5;"),
    "test_limit": (("digits", None), {"test_limit": 361}, "test_limit must be .* from 1 to 360, got 361;"),
    "download": (("cifar10", "x"), {"download": 1}, "download must be True or False, got 1"),
    "zero byte": (("cifar10", "\0"), {}, "data root .* cannot be read"),
    "root of numbers": (("cifar100", np.zeros(2)), {}, "data root is array"),
    "image_size": (("digits", None), {"image_size": 0}, "image_size must be .*, got 0;"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_one_clear_line(case: str) -> None:
    arguments, options, pattern = BAD_OPTIONS[case]
    with pytest.raises(InputError, match=pattern) as caught:
        load_dataset(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


BAD_INDICES = [
    "mean",
    ...,
    slice(2),
    math.nan,
    0.5,
    [0.5],
    True,
    [[0], [1, 2]],
    [None],
    {1},
    torch.tensor(math.nan),
    [10**30],
]


@pytest.mark.parametrize("indices", BAD_INDICES, ids=range(len(BAD_INDICES)))
def test_indices_that_are_no_whole_numbers(indices: Any) -> None:
    """Of the package's own data and of a user's."""
    digits = load_dataset("digits", limit=20, test_limit=10).train
    for split in (digits, OwnSplit(digits)):
        with pytest.raises(InputError, match=r"the indices are .* whole numbers") as caught:
            split.batch(indices)
        assert len(str(caught.value).splitlines()) == 1
        for outside in (20, -21, 2**63):
            with pytest.raises(IndexError, match="in a split of 20"):
                split.batch([outside])
    with pytest.raises(InputError):
        digits[indices]
    with pytest.raises(InputError, match="use batch"):
        digits[[0, 1]]  # type: ignore[index]


def test_limit_above_an_image_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    with pytest.raises(InputError, match=r"limit must be .* from 1 to 8, got 9;"):
        load_dataset("imagefolder", tmp_path, limit=9)


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (0, -1), (2**63, 0), (0.5, 0), (0, True)])
def test_bad_seed_or_epoch(seed: int, epoch: int) -> None:
    with pytest.raises(InputError, match="must be a whole number"):
        load_dataset("digits").train.set_epoch(seed, epoch)
    with pytest.raises(InputError, match="must be a whole number"):
        epoch_order(5, seed, epoch)


def test_download_happens_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise URLError("no network")

    for module in (torchvision.datasets.cifar, torchvision.datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    for name, row in DATASETS.items():
        if row.downloadable:
            with pytest.raises(InputError, match=f"^{name} is not in .*--download"):
                load_dataset(name, tmp_path)
            with pytest.raises(InputError, match=f"^{row.label} could not be downloaded to .*") as caught:
                load_dataset(name, tmp_path, download=True)
            assert "\n" not in str(caught.value)
