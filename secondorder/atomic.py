"""Files that hold either their old content or all of the new one, and folders that one process writes at a time."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from secondorder.errors import InputError


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write beside `path`, bring it to the disk (fsync) and rename it over what was there.

    Killed at any moment or out of space (OSError), the old content is intact; only a kill leaves a partial file, which the
    next writing replaces. One process at a time may write a path: see `exclusive`.
    """
    with writing_atomically(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, which takes its place on exit as by `write_atomically`; not after an exception."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a pipe left there would be waited for, a link followed
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def opened_regular(path: str | Path) -> BinaryIO:
    """A regular file opened for reading; OSError else, where a pipe or a device would be waited for without an end."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "it is not a regular file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """The content of a regular file; OSError as `opened_regular`."""
    with opened_regular(path) as file:
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
def exclusive(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when the process ends, however it ends.

    Raises InputError when another process holds it, and when the lock's file in it, called `name`, cannot be used.
    """
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process writes to {str(folder)!r}; wait for it or choose another folder") from None
    except (OSError, NotImplementedError) as error:  # a folder or a link to nowhere; a file system without locks
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot lock {str(folder / name)!r}: {reason}; delete it or choose another folder") from None
    try:
        yield
    finally:
        lock.release()
