"""Readers: ``(row, root, download) -> Source``, one for each form in which a data set comes.

Each raises `InputError` with one line that says what is wrong with which path, and the way out.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secondorder.data.decoding import decode
from secondorder.data.files import check_regular, entries, exists, folders_in, images_in, is_folder, reason, shown
from secondorder.data.row import Row, Source, Split
from secondorder.data.sampling import uniforms
from secondorder.errors import InputError
from secondorder.optional import needed_by

DIGITS_TEST_SIZE = 360

FAKE_IMAGES = (256, 64)  # train, test

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the files of an image folder, those that torchvision's `ImageFolder` takes."""

MAX_FILE = 2**30
"""The largest file that is handed to torchvision, in bytes; the largest of its sets here has 155 MB."""


def read_digits(row: Row, root: Path, download: bool, digits: range = range(10)) -> Source:
    """Handwritten digits (Alpaydin & Kaynak 1998) as embedded in scikit-learn: 1,797 images, 8x8, grey levels 0 to 16.

    scikit-learn gives no split; here 360 test images are drawn by `train_test_split(stratify=labels, random_state=0)`.
    The writers are not recorded, so one writer's digits may lie on both sides. Of some of the ten ``digits`` labels count from 0.
    """
    with needed_by("the data set digits"):
        import sklearn
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    all_ten = load_digits()
    train, test = train_test_split(
        np.arange(len(all_ten.target)), test_size=DIGITS_TEST_SIZE, stratify=all_ten.target, random_state=0
    )

    def split(indices: np.ndarray) -> Split:
        chosen = indices[np.isin(all_ten.target[indices], digits)]
        pixels = torch.from_numpy(all_ten.images[chosen].astype(np.uint8))
        return pixels[:, None].contiguous(), torch.from_numpy(all_ten.target[chosen].astype(np.int64)) - digits.start

    names = tuple(str(all_ten.target_names[digit]) for digit in digits)
    return Source(split(train), split(test), names, {"source": f"embedded in scikit-learn {sklearn.__version__}"})


def read_fake(row: Row, root: Path, download: bool) -> Source:
    """Noise of ImageNet's shape with random labels: it measures cost and shows that a setting runs, nothing else."""

    def split(part: int) -> Split:
        size = FAKE_IMAGES[part]
        generator = torch.Generator().manual_seed(part)
        shape = (size, row.in_channels, row.image_size, row.image_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = uniforms("fake", part, 0, np.arange(size), 1)[:, 0] * 1000
        return pixels, torch.from_numpy(labels.astype(np.int64))

    return Source(split(0), split(1), tuple(f"fake {k}" for k in range(1000)), {"source": "generated noise"})


def torchvision_arrays(dataset: str) -> Callable[[Row, Path, bool], Source]:
    """Reader of a data set that ``torchvision.datasets.<dataset>`` loads into memory (and downloads when asked)."""

    def read(row: Row, root: Path, download: bool) -> Source:
        with needed_by(f"the data set {row.label}"):
            import torchvision
        train, test = (_torchvision_split(dataset, row, root, train, download) for train in (True, False))
        return Source(
            (_pixels(train.data), torch.as_tensor(train.targets, dtype=torch.int64)),
            (_pixels(test.data), torch.as_tensor(test.targets, dtype=torch.int64)),
            tuple(train.classes),
            {"source": f"torchvision.datasets.{dataset}", "torchvision": torchvision.__version__},
        )

    return read


def _torchvision_split(dataset: str, row: Row, root: Path, train: bool, download: bool) -> Any:
    """torchvision's own object for one split; it reads whole files, so that none may be of absurd size."""
    import torchvision

    for marker in row.markers if exists(root) else ():
        for entry in entries(root / marker) if is_folder(root / marker) else ():
            check_regular(entry.path, MAX_FILE)
    try:
        return getattr(torchvision.datasets, dataset)(root, train=train, download=download)
    except PermissionError as error:
        raise InputError(f"{row.label} under {shown(root)} may not be read or written ({reason(error)})") from error
    except (RuntimeError, OSError, EOFError, AssertionError, ValueError, LookupError, pickle.PickleError) as error:
        if download:
            raise InputError(f"{row.label} could not be downloaded to {shown(root)} ({reason(error)})") from error
        raise InputError(
            f"{row.label} under {shown(root)} is truncated, corrupt or incomplete ({reason(error)}); "
            f"delete {' or '.join(row.markers)} there and pass --download to fetch it again"
        ) from error


def _pixels(data: np.ndarray | Tensor) -> Tensor:
    """Pixels ``[N, H, W, C]`` or ``[N, H, W]`` as ``[N, C, H, W]``."""
    images = torch.as_tensor(data)
    return (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous()


def read_image_folder(row: Row, root: Path, download: bool) -> Source:
    """ImageNet's layout: ``root/train/<class>/<image>`` and ``root/val/...`` (or ``root/test/...``), decoded lazily.

    Images may lie in folders below the class folder. Hidden files and folders are left out; links are followed. Only the
    first image of each split is decoded here, of the others the sizes are looked at: of ImageNet's 1.3 million one that is
    cut short is met, and named, when its turn comes.
    """
    held_out = next((name for name in ("val", "test") if is_folder(root / name)), None)
    if held_out is None or not is_folder(root / "train"):
        raise InputError(
            f"{shown(root)} is no image folder: looked for train/<class>/<image>, and val/<class>/<image> or test/..."
        )
    classes, held_out_classes = (folders_in(root / name) for name in ("train", held_out))
    if classes != held_out_classes:
        odd = [shown(name, 25) for name in sorted(set(classes) ^ set(held_out_classes))]
        raise InputError(
            f"{shown(root)}: train holds {len(classes)} classes and {held_out} {len(held_out_classes)}, but both must hold "
            f"the same; in one only: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"
        )
    train, test = (folder_split(root / name, classes, row.allow_empty) for name in ("train", held_out))
    decode(train[0][0]), decode(test[0][0])
    return Source(train, test, tuple(classes), {"source": f"folders train and {held_out}"})


def folder_split(folder: Path, classes: list[str], allow_empty: bool) -> tuple[list[str], Tensor]:
    """Paths of the images ``folder/<class>/...`` and their labels ``[N]``."""
    images = [list(images_in(folder / name, SUFFIXES)) for name in classes]
    empty = [shown(name, 25) for name, files in zip(classes, images, strict=True) if not files]
    if not classes or len(empty) == len(classes):
        raise InputError(f"{shown(folder)} is no folder of class folders with images")
    if empty and not allow_empty:
        raise InputError(
            f"{shown(folder)} is no folder of class folders with images: {len(empty)} hold none ({', '.join(empty[:3])}"
            f"{' ...' if len(empty) > 3 else ''}); delete those folders, or keep such classes with allow_empty=True"
        )
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(files) for files in images]))
    return [file for files in images for file in files], labels
