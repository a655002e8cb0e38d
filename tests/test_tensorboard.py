"""TensorBoard: event files that have every step once, the epochs, the hyper-parameters and the figures."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secondorder.data import ImageDataset
from secondorder.errors import InputError
from secondorder.optional import MissingLibraryError
from secondorder.training import Run, TensorBoard, Trained, train
from secondorder.training.tensorboard import hyper_parameters
from studies.__main__ import main
from studies.engine.fake_data import fake_data
from studies.engine.figures import write_figures
from studies.engine.store import Store, Subject

pytest.importorskip("tensorboard", reason="an extra: pip install 'secondorder[tensorboard]'")

RUN = Run("digits_tiny", "gap", "digits", epochs=2, batch_size=16, learning_rate=0.05, threads=1)


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return fake_data("digits", 64)


def events(folder: Path) -> Any:
    """What TensorBoard reads of a folder, in which there is one file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len([*folder.iterdir()]) == 1
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    return read


def check(folder: Path, trained: Trained) -> None:
    """Every step and every epoch is there once, in order."""
    read = events(folder)
    losses = read.Scalars("loss")
    assert [event.step for event in losses] == [*range(1, 1 + len(trained.step_losses))]
    assert [event.value for event in losses] == pytest.approx(trained.step_losses, rel=1e-6)
    for name in ("train_loss", "test_top1", "learning_rate", "seconds"):
        rows = [(event.step, event.value) for event in read.Scalars(f"epoch/{name}")]
        assert [step for step, _ in rows] == [row["step"] for row in trained.history]
        assert [value for _, value in rows] == pytest.approx([row[name] for row in trained.history], rel=1e-6)


def test_every_step_and_epoch_and_at_the_end_the_hyper_parameters(data: ImageDataset, tmp_path: Path) -> None:
    trained = train(RUN, data, tmp_path / "run", tracker=TensorBoard(tmp_path / "events"), progress=False)
    folder = tmp_path / "events" / RUN.name
    check(folder, trained)
    assert train(RUN, data, tmp_path / "plain", progress=False).step_losses == trained.step_losses
    from tensorboard.plugins.hparams import plugin_data_pb2

    metadata = events(folder).SummaryMetadata
    start = plugin_data_pb2.HParamsPluginData.FromString(
        metadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    assert start.hparams["learning_rate"].number_value == 0.05
    assert start.hparams["backbone"].string_value == "digits_tiny"
    (last,) = events(folder).Scalars("final/test_loss")
    assert (last.step, last.value) == (8, pytest.approx(trained.history[-1]["test_loss"]))


def test_training_that_goes_on_has_no_step_twice_and_none_missing(data: ImageDataset, tmp_path: Path) -> None:
    folder, tracker = tmp_path / "run", TensorBoard(tmp_path / "events", "mine")
    train(RUN, data, folder, tracker=tracker, snapshots=(2,), until=6, progress=False)
    assert "final/test_loss" not in events(tmp_path / "events" / "mine").Tags()["scalars"]
    shutil.copy(folder / "step-2.pt", folder / "checkpoint.pt")  # as if it had been killed then
    trained = train(RUN, data, folder, tracker=TensorBoard(tmp_path / "events", "mine"), resume=True, progress=False)
    check(tmp_path / "events" / "mine", trained)
    again = train(RUN, data, folder, resume=True, progress=False)  # without: a tracker is no part of the checkpoint
    assert again.step_losses == trained.step_losses
    train(RUN, data, folder, tracker=TensorBoard(tmp_path / "events", "done"), resume=True, progress=False)
    check(tmp_path / "events" / "done", trained)


def test_networks_of_a_store_have_a_folder_each_also_when_they_are_trained_already(
    data: ImageDataset, tmp_path: Path
) -> None:
    subjects = [Subject(dataclasses.replace(RUN, seed=seed), data) for seed in range(2)]
    found = {}
    for name in ("first", "again"):
        store = Store(tmp_path / "store", tmp_path / name)
        for subject in subjects:
            training = store.entry(subject).ensure(())
            read = events(tmp_path / name / subject.name)
            found[name, subject.run.seed] = [(event.step, event.value) for event in read.Scalars("loss")]
            assert len(found[name, subject.run.seed]) == training["total"] == 8
            assert read.Scalars("final/test_top1")
        assert {path.name for path in (tmp_path / name).iterdir()} == {subject.name for subject in subjects}
    for subject in subjects:
        assert found["first", subject.run.seed] == found["again", subject.run.seed]
    assert found["first", 0] != found["first", 1]


def test_the_command_writes_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pages(folder: Path, *_: Any, **__: Any) -> tuple[str, str]:
        Image.fromarray(np.full((4, 6), 128, np.uint8)).save(folder / "claims.png")
        return "", ""

    monkeypatch.setattr("studies.program.measure", lambda *_: None)
    monkeypatch.setattr("studies.program.write_pages", pages)
    flags = [
        "landscape",
        "--preset",
        "smoke",
        "--tensorboard",
        str(tmp_path / "events"),
        "--out",
        str(tmp_path / "out"),
    ]
    for _ in range(2):
        assert main(flags) == 0
    (image,) = events(tmp_path / "events" / "figures").Images("claims")
    assert (image.width, image.height) == (6, 4)


def test_the_engine_has_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    monkeypatch.setattr("studies.engine.command.carry_out", lambda plans, tables, store, *_, **__: stores.append(store))
    monkeypatch.setattr("studies.program.write_pages", lambda *_, **__: ("", ""))
    assert main(["landscape", "--preset", "smoke", "--tensorboard", str(tmp_path / "e"), "--out", str(tmp_path)]) == 0
    assert stores[0].events == tmp_path / "e"


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = "TensorBoard needs tensorboard: pip install 'secondorder[tensorboard]'"
    with pytest.raises(MissingLibraryError) as caught:
        TensorBoard(tmp_path)
    assert str(caught.value) == words
    refused(words, "landscape", "--preset", "smoke", "--tensorboard", str(tmp_path / "events"))


def test_a_folder_that_cannot_be_written(data: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write events for TensorBoard into .*file"):
        train(RUN, data, tmp_path / "run", tracker=TensorBoard(tmp_path / "file"), progress=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="cannot write events"):
        write_figures(tmp_path / "file", tmp_path / "out")


def test_hyper_parameters_are_numbers_and_words() -> None:
    found = hyper_parameters(dataclasses.replace(RUN, optimizer="kfac", optimizer_options={"damping": 0.1}))
    assert found["optimizer_options/damping"] == 0.1
    assert (found["channels_last"], found["train_limit"], found["epochs"]) == (False, "None", 2)
    assert all(isinstance(value, bool | float | int | str) for value in found.values())
