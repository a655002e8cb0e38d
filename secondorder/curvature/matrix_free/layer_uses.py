"""What goes into a layer and where its output's gradient is found, each time the layer is used."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from secondorder.matrix_power.transforms import inside_transform


@dataclass(eq=False)
class Input:
    """What went into one call of a layer: the input a `[N, ...]`, without its graph, and its version then."""

    input: Tensor
    version: int

    @property
    def intact(self) -> bool:
        """Whether nothing has changed the input in place since."""
        return self.input._version == self.version


@dataclass(eq=False)
class LayerUse(Input):
    """One call of a layer: its input a `[N, ...]` and the place in the graph of its output.

    The place is that of the output as the layer returned it, also when a later operation changed it in place.
    """

    layer: nn.Module
    output: GradientEdge
    output_shape: torch.Size
    buffers: Mapping[str, Tensor | None]
    """The layer's buffers in this call, which are not those it has outside of it."""


def read_call(args: tuple, kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, int, GradientEdge] | None:
    """Of a forward hook's arguments: the input, its version, the place of the output; None for an output without a gradient."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    a = args[0] if args else next(iter(kwargs.values()))
    return a.detach(), a._version, get_gradient_edge(output)


@contextmanager
def recorded_uses(layers: Mapping[nn.Module, object]) -> Iterator[list[LayerUse]]:
    """The uses of the given layers inside, in order. Only uses whose output has a gradient are recorded."""
    uses: list[LayerUse] = []

    def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if inside_transform():  # of what is of no use outside of it
            return
        call = read_call(args, kwargs, output)
        if call is not None:
            a, version, place = call
            uses.append(LayerUse(a, version, layer, place, output.shape, dict(layer._buffers)))

    # First of all hooks: another one may replace the output.
    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()
