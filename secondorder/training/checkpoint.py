"""Checkpoints: one file per run, written atomically, refused when damaged.

A checkpoint is a ``torch.save`` of plain values and tensors, so ``torch.load(weights_only=True)`` reads it. It is
written beside its final place, brought to the disk (fsync) and renamed over the previous one: at every moment the
folder holds one complete checkpoint, whenever the process is killed or the disk is full.
"""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secondorder.atomic import check_writable, exclusive, write_atomically
from secondorder.data import ImageDataset
from secondorder.data.files import expanded, open_regular, reason, shown
from secondorder.data.own import is_own
from secondorder.errors import InputError
from secondorder.training.run import Run
from secondorder.training.schedules import SCHEDULES
from secondorder.training.state import Progress

CHECKPOINT = "checkpoint.pt"
FORMAT = 1
PARTS = ("run", "data", "observers", "model", "optimizer", "scaler", "progress")


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Create ``folder``, prove that it can be written and keep other processes out, before any training.

    Raises:
        InputError: naming the folder, when it cannot be written or another process trains there.
    """
    with _named(folder):
        check_writable(folder)
    with exclusive(folder):
        yield


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """OSError becomes InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot save a checkpoint in {shown(folder, 100)!r}: {error.strerror or error}; make room there or choose a "
            "folder that can be written (an earlier checkpoint there is intact)"
        ) from error


def snapshot_name(step: int) -> str:
    """The file of the state after so many steps, in the folder of a training."""
    return f"step-{step}.pt"


def save(state: dict[str, Any], folder: Path, name: str = CHECKPOINT) -> None:
    """Write ``state`` as the folder's checkpoint, or as a file of another name, atomically.

    Raises:
        InputError: naming the folder, when it cannot be written (full or read-only disk); the previous checkpoint is
            then intact.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT} | state, content)
    with _named(folder):
        write_atomically(folder / name, content.getbuffer())


def file_of(path: Path) -> Path:
    """The checkpoint of a folder, or the file itself where ``path`` is one."""
    return path if os.path.isfile(path) else path / CHECKPOINT  # noqa: PTH113  never raises, unlike Path.is_file


def read(path: Path) -> bytes | None:
    """The bytes of a checkpoint file, None when there is none; raises InputError when it cannot be read."""
    try:
        if not os.path.lexists(path):
            return None
        with open_regular(path) as stream:
            return stream.read()
    except (OSError, InputError) as error:
        raise InputError(f"cannot read the checkpoint: {error}") from error


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """The state in the bytes of a checkpoint file, on the CPU; every checksum in the file is verified.

    Raises:
        InputError: naming the file, when it is truncated, damaged or not a checkpoint of this package.
    """
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        _check_parts(state)
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        if plain_weights(content) is not None:
            raise InputError(
                f"the checkpoint {shown(path)!r} holds weights alone (a state_dict), no training to continue; move it elsewhere "
                "and begin from it with train(..., initial=that file)"
            ) from error
        raise InputError(
            f"the checkpoint {shown(path, 140)!r} is damaged ({reason(error, 50)}); delete it to start afresh"
        ) from error
    return dict(state)


def _check_parts(state: Any) -> None:
    """Raise ValueError unless a file's content is what `save` writes."""
    if not isinstance(state, dict):
        raise ValueError(f"a {type(state).__name__} instead of a dictionary")
    if state.get("format") != FORMAT:
        raise ValueError(f"format {state.get('format')!r:.20} instead of {FORMAT}")
    if missing := [part for part in PARTS if not isinstance(state.get(part), dict)]:
        raise ValueError(f"without {', '.join(missing)}")
    if missing := [field.name for field in fields(Progress) if field.name not in state["progress"]]:
        raise ValueError(f"progress without {', '.join(missing)}")
    for part, name in (("run", "epochs"), ("progress", "step")):
        if not isinstance(state[part].get(name), int):
            raise ValueError(f"{part} {name} is {state[part].get(name)!r:.20}")


