"""The table of data sets and the one way to load them."""

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from secondorder.data.augmentation import PaddedCrop, ResizedCrop
from secondorder.data.files import expanded, is_folder, shown
from secondorder.data.images import ImageArray, ImageFiles, ImageSplit, check_image_size
from secondorder.data.jpeg import read_jpeg_classes
from secondorder.data.readers import read_digits, read_fake, read_image_folder, torchvision_arrays
from secondorder.data.row import Row, Source, Split
from secondorder.data.sampling import stratified_subset
from secondorder.errors import InputError, check_flag, check_whole, unknown

VARIABLE = "SECONDORDER_DATA"

_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_DIGITS = Row(
    label="Digits (8x8)",
    read=read_digits,
    in_channels=1,
    image_size=8,
    mean=(0.3054,),
    std=(0.3761,),
    maximum=16,
    augmentation=None,  # a shift by one of eight pixels cuts strokes off, and a mirrored digit is none
    expected=(1437, 360),
)

DATASETS: dict[str, Row] = {
    "digits": _DIGITS,
    "digits_0_to_4": replace(
        _DIGITS,
        label="Digits 0 to 4 (8x8)",
        read=partial(read_digits, digits=range(5)),
        mean=(0.3052,),
        std=(0.3784,),
        expected=(721, 180),
    ),
    "digits_5_to_9": replace(
        _DIGITS,
        label="Digits 5 to 9 (8x8)",
        read=partial(read_digits, digits=range(5, 10)),
        mean=(0.3055,),
        std=(0.3738,),
        expected=(716, 180),
    ),
    "cifar10": Row(
        label="CIFAR-10",
        read=torchvision_arrays("CIFAR10"),
        in_channels=3,
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augmentation=PaddedCrop(),
        expected=(50_000, 10_000),
        markers=("cifar-10-batches-py",),
        downloadable=True,
        substitute="cifar10_jpeg",
    ),
    "cifar10_jpeg": Row(
        label="CIFAR-10 (JPEG)",  # not bit-identical to CIFAR-10: results must carry this label
        read=read_jpeg_classes,
        in_channels=3,
        image_size=32,
        mean=(0.4913, 0.4821, 0.4465),
        std=(0.2452, 0.2428, 0.2606),
        augmentation=PaddedCrop(),
        expected=(50_000, 10_000),
        markers=("train", "cifar10-jpeg/train", "train.tar.xz", "cifar10-jpeg/train.tar.xz"),
        classes=_CIFAR10_CLASSES,
    ),
    "cifar100": Row(
        label="CIFAR-100",
        read=torchvision_arrays("CIFAR100"),
        in_channels=3,
        image_size=32,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augmentation=PaddedCrop(),
        expected=(50_000, 10_000),
        markers=("cifar-100-python",),
        downloadable=True,
    ),
    "fashion_mnist": Row(
        label="Fashion-MNIST",
        read=torchvision_arrays("FashionMNIST"),
        in_channels=1,
        image_size=28,
        mean=(0.2860,),
        std=(0.3530,),
        augmentation=PaddedCrop(),
        expected=(60_000, 10_000),
        markers=("FashionMNIST/raw",),
        downloadable=True,
    ),
    "imagefolder": Row(
        label="image folder",
        read=read_image_folder,
        in_channels=3,
        image_size=224,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        augmentation=ResizedCrop(),
        markers=("train",),
    ),
    "fake": Row(
        label="fake data",
        read=read_fake,
        in_channels=3,
        image_size=224,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        augmentation=PaddedCrop(),
        expected=(256, 64),
    ),
}


@dataclass(frozen=True)
class ImageDataset:
    """A loaded data set: two splits of (image float32 ``[C, H, W]``, label), and what is known of them.

    ``name`` is the row of `DATASETS` that was read, ``label`` its name in figures and tables, ``image_size`` the side
    in pixels; ``mean`` and ``std`` undo the normalisation; ``provenance`` (JSON values) belongs beside every result.
    """

    name: str
    label: str
    train: ImageSplit
    test: ImageSplit
    num_classes: int
    in_channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    provenance: dict[str, object]


