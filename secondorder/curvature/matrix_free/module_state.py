"""A network's own modules with other tensors in them, in given modes, and then as they were.

`torch.func.functional_call` swaps tensors in a forward pass, and leaves ours behind in a module that has two names. A backward
pass needs them, too: what `torch.utils.checkpoint` has dropped is made by the modules once more.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
        """Inside, the modules hold these tensors in place of theirs, in their modes, without backward hooks."""
        before = [(m, dict(m.__dict__), [(held, dict(held.items())) for held in _held(m)]) for m in self.modes]
        try:
            for module, mode in self.modes.items():
                module.__dict__.update(training=mode, _backward_hooks={}, _backward_pre_hooks={})
            for held, attribute, name in self._places:
                held[attribute] = tensors[name]
            yield
        finally:
            for module, attributes, kinds in before:
                module.__dict__.clear()
                module.__dict__.update(attributes)
                for held, contents in kinds:
                    _put_back(held, contents)


def _held(module: nn.Module) -> tuple[Any, Any, Any]:
    """What a module holds in dictionaries, beside its attributes."""
    return module._parameters, module._buffers, module._modules


def _put_back(held: Any, contents: Mapping[str, Any]) -> None:
    if isinstance(held, dict):
        held.clear()
        held.update(contents)
        return
    for name, content in contents.items():  # of torch.jit, whose names are fixed
        if held[name] is not content:
            held[name] = content
