"""Checkpoints: killed trainings resume bit for bit; full disks, damage and strangers are refused."""

import dataclasses
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from secondorder.data import ImageDataset, load_dataset
from secondorder.data.files import shown
from secondorder.errors import InputError
from secondorder.training import Moment, Run, Trained, checkpoint, load_checkpoint, setup, steps, train

# Both sources of randomness in a forward pass are on: dropout before the classifier and in the head.
RUN = Run(
    "digits_net", "dropcov", "digits", epochs=3, batch_size=16, learning_rate=0.05, dropout=0.3, seed=3, threads=1
)
STEPS = 12
PATIENCE = 300.0  # seconds to wait for a process on a busy machine; a quiet one needs two


class Norms:
    """The norm of every weight before each second step; from step ``gate`` on it waits to be killed, for ten minutes."""

    def __init__(self, every: int = 2, gate: int = STEPS) -> None:
        self.every, self.gate = every, gate

    def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
        time.sleep(2 * PATIENCE if moment.step >= self.gate else 0)
        return [{"step": moment.step, "name": n, "norm": w.norm().item()} for n, w in moment.model.named_parameters()]


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=70, test_limit=30)


def fit(folder: Path, data: ImageDataset, run: Run = RUN, *, gate: int = STEPS, **options: Any) -> Trained:
    observers = {"norms": Norms(gate=gate)}
    return train(run, data, folder, observers=observers, progress=False, **options)