def load_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    limit: int | None = None,
    test_limit: int | None = None,
    image_size: int | None = None,
    allow_empty: bool = False,
) -> ImageDataset:
    """Load the data set of row ``name`` of `DATASETS` from ``root`` (else from the folder of ``SECONDORDER_DATA``).

    Args:
        name: row of `DATASETS`. ``cifar10`` takes the JPEG set when the root holds only that, and then says so in ``name``
            and ``label`` of what it returns.
        root: folder that holds the data; a ``~`` is the home folder.
        download: let torchvision fetch a missing set into ``root``.
        limit: keep that many training images, a fixed class-balanced subset; None: all.
        test_limit: keep that many test images; None: the same share as of the training images.
        image_size: resize to that many pixels a side, at most 4,096; None: the data set's own size.
        allow_empty: of ``imagefolder``, keep class folders without images as classes; they are refused otherwise, since a
            class too many changes the network.

    Raises:
        InputError: for an unknown name, a missing, incomplete or corrupt data set, and values out of range.
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise unknown("data set", shown(name), DATASETS)
    check_flag("download", download)
    check_flag("allow_empty", allow_empty)
    if image_size is not None:
        check_image_size(image_size)
    name, folder = _locate(name, root, download)
    row = replace(DATASETS[name], allow_empty=allow_empty)
    if allow_empty and row.read is not read_image_folder:
        raise InputError(f"allow_empty=True: {name} has every class; leave it out")
    _check_limits(row, limit, test_limit)
    source = row.read(row, folder, download)
    _check_counts(row, source)

    train_split, test_split = source.train, source.test
    if limit is not None and test_limit is None:
        test_limit = max(1, round(len(test_split[1]) * limit / len(train_split[1])))
    train_split, test_split = _limited(train_split, limit), _limited(test_split, test_limit)
    size = image_size or row.image_size
    provenance = source.provenance | {"train_images": len(train_split[1]), "test_images": len(test_split[1])}
    return ImageDataset(
        name=name,
        label=row.label,
        train=_split(row, train_split, row.augmentation, size),
        test=_split(row, test_split, None, size),
        num_classes=len(source.classes),
        in_channels=row.in_channels,
        image_size=size,
        classes=source.classes,
        mean=row.mean,
        std=row.std,
        provenance=provenance,
    )


def _locate(name: str, root: str | Path | None, download: bool) -> tuple[str, Path]:
    """The row to read, ``name`` or its substitute, and the data root."""
    row = DATASETS[name]
    if not row.markers:
        return name, Path()
    root = root if root is not None else os.environ.get(VARIABLE)
    way_out = f"pass --data-root or set {VARIABLE}" + (" (with --download to fetch it)" if row.downloadable else "")
    sought = ", ".join(row.markers)
    if row.substitute:
        sought += f", or for {DATASETS[row.substitute].label}: {', '.join(DATASETS[row.substitute].markers)}"
    if root is None or (isinstance(root, str) and not root):
        raise InputError(f"{name} needs the folder that holds one of {sought}; {way_out}")
    folder = expanded(root, "data root")
    fetch = download and row.downloadable
    if not fetch and not _is_root(folder):
        raise InputError(f"data root {shown(folder)} is no folder; {way_out}")
    if fetch or row.found(folder):
        return name, folder
    if row.substitute and DATASETS[row.substitute].found(folder):
        return row.substitute, folder
    raise InputError(f"{name} is not in {shown(folder)}: looked for {sought}; {way_out}")


def _is_root(folder: Path) -> bool:
    """`is_folder`, whose error names the path alone, said of the data root."""
    try:
        return is_folder(folder)
    except InputError as error:
        raise InputError(f"data root {error}") from error


def _check_limits(row: Row, limit: int | None, test_limit: int | None) -> None:
    """Raise `InputError` for a limit that cannot be met, before anything is read."""
    options = (("limit", limit), ("test_limit", test_limit))
    for (option, value), size in zip(options, row.expected or (None, None), strict=True):
        if value is not None:
            hint = "" if size is None else f"; {row.label} has {size} images"
            check_whole(option, value, most=math.inf if size is None else size, hint=hint)


def _check_counts(row: Row, source: Source) -> None:
    """Raise `InputError` when images are missing or of another shape, or labels lie outside the classes."""
    parts = (("train", source.train), ("test", source.test))
    for (part, (pixels, labels)), expected in zip(parts, row.expected or (None, None), strict=True):
        if expected is not None and len(labels) != expected:
            raise InputError(f"{row.label} {part} has {len(labels)} images, expected {expected}; fetch it again")
        shape = (len(labels), row.in_channels, row.image_size, row.image_size)
        if isinstance(pixels, Tensor) and pixels.shape != shape:
            raise InputError(f"{row.label} {part} has pixels of shape {list(pixels.shape)}, expected {list(shape)}")
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < len(source.classes):
            raise InputError(f"{row.label} {part} has no images or labels outside its {len(source.classes)} classes")


def _limited(split: Split, limit: int | None) -> Split:
    """The class-balanced subset of ``limit`` images, or all."""
    pixels, labels = split
    if limit is None or limit == len(labels):
        return split
    chosen = stratified_subset(labels, limit)
    return (pixels[chosen] if isinstance(pixels, Tensor) else [pixels[n] for n in chosen.tolist()]), labels[chosen]


def _split(row: Row, split: Split, augmentation: PaddedCrop | ResizedCrop | None, image_size: int) -> ImageSplit:
    """Images in memory or on disk, normalised and augmented as the row says."""
    pixels, labels = split
    if isinstance(pixels, Tensor):
        assert not isinstance(augmentation, ResizedCrop), "images in memory are cropped at their own size"
        return ImageArray(pixels, labels, row.normalisation(), augmentation, image_size)
    assert not isinstance(augmentation, PaddedCrop), "image files differ in size: padding them gives no batch"
    return ImageFiles(pixels, labels, row.normalisation(), augmentation, image_size)
