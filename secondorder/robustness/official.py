"""Official sets of corrupted and perturbed images, read as they are published, a batch at a time.

    ImageNet-C, Tiny-ImageNet-C   root/<corruption>/<severity>/<class>/<image>, JPEG files
    CIFAR-10-C, CIFAR-100-C       root/<corruption>.npy  uint8 [5 N, H, W, 3], severity 1 first; root/labels.npy [5 N]
    CIFAR-10-P                    root/<perturbation>.npy  uint8 [N, J, H, W, 3]; of noises <perturbation>_2.npy, ..._3.npy too

The arrays stay on disk, of which a batch is read when its turn comes. ImageNet-P comes as H.264 videos and is refused.

Index letters: ``N`` images, ``B`` images of a batch, ``J`` frames, ``C`` channels, ``H`` rows, ``W`` columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secondorder.data.decoding import decode, decode_stream
from secondorder.data.files import check_regular, entries, expanded, folders_in, is_folder, open_regular, reason, shown
from secondorder.data.readers import folder_split
from secondorder.errors import InputError, check_whole, short
from secondorder.robustness.metrics import SEVERITIES
from secondorder.robustness.streams import Batch

ARRAY = ".npy"
LABELS = "labels"


def corruptions_in(root: str | Path) -> list[str]:
    """Names of the corruptions, or perturbations, that the folder of an official set holds, sorted.

    Raises:
        InputError: when there is no such folder, or it may not be read.
    """
    folder = _root(root)
    arrays = [entry.name.removesuffix(ARRAY) for entry in entries(folder) if entry.name.endswith(ARRAY)]
    return sorted({*folders_in(folder), *arrays} - {LABELS})


def read_corruption(
    root: str | Path,
    corruption: str,
    severity: int,
    *,
    classes: Sequence[str] | None = None,
    batch_size: int = 256,
) -> Iterator[Batch]:
    """One corruption at one severity of ImageNet-C, Tiny-ImageNet-C, CIFAR-10-C or CIFAR-100-C, in the published order.

    What can be known without reading every image is checked before the first batch.

    Args:
        root: the folder that holds the corruptions.
        corruption: as its folder or array is called.
        severity: 1 to 5.
        classes: names of the class folders in the order of the network's outputs, as `ImageDataset.classes`; None: sorted. The
            arrays know numbers only.
        batch_size: images at a time.

    Raises:
        InputError: for a corruption that is not there (those that are, are listed), class folders that are not ``classes``,
            images of more than one size or damaged, and arrays that are truncated or of another kind or shape than published.
    """
    check_whole("severity", severity, SEVERITIES[0], SEVERITIES[-1])
    check_whole("batch_size", batch_size)
    folder = _root(root)
    _check_there(folder, corruption)
    if is_folder(folder / corruption):
        return _from_folder(folder / corruption / str(severity), classes, batch_size)
    return _from_array(folder, corruption, severity, batch_size)


def read_sequence(root: str | Path, name: str, *, batch_size: int = 32) -> Iterator[Tensor]:
    """One perturbation of CIFAR-10-P: sequences uint8 ``[B, J, 3, H, W]`` in the order of the test images.

    Args:
        root: the folder that holds the arrays.
        name: of the array; noises of difficulty 2 and 3 have their own, such as gaussian_noise_2.
        batch_size: sequences at a time.

    Raises:
        InputError: for a perturbation that is not there (those that are, are listed), a truncated array or one of another kind
            or shape, and the videos of ImageNet-P.
    """
    check_whole("batch_size", batch_size)
    folder = _root(root)
    _check_there(folder, name)
    if is_folder(folder / name):
        raise InputError(
            f"{shown(folder / name)} is a folder, as of the videos (.mp4) of ImageNet-P: they need a video decoder, which is not "
            "part of this package; decode them to an array [N, frames, H, W, 3], or make the frames with perturb(...)"
        )
    path = folder / f"{name}{ARRAY}"
    frames = _array(path)
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[1] < 2 or frames.shape[4] != 3 or 0 in frames.shape:
        raise InputError(f"{_kind(path, frames)}; sequences are uint8 [N, frames, H, W, 3] of at least 2 frames")
    return (_tensor(frames[i : i + batch_size], (0, 1, 4, 2, 3)) for i in range(0, len(frames), batch_size))


def _root(root: str | Path) -> Path:
    """The folder of the official set."""
    folder = expanded(root, "the root of the official set")
    if not is_folder(folder):
        raise InputError(f"{shown(folder)} is no folder; give the one that holds the corruptions")
    return folder


def _check_there(folder: Path, name: str) -> None:
    """InputError unless the folder holds the corruption, naming those that it holds."""
    there = corruptions_in(folder)
    if name not in there:
        has = f"there are: {', '.join(there)}" if there else "it holds no corruptions"
        raise InputError(f"{shown(repr(name), 40)} is not in {shown(folder)}; {shown(has, 160)}")


def _from_folder(folder: Path, classes: Sequence[str] | None, batch_size: int) -> Iterator[Batch]:
    """The images of one severity, in class folders."""
    if not is_folder(folder):
        severities = ", ".join(folders_in(folder.parent)) or "none"
        raise InputError(f"{shown(folder)} is not there; severities of {shown(folder.parent.name, 40)}: {severities}")
    found = folders_in(folder)
    if classes is not None and (isinstance(classes, str) or not isinstance(classes, Iterable)):
        raise InputError(f"classes are {short(classes)}; give the names of the class folders, or None")
    order = found if classes is None else [str(name) for name in classes]
    if sorted(order) != found:
        odd = [shown(name, 25) for name in sorted(set(order) ^ set(found))]
        raise InputError(
            f"{shown(folder)} holds {len(found)} class folders that are not the network's {len(order)} classes; in one only: "
            f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"
        )
    files, labels = folder_split(folder, order, allow_empty=False)
    size = decode(files[0]).size  # (width, height), the only one accepted: a batch has one shape

    def batches() -> Iterator[Batch]:
        for i in range(0, len(files), batch_size):
            pixels = np.stack([_pixels(file, size) for file in files[i : i + batch_size]])
            yield _tensor(pixels, (0, 3, 1, 2)), labels[i : i + batch_size]

    return batches()


def _pixels(file: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB pixels ``[H, W, 3]`` of an image file."""
    with open_regular(file) as stream:
        return np.asarray(decode_stream(stream, shown(file), size))


