"""Small copies of every data set, written to disk in their real formats."""

import lzma
import pickle
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from secondorder.data import DATASETS

CIFAR10_CLASSES = DATASETS["cifar10_jpeg"].classes or ()
TRAIN, TEST = 30, 20  # images of the small sets written here


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Smooth random colours: JPEG would turn noise into mush."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def write_tree(root: Path, splits: dict[str, int], classes: tuple[str, ...], sizes: list[tuple[int, int]]) -> None:
    for part, count in splits.items():
        for n in range(count):
            folder = root / part / classes[n % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            seed = n + 1000 * len(part)
            picture(seed, *sizes[n % len(sizes)]).save(folder / f"{n:04d}.jpg", quality=75)


def write_jpeg_folders(root: Path) -> None:
    write_tree(root, {"train": TRAIN, "test": TEST}, CIFAR10_CLASSES, [(32, 32)])


def write_jpeg_archives(root: Path) -> None:
    write_jpeg_folders(root / "unpacked")
    for part in ("train", "test"):
        buffer = BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(root / "unpacked" / part, arcname=part)
        padding = bytes(1 << 20)  # as tape blocks end: a reader that stops at the last file never sees the checksum
        (root / f"{part}.tar.xz").write_bytes(lzma.compress(buffer.getvalue() + padding))


def write_image_folder(root: Path) -> None:
    write_tree(root, {"train": 8, "val": 4}, ("n01", "n02"), [(40, 30), (300, 260), (25, 90), (32, 32)])


def write_cifar(folder: str, label_key: str, meta: str, meta_key: str, classes: int) -> Callable[[Path], None]:
    """The published pickles, in a smaller number of images: five (or one) train batches and a test batch."""

    def write(root: Path) -> None:
        (root / folder).mkdir(parents=True)
        train_files = [f"data_batch_{k}" for k in range(1, 6)] if folder == "cifar-10-batches-py" else ["train"]
        test_file = "test_batch" if folder == "cifar-10-batches-py" else "test"
        for file, count in [(f, TRAIN // len(train_files)) for f in train_files] + [(test_file, TEST)]:
            rng = np.random.default_rng(len(file) + count)
            batch = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8)}
            (root / folder / file).write_bytes(pickle.dumps(batch | {label_key: [n % classes for n in range(count)]}))
        (root / folder / meta).write_bytes(pickle.dumps({meta_key: [f"class {k}" for k in range(classes)]}))

    return write


def write_fashion_mnist(root: Path) -> None:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        header = b"".join(size.to_bytes(4, "big") for size in (0x803, count, 28, 28))  # the idx format
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + rng.bytes(count * 28 * 28))
        header = b"".join(size.to_bytes(4, "big") for size in (0x801, count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(n % 10 for n in range(count)))


# How a small copy of each data set is written; a new row of DATASETS needs one here.
WRITERS: dict[str, Callable[[Path], None] | None] = {
    "digits": None,
    "digits_0_to_4": None,
    "digits_5_to_9": None,
    "cifar10": write_cifar("cifar-10-batches-py", "labels", "batches.meta", "label_names", 10),
    "cifar10_jpeg": write_jpeg_archives,
    "cifar100": write_cifar("cifar-100-python", "fine_labels", "meta", "fine_label_names", 100),
    "fashion_mnist": write_fashion_mnist,
    "imagefolder": write_image_folder,
    "fake": None,
}
