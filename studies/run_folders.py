"""The folder of a study's training runs: begun afresh or resumed, and by which code each run was begun."""

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from secondorder.errors import InputError
from studies.results import git_commit, write_file

Content = TypeVar("Content")


def open_runs(folder: Path, settings: Any, resume: bool, may_grow: Collection[str] = ("poolings",)) -> None:
    """Start the folder of runs afresh, or check that the runs there are of these settings.

    The settings named in `may_grow` may differ: each of their values has runs of its own, so that others can be added.
    """
    file, mine = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    if resume and file.exists():
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is damaged ({error}); start afresh without --resume") from None
        for name in (n for n in mine if n not in may_grow and mine[n] != theirs.get(n)):
            raise InputError(
                f"the runs in {folder} have {name} = {theirs.get(name)!r}, not {mine[name]!r}; repeat the flags of the "
                "interrupted command, or start afresh without --resume"
            )
    elif not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(mine, indent=2) + "\n")


def sign(folder: Path) -> None:
    """Note the commit of the code that begins a run, which may not be the code that finishes the study."""
    if not (folder / "commit").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "commit", git_commit())


def commit_of(folder: Path) -> str:
    """The commit that `sign` noted."""
    return (folder / "commit").read_text(encoding="utf-8")


def commits_below(folder: Path) -> list[str]:
    """Those that `sign` noted in the folders directly below."""
    return sorted({commit_of(file.parent) for file in folder.glob("*/commit")})


def kept(file: Path, compute: Callable[[], Content]) -> Content:
    """What is in a file as JSON, which is computed and written when it does not exist; InputError when it is damaged."""
    if not file.exists():
        write_file(file, json.dumps(compute()))
    try:
        return cast(Content, json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); delete it and continue with --resume") from None
