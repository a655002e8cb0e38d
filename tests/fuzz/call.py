"""One call of the package, and what the judge must know of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Check = Callable[[Any], str | None]
"""What is wrong with a result, in a few words; None when it is right."""


def right(result: Any) -> str | None:
    """Nothing is known of the result."""
    return None


@dataclass(frozen=True)
class Call:
    """A call, in words that let a reader repeat it.

    names: of which a refusal must hold at least one (the argument, or the value); empty when any wording is right.
    expected: "accept", "refuse", or "either" where only the package knows.
    watched: modules, optimisers and tensors that a refused call must leave as they were.
    check: what is wrong with the result of an accepted call.
    pure: an accepted call, too, leaves the random state and all that is watched as it was.
    seconds: after which the call counts as hanging.
    raises: errors that are right too: those of the user's own code, and what Python's protocols ask for.
    """

    words: str
    run: Callable[[], Any]
    names: Sequence[str] = ()
    expected: str = "either"
    watched: Sequence[Any] = ()
    check: Check = right
    pure: bool = False
    seconds: float = 20.0
    raises: tuple[type[Exception], ...] = ()


Generator = Callable[[Random], Call]


def shown(value: object, length: int = 60) -> str:
    """A value as code, cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def arguments(settings: dict[str, Any]) -> str:
    """Keyword arguments as code."""
    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
