"""What a launcher such as torchrun says in environment variables."""

import os

from secondorder.data.files import shown
from secondorder.errors import InputError

NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
"""Variables that torchrun sets, and what they are for a single process, which is also the least that they may be."""


def check_environment() -> None:
    """InputError unless the numbers of a launch, where they are there, are such, and this process is one of those announced."""
    for name, default in NUMBERS.items():
        launch_number(name, default, default)
    several, own = launch_number("WORLD_SIZE", 1), launch_number("RANK", 0)
    if several > 1 and own >= several:
        raise InputError(f"RANK {own} of WORLD_SIZE {several} cannot be; unset both, or start with torchrun")


def launch_number(variable: str, default: int, low: int = 0) -> int:
    """The whole number in an environment variable, ``default`` where it is not set.

    Raises:
        InputError: when it holds anything else, or a number below ``low``.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < low:
        raise InputError(
            f"{variable} is {shown(repr(text))}; it must be a whole number, at least {low}; unset it, or start with torchrun"
        )
    return int(text)
