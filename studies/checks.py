"""Checks of settings, with messages that name the flag."""

from collections.abc import Collection

from secondorder.errors import InputError

MOST = 2**31 - 1
"""The largest whole number of a setting: no array can have a larger size."""


def check_count(name: str, value: int, least: int = 1, most: int = MOST) -> None:
    """InputError unless the setting is from `least` to `most`."""
    if value < least:
        raise InputError(f"--{name.replace('_', '-')} {value}: at least {least}")
    if value > most:
        raise InputError(f"--{name.replace('_', '-')} {value}: at most {most}")


def check_names(name: str, values: Collection[str]) -> None:
    """InputError unless there is at least one, and each once."""
    if len(set(values)) < len(values) or not values:
        raise InputError(f"--{name.replace('_', '-')} {' '.join(values) or '(none)'}: name at least one, each once")