@pytest.fixture(scope="module")
def finished(data: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """An uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    return fit(folder, data), folder


def assert_same_bits(one: Trained, other: Trained) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert one.step_losses == other.step_losses
    assert one.records == other.records
    assert [row | {"seconds": 0} for row in one.history] == [row | {"seconds": 0} for row in other.history]


# ------------------------------------------------------------------------------------------------------------- kills


def kill_in(owner: object, name: str, call: int, *, after: bool = False) -> None:
    """Let this process end itself by SIGKILL in the ``call``-th call of ``owner.name``, before or after its work."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if calls == call and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


# Moments at which a process kills itself: the owner of a function, its name, the call, and before or after it.
SUICIDES: list[tuple[object, str, int, bool]] = [
    (torch.optim.SGD, "step", 2, False),  # in the middle of a step
    (os, "fsync", 3, False),  # a partial file is being written (files and folder take turns)
    (Path, "replace", 2, False),  # written, not yet renamed
    (Path, "replace", 2, True),  # renamed, the folder not yet brought to the disk
    (steps, "evaluate", 1, False),  # an epoch's steps are done, its evaluation is not
    (steps, "evaluate", 1, True),
]


def child(folder: str, suicide: int | None, gate: int) -> None:
    """One attempt at the run, in a process of its own."""
    torch.set_num_threads(1)
    if suicide is not None:
        owner, name, call, after = SUICIDES[suicide]
        kill_in(owner, name, call, after=after)
    fit(Path(folder), load_dataset("digits", limit=70, test_limit=30), gate=gate, resume=True, checkpoint_every=0)


@pytest.fixture(scope="module")
def attempt(forkserver: ForkServerContext) -> Callable[..., Any]:
    """Start an attempt in a process of its own."""

    def start(folder: Path, *, suicide: int | None = None, gate: int = STEPS) -> Any:
        process = forkserver.Process(target=child, args=(str(folder), suicide, gate))
        process.start()
        return process

    return start


def steps_saved(folder: Path) -> int:
    state = load_checkpoint(folder)
    return state["progress"]["step"] if state else 0


def test_killed_in_the_middle_of_everything(
    attempt: Callable[..., Any], finished: tuple[Trained, Path], data: ImageDataset, tmp_path: Path
) -> None:
    reached = [0]
    for suicide in range(len(SUICIDES)):
        process = attempt(tmp_path, suicide=suicide)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        reached.append(steps_saved(tmp_path))
    assert reached == sorted(reached)
    assert 0 < reached[-1] < STEPS
    resumed = fit(tmp_path, data, resume=True)
    assert_same_bits(resumed, finished[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint.pt"]


def test_killed_from_outside_again_and_again(
    attempt: Callable[..., Any], finished: tuple[Trained, Path], data: ImageDataset, tmp_path: Path
) -> None:
    for goal, delay in ((1, 0.0), (4, 0.007), (5, 0.013), (8, 0.03)):  # whichever moment is met, the result is the same
        process = attempt(tmp_path, gate=goal + 2)
        deadline = time.monotonic() + PATIENCE
        while steps_saved(tmp_path) < goal and time.monotonic() < deadline:
            assert process.exitcode is None, "the attempt ended before it could be killed"
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        assert goal <= steps_saved(tmp_path) < STEPS
    process = attempt(tmp_path)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert_same_bits(fit(tmp_path, data, resume=True), finished[0])


def test_finished_run_returns_at_once(
    finished: tuple[Trained, Path], data: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, folder = finished
    monkeypatch.delattr(steps.Training, "_step")
    again = fit(folder, data, resume=True)
    assert_same_bits(again, trained)
    assert again.history == trained.history
    assert again.seconds == trained.seconds > 0


def test_resume_without_a_checkpoint_starts_and_without_resume_starts_afresh(
    finished: tuple[Trained, Path], data: ImageDataset, tmp_path: Path
) -> None:
    assert_same_bits(fit(tmp_path / "new" / "folder", data, resume=True), finished[0])
    other = fit(tmp_path / "new" / "folder", data, dataclasses.replace(RUN, seed=4, epochs=1))
    assert len(other.step_losses) == 4
    assert steps_saved(tmp_path / "new" / "folder") == 4


# ------------------------------------------------------------------------------------------- what must not be accepted


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 4, "run seed = 3, not 4"),
        ("epochs", 4, "run epochs = 3, not 4"),
        ("threads", None, "run threads = 1, not None"),
        ("pooling_options", {"x": 1}, "run pooling_options = {}, not {'x': 1}"),
    ],
)
def test_checkpoint_of_another_run(
    finished: tuple[Trained, Path], data: ImageDataset, field: str, value: Any, message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(setup, "initial_network", lambda run, data: torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match=message):
        fit(finished[1], data, dataclasses.replace(RUN, **{field: value}), resume=True)


def test_checkpoint_of_other_data_and_observers(finished: tuple[Trained, Path], data: ImageDataset) -> None:
    with pytest.raises(InputError, match="data test = 30, not 20"):
        fit(finished[1], load_dataset("digits", limit=70, test_limit=20), resume=True)
    with pytest.raises(InputError, match="observers norms = 2, not 3"):
        train(RUN, data, finished[1], observers={"norms": Norms(3)}, progress=False, resume=True)
    with pytest.raises(InputError, match="observers norms = 2, not None"):
        train(RUN, data, finished[1], progress=False, resume=True)


def test_checkpoint_of_a_changed_network(
    finished: tuple[Trained, Path], data: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "initial_network", lambda run, data: torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="does not fit the network"):
        fit(finished[1], data, resume=True)


def damages(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return {
        "empty": b"",
        "text": b"not a checkpoint",
        "half": content[: len(content) // 2],
        "last byte lost": content[:-1],
        "one bit": bytes(flipped),
        "beginning lost": content[100:],
    }


def test_damaged_checkpoint(finished: tuple[Trained, Path], data: ImageDataset, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for name, content in damages((finished[1] / "checkpoint.pt").read_bytes()).items():
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            fit(tmp_path, data, resume=True)
        message = str(caught.value)
        assert "\n" not in message, name
        assert shown(path, 140) in message, name
        assert len(message) <= 300, name
        assert "delete it to start afresh" in message, name
        assert path.read_bytes() == content, name


WHOLE = {part: {} for part in checkpoint.PARTS} | {"format": 1}


@pytest.mark.parametrize(
    "content",
    [{"a": 1}, [1, 2], {"format": 99}, {"format": 1, "run": {}}, torch.zeros(3), WHOLE | {"progress": 3}, WHOLE],
)
def test_file_that_is_no_checkpoint(data: ImageDataset, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="is damaged"):
        fit(tmp_path, data, resume=True)


def test_checkpoint_runs_no_code(data: ImageDataset, tmp_path: Path) -> None:
    torch.save({"format": 1, "run": Path(), "call": os.getpid}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="is damaged"):
        fit(tmp_path, data, resume=True)


def test_checkpoint_from_before_own_networks_is_continued(
    finished: tuple[Trained, Path], data: ImageDataset, tmp_path: Path
) -> None:
    state = torch.load(finished[1] / "checkpoint.pt", weights_only=True)
    assert state.pop("network") == {}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert_same_bits(fit(tmp_path, data, resume=True), finished[0])


def test_checkpoint_is_an_ordinary_torch_file(finished: tuple[Trained, Path]) -> None:
    state = torch.load(finished[1] / "checkpoint.pt", weights_only=True)
    assert Run.from_dict(state["run"]) == RUN
    assert state["progress"]["step"] == STEPS
    assert len(state["progress"]["records"]["norms"]) == 6 * len(list(finished[0].model.parameters()))


# ------------------------------------------------------------------------------------------------- disks and folders


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes, as on a full disk (EFBIG in place of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_the_previous_checkpoint(
    finished: tuple[Trained, Path], data: ImageDataset, tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    class Full:
        every = 1

        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            if moment.step == 5:
                small_disk(20_000)
            return []

    with pytest.raises(InputError) as caught:
        train(RUN, data, tmp_path, observers={"full": Full()}, progress=False, checkpoint_every=0)
    small_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    message = str(caught.value)
    assert "\n" not in message
    assert f"cannot save a checkpoint in {shown(tmp_path, 100)!r}" in message
    assert "make room" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint.pt"]
    assert steps_saved(tmp_path) == 5

    class Roomy(Full):
        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            return []

    resumed = train(RUN, data, tmp_path, observers={"full": Roomy()}, progress=False, resume=True)
    assert resumed.step_losses == finished[0].step_losses


def test_folder_that_cannot_be_written_is_refused_before_training(
    data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(steps.Training, "_step")
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot save a checkpoint in"):
            fit(folder, data)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / checkpoint.CHECKPOINT).mkdir()
    with pytest.raises(InputError, match="cannot read the checkpoint"):
        fit(tmp_path, data, resume=True)
