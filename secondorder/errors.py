"""Errors that a user can act on."""

import math
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 300
"""Characters of an error's message."""
MOST = 2**31 - 1
"""The largest whole number of an argument that is a size: no array can have a larger one."""
SEEDS = 2**63
"""As many as a generator of torch takes."""


class InputError(ValueError):
    """Bad input: a one-line message that names the value and says what is allowed (exit code 2 on the command line).

    A message that is longer than LONGEST characters, because a value in it is, loses its middle: the name of what is wrong stands
    at its beginning, the way out at its end.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class NonFiniteError(InputError):
    """Bad input: numbers that must be finite are NaN or infinite."""


def one_line(message: str) -> str:
    """The message with single spaces for white space, at most LONGEST characters of it."""
    line = " ".join(str(message).split())
    if len(line) <= LONGEST:
        return line
    head = (LONGEST - 3) * 2 // 3
    return f"{line[:head]}...{line[head + 3 - LONGEST :]}"


def unknown(kind: str, value: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that is in no table: ``unknown pooling 'gpc'; choose one of: gap, gcp``."""
    return InputError(f"unknown {kind} {short(value)}; choose one of: {', '.join(allowed)}")


def check_known(kind: str, value: object, allowed: Iterable[str]) -> None:
    """InputError unless the value is one of the allowed names; anything may be asked for, also what has no hash."""
    names = list(allowed)
    if not isinstance(value, str) or value not in names:
        raise unknown(kind, value, names)


def check_flag(name: str, value: object) -> None:
    """InputError unless the value is True or False: "no" would count as True."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {short(value)}")


def check_whole(name: str, value: object, least: int = 1, most: float = math.inf, hint: str = "") -> None:
    """InputError unless the value is an int, and no bool, in [least, most].

    Args:
        name: of the argument.
        value: of the argument.
        least: the smallest number allowed.
        most: the largest number allowed; none by default.
        hint: follows the message, such as what None would mean.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        too_large = isinstance(value, int) and value > most
        highest = "2^63 - 1" if most == SEEDS - 1 else most
        interval = f"from {least} to {highest}" if too_large or most not in (MOST, math.inf) else f"of at least {least}"
        raise InputError(f"{name} must be a whole number {interval}, got {short(value)}{hint}")


def check_seed(value: object, name: str = "seed", hint: str = "") -> None:
    """InputError unless the value is a whole number that torch's generators take."""
    check_whole(name, value, 0, SEEDS - 1, hint)


def check_number(name: str, value: object, low: float, high: float, ends: str = "[)", hint: str = "") -> None:
    """InputError unless the value is an int or float, no bool and not nan, in the interval from `low` to `high`.

    Args:
        name: of the argument.
        value: of the argument.
        low: the lower end of the interval.
        high: the upper end of the interval.
        ends: whether they belong to it, as brackets: "[)", "()", "[]" or "(]".
        hint: follows the message, such as what None would mean.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond floats
            number = math.inf if value > 0 else -math.inf
    above = low <= number if ends[0] == "[" else low < number
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        kind, interval = "number", f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
        if high == math.inf:
            kind = "number" if ends[1] == "]" else "finite number"
            interval = f"of at least {low:g}" if ends[0] == "[" else f"above {low:g}"
        raise InputError(f"{name} must be a {kind} {interval}, got {short(value)}{hint}")


def short(value: object) -> str:
    """The value as code for a message: at most some 60 characters, whatever it is."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an integer of too many digits, a `__repr__` that fails
        return f"of type {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


@contextmanager
def failures_of(what: str) -> Iterator[None]:
    """What torch raises inside of a user's network or loss becomes an InputError of one line: ``<what> fails: <reason>``.

    Mistakes of the user's own code (TypeError, AttributeError, ...), too little memory and failed decompositions go through as
    they are.
    """
    import torch  # here, because processes of a pool import this file before anything else

    try:
        yield
    except (InputError, torch.OutOfMemoryError, torch.linalg.LinAlgError):
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise InputError(f"{what} fails: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow the first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
