"""Which forward passes have their gradients in the weights at present, and whether these have been cleared since."""

from collections.abc import Iterable

import torch
from torch.autograd.graph import get_gradient_edge

from secondorder.kfac.capture.calls import Forward
from secondorder.kfac.layers import KroneckerLayer


class HeldGradients:
    """The forwards whose gradients have come to each weight, and the version of weight.grad when a backward had added to it."""

    def __init__(self) -> None:
        self._forwards: dict[KroneckerLayer, list[Forward]] = {}
        self._versions: dict[KroneckerLayer, int] = {}

    @property
    def forwards(self) -> set[Forward]:
        """The forward passes, of all layers together, whose gradients are in the weights at present."""
        return {forward for forwards in self._forwards.values() for forward in forwards}

    @property
    def rows(self) -> int | None:
        """Rows of the outputs of these forward passes together; None where an output is not a tensor with rows."""
        rows = [forward.rows for forward in self.forwards]
        return None if None in rows else sum(row for row in rows if row is not None)

    def add(self, layer: KroneckerLayer, forwards: Iterable[Forward]) -> None:
        """A backward pass has brought the gradients of these forwards to the weight."""
        self._forwards.setdefault(layer, []).extend(forwards)

    def accumulated(self, layer: KroneckerLayer) -> None:
        """Note that the gradients which have come to the layer's weight have been added to `weight.grad`."""
        if layer.weight.grad is not None and layer in self._forwards:
            self._versions[layer] = layer.weight.grad._version

    def clear(self) -> None:
        """Note that the gradients of all weights have been cleared."""
        self._forwards, self._versions = {}, {}

    def all_cleared(self) -> bool:
        """Whether backward passes have added to gradients, and no gradient has it any longer."""
        return bool(self._versions) and all(self._is_cleared(layer, True) for layer in self._versions)

    def drop_cleared(self, layer: KroneckerLayer) -> list[KroneckerLayer]:
        """A backward pass begins with this layer: forget, and name, the layers whose gradients have been cleared before it."""
        accumulates = _accumulates(layer)
        cleared = [own for own in self._forwards if self._is_cleared(own, accumulates)]
        for own in cleared:
            del self._forwards[own]
            self._versions.pop(own, None)
        return cleared

    def _is_cleared(self, layer: KroneckerLayer, accumulates: bool) -> bool:
        """Whether what came to a weight is not in its gradient, as the one that accumulates begins without; waits seldom."""
        gradient, version = layer.weight.grad, self._versions.get(layer)
        if version is None:  # it came from autograd.grad, and may yet be put there by hand
            return accumulates
        return gradient is None or (gradient._version != version and not bool(gradient.any()))


def _accumulates(layer: KroneckerLayer) -> bool:
    """Whether the present backward pass adds to gradients, as `backward()` does and `autograd.grad` does not."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(layer.weight).node)
    except RuntimeError:  # torch's answer for a weight that autograd.grad is asked for
        return False
