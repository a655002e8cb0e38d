"""Errors that a user can act on."""

from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a one-line message that names the value and says what is allowed (exit code 2 on the command line)."""


class NonFiniteError(InputError):
    """Numbers that must be finite are not."""


def unknown(kind: str, value: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is in no table: ``unknown pooling 'gpc'; choose one of: gap, gcp``."""
    return InputError(f"unknown {kind} {value!r}; choose one of: {', '.join(allowed)}")
