"""A folder of numbered records, in files that are written whole or not at all and hold no code.

A record belongs to a place: 0.3.12 is the 12th (from 0) that was made on the way to the 3rd on the way to the 0th. It is a
result (RECORD), or what there is of one (BEGUN). The record of 0.3 takes the place of all that begin with 0.3. A file,
`<number>.records`, has what was written at one time, and is removed when nothing in it counts any more.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secondorder.atomic import writing_atomically
from secondorder.curvature.resuming.keys import Key, difference
from secondorder.errors import InputError

FORMAT, VERSION = "secondorder.curvature.long_run", 1
Place = tuple[int, ...]
RECORD, BEGUN = "record", "begun"
RUN: Place = (-1,)
"""Where stands what all records depend on."""
LOCK = ".lock"
NAME = re.compile(rf"\d+\.records|{re.escape(LOCK)}|\.\d+\.records\.partial")
FILES: dict[str, Callable[..., Any]] = {}
"""How files are written and read: by `secondorder.curvature.saving`, which knows all that can be saved and imports this one."""


@dataclass(frozen=True)
class Record:
    """The value of `what`, made from `key`, which belongs to a place."""

    place: Place
    kind: str
    what: str
    key: Key
    value: Any


class Journal:
    """Records in a folder, which is made. InputError for one that cannot be used, with other files in it, or a damaged one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = [path.name for path in folder.iterdir()]
        except OSError as error:
            raise self._unusable(error) from error
        if other := sorted(name for name in names if not NAME.fullmatch(name)):
            raise InputError(
                f"checkpoint {str(folder)!r} has other files in it ({other[0]!r}); choose a folder of its own"
            )
        self._files: dict[tuple[Place, str], int] = {}
        self._read: tuple[int, list[Record]] = -1, []
        self._last = -1
        for number in sorted(int(name.split(".")[0]) for name in names if name.endswith(".records") and name[0] != "."):
            self._note(number, self._records(number))

    def has(self, place: Place, kind: str) -> bool:
        """Whether there is such a record."""
        return (place, kind) in self._files

    def read(self, place: Place, kind: str, what: str, key: Key) -> Any:
        """The value of a record. InputError for one that is damaged, or not of `what` made from `key`."""
        records = self._records(self._files[place, kind])
        found = next(record for record in records if (record.place, record.kind) == (place, kind))
        why = f"{what} comes where {found.what} came" if found.what != what else difference(key, found.key)
        if why:
            raise InputError(
                f"checkpoint {str(self.folder)!r} is of another computation: {why}; use another folder, or delete it"
            )
        return found.value

    def write(self, records: Sequence[Record]) -> None:
        """Write records, and forget all that they take the place of. InputError where they cannot be written."""
        if not records:
            return
        try:
            with writing_atomically(self._path(self._last + 1)) as file:
                FILES["write"](file, FORMAT, VERSION, [fields_of(record) for record in records])
        except OSError as error:
            raise self._unusable(error) from error
        self._note(self._last + 1, records)

    def check_run(self, key: Key) -> None:
        """Note what all records of the folder depend on; InputError where that is not what was noted."""
        if self.has(RUN, RECORD):
            self.read(RUN, RECORD, "the run", key)
        else:
            self.write([Record(RUN, RECORD, "the run", key, None)])

    def clear(self) -> None:
        """Remove the files of all records from the folder."""
        self._remove(set(self._files.values()))
        self._files = {}

    def _note(self, number: int, records: Sequence[Record]) -> None:
        """A file has these records."""
        self._last, before = number, {*self._files.values(), number}
        for record in records:
            place = record.place
            if record.kind == RECORD:
                self._files = {known: file for known, file in self._files.items() if known[0][: len(place)] != place}
            self._files[place, record.kind] = number
        self._remove(before - {*self._files.values()})

    def _records(self, number: int) -> list[Record]:
        if self._read[0] != number:
            way_out = "delete it: what it had is computed anew"
            words = "not written by long_run, or is damaged"
            found = FILES["read"](self._path(number), FORMAT, VERSION, None, words, way_out)
            self._read = number, [Record(tuple(place), *rest) for place, *rest in found]
        return self._read[1]

    def _remove(self, numbers: set[int]) -> None:
        for number in numbers:
            with suppress(OSError):
                self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.records"

    def _unusable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write the checkpoint {str(self.folder)!r}: {error.strerror or error}; choose another folder"
        )


def fields_of(record: Record) -> tuple[Any, ...]:
    """The fields in order, their values as they are."""
    return record.place, record.kind, record.what, record.key, record.value