def _from_array(folder: Path, corruption: str, severity: int, batch_size: int) -> Iterator[Batch]:
    """The images of one severity, the severity-th fifth of an array."""
    path, labels_path = folder / f"{corruption}{ARRAY}", folder / f"{LABELS}{ARRAY}"
    images, labels = _array(path), _array(labels_path)
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or shape[0] % len(SEVERITIES):
        raise InputError(f"{_kind(path, images)}; corrupted images are uint8 [5 N, H, W, 3], severity by severity")
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
        raise InputError(f"{_kind(labels_path, labels)}; labels are whole numbers [{shape[0]}], one for each image")
    n = shape[0] // len(SEVERITIES)
    start, end = (severity - 1) * n, severity * n

    def batches() -> Iterator[Batch]:
        for i in range(start, end, batch_size):
            part = slice(i, min(i + batch_size, end))
            yield _tensor(images[part], (0, 3, 1, 2)), torch.from_numpy(labels[part].astype(np.int64))

    return batches()


def _array(path: Path) -> NDArray[Any]:
    """The array of a file, left on disk; nothing in it is run as code."""
    check_regular(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header can fail anywhere in its parser
        raise InputError(f"{shown(path)} is truncated or no array ({reason(error)}); copy it again") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{shown(path)} is an archive of arrays, not one array; copy it again")
    return array


def _kind(path: Path, array: NDArray[Any]) -> str:
    """What a file holds, for a message."""
    return f"{shown(path)} has {shown(array.dtype, 30)} of shape {shown(list(array.shape), 40)}"


def _tensor(pixels: NDArray[np.uint8], axes: tuple[int, ...]) -> Tensor:
    """The pixels with their axes in this order, copied from the disk."""
    return torch.from_numpy(np.array(pixels.transpose(axes), order="C"))
