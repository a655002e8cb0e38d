"""Whatever goes wrong on the command line is one line of at most 300 characters and exit code 2, never a traceback."""

import errno
import io
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from secondorder.errors import InputError
from studies import program
from studies.__main__ import main
from studies.messages import LIMIT, one_line, without_middle
from studies.study import STUDIES

FLAGS = ["--preset", "smoke", "--no-progress", "--threads", "1", "--processes", "1"]


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must be refused; the line."""

    def line(*arguments: str, code: int = 2) -> str:
        assert main([*arguments, *FLAGS]) == code
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert len(captured.err) <= LIMIT + 1
        assert captured.err[:-1].isprintable()
        return captured.err

    return line


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda path: path.write_text(""), "it is a file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "it is a link to nowhere"),
    "a link to itself": (lambda path: path.symlink_to(path), "link"),
    "a pipe": (os.mkfifo, "it is a file"),
    "below a file": (lambda path: path.parent.rmdir() or path.parent.write_text(""), "Not a directory"),
    "with a folder for a lock": (lambda path: (path / ".lock").mkdir(parents=True), "cannot lock"),
    "with a link for a lock": (
        lambda path: path.mkdir() or (path / ".lock").symlink_to("nowhere/nowhere"),
        "cannot lock",
    ),
    "with a file for the store": (
        lambda path: path.mkdir() or (path / "store").write_text(""),
        "in the store: Not a directory; choose another with --store",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_an_output_folder_that_cannot_be_used(kind: str, tmp_path: Path, refuses: Callable[..., str]) -> None:
    make, words = FOLDERS[kind]
    path = tmp_path / "above" / "out"
    path.parent.mkdir()
    make(path)
    line = refuses("landscape", "--out", str(path))
    assert words in line
    assert str(path) in line or len(str(path)) > 160


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 400, "File name too long"),
        ("a\0b", "null byte"),
        ("a/" * 3000, "File name too long"),
        ("\udcff" * 300, ""),
    ],
)
def test_a_name_that_no_folder_can_have(name: str, words: str, tmp_path: Path, refuses: Callable[..., str]) -> None:
    assert words in refuses("landscape", "--out", str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORLD_SIZE", value) for value in ("abc", "", "-1", "0", "1.5", "9" * 5000, "٣", "\x1b[31m")),
        *((name, v) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT") for v in ("-1", "\x1b[31m")),
    ],
)
def test_what_torchrun_did_not_put_there(
    name: str, value: str, tmp_path: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert name in refuses("landscape", "--out", str(tmp_path))


@pytest.mark.parametrize("environment", [{"RANK": "2"}, {"RANK": "0", "MASTER_PORT": "99999"}, {}])
def test_processes_that_cannot_meet(
    environment: dict[str, str], tmp_path: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **environment}.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in refuses("landscape", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lanscape"], f"unknown study 'lanscape'; choose one of: {', '.join(STUDIES)}; the nearest is landscape"),
        (["optimizers"], "the nearest is optimisers"),
        (["x" * 5000], "unknown study 'xxx"),
        ([""], "unknown study ''"),
        (["\udcff\x1b[31m"], "unknown study"),
        (["landscape", "--seeds", "99999999999"], "--seeds 99999999999: at least 1 seed is needed, and at most 1000"),
        (["landscape", "--seeds", "9" * 5000], "seeds"),
        (["landscape", "--seeds", "-1"], "--seeds -1"),
        (["landscape", "--device", "foo"], "device"),
        (["landscape", "--device", "foo" * 1000], "device"),
        (["landscape", "--device", "\udcff"], "device"),
        (["landscape", "--heads", "g" * 5000], "unknown pooling 'ggg"),
        (["landscape", "--heads", *(f"p{i}" for i in range(500))], "unknown pooling 'p0'"),
        (["landscape", "--weight-decay", "1e300"], "weight_decay must be a number in [0, 3.4e+38), got 1e+300"),
        (["landscape", "--train-limit", "0"], "train_limit must be a whole number from 1 to 1000000000000, got 0"),
        (["landscape", "--eta-points", "99999999999"], "--eta-points 99999999999: at most 10000"),
        (["landscape", "--image-size", "99999999999999999999"], "--image-size 99999999999999999999: at most 2147483647"),
        (["optimisers", "--autoencoder.widths", "3", "1" + "0" * 25], "--autoencoder.widths 1000"),
        (["--curvature.limits.images", "1" + "0" * 25], "--limits.images 1000"),
        (["landscape", *(f"--no-such-flag-{i}" for i in range(300))], "--no-such-flag-0"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)  # fmt: skip
def test_bad_values(arguments: list[str], words: str, tmp_path: Path, refuses: Callable[..., str]) -> None:
    assert words in refuses(*arguments, "--out", str(tmp_path))


ERRORS: dict[str, tuple[BaseException, int, str]] = {
    "no memory": (MemoryError(), 2, "out of memory (MemoryError)"),
    "no memory on a GPU": (
        RuntimeError("CUDA out of memory. Tried\nto"),
        2,
        "out of memory (CUDA out of memory. Tried)",
    ),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "/x/y: No space left on device"),
    "too many files": (OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files"),
    "a long message": (InputError("one\ntwo " + "x" * 5000 + " the way out"), 2, "the way out"),
    "colours": (InputError("\x1b[31mred"), 2, r"\x1b[31mred"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_that_are_not_this_packages(
    kind: str, tmp_path: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error, code, words = ERRORS[kind]

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(program, "run", fail)
    assert words in refuses("landscape", "--out", str(tmp_path), code=code)


def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("of this package")

    monkeypatch.setattr(program, "run", fail)
    with pytest.raises(KeyError):
        main(["landscape", *FLAGS])


class Gone(io.StringIO):
    """An output that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        self.write("")


def test_an_output_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, refuses: Callable[..., str]) -> None:
    monkeypatch.setattr(program, "run", lambda _: print("words", flush=True))
    monkeypatch.setattr(sys, "stdout", Gone())
    assert "cannot write to the standard output: Broken pipe" in refuses("landscape")


def helped(output: str, errors: str) -> None:
    """In a process of its own: print the help to a file, errors to another."""
    for number, name, flags in ((1, output, os.O_WRONLY), (2, errors, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(name, flags), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.exit(main(["landscape", "--help"]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_help_into_a_full_disk(tmp_path: Path, forkserver: ForkServerContext) -> None:
    """A real process: nothing is left for the interpreter's end to fail at."""
    process = forkserver.Process(target=helped, args=("/dev/full", str(tmp_path / "err")))
    process.start()
    process.join(120)
    assert process.exitcode == 2
    assert (tmp_path / "err").read_text() == (
        "error: cannot write to the standard output: No space left on device; everything is kept, the same command continues\n"
    )


@pytest.mark.parametrize(
    "words", ["x" * 10_000, "a " * 5000, "/x" * 400 + " is no file; " + "y" * 999 + " mend it", "é\n" * 999]
)
def test_a_line_has_an_end(words: str) -> None:
    line = one_line(words)
    assert len(line) <= LIMIT
    assert "\n" not in line
    assert line[:20] == " ".join(words.split())[:20]
    assert line[-8:] == " ".join(words.split())[-8:]
    assert one_line(line) == line


def test_short_lines_stay_as_they_are() -> None:
    path = "/a/long/path" * 20
    assert one_line(f"error: {path} is no file") == f"error: {path} is no file"
    assert without_middle("abcdefghij", 7) == "ab...ij"
