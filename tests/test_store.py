"""The store: each network is trained once, whoever asks, killed or not, and what is damaged is refused in one line."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secondorder.data import ImageDataset, load_dataset, own_dataset
from secondorder.errors import InputError
from secondorder.training import Run, load_checkpoint
from studies.engine import store as store_module
from studies.engine.store import Store, Subject
from studies.engine.store_command import StoreCommand, store_command

RUN = Run("digits_tiny", "gap", "digits", 4, 32, 0.05, train_limit=96, dropout=0.3, threads=1)


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=96)


def weights(file: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(file)
    assert state is not None
    return dict(state["model"])


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were trained in."""
    trained: list[str] = []
    train = store_module.train
    monkeypatch.setattr(
        store_module,
        "train",
        lambda run, data, folder, **o: trained.append(folder.name) or train(run, data, folder, **o),
    )
    return trained


def test_a_network_is_trained_once(data: ImageDataset, tmp_path: Path, counted: list[str]) -> None:
    subject = Subject(RUN, data)
    first = Store(tmp_path).entry(subject).ensure([0, 5])
    again = Store(tmp_path).entry(Subject(RUN, data)).ensure([5, 12])
    assert first == again
    assert counted == [subject.name]
    assert first["total"] == len(first["step_losses"]) == 12
    assert first["run"] == RUN.to_dict()


@pytest.mark.parametrize("change", [{"seed": 1}, {"threads": 2}, {"epochs": 5}, {"pooling": "gcp"}, {"momentum": 0.8}])
def test_whatever_changes_the_numbers_has_an_entry_of_its_own(data: ImageDataset, change: dict[str, Any]) -> None:
    assert Subject(replace(RUN, **change), data).name != Subject(RUN, data).name


def test_own_networks_and_data_are_told_apart_by_what_they_hold() -> None:
    images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    run = Run("own", "own", "own", 1, 4, 0.1)

    def subject(shift: float, width: int) -> Subject:
        pairs = torch.utils.data.TensorDataset(images + shift, labels)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Linear(width, 2))
        for parameter in network.parameters():
            nn.init.constant_(parameter, 0.1)
        return Subject(run, own_dataset("own", pairs, pairs), network)

    assert subject(0, 3).name == subject(0, 3).name
    assert len({subject(0, 3).name, subject(0, 4).name, subject(1, 3).name}) == 3


def test_snapshots_that_were_not_kept_are_made_from_the_nearest_one(
    data: ImageDataset, tmp_path: Path, counted: list[str]
) -> None:
    whole, grown = Store(tmp_path / "a").entry(Subject(RUN, data)), Store(tmp_path / "b").entry(Subject(RUN, data))
    whole.ensure([4, 7, 9])
    grown.ensure([4])
    grown.ensure([7, 9, 12])
    assert counted[2:] == ["again"]
    assert same(whole.file(7), grown.file(7))
    assert same(whole.file(9), grown.file(9))
    assert same(whole.file(12), grown.file(12))
    assert not (grown.folder / "again").exists()


def _train(folder: str) -> None:
    torch.set_num_threads(1)
    subject = Subject(replace(RUN, epochs=200), load_dataset("digits", limit=96))
    Store(Path(folder)).entry(subject).ensure([4, 300])


def test_killed_and_asked_again_gives_the_same_bits(
    data: ImageDataset, tmp_path: Path, killed: Callable[..., None]
) -> None:
    subject = Subject(replace(RUN, epochs=200), data)
    half = Store(tmp_path / "killed").entry(subject)
    killed(lambda: half.has(300), str(tmp_path / "killed"), target=_train)
    assert not (half.folder / "trained.json").exists()
    assert not half.has(310)
    again, whole = half.ensure([4, 300, 310]), Store(tmp_path / "whole").entry(subject).ensure([310])
    assert again["step_losses"] == whole["step_losses"]
    other = Store(tmp_path / "whole").entry(subject)
    assert same(half.file(310), other.file(310))
    assert same(half.file(600), other.file(600))


def test_two_that_want_the_same_network_wait_for_one_training(
    data: ImageDataset, tmp_path: Path, counted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    subject = Subject(RUN, data)
    entry = Store(tmp_path).entry(subject)
    entry.folder.mkdir()
    with store_module._held(entry.folder):
        other = threading.Thread(target=lambda: Store(tmp_path).entry(subject).ensure([3]), daemon=True)
        other.start()
        deadline = time.monotonic() + 60
        while "waiting" not in capsys.readouterr().out:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert counted == []
    other.join(60)
    assert counted == [subject.name]
    entry.ensure([3])
    assert counted == [subject.name]


def test_what_is_damaged_or_of_another_version_is_refused(data: ImageDataset, tmp_path: Path) -> None:
    entry = Store(tmp_path).entry(Subject(RUN, data))
    entry.ensure([])
    file = entry.folder / "trained.json"
    content = file.read_text()
    file.write_text(content.replace("digits_tiny", "digits_tinx"))
    with pytest.raises(
        InputError, match=r"digits-digits_tiny-gap-s0-.*is damaged.*delete this folder, and the same command"
    ):
        entry.ensure([])
    store_module.write_sealed(file, json.loads(content)["content"] | {"format": 0})
    with pytest.raises(InputError, match="another version, format 0; delete this folder"):
        entry.ensure([])
    file.unlink()
    (entry.folder / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"checkpoint.pt' is damaged"):
        entry.ensure([])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another with --store"):
        Store(tmp_path / "file").entry(Subject(RUN, data)).ensure([])


def test_a_measurement_is_kept(data: ImageDataset, tmp_path: Path) -> None:
    entry, calls = Store(tmp_path).entry(Subject(RUN, data)), []
    for _ in range(2):
        assert entry.measured("key", lambda: calls.append(1) or [1.5, float("inf")]) == [1.5, float("inf")]
    assert calls == [1]


def test_the_command_lists_and_removes(data: ImageDataset, tmp_path: Path) -> None:
    assert store_command(StoreCommand(tmp_path / "none")) == [f"{tmp_path / 'none'}: 0 entries, 0.0 MiB"]
    names = []
    for seed in range(3):
        entry = Store(tmp_path).entry(Subject(replace(RUN, seed=seed, epochs=1), data))
        entry.ensure([])
        names.append(entry.folder.name)
    (tmp_path / names[2] / "trained.json").unlink()
    lines = store_command(StoreCommand(tmp_path))
    assert [line.split()[0] for line in lines[:-1]] == sorted(names)
    assert [line.endswith(", unfinished") for line in lines[:-1]] == [name == names[2] for name in sorted(names)]
    assert ": 3 entries," in lines[-1]
    with pytest.raises(InputError, match="--remove nothing: not in"):
        store_command(StoreCommand(tmp_path, remove=("nothing",)))
    with pytest.raises(InputError, match="at least 0"):
        store_command(StoreCommand(tmp_path, older_than=-1))
    with store_module._held(tmp_path / names[0]), pytest.raises(InputError, match="another process writes to"):
        store_command(StoreCommand(tmp_path, remove=("all",)))
    assert store_command(StoreCommand(tmp_path, unfinished=True))[0].startswith("removed 1 of 3")
    assert store_command(StoreCommand(tmp_path, older_than=1))[0].startswith("removed 0 of 2")
    assert store_command(StoreCommand(tmp_path, remove=(names[0],)))[0].startswith("removed 1 of 2")
    assert store_command(StoreCommand(tmp_path, remove=("all",)))[0].startswith("removed 1 of 1")
