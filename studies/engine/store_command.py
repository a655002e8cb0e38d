"""``python -m studies store``: lists the networks of a store with their sizes, and removes those that are named."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from secondorder.atomic import exclusive
from secondorder.errors import InputError
from studies.engine.store import COMMIT, LOCK, TRAINED

DAY = 86_400.0


@dataclass(frozen=True)
class StoreCommand:
    """What to do with a store; without --remove, --unfinished or --older-than it is listed only."""

    store: Path = Path("reports/store")
    """Folder of trained networks."""
    remove: tuple[str, ...] = ()
    """Names of networks to remove, as listed; all: every one."""
    unfinished: bool = False
    """Remove networks whose training was interrupted."""
    older_than: float | None = None
    """Remove networks that were last written to so many days ago, or longer."""


@dataclass(frozen=True)
class Kept:
    """One folder of the store."""

    folder: Path
    size: int
    """Bytes of all its files."""
    written: float
    """Seconds since the epoch."""

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to the end; measurements without a network always were."""
        return (self.folder / TRAINED).exists() or not (self.folder / COMMIT).exists()


def kept_in(store: Path) -> list[Kept]:
    """The folders of a store, by name; InputError when it cannot be read."""
    if not store.exists():
        return []
    try:
        folders = sorted(folder for folder in store.iterdir() if folder.is_dir())
        return [_kept(folder) for folder in folders]
    except OSError as error:
        raise InputError(f"cannot read the store {store}: {error.strerror or error}") from None


def _kept(folder: Path) -> Kept:
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    times = [stat.st_mtime for stat in files] or [folder.stat().st_mtime]
    return Kept(folder, sum(stat.st_size for stat in files), max(times))


def store_command(command: StoreCommand) -> list[str]:
    """Do it; lines that say what is there, or what was removed.

    Raises:
        InputError: for a name that is not in the store, a number of days below 0, and what cannot be removed.
    """
    entries = kept_in(command.store)
    if command.older_than is not None and not command.older_than >= 0:
        raise InputError(f"--older-than {command.older_than:g}: a number of days, at least 0")
    names = {entry.folder.name for entry in entries}
    for name in (name for name in command.remove if name not in names | {"all"}):
        raise InputError(f"--remove {name}: not in {command.store}; python -m studies store lists what is there")
    removed = [entry for entry in entries if _is_meant(entry, command)]
    for entry in removed:
        try:
            with exclusive(entry.folder, LOCK):
                shutil.rmtree(entry.folder)
        except OSError as error:
            raise InputError(f"cannot remove {entry.folder}: {error.strerror or error}") from None
    if command.remove or command.unfinished or command.older_than is not None:
        return [f"removed {len(removed)} of {len(entries)} ({mebibytes(sum(entry.size for entry in removed))})"]
    lines = [
        f"{entry.folder.name}  {mebibytes(entry.size)}, {(time.time() - entry.written) / DAY:.1f} days old"
        + ("" if entry.is_finished else ", unfinished")
        for entry in entries
    ]
    return [*lines, f"{command.store}: {len(entries)} entries, {mebibytes(sum(entry.size for entry in entries))}"]


def _is_meant(entry: Kept, command: StoreCommand) -> bool:
    old = command.older_than is not None and time.time() - entry.written >= command.older_than * DAY
    return old or (command.unfinished and not entry.is_finished) or bool({entry.folder.name, "all"} & {*command.remove})


def mebibytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 2**20:,.1f} MiB"
