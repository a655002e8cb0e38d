"""A network's own modules with other tensors in them, in given modes, and then as they were.

`torch.func.functional_call` swaps tensors in a forward pass, and leaves ours behind in a module that has two names. A backward
pass needs them, too: what `torch.utils.checkpoint` has dropped is made by the modules once more.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

CONTAINERS = frozenset((dict, OrderedDict, list, set, deque))
"""What modules hold parameters, buffers and parts in, and things of their own."""
ALONE = frozenset((bool, int, float, str, tuple, type(None), Tensor, nn.Parameter))
"""Attributes of nearly every module that hold nothing that can change; passed over for speed."""
SMALL, DEEP = 64, 3
"""Entries up to which containers and objects are looked into, and how far: a vocabulary or a trainer remembers no images."""


class ModuleState:
    """The modules of a network, the modes they are in now, and where each parameter and buffer is, by the first of its names."""

    def __init__(self, network: nn.Module) -> None:
        self.modes = {module: module.training for module in network.modules()}
        named = [*network.named_parameters(), *network.named_buffers()]
        names = {id(tensor): name for name, tensor in named}
        self._places: list[tuple[MutableMapping[str, Any], str, str]] = [
            (held, attribute, names[id(tensor)])
            for module in self.modes
            for held in (module._parameters, module._buffers)
            for attribute, tensor in held.items()
            if tensor is not None
        ]

    @contextmanager
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the modules hold these tensors in place of theirs, in their modes, without backward hooks.

        Then attributes, and lists, dictionaries and plain objects within them, are as before: what a forward pass remembers is
        forgotten.
        """
        before = [(m, dict(m.__dict__), _held(m.__dict__.values())) for m in self.modes]
        scripted = [(held, name, held[name]) for held, name, _ in self._places if not isinstance(held, dict)]
        try:
            for module, mode in self.modes.items():
                module.__dict__.update(training=mode, _backward_hooks={}, _backward_pre_hooks={})
            for held, attribute, name in self._places:
                held[attribute] = tensors[name]
            yield
        finally:
            for module, attributes, containers in before:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                for container, contents in containers:
                    _put_back(container, contents)
            for held, name, tensor in scripted:
                held[name] = tensor


def _held(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """The containers among some values, and those and attributes of plain objects that small ones hold, each with a copy."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting = list(values)
    for _ in range(DEEP):
        inner: list[Any] = []
        for held in waiting:
            if type(held) in ALONE:
                continue
            if type(held) not in CONTAINERS:
                if not _is_plain(held):
                    continue
                held = held.__dict__
            if not held:  # as most are
                found[id(held)] = held, ()
            elif id(held) not in found:
                found[id(held)] = held, held.copy()
                if len(held) <= SMALL:
                    inner += held.values() if isinstance(held, dict) else held
        waiting = inner
    return list(found.values())


def _is_plain(held: Any) -> bool:
    """Whether something is a small object of a class that somebody has written in Python, for a network of their own."""
    kind = type(held)
    attributes = getattr(held, "__dict__", None)
    return (
        isinstance(attributes, dict)
        and len(attributes) <= SMALL
        and not isinstance(held, (type, ModuleType, nn.Module, Tensor, FunctionType))
        and kind.__module__.partition(".")[0] not in ("torch", "numpy", "builtins")
    )


def _put_back(container: Any, contents: Any) -> None:
    if not (container or contents):
        return
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(contents)
