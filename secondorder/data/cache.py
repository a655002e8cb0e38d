"""A folder of decoded arrays, so that slow decoding happens once: correct without it, faster with it."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from secondorder.data.files import expanded, open_regular

Arrays = dict[str, np.ndarray]

VARIABLE = "SECONDORDER_CACHE"


def cache_folder() -> Path | None:
    """Folder of ``SECONDORDER_CACHE``, else ``$XDG_CACHE_HOME/secondorder``, else ``~/.cache/secondorder``.

    None when there is no home folder either.
    """
    if chosen := os.environ.get(VARIABLE):
        return expanded(chosen, VARIABLE)
    if parent := os.environ.get("XDG_CACHE_HOME"):
        return Path(parent) / "secondorder"
    try:
        return Path.home() / ".cache" / "secondorder"
    except RuntimeError:
        return None


def cached(name: str, build: Callable[[], Arrays], valid: Callable[[Arrays], bool]) -> Arrays:
    """The arrays stored under ``name``, else those of ``build()``, which are then stored for the next time.

    ``name`` must identify the contents. A file that is damaged or not ``valid`` is built again; a folder that cannot
    be written costs the next run its time and is no error.
    """
    folder = cache_folder()
    if folder is None:
        return build()
    file = folder / f"{name}.npz"
    # Any exception: a damaged zip archive fails in many ways (its CRC sees every flipped bit), and all mean "build it".
    with suppress(Exception), open_regular(file) as stream, np.load(stream, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
        if valid(arrays):
            return arrays
    arrays = build()
    with suppress(OSError):
        _store(file, arrays)
    return arrays


def _store(file: Path, arrays: Arrays) -> None:
    """Write ``arrays`` so that ``file`` is either absent or whole, whoever else writes it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own options
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