def plain_weights(content: bytes) -> dict[str, Any] | None:
    """The state_dict in the bytes of a file, None when they hold anything else."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # as above
        return None
    named = isinstance(state, dict) and bool(state) and all(isinstance(name, str) for name in state)
    return dict(state) if named and all(isinstance(value, Tensor) for value in state.values()) else None


def identity(run: Run, data: ImageDataset, observers: dict[str, int], origin: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint must have in common with a training to be continued: see `check_same`."""
    sizes: dict[str, Any] = {"name": data.name, "train": len(data.train), "test": len(data.test)}
    sizes["image_size"] = data.image_size
    if is_own(data.name):
        sizes["samples"] = data.provenance["samples_sha256"]
    return {"run": run.to_dict(), "data": sizes, "observers": observers, "network": origin}


def check_same(state: dict[str, Any], expected: dict[str, dict[str, Any]], folder: Path) -> None:
    """Raise InputError, naming the first difference, unless the parts of ``expected`` are those of the checkpoint."""
    for part, mine in expected.items():
        theirs = state.get(part, {})
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                raise InputError(
                    f"the checkpoint in {shown(folder)!r} has {part} {name} = {shown(repr(theirs.get(name)), 50)}, not "
                    f"{shown(repr(mine.get(name)), 50)}; choose another folder, or begin afresh without resume"
                )


def take_epochs(state: dict[str, Any], run: Run, steps_per_epoch: int, folder: Path) -> None:
    """Give the checkpoint the run's number of epochs where its steps have the same learning rates under both.

    Then they are the first steps of the longer (or shorter) run too, and continuing gives that run bit for bit. Raises
    InputError else.
    """
    theirs, done = int(state["run"]["epochs"]), int(state["progress"]["step"])
    if theirs == run.epochs:
        return
    schedule = SCHEDULES[run.schedule]

    def rate(step: int, epochs: int) -> float:
        return schedule.factor_at(step, steps_per_epoch, epochs)

    steps = range(0, done, 1 if schedule.per_step else steps_per_epoch)
    if done > steps_per_epoch * run.epochs or any(rate(step, theirs) != rate(step, run.epochs) for step in steps):
        raise InputError(
            f"the checkpoint in {shown(folder)!r} has run epochs = {theirs}, not {run.epochs}: the {done} steps done would be "
            f"others under {run.schedule!r}; use another folder, and initial= to begin with its weights"
        )
    state["run"]["epochs"] = run.epochs


def restore(state: dict[str, Any], parts: dict[str, Any], folder: Path) -> None:
    """Give network, optimiser and scaler of a training the states of a checkpoint; InputError when they do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # the package's code has changed since
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the checkpoint in {shown(folder)!r} does not fit the network ({shown(reason, 60)}); choose another folder "
            "or begin afresh without resume"
        ) from error


def resumed(
    content: bytes,
    folder: Path,
    run: Run,
    steps_per_epoch: int,
    expected: dict[str, dict[str, Any]],
    parts: dict[str, Any],
) -> Progress:
    """The progress in the bytes of a folder's checkpoint, whose states are given to the parts of a training.

    Args:
        content: see `read`.
        folder: of the checkpoint, named by errors.
        run: of the training; its number of epochs may be another (`take_epochs`).
        steps_per_epoch: of the training.
        expected: the `identity` of the training.
        parts: network, optimiser and scaler of the training, by the names of their states.

    Raises:
        InputError: when the checkpoint is damaged, or of another training.
    """
    state = parse(content, folder / CHECKPOINT)
    take_epochs(state, run, steps_per_epoch, folder)
    check_same(state, expected, folder)
    restore(state, parts, folder)
    return Progress(**state["progress"])


def load(path: str | Path) -> dict[str, Any] | None:
    """The state in a checkpoint, given its folder or the file itself; None when there is none.

    Raises:
        InputError: when it cannot be read or is damaged.
    """
    file = file_of(expanded(path, "checkpoint"))
    content = read(file)
    return None if content is None else parse(content, file)
