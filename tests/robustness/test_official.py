"""Official sets in small: images and labels come back as they were written, and a damaged set is refused in one line."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secondorder.errors import InputError
from secondorder.robustness import official
from secondorder.robustness.official import corruptions_in, read_corruption, read_sequence

IMAGES, SIDE = 6, 8  # of each severity
CLASSES = ("n01", "n02")
PIXELS = np.random.default_rng(0).integers(0, 256, (5 * IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.tile(np.arange(IMAGES) % 3, 5)
FRAMES = np.random.default_rng(1).integers(0, 256, (5, 4, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """CIFAR-10-C and CIFAR-10-P in one folder."""
    root = tmp_path / "arrays"
    root.mkdir()
    for name, array in (("fog", PIXELS), ("labels", LABELS), ("gaussian_noise_2", FRAMES)):
        np.save(root / f"{name}.npy", array)
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """ImageNet-C: severities 2 and 3 of one corruption, two classes, three images each of one colour."""
    root = tmp_path / "folders"
    for severity in (2, 3):
        for label, name in enumerate(CLASSES):
            folder = root / "fog" / str(severity) / name
            folder.mkdir(parents=True)
            for n in range(3):
                colour = (100 * label, 40 * n, 20 * severity)
                Image.new("RGB", (12, 10), colour).save(folder / f"val_{n}.JPEG", quality=100, subsampling=0)
    return root


def test_a_severity_is_a_fifth_of_the_array(arrays: Path) -> None:
    assert corruptions_in(arrays) == ["fog", "gaussian_noise_2"]
    for severity in (1, 3, 5):
        batches = list(read_corruption(arrays, "fog", severity, batch_size=4))
        assert [len(labels) for _, labels in batches] == [4, 2]
        images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        part = slice((severity - 1) * IMAGES, severity * IMAGES)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), PIXELS[part])
        assert labels.dtype == torch.int64
        assert labels.tolist() == LABELS[part].tolist()


def test_sequences_of_an_array(arrays: Path) -> None:
    batches = list(read_sequence(str(arrays), "gaussian_noise_2", batch_size=3))
    assert [list(batch.shape) for batch in batches] == [[3, 4, 3, SIDE, SIDE], [2, 4, 3, SIDE, SIDE]]
    assert np.array_equal(torch.cat(batches).permute(0, 1, 3, 4, 2).numpy(), FRAMES)


def test_the_array_stays_on_disk(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    load = np.load
    monkeypatch.setattr(official.np, "load", lambda *a, **k: opened.append(load(*a, **k)) or opened[-1])
    next(read_corruption(arrays, "fog", 1))
    next(read_sequence(arrays, "gaussian_noise_2"))
    assert len(opened) == 3
    assert all(isinstance(array, np.memmap) for array in opened)


@pytest.mark.parametrize("classes", [None, CLASSES, CLASSES[::-1]])
def test_folders_are_labelled_in_the_order_of_the_classes(folders: Path, classes: tuple[str, ...] | None) -> None:
    batches = list(read_corruption(folders, "fog", 3, classes=classes, batch_size=5))
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert images.shape == (6, 3, 10, 12)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    order = classes or CLASSES
    expected = [(100 * CLASSES.index(name), 40 * n, 60) for name in order for n in range(3)]
    assert (images[:, :, 5, 5].float() - torch.tensor(expected)).abs().max() <= 3  # JPEG


def save(file: str, array: Any) -> Callable[[Path], None]:
    return lambda root: np.save(root / file, array, allow_pickle=True)


def cut(file: str, keep: int) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes((root / file).read_bytes()[:keep])


def archive(root: Path) -> None:
    with (root / "fog.npy").open("wb") as stream:
        np.savez(stream, PIXELS)


def fifo(root: Path) -> None:
    (root / "fog.npy").unlink()
    os.mkfifo(root / "fog.npy")


BAD_ARRAYS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut in the pixels": (cut("fog.npy", 3000), "fog.npy is truncated or no array .*copy it again"),
    "cut in the header": (cut("fog.npy", 20), "fog.npy is truncated or no array"),
    "empty": (cut("fog.npy", 0), "fog.npy is truncated or no array"),
    "objects, which would run code": (save("fog.npy", np.array([{}])), "fog.npy is truncated or no array"),
    "pickle": (lambda root: (root / "fog.npy").write_bytes(pickle.dumps(PIXELS)), "fog.npy is truncated or no array"),
    "archive": (archive, "archive of arrays"),
    "fifo": (fifo, "is a FIFO"),
    "float": (save("fog.npy", PIXELS / 255), r"has float64 of shape \[30, 8, 8, 3\]; .*uint8 \[5 N"),
    "grey": (save("fog.npy", PIXELS[..., 0]), r"shape \[30, 8, 8\]"),
    "channels first": (save("fog.npy", PIXELS.transpose(0, 3, 1, 2)), r"shape \[30, 3, 8, 8\]"),
    "not five severities": (save("fog.npy", PIXELS[:-1]), r"shape \[29, 8, 8, 3\]"),
    "no labels": (lambda root: (root / "labels.npy").unlink(), "labels.npy does not exist"),
    "labels of one severity": (
        save("labels.npy", LABELS[:IMAGES]),
        r"labels.npy has int64 of shape \[6\].*whole numbers \[30\]",
    ),
    "labels of floats": (save("labels.npy", LABELS / 1), "labels.npy has float64"),
    "no corruption": (lambda root: (root / "fog.npy").unlink(), "'fog' is not in .*there are: gaussian_noise_2"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_damaged_arrays_are_refused(kind: str, arrays: Path) -> None:
    damage, words = BAD_ARRAYS[kind]
    damage(arrays)
    with pytest.raises(InputError, match=words):
        read_corruption(arrays, "fog", 1)


def nested(root: Path, *parts: str) -> None:
    (root.joinpath(*parts)).mkdir(parents=True)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "a severity that is not there": (lambda root: None, {"severity": 4}, "4 is not there; severities of fog: 2, 3"),
    "no severity": (lambda root: None, {"severity": 6}, "severity must be a whole number from 1 to 5, got 6"),
    "another network": (lambda root: None, {"classes": ("n01", "n03")}, "network's 2 classes; in one only: n02, n03"),
    "no names": (lambda root: None, {"classes": 3}, "classes are 3"),
    "a class too many": (lambda root: nested(root, "fog", "3", "n09"), {"classes": CLASSES}, "in one only: n09"),
    "a class without images": (lambda root: nested(root, "fog", "3", "n09"), {}, "1 hold none \\(n09\\)"),
    "nothing": (lambda root: nested(root, "snow"), {"corruption": "snow"}, "severities of snow: none"),
    "unknown": (lambda root: None, {"corruption": "../fog"}, "'../fog' is not in .*there are: fog"),
    "batches of nothing": (lambda root: None, {"batch_size": 0}, "batch_size must be"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders_are_refused(kind: str, folders: Path) -> None:
    damage, options, words = BAD_FOLDERS[kind]
    damage(folders)
    with pytest.raises(InputError, match=words):
        read_corruption(**({"root": folders, "corruption": "fog", "severity": 3} | options))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda file: Image.new("RGB", (12, 11)).save(file), "12x11 pixels, not 12x10"),
        (lambda file: file.write_bytes(b"\xff\xd8 no image"), "does not decode"),
    ],
)
def test_a_bad_image_is_named_when_its_turn_comes(write: Any, words: str, folders: Path) -> None:
    write(folders / "fog" / "3" / "n02" / "val_1.JPEG")
    batches = read_corruption(folders, "fog", 3, batch_size=3)
    next(batches)
    with pytest.raises(InputError, match=f"n02/val_1.JPEG.*{words}"):
        next(batches)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (PIXELS, r"uint8 \[N, frames"),
        (FRAMES[:, :1], "at least 2 frames"),
        (FRAMES / 1, "has float64"),
        (FRAMES[:0], r"\[0, 4"),
    ],
)
def test_bad_sequences_are_refused(array: Any, words: str, arrays: Path) -> None:
    np.save(arrays / "tilt.npy", array)
    with pytest.raises(InputError, match=words):
        read_sequence(arrays, "tilt")


def test_videos_are_refused(tmp_path: Path) -> None:
    nested(tmp_path, "tilt", "n01")
    (tmp_path / "tilt" / "n01" / "val_1.mp4").write_bytes(b"video")
    with pytest.raises(InputError, match="ImageNet-P: they need a video decoder"):
        read_sequence(tmp_path, "tilt")
    with pytest.raises(InputError, match="is no folder"):
        read_sequence(tmp_path / "elsewhere", "tilt")
