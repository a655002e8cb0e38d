"""Checkpoints: one file per run, written atomically, refused when damaged.

A checkpoint is a ``torch.save`` of plain values and tensors, so ``torch.load(weights_only=True)`` reads it. It is
written beside its final place, brought to the disk (fsync) and renamed over the previous one: at every moment the
folder holds one complete checkpoint, whenever the process is killed or the disk is full.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from secondorder.atomic import check_writable, exclusive, read_regular, write_atomically
from secondorder.errors import InputError

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
            f"cannot save a checkpoint in {str(folder)!r}: {error.strerror or error}; make room there or choose a "
            "folder that can be written (an earlier checkpoint there is intact)"
        ) from error


def save(state: dict[str, Any], folder: Path) -> None:
    """Write ``state`` as the folder's checkpoint, atomically.

    Raises:
        InputError: naming the folder, when it cannot be written (full or read-only disk); the previous checkpoint is
            then intact.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT} | state, content)
    with _named(folder):
        write_atomically(folder / CHECKPOINT, content.getbuffer())


def read(folder: Path) -> bytes | None:
    """The bytes of the folder's checkpoint, None when there is none; raises InputError when it cannot be read."""
    path = folder / CHECKPOINT
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {str(path)!r}: {error.strerror or error}") from error


def parse(content: bytes, folder: Path) -> dict[str, Any]:
    """The state in a checkpoint's bytes, on the CPU; every checksum in the file is verified.

    Raises:
        InputError: naming the file, when it is truncated, damaged or not a checkpoint of this package.
    """
    path = folder / CHECKPOINT
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']} instead of {FORMAT}")
        if missing := [part for part in PARTS if part not in state]:
            raise ValueError(f"without {', '.join(missing)}")
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the checkpoint {str(path)!r} is damaged ({reason}); delete it or run without --resume to start afresh"
        ) from error
    return dict(state)


def check_same(state: dict[str, Any], expected: dict[str, dict[str, Any]], folder: Path) -> None:
    """Raise InputError, naming the first difference, unless the parts of ``expected`` are those of the checkpoint."""
    for part, mine in expected.items():
        for name in mine | state[part]:
            if mine.get(name) != state[part].get(name):
                raise InputError(
                    f"the checkpoint in {str(folder)!r} has {part} {name} = {state[part].get(name)!r}, not "
                    f"{mine.get(name)!r}; choose another folder or run without --resume to start afresh"
                )


def load(folder: Path) -> dict[str, Any] | None:
    """The state in the folder's checkpoint, None when there is none; raises InputError when it is damaged."""
    content = read(folder)
    return None if content is None else parse(content, folder)
