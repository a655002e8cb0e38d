"""Whether a forward pass registers hooks on gradients of its tensors, of which a graph does not tell."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class HookNote:
    """Whether a hook on a gradient has been registered."""

    registered: bool = False


_changing = Lock()
_register: Callable[[Tensor, Callable[..., Any]], Any] = Tensor.register_hook
_open: list[HookNote] = []
"""The notes that are being taken, in this thread or another one: what registers for one is written down in all."""


@contextmanager
def noted_hooks() -> Iterator[HookNote]:
    """Whether `Tensor.register_hook` is called inside, in any thread."""
    global _register
    note = HookNote()
    with _changing:
        if not _open:
            _register = Tensor.register_hook
            Tensor.register_hook = _noting  # type: ignore[method-assign]
        _open.append(note)
    try:
        yield note
    finally:
        with _changing:
            _open.remove(note)
            if not _open:
                Tensor.register_hook = _register  # type: ignore[method-assign]


def _noting(tensor: Tensor, hook: Callable[..., Any]) -> Any:
    for note in tuple(_open):
        note.registered = True
    return _register(tensor, hook)
