"""Files of a data set: what may be opened at all, folders listed without surprises, and how a message names a path.

Opening a FIFO waits for ever and opening a device may do anything, so a path is looked at before it is opened, through
every link. All errors are `InputError` in one line that names the path.
"""

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from secondorder.errors import InputError

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
}


def shown(path: object, length: int = 80) -> str:
    """A path or name for a message of one line: unprintable characters escaped, the middle left out where it is long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
    if len(text) <= length:
        return text
    head = length // 4
    return f"{text[:head]}...{text[head + 3 - length :]}"


def reason(error: BaseException, length: int = 100) -> str:
    """Type and beginning of the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shown(text[0], length)}" if text else type(error).__name__


def status_of(path: str | Path) -> os.stat_result:
    """What ``path`` leads to, through all links.

    Raises:
        InputError: for a dangling link, a loop of links, a path that is not there, may not be read or is no path.
    """
    try:
        return os.stat(path)  # noqa: PTH116  a string of DirEntry, a million times
    except FileNotFoundError as error:
        if os.path.islink(path):  # noqa: PTH114
            target = shown(os.readlink(path), 60)  # noqa: PTH115
            raise InputError(
                f"{shown(path)} is a dangling link: {target} is not there; mend it or delete it"
            ) from error
        raise InputError(f"{shown(path)} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be read ({_words(error)})") from error


def exists(path: str | Path) -> bool:
    """Whether there is something under ``path``; raises `InputError` for a dangling link and what cannot be looked at."""
    if not os.path.lexists(path) and _parents_can_be_read(path):
        return False
    status_of(path)
    return True


def _parents_can_be_read(path: str | Path) -> bool:
    """Whether ``path`` is absent for certain, and not merely hidden behind a folder that may not be read."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return True


def is_folder(path: str | Path) -> bool:
    """Whether ``path`` is there and a folder; raises `InputError` as `exists`."""
    return exists(path) and stat.S_ISDIR(status_of(path).st_mode)


def check_regular(path: str | Path, most: int | None = None) -> os.stat_result:
    """Raise `InputError` unless ``path`` is a regular file, behind links or not, of at most ``most`` bytes."""
    status = status_of(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise InputError(f"{shown(path)} is {kind}, which is not opened; put a regular file there or delete it")
    if most is not None and status.st_size > most:
        raise InputError(f"{shown(path)} has {status.st_size} bytes; at most {most} are read; replace or remove it")
    return status


def open_regular(path: str | Path, most: int | None = None) -> BinaryIO:
    """``path`` opened for reading in binary; raises `InputError` as `check_regular`, and when it may not be read."""
    check_regular(path, most)
    try:  # without blocking, should a FIFO have taken the file's place since
        return open(path, "rb", opener=lambda p, flags: os.open(p, flags | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read ({_words(error)})") from error


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in ``folder``, by name, without the hidden (``.DS_Store``, ``._a.jpg``, ``.ipynb_checkpoints``).

    Raises:
        InputError: when the folder may not be read, or is none.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"the folder {shown(folder)} cannot be read ({_words(error)})") from error


def folders_in(folder: str | Path) -> list[str]:
    """Names of the folders in ``folder``, links to folders among them, sorted; raises `InputError` as `entries`."""
    return [entry.name for entry in entries(folder) if _is_folder_entry(entry)]


def _is_folder_entry(entry: os.DirEntry[str]) -> bool:
    """Whether the entry leads to a folder; raises `InputError` for a dangling link, since it may have been one."""
    return stat.S_ISDIR(status_of(entry.path).st_mode) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def images_in(folder: str | Path, suffixes: Collection[str], *, below: bool = True) -> Iterator[str]:
    """Paths of the files in ``folder`` (and ``below``) with one of the ``suffixes``, in the order of torchvision's folders.

    Raises:
        InputError: for an image that is no regular file or empty, a dangling link, a folder that may not be read, and a
            link that leads back to a folder above it.
    """
    ends, folders = tuple(suffixes), [(str(folder), frozenset[tuple[int, int]]())]
    paths: list[tuple[str, list[str]]] = []
    while folders:
        path, above = folders.pop()
        status = status_of(path)
        if (status.st_dev, status.st_ino) in above:
            raise InputError(f"{shown(path)} is a link back to a folder above it, without end; delete the link")
        above |= {(status.st_dev, status.st_ino)}
        files = []
        for entry in entries(path):
            if _is_folder_entry(entry):
                if below:
                    folders.append((entry.path, above))
            elif entry.name.lower().endswith(ends):
                if check_regular(entry.path).st_size == 0:
                    raise InputError(f"{shown(entry.path)} is empty; copy the image again or delete it")
                files.append(entry.path)
        paths.append((path, files))
    return (file for _, files in sorted(paths) for file in files)


def expanded(path: object, what: str) -> Path:
    """``path`` with its ``~`` replaced by the home folder; `InputError` that begins with ``what`` when there is none."""
    try:
        return Path(path).expanduser()  # type: ignore[arg-type]
    except RuntimeError as error:
        raise InputError(f"{what} {shown(path)} names a user without a home folder; write the path in full") from error
    except TypeError as error:
        raise InputError(f"{what} is {shown(repr(path))}; it must be a path") from error


def _words(error: Exception) -> str:
    """The system's words for an error."""
    return (isinstance(error, OSError) and error.strerror) or reason(error)
