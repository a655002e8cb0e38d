"""The state of other packages' optimisers as plain values, and several optimisers as one.

A checkpoint is read with ``torch.load(weights_only=True)``, which refuses objects. Those in the state of Shampoo and singd hold
tensors and plain values only, so an object is saved as the name of its class and its attributes.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

PACKAGES = ("pytorch_optimizer.", "singd.")
"""Only classes of these packages are made again; a name in a file cannot call anything else."""
OBJECT = "object of class"


def plain(value: Any) -> Any:
    """`value` with every object of PACKAGES as a dictionary of its attributes."""
    kind = type(value)
    if kind.__module__.startswith(PACKAGES):
        if isinstance(value, int):  # an enumeration
            return int(value)
        return {OBJECT: f"{kind.__module__}:{kind.__qualname__}", "attributes": plain(dict(vars(value)))}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def with_objects(value: Any) -> Any:
    """The inverse of `plain`; ValueError for a class of another package."""
    if isinstance(value, dict) and OBJECT in value:
        module, _, name = value[OBJECT].partition(":")
        if not module.startswith(PACKAGES):
            raise ValueError(f"the state names the class {value[OBJECT]}, which is none of {', '.join(PACKAGES)}")
        kind = getattr(import_module(module), name)
        made = kind.__new__(kind)
        vars(made).update(with_objects(value["attributes"]))
        return made
    if isinstance(value, dict):
        return {key: with_objects(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_objects(item) for item in value]
    return value


class Together(torch.optim.Optimizer):
    """Optimisers over different parameters of a network, used as one; its parameter groups are theirs."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]  # the same objects, not copies

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every optimiser, in order. Raises NotImplementedError for a closure."""
        if closure is not None:
            raise NotImplementedError("several optimisers as one take no closure")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimisers, in order, as plain values under "parts"."""
        return {"parts": [plain(part.state_dict()) for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue every optimiser from its part of a `state_dict()` of the same optimisers."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(with_objects(state))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
