"""Hooks on models, parameters and graphs that keep nothing alive, and know the passes that are not the user's."""

import _thread
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch


class Hook:
    """Calls `function(owner, *given, *args)` as long as the owner lives; a copy or pickle of a hook does nothing."""

    def __init__(self, owner: Any = None, function: Callable[..., None] | None = None, *given: Any) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.function, self.given = function, given

    def __call__(self, *args: Any) -> None:
        """Call the function; nothing while torch.compile reads a model, whose program would call hooks that are gone."""
        if torch.compiler.is_compiling():
            return
        owner = None if self.owner is None else self.owner()
        if owner is not None and self.function is not None:
            self.function(owner, *self.given, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


def handles_of(owner: Any) -> list[Any]:
    """A list for the handles of an object's hooks, which are removed when the object dies."""
    handles: list[Any] = []
    weakref.finalize(owner, remove, handles).atexit = False
    return handles


def remove(handles: list[Any]) -> None:
    """Remove the hooks of these handles, and empty the list."""
    for handle in handles:
        handle.remove()
    handles.clear()


class Uncompiled:
    """While one of these is there, whatever torch.compile has made runs uncompiled, in the whole process; `remove` ends that.

    What is compiled neither calls hooks that came later nor has the graph that they need, and is not made anew when they come.
    """

    _present: ClassVar[set["Uncompiled"]] = set()
    _before: ClassVar[list[Any]] = []
    """What gives back the stance that was there before the first of these; empty where none is there."""

    def __init__(self) -> None:
        Uncompiled._present.add(self)
        if not Uncompiled._before:
            Uncompiled._before.append(torch.compiler.set_stance("force_eager"))

    def remove(self) -> None:
        """Give back the stance that was there before the first of these, if this was the last.

        Also where that is forbidden, in the middle of a compiled program: an object may be collected anywhere, and a thread of
        its own is never in one. It is a bare one, as `threading` may be in the middle of something, too.
        """
        Uncompiled._present.discard(self)
        if not Uncompiled._present and Uncompiled._before:
            given_back = _thread.allocate_lock()
            given_back.acquire()
            _thread.start_new_thread(_give_back, (Uncompiled._before.pop(), given_back))
            given_back.acquire()


def _give_back(stance: Any, given_back: _thread.LockType) -> None:
    try:
        stance.__exit__(None, None, None)
    finally:
        given_back.release()


_pulls: list[None] = []
"""One for each pull under way; of the process, as the backward pass of a GPU runs its hooks in another thread."""


@contextmanager
def pulling() -> Iterator[None]:
    """Backward passes inside are those of K-FAC, of whichever model: hooks that wait for the user's pass them over."""
    _pulls.append(None)
    try:
        yield
    finally:
        _pulls.pop()


def is_pulling() -> bool:
    """Whether the present backward pass is one of K-FAC."""
    return bool(_pulls)
