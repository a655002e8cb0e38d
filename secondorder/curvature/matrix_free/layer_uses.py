"""What goes into a layer and where its output's gradient is found, each time the layer is used."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from secondorder.curvature.matrix_free.attention_calls import Projection, ProjectionWatch
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
    """The input of a layer's call, its version, and the place of the output in the graph, from a forward hook's arguments.

    None for an output without a gradient.
    """
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    a = args[0] if args else next(iter(kwargs.values()))
    return a.detach(), a._version, get_gradient_edge(output)


@contextmanager
def recorded_uses(layers: Mapping[nn.Module, nn.Module | None]) -> Iterator[list[LayerUse]]:
    """The uses of the given layers inside, in order. Only uses whose output has a gradient are recorded.

    Args:
        layers: each with the nn.MultiheadAttention that uses its weight without calling it, or None.
    """
    uses: list[LayerUse] = []

    def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if inside_transform():  # of what is of no use outside of it
            return
        call = read_call(args, kwargs, output)
        if call is not None:
            a, version, place = call
            uses.append(LayerUse(a, version, layer, place, output.shape, dict(layer._buffers)))

    # First of all hooks: another one may replace the output.
    handles = [
        layer.register_forward_hook(record, prepend=True, with_kwargs=True)
        for layer, caller in layers.items()
        if layer is not caller
    ]
    for caller in {caller: None for caller in layers.values() if caller is not None}:
        handles += _watched(caller, [layer for layer, other in layers.items() if other is caller], record)
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _watched(caller: nn.Module, layers: Sequence[nn.Module], record: Callable[..., None]) -> list[RemovableHandle]:
    """Hooks that record the projections of an attention module: by its own weight (if it is among the layers), by others."""
    entered: list[ProjectionWatch] = []

    def projection(layer: nn.Module) -> tuple[Tensor, Projection]:
        weight: Any = layer.in_proj_weight if layer is caller else layer.weight
        groups = 3 if layer is caller else 1
        return weight, Projection(groups, len(weight) // groups, lambda x, y: record(layer, (x,), {}, y))

    def enter(module: nn.Module, args: Any) -> None:
        watch = ProjectionWatch(dict(map(projection, layers)))  # of the weights in this call
        watch.__enter__()
        entered.append(watch)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [caller.register_forward_pre_hook(enter), caller.register_forward_hook(leave, always_call=True)]
