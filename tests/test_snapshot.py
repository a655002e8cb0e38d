"""Snapshots: kept at stated steps, and training as it was there, bit for bit what an observer is given."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.landscape import optimiser_step
from secondorder.training import Run, load_checkpoint, snapshot, train
from secondorder.untouched import untouched

STEPS = (0, 3, 5, 12)


class Watch:
    """Records the loss, an optimiser's step and the learning rate of every step."""

    every = 1

    def __call__(self, moment: Any) -> list[dict[str, float | int]]:
        return [seen(moment)]


def seen(moment: Any) -> dict[str, float | int]:
    """What depends on weights, momentum, learning rate, batch and dropout masks."""
    step = optimiser_step(moment.model, moment.optimizer, F.cross_entropy, moment.images, moment.labels)
    with untouched(moment.model):
        loss = F.cross_entropy(moment.model(moment.images), moment.labels).item()
    length = sum(float(s.double().square().sum()) for s in step)
    return {"step": moment.step, "loss": loss, "length": length, "rate": moment.learning_rate, "epoch": moment.epoch}


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=96)


def run(**changes: Any) -> Run:
    settings = {"backbone": "digits_tiny", "pooling": "gcp", "dataset": "digits", "epochs": 4, "batch_size": 32}
    return Run(**settings | {"train_limit": 96, "learning_rate": 0.05, "dropout": 0.3, "threads": 1} | changes)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_snapshot_is_what_an_observer_is_given(data: ImageDataset, tmp_path: Path, optimizer: str) -> None:
    settings = run(optimizer=optimizer, learning_rate=0.01, schedule="resnet_adju")
    trained = train(settings, data, tmp_path / "a", observers={"watch": Watch()}, progress=False)
    train(settings, data, tmp_path / "b", snapshots=STEPS, progress=False)
    before = torch.random.get_rng_state()
    for step in STEPS[:-1]:
        with snapshot(settings, data, tmp_path / "b" / f"step-{step}.pt") as at:
            assert seen(at) == trained.records["watch"][step]
    assert torch.equal(torch.random.get_rng_state(), before)
    with snapshot(settings, data, tmp_path / "b") as at:
        assert at.step == at.total == 12
        assert at.history == [{**row, "seconds": at.history[n]["seconds"]} for n, row in enumerate(trained.history)]
        state = trained.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in at.model.state_dict().items())
        with pytest.raises(InputError, match="no next batch"):
            _ = at.images


def test_stopped_and_resumed_with_the_same_snapshots(data: ImageDataset, tmp_path: Path) -> None:
    train(run(), data, tmp_path / "a", snapshots=STEPS, progress=False)
    stopped = train(run(), data, tmp_path / "b", snapshots=STEPS, until=4, progress=False)
    assert len(stopped.step_losses) == 4
    assert not (tmp_path / "b" / "step-5.pt").exists()
    train(run(), data, tmp_path / "b", snapshots=STEPS, resume=True, progress=False)
    for step in STEPS:
        a, b = (load_checkpoint(tmp_path / folder / f"step-{step}.pt") for folder in "ab")
        assert a is not None
        assert b is not None
        assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
        assert a["progress"]["step_losses"] == b["progress"]["step_losses"]


def test_a_snapshot_continues_as_a_checkpoint(data: ImageDataset, tmp_path: Path) -> None:
    whole = train(run(), data, tmp_path / "a", snapshots=(5,), progress=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint.pt").write_bytes((tmp_path / "a" / "step-5.pt").read_bytes())
    again = train(run(), data, tmp_path / "b", snapshots=(7,), until=7, resume=True, progress=False)
    assert again.step_losses == whole.step_losses[:7]
    with pytest.raises(InputError, match=r"snapshot at step 3: 7 steps are done and it was not kept"):
        train(run(), data, tmp_path / "b", snapshots=(3,), resume=True, progress=False)


@pytest.mark.parametrize("step", [-1, 13, 1.5, True, "1"])
def test_steps_that_are_none(data: ImageDataset, tmp_path: Path, step: Any) -> None:
    with pytest.raises(InputError, match="whole number from 0 to 12"):
        train(run(), data, tmp_path, snapshots=[step], progress=False)
    with pytest.raises(InputError, match="whole number from 0 to 12"):
        train(run(), data, tmp_path, until=step, progress=False)


def test_snapshots_that_are_not_there_or_of_another_run(data: ImageDataset, tmp_path: Path) -> None:
    train(run(epochs=1), data, tmp_path, snapshots=(1,), progress=False)
    with pytest.raises(InputError, match="there is no snapshot"), snapshot(run(epochs=1), data, tmp_path / "step-2.pt"):
        pass
    with (
        pytest.raises(InputError, match="seed = 0, not 1"),
        snapshot(run(epochs=1, seed=1), data, tmp_path / "step-1.pt"),
    ):
        pass
    (tmp_path / "step-1.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged"), snapshot(run(epochs=1), data, tmp_path / "step-1.pt"):
        pass
