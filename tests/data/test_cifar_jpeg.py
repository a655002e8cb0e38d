"""The forms of CIFAR-10 (JPEG), and the cache of its decoded images."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from image_sets import CIFAR10_CLASSES, TRAIN, WRITERS, write_jpeg_archives, write_jpeg_folders
from PIL import Image
from torch import Tensor
from undrawn_figures import undrawn_figures

from secondorder.data import jpeg as jpeg_module
from secondorder.data import load_dataset
from studies.__main__ import main
from studies.engine.records import read_records


def equal(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


@pytest.mark.parametrize("name", ["cifar10", "cifar10_jpeg"])
@pytest.mark.parametrize("write", [write_jpeg_archives, write_jpeg_folders])
@pytest.mark.parametrize("below", ["", "cifar10-jpeg"])
def test_every_form_of_jpeg_set_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], None], below: str
) -> None:
    write(tmp_path / "data" / below)
    monkeypatch.setenv("SECONDORDER_DATA", str(tmp_path / "data"))
    data = load_dataset(name)
    assert (data.name, data.label) == ("cifar10_jpeg", "CIFAR-10 (JPEG)")
    assert data.classes == CIFAR10_CLASSES
    assert "Pillow" in str(data.provenance["decoder"])
    write_jpeg_folders(tmp_path / "reference")
    for part, split in (("train", data.train), ("test", data.test)):
        files = sorted((tmp_path / "reference" / part).glob("*/*"))
        assert torch.equal(split.labels, torch.tensor([CIFAR10_CLASSES.index(file.parent.name) for file in files]))
        expected = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])
        assert np.array_equal(split.images.numpy(), expected)  # type: ignore[attr-defined]


def test_the_original_is_preferred_to_its_jpeg_copy(tmp_path: Path, trusted: None) -> None:
    write_jpeg_folders(tmp_path)
    WRITERS["cifar10"](tmp_path)  # type: ignore[misc]
    assert load_dataset("cifar10", tmp_path).label == "CIFAR-10"
    assert load_dataset("cifar10_jpeg", tmp_path).label == "CIFAR-10 (JPEG)"


def test_cache_is_used_and_a_damaged_one_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jpeg_archives(tmp_path)
    decoded: list[Path] = []
    decode_all = jpeg_module._decode_all
    monkeypatch.setattr(
        jpeg_module, "_decode_all", lambda row, path, m: decoded.append(path) or decode_all(row, path, m)
    )
    first = load_dataset("cifar10_jpeg", tmp_path).train.batch(range(TRAIN))
    assert len(decoded) == 2
    assert equal(load_dataset("cifar10_jpeg", tmp_path).train.batch(range(TRAIN)), first)
    assert len(decoded) == 2
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2  # no temporary file is left
    whole = files[0].read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    other = BytesIO()
    np.savez(other, images=np.zeros((TRAIN, 3, 8, 8), np.uint8), labels=np.zeros(TRAIN, np.int64))
    for damage in (whole[: len(whole) // 2], b"", bytes(flipped), b"no archive", other.getvalue()):
        files[0].write_bytes(damage)
        decoded.clear()
        assert equal(load_dataset("cifar10_jpeg", tmp_path).train.batch(range(TRAIN)), first)
        assert len(decoded) == 1
        assert files[0].read_bytes() != damage


def test_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jpeg_folders(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECONDORDER_CACHE", str(tmp_path / "file" / "cache"))  # a folder below a file cannot be made
    assert len(load_dataset("cifar10_jpeg", tmp_path).train) == TRAIN


@undrawn_figures()
def test_all_records_of_a_study_are_of_the_set_that_was_found(tmp_path: Path) -> None:
    """Asked for is `cifar10`: claims are judged on the records of one name."""
    write_jpeg_archives(tmp_path)
    flags = f"--preset smoke --dataset cifar10 --data-root {tmp_path} --train-limit 16 --batch-size 8 --targets 100"
    flags += f" --others --autoencoder.arms --no-progress --processes 1 --out {tmp_path / 'out'}"
    assert main(["optimisers", *flags.split()]) == 0
    records, _ = read_records(tmp_path / "out", "optimisers")
    assert records.dataset.unique().tolist() == ["cifar10_jpeg"]
    claims = pd.read_csv(tmp_path / "out" / "claims.csv")
    assert claims[claims.primary == 6].outcome.tolist() != ["not measured"]
