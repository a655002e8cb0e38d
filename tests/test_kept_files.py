"""What is kept to go on with: files that are refused in one line when anything in them has changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secondorder.atomic import read_regular, write_atomically
from secondorder.data import files
from secondorder.errors import InputError
from studies.engine.store import kept
from studies.results import read_sealed

CONTENT = {"rows": [{"step": 3, "loss": 0.125, "name": "gap"}, {"step": 5, "loss": float("inf")}], "diverged": ""}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of a run, with what `kept` writes."""
    path = tmp_path / "digits-gap-s0" / "result.json"
    assert kept(path, lambda: CONTENT) == CONTENT
    return path


def test_what_is_kept_comes_back_in_its_order(file: Path) -> None:
    def not_again() -> Any:
        raise AssertionError("computed twice")

    assert kept(file, not_again) == CONTENT
    assert list(kept(file, not_again)["rows"][0]) == ["step", "loss", "name"]
    moved = file.parents[1] / "elsewhere" / file.parent.name
    shutil.copytree(file.parent, moved)
    assert read_sealed(moved / file.name) == CONTENT  # a folder of results can be moved


def test_no_byte_can_change_unnoticed(file: Path) -> None:
    """Every byte, made the next one: refused, or what it means is the same (white space, say)."""
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_sealed(file) == CONTENT
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert str(file) in str(error)  # noqa: PT017


def other_digit(file: Path) -> None:
    file.write_text(file.read_text().replace("0.125", "0.126"))


def without_digest(file: Path) -> None:
    file.write_text(json.dumps(CONTENT))


def of_another_run(file: Path) -> None:
    other = file.parents[1] / "digits-gcp-s0" / file.name
    kept(other, lambda: CONTENT | {"diverged": "yes"})
    shutil.copy(other, file)


def in_its_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replaced(file: Path) -> None:
        file.unlink()
        make(file)

    return replaced


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another digit": (other_digit, "is damaged: it is not what was written there"),
    "no digest": (without_digest, "has no digest: it is damaged, or an earlier version wrote it"),
    "of another run": (of_another_run, "is damaged: it is not what was written there"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-20]), "is damaged (JSONDecodeError"),
    "empty": (lambda file: file.write_text(""), "is damaged (JSONDecodeError"),
    "garbage": (lambda file: file.write_bytes(bytes(range(256))), "is damaged (UnicodeDecodeError"),
    "a list": (lambda file: file.write_text("[]"), "has no digest"),
    "NaN": (lambda file: file.write_text("NaN"), "has no digest"),
    "too deep": (lambda file: file.write_text("[" * 100_000), "is damaged (RecursionError"),
    "a very long number": (lambda file: file.write_text("9" * 10_000), "is damaged (ValueError"),
    "content missing": (lambda file: file.write_text('{"sha256": "0"}'), "has no digest"),
    "digest of a wrong type": (lambda file: file.write_text('{"sha256": 1, "content": 2}'), "is damaged"),
    "a folder": (in_its_place(lambda file: file.mkdir()), "cannot read"),
    "a pipe": (in_its_place(os.mkfifo), "it is not a regular file"),
    "a link to nowhere": (in_its_place(lambda file: file.symlink_to("nowhere")), "No such file or directory"),
    "a link to itself": (in_its_place(lambda file: file.symlink_to(file)), "symbolic links"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_with_the_way_out(file: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(file)
    with pytest.raises(InputError) as caught:
        kept(file, lambda: pytest.fail("what was there is replaced in silence"))
    message = str(caught.value)
    assert words in message
    assert str(file) in message
    assert message.endswith("delete it, and the same command computes it again")
    assert "\n" not in message
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink()
    assert kept(file, lambda: CONTENT) == CONTENT  # the way out


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot make .*Not a directory; choose another with --store"):
        kept(tmp_path / "file" / "run" / "result.json", lambda: CONTENT)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that took the file's place after the data's own look at it, too."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(files, "check_regular", lambda *_: None)
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(path)
        with pytest.raises(InputError, match="not a regular file"):
            files.open_regular(path)


def test_what_a_kill_has_left_is_replaced_whatever_it_is(tmp_path: Path) -> None:
    """A pipe in place of the partial file would be waited for, a link followed."""
    other = tmp_path / "other"
    other.write_text("of another program")
    for make in (os.mkfifo, lambda path: path.symlink_to(other), lambda path: path.write_text("half")):
        make(tmp_path / ".a.partial")
        write_atomically(tmp_path / "a", b"new")
        assert read_regular(tmp_path / "a") == b"new"
    assert other.read_text() == "of another program"
