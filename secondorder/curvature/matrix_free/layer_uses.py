"""What goes into a layer and where its output's gradient is found, each time the layer is used."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class LayerUse:
    """One call of a layer: its input a `[N, ...]` and the place in the graph of its output.

    The place is that of the output as the layer returned it, also when a later operation changed it in place.
    """

    layer: nn.Module
    input: Tensor
    output: GradientEdge
    output_shape: torch.Size
    version: int
    buffers: Mapping[str, Tensor | None]
    """The layer's buffers in this call, which are not those it has outside of it."""

    @property
    def intact(self) -> bool:
        """Whether nothing has changed the input in place since."""
        return self.input._version == self.version


@contextmanager
def recorded_uses(layers: Mapping[nn.Module, object]) -> Iterator[list[LayerUse]]:
    """The uses of the given layers inside, in order. Only uses whose output has a gradient are recorded."""
    uses: list[LayerUse] = []

    def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        a = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, Tensor) and output.requires_grad:
            place = get_gradient_edge(output)
            uses.append(LayerUse(layer, a.detach(), place, output.shape, a._version, dict(layer._buffers)))

    # First of all hooks: another one may replace the output.
    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()
