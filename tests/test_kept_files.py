"""What is kept for --resume: files that are refused in one line when anything in them has changed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from secondorder.atomic import read_regular, write_atomically
from secondorder.errors import InputError
from studies.run_folders import commit_of, commits_below, kept, open_runs, sign
from studies.sealed import read_sealed

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
    assert message.endswith("delete it and continue with --resume, which computes it again")
    assert "\n" not in message
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink()
    assert kept(file, lambda: CONTENT) == CONTENT  # the way out


@dataclass(frozen=True)
class Settings:
    epochs: int = 3
    poolings: tuple[str, ...] = ("gap",)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_settings_lose_no_run(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "digits-gap-s0"
    open_runs(folder, Settings(), resume=False)
    run = folder / "run" / "result.json"
    assert kept(run, lambda: CONTENT) == CONTENT
    file = folder / "settings.json"
    file.write_text(file.read_text().replace("3", "0.125"))  # of the same length of name, for the damages above
    DAMAGE[kind][0](file)
    with pytest.raises(
        InputError, match="delete it and continue with --resume and the flags of the interrupted command"
    ):
        open_runs(folder, Settings(), resume=True)
    assert read_sealed(run) == CONTENT


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_commit_is_found_before_the_run(tmp_path: Path, kind: str) -> None:
    sign(tmp_path / "run")
    assert [commit_of(tmp_path / "run")] == commits_below(tmp_path)
    file = tmp_path / "run" / "commit"
    file.write_text(file.read_text().replace('"content": "', '"content": "0.125'))
    DAMAGE[kind][0](file)
    with pytest.raises(InputError, match="delete it and continue with --resume"):
        sign(tmp_path / "run")


def test_a_fresh_start_keeps_nothing_of_the_runs_before(tmp_path: Path) -> None:
    """Also when the folder is a link, which cannot be removed as a tree, or a file."""
    real, folder = tmp_path / "real", tmp_path / "runs"
    real.mkdir()
    folder.symlink_to(real)
    kept(folder / "run" / "result.json", lambda: 1)
    (folder / "link").symlink_to(tmp_path / "nowhere")
    open_runs(folder, Settings(), resume=False)
    assert sorted(path.name for path in real.iterdir()) == ["settings.json"]
    shutil.rmtree(real)
    open_runs_again = tmp_path / "file"
    open_runs_again.write_text("x")
    open_runs(open_runs_again, Settings(), resume=False)
    assert read_sealed(open_runs_again / "settings.json")["epochs"] == 3


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for begin in (
        lambda: open_runs(tmp_path / "file" / "runs", Settings(), resume=True),
        lambda: open_runs(tmp_path / "file" / "runs", Settings(), resume=False),
        lambda: sign(tmp_path / "file" / "run"),
    ):
        with pytest.raises(InputError, match=r"cannot use the folder of runs .*Not a directory"):
            begin()


def test_what_a_kill_has_left_is_replaced_whatever_it_is(tmp_path: Path) -> None:
    """A pipe in place of the partial file would be waited for, a link followed."""
    other = tmp_path / "other"
    other.write_text("of another program")
    for make in (os.mkfifo, lambda path: path.symlink_to(other), lambda path: path.write_text("half")):
        make(tmp_path / ".a.partial")
        write_atomically(tmp_path / "a", b"new")
        assert read_regular(tmp_path / "a") == b"new"
    assert other.read_text() == "of another program"
