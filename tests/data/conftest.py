"""Every test sees the small copies of the data sets, and none the user's cache or data root."""

from dataclasses import replace
from pathlib import Path

import pytest
import torchvision
from image_sets import TEST, TRAIN, WRITERS

from secondorder.data import DATASETS, ImageDataset, load_dataset, readers


@pytest.fixture(autouse=True)
def small_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect the small copies, whose checksums differ from the published ones; keep the cache in the test's folder."""
    monkeypatch.setenv("SECONDORDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SECONDORDER_DATA", raising=False)
    monkeypatch.setattr(readers, "FAKE_IMAGES", (TRAIN, TEST))
    for name in ("cifar10", "cifar10_jpeg", "cifar100", "fashion_mnist", "fake"):
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], expected=(TRAIN, TEST)))


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision accept pickles with other checksums than the published ones."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.fixture(params=DATASETS)
def data(request: pytest.FixtureRequest, tmp_path: Path, trusted: None) -> ImageDataset:
    write = WRITERS[request.param]
    if write is not None:
        write(tmp_path / "data")
    return load_dataset(request.param, tmp_path / "data")
