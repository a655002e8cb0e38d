"""What a launcher such as torchrun says in environment variables."""

import os

from secondorder.data.files import shown
from secondorder.errors import InputError


def launch_number(variable: str, default: int, low: int = 0) -> int:
    """The whole number in an environment variable, ``default`` where it is not set.

    Raises:
        InputError: when it holds anything else, or a number below ``low``.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    if not text.strip().isdecimal() or len(text) > 9 or int(text) < low:
        raise InputError(
            f"{variable} is {shown(repr(text))}; it must be a whole number, at least {low}; start with torchrun"
        )
    return int(text)
