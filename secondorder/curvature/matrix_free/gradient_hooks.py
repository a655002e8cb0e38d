"""Whether a forward pass registers hooks on gradients of its tensors, of which a graph does not tell."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def noted_hooks() -> Iterator[list[Callable[..., Any]]]:
    """The hooks that `Tensor.register_hook` is given inside."""
    found: list[Callable[..., Any]] = []
    register = Tensor.register_hook

    def noting(tensor: Tensor, hook: Callable[..., Any]) -> Any:
        found.append(hook)
        return register(tensor, hook)

    Tensor.register_hook = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Tensor.register_hook = register  # type: ignore[method-assign]
