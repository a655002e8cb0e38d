"""The training loop on any device: losses of the CPU, a checkpoint that is resumed, divergence, and no waiting."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import moved
from torch import Tensor, nn

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.robustness import corruption_mistakes, sequence_classes, split_batches
from secondorder.training import (
    Moment,
    NonFiniteLossError,
    Run,
    Trained,
    checkpoint,
    evaluate,
    load_checkpoint,
    losses,
    resolve_device,
    setup,
    train,
)
from secondorder.untouched import same_randomness

RUN = Run("digits_tiny", "gcp", "digits", epochs=2, batch_size=16, learning_rate=0.05, dropout=0.3, threads=1)


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=70, test_limit=30)  # 4 steps an epoch


@pytest.fixture
def run(device: str) -> Run:
    return dataclasses.replace(RUN, device=device)


class Norms:
    every = 3

    def __call__(self, moment: Moment) -> list[dict[str, Any]]:
        assert moment.images.device == next(moment.model.parameters()).device
        return [{"norm": float(sum(w.detach().square().sum() for w in moment.model.parameters()))}]


def fit(run: Run, data: ImageDataset, folder: Path, **options: Any) -> Trained:
    return train(run, data, folder, observers={"norms": Norms()}, progress=False, **options)


def test_names(device: str) -> None:
    kind = device.partition(":")[0]
    assert resolve_device("auto").type == resolve_device(device).type == kind
    with pytest.raises(InputError, match=f"device '{kind}:99' .* available: cpu, {kind}:0"):
        resolve_device(f"{kind}:99")
    with pytest.raises(InputError, match=f"device is 'tpu'; choose one of: auto, cpu, .*available: cpu, {kind}:0"):
        resolve_device("tpu")


@pytest.mark.parametrize("optimizer", ["sgd", "kfac"])
def test_is_that_of_the_cpu(optimizer: str, run: Run, data: ImageDataset, tmp_path: Path) -> None:
    run = dataclasses.replace(run, optimizer=optimizer, dropout=0.0)
    there = fit(run, data, tmp_path / "there")
    here = fit(dataclasses.replace(run, device="cpu"), data, tmp_path / "here")
    assert next(there.model.parameters()).device.type == run.device.partition(":")[0]
    assert there.step_losses == pytest.approx(here.step_losses, rel=1e-3)
    for ours, theirs in zip(there.history, here.history, strict=True):
        assert ours | {"seconds": 0} == pytest.approx(theirs | {"seconds": 0}, rel=1e-2)
    assert [row["norm"] for row in there.records["norms"]] == pytest.approx(
        [row["norm"] for row in here.records["norms"]], rel=1e-3
    )


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
def test_resumes(amp: str, run: Run, data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after 3 steps and continued, it takes the steps of the run that was not."""
    run = dataclasses.replace(run, amp=amp, optimizer="kfac" if amp == "off" else "sgd")
    whole = fit(run, data, tmp_path / "whole")
    save, saved = checkpoint.save, 0

    def third_is_the_last(*arguments: Any) -> None:
        nonlocal saved
        save(*arguments)
        saved += 1
        if saved == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", third_is_the_last)
    with pytest.raises(KeyboardInterrupt):
        fit(run, data, tmp_path / "parts", checkpoint_every=0)
    monkeypatch.setattr(checkpoint, "save", save)
    state = load_checkpoint(tmp_path / "parts")
    assert state["progress"]["step"] == len(state["progress"]["step_losses"]) == 3
    assert all(tensor.device.type == "cpu" for tensor in state["model"].values())
    resumed = fit(run, data, tmp_path / "parts", resume=True)
    assert resumed.step_losses == pytest.approx(whole.step_losses, rel=1e-6)
    assert resumed.records == whole.records


@pytest.mark.parametrize("read_every", [1, 2, 100])
@pytest.mark.parametrize("pooling", ["gap", "gcp_exact"])
def test_divergence_names_its_step(
    pooling: str, read_every: int, run: Run, data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the CPU, wherever the losses are read; no checkpoint has taken it."""
    monkeypatch.setattr(losses, "READ_EVERY", read_every)
    run = dataclasses.replace(run, learning_rate=1e25, pooling=pooling, schedule="constant", dropout=0.0)
    words = {}
    for name in (run.device, "cpu"):
        with pytest.raises(NonFiniteLossError) as caught:
            train(dataclasses.replace(run, device=name), data, tmp_path / name, progress=False)
        words[name] = str(caught.value).partition(";")[0]
        assert load_checkpoint(tmp_path / name) is None
    assert words[run.device] == words["cpu"]


def test_random_numbers_are_given_back(device: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3, device=device).cpu()
    torch.manual_seed(0)
    with same_randomness():
        torch.rand(5, device=device)
    assert torch.equal(torch.rand(3, device=device).cpu(), expected)


def test_waits_of_training(
    run: Run, tmp_path: Path, waits: Callable[[], AbstractContextManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None in a step: as many in an epoch of 2 steps as in one of 8. But for every 100th, whose losses are read."""
    run = dataclasses.replace(run, epochs=1, batch_size=8)
    counts = []
    for name, images, read_every in (("2", 16, 100), ("8", 64, 100), ("8 read", 64, 3)):
        monkeypatch.setattr(losses, "READ_EVERY", read_every)
        data = load_dataset("digits", limit=images, test_limit=30)
        with waits() as found:
            train(run, data, tmp_path / name, progress=False, checkpoint_every=1e9)
        counts.append(len(found))
    assert counts[0] == counts[1]
    assert counts[2] == counts[1] + 2


def test_waits_of_an_evaluation(device: str, data: ImageDataset, waits: Callable[[], AbstractContextManager]) -> None:
    """One, however many batches it takes."""
    model = moved(setup.initial_network(RUN, data), device)
    with waits() as found:
        evaluate(model, data.test, batch_size=8)
    assert len(found) == 1, found


def test_robustness(device: str, data: ImageDataset, waits: Callable[[], AbstractContextManager]) -> None:
    """Mistakes and classes of the CPU; two waits at the end, for the numbers and whether they are finite."""
    model = setup.initial_network(RUN, data).double()
    normalisation = data.test.normalisation

    def measured(model: nn.Module, batch_size: int) -> tuple[Tensor, Tensor]:
        batches = split_batches(data.test, batch_size)
        wrong = corruption_mistakes(model, batches, "contrast", normalisation, severities=[1, 5])
        return wrong, sequence_classes(model, split_batches(data.test, batch_size), "translate", normalisation)

    expected = measured(model, 30)
    with waits() as found:
        assert all(map(torch.equal, measured(moved(model, device), 8), expected))
    assert len(found) == 4, found


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("optimizer", ["sgd", "kfac", "gauss_newton"])
def test_without_float64(optimizer: str, run: Run, tmp_path: Path) -> None:
    data = load_dataset("digits", limit=20, test_limit=10)
    run = dataclasses.replace(run, epochs=1, batch_size=10, optimizer=optimizer)
    there = train(run, data, tmp_path / "there", progress=False)
    here = train(dataclasses.replace(run, device="cpu", dropout=0.3), data, tmp_path / "here", progress=False)
    assert there.step_losses == pytest.approx(here.step_losses, rel=1e-2)
