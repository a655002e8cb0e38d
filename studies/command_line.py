"""The command line, generated from the settings: every field is a flag, presets give the defaults."""

import argparse
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from secondorder.errors import InputError, unknown
from studies.checks import MOST
from studies.engine.store_command import StoreCommand
from studies.settings import PRESETS, Common
from studies.study import STUDIES

PROGRAM = "python -m studies"


@dataclass(frozen=True)
class Command:
    """What the user asked for: settings shared by all studies, and each study to run with its own."""

    common: Common
    studies: dict[str, Any] = field(default_factory=dict)


def parse(arguments: Sequence[str]) -> Command:
    """Parse ``[study] [--flags]``; raises InputError for bad flags and values."""
    arguments = list(arguments)
    names = list(STUDIES)
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in STUDIES:
            nearest = difflib.get_close_matches(name[:100], STUDIES, n=1)
            raise InputError(f"{unknown('study', name, STUDIES)}" + "".join(f"; the nearest is {n}" for n in nearest))
        names = [name]
    preset = _preset(arguments)
    common = Common(preset=preset)  # type: ignore[arg-type]
    defaults = {name: STUDIES[name].presets[preset] for name in names}
    # One study: its flags carry no prefix. All studies: --landscape.epochs, --performance.repeats, ...
    prefixed = len(names) > 1
    members = [("common", Annotated[Common, tyro.conf.arg(name="")])] + [
        (name, type(default) if prefixed else Annotated[type(default), tyro.conf.arg(name="")])
        for name, default in defaults.items()
    ]
    every = make_dataclass("Every", members, frozen=True)
    with _errors_in_one_line():
        parsed = tyro.cli(
            every,
            default=every(common, *defaults.values()),
            args=arguments,
            prog=PROGRAM if prefixed else f"{PROGRAM} {names[0]}",
            description=_description(names),
            config=(tyro.conf.AvoidSubcommands,),
        )
    for name in ("common", *names):
        _check_counts(getattr(parsed, name), f"{name}." if prefixed and name != "common" else "")
    return Command(parsed.common, {name: getattr(parsed, name) for name in names})


def parse_store(arguments: Sequence[str]) -> StoreCommand:
    """Parse what follows ``store``; raises InputError for bad flags."""
    with _errors_in_one_line():
        return tyro.cli(StoreCommand, args=list(arguments), prog=f"{PROGRAM} store")


def _check_counts(settings: Any, prefix: str) -> None:
    """InputError for a whole number that no array can have as a size; libraries would fail on it anywhere."""
    for entry in fields(settings):
        value, name = getattr(settings, entry.name), prefix + entry.name.replace("_", "-")
        if is_dataclass(value):
            _check_counts(value, prefix if _is_flat(settings, entry.name) else f"{name}.")
        for count in value if isinstance(value, tuple | list) else (value,):
            if isinstance(count, int) and abs(count) > MOST:
                raise InputError(f"--{name} {count}: at most {MOST}")


def _is_flat(settings: Any, field_name: str) -> bool:
    """Whether the fields of a field are flags without its name: it is annotated with an empty one."""
    hint = get_type_hints(type(settings), include_extras=True)[field_name]
    return any(getattr(extra, "name", None) == "" for extra in getattr(hint, "__metadata__", ()))


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """tyro draws a box around what is wrong with a flag and exits; say the same in one line, as an InputError."""
    drawn = io.StringIO()
    try:
        with redirect_stderr(drawn):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[\u2500-\u257f]|\x1b\[[0-9;]*m|-{3,}|\|", " ", drawn.getvalue())  # box lines, colours
        raise InputError(_without_descriptions(" ".join(words.split()))) from None


def _without_descriptions(words: str) -> str:
    """tyro's words without its title, and of the flags that it suggests, described there, only the names."""
    words = re.sub(r"^(Value error|Invalid choice|Missing argument|Unrecognized options(?= Unr)) ", "", words)
    words = re.sub(r" ?(For full helptext, |Argument helptext: ).*", "", words)
    what, *suggested = re.split(r" ?(?:Perhaps you meant|Arguments similar to [^ ]+): ", words)
    flags = [*dict.fromkeys(flag for part in suggested for flag in re.findall(r"(?<!\S)--[\w.-]*\w", part))]
    return (
        f"{what.rstrip(' .')}; "
        + (f"perhaps you meant {', '.join(flags[:5])}; " if flags else "")
        + "--help lists all flags"
    )


def _preset(arguments: list[str]) -> str:
    """The value of ``--preset``, read ahead because it gives the defaults of all other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=Common.preset, nargs="?", const="")
    preset: str = parser.parse_known_args(arguments)[0].preset
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    return preset


def _description(names: list[str]) -> str:
    if len(names) == 1:
        return f"Study '{names[0]}': {STUDIES[names[0]].title}."
    studies = "; ".join(f"{name} ({study.title})" for name, study in STUDIES.items())
    presets = "; ".join(f"{name} ({words})" for name, words in PRESETS.items())
    return (
        f"Run all studies, or one: {PROGRAM} <study>. Studies: {studies}. Presets: {presets}. "
        f"The flags of a study alone carry no prefix: {PROGRAM} landscape --epochs 5."
    )
