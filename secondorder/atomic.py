"""Files that hold either their old content or all of the new one, and folders that one process writes at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from secondorder.errors import InputError


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside `path`, bring it to the disk (fsync) and rename it over what was there.

    Killed at any moment or out of space (OSError), the old content is intact; only a kill leaves a partial file, which the
    next writing replaces. One process at a time may write a path: see `exclusive`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the renaming itself to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Make `folder` and prove that a file can be written there; raises OSError else."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when the process ends, however it ends.

    Raises InputError when another process holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process writes to {str(folder)!r}; wait for it or choose another folder") from None
    try:
        yield
    finally:
        lock.release()
