"""The studies' command line: flags of every kind, and what each study checks before it begins."""

import contextlib
import io
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random, getstate, setstate
from typing import Any

from studies.command_line import Command, parse
from studies.settings import Common, own_folder
from studies.study import STUDIES

from .call import Call, shown

WORDS = (
    "", "0", "-1", "1", "2", "3", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "99999999999999999999", "9" * 400,
    "foo", "None", "True", "false", "~nosuchuser/x", "/dev/null", "/proc/no", "../x", "\xfc\u4e2d\U0001f600", "a\nb",
    "--", "-", "x" * 1000, "cuda", "cuda:9", "cpu", "auto", "gap", "gcp", "sgd", "digits", "cifar10", "resnet18",
    "float64", "<script>alert(1)</script>", "\x1b[31m", "digits_tiny", "0.1", "1,2", "[1]", "{}", "%s", "$HOME", "'",
    '"', "\t",
)  # fmt: skip


def command_line(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((flags, flags, flags, flags, checks, program, out))(random)


def names(kind: Any, prefix: str = "") -> list[str]:
    """The flags of a dataclass of settings."""
    found = []
    for field in fields(kind):
        default = getattr(kind, field.name) if not isinstance(kind, type) else None
        flag = f"{prefix}{field.name.replace('_', '-')}"
        found += names(default, f"{flag}.") if is_dataclass(default) else [flag]
    return found


def line(random: Random, name: str | None, preset: str) -> tuple[list[str], str]:
    """A line of flags, and the flag that was given something."""
    own = names(STUDIES[name].presets[preset]) if name else []
    flag = random.choice([*names(Common), *own, *own, *own])
    if flag == "preset":
        flag = "seeds"
    flag = random.choice(("", "no-")) + flag if random.random() < 0.1 else flag
    if random.random() < 0.05:
        flag = random.choice(("no-such-flag", "", "seeds=", "\u00fc"))
    values = [random.choice(WORDS) for _ in range(random.choice((0, 1, 1, 1, 1, 2, 3)))]
    return [*([name] if name else []), "--preset", preset, f"--{flag}", *values], flag


def parsed(arguments: list[str]) -> Command | None:
    """The command; None where the line asks for help. Python's random state stays: tyro's cache draws from it."""
    state = getstate()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return parse(arguments)
    except SystemExit as stop:
        if stop.code:
            raise
        return None
    finally:
        setstate(state)


def flags(random: Random) -> Call:
    """parse."""
    name = random.choice(list(STUDIES))
    arguments, _ = line(random, name, random.choice(("smoke", "quick", "cifar10", "paper")))
    return Call(f"parse({shown(arguments, 200)})", lambda: parsed(arguments), pure=True)


def program(random: Random) -> Call:
    """parse of a line that begins with anything."""
    arguments = [
        random.choice((*WORDS, *STUDIES, "--help", "-h", "--preset", "--preset=x", "--version"))
        for _ in range(random.randint(1, 3))
    ]
    return Call(f"parse({shown(arguments, 200)})", lambda: parsed(arguments), pure=True)


def checks(random: Random) -> Call:
    """What parse accepts, checked by the study at its smallest preset."""
    name = random.choice(list(STUDIES))
    arguments, flag = line(random, name, "smoke")

    def run() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            command = parsed([*arguments, *([] if flag == "out" else ["--out", folder])])
            if command is None or command.common.download:
                return None
            return next(STUDIES[name].plan(STUDIES[name].context(command.common, command.studies[name])))

    return Call(f"check({shown(arguments, 200)})", run, pure=True, seconds=30.0)


def out(random: Random) -> Call:
    """Folders for results that are none, or whose lock is none."""
    kind = random.choice(
        ("file", "lock is a folder", "below a file", "link to nowhere", "long", "zero", "lock is a link", "fine", "odd")
    )

    def run() -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "out"
            if kind == "file":
                folder.write_text("x")
            elif kind == "lock is a folder":
                (folder / ".lock").mkdir(parents=True)
            elif kind == "below a file":
                folder.write_text("x")
                folder /= "below"
            elif kind == "link to nowhere":
                folder.symlink_to(Path(name) / "nowhere" / "deep")
            elif kind == "lock is a link":
                folder.mkdir()
                (folder / ".lock").symlink_to(Path(name) / "nowhere" / "deep")
            elif kind != "fine":
                folder /= {"long": "x" * 400, "zero": "a\0b", "odd": "\u00fc <b>\n"}[kind]
            with own_folder(folder):
                (folder / "x").write_text("x")

    return Call(f"own_folder: {kind}", run, pure=True)
