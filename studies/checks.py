"""Checks of settings, with messages that name the flag."""

from collections.abc import Collection

from secondorder.errors import InputError


def check_count(name: str, value: int, least: int = 1) -> None:
    """InputError unless the setting is at least `least`."""
    if value < least:
        raise InputError(f"--{name.replace('_', '-')} {value}: at least {least}")


def check_names(name: str, values: Collection[str]) -> None:
    """InputError unless there is at least one, and each once."""
    if len(set(values)) < len(values) or not values:
        raise InputError(f"--{name.replace('_', '-')} {' '.join(values) or '(none)'}: name at least one, each once")
