"""The record of one call of a layer, and of the forward pass of the model that it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from secondorder.curvature.matrix_free.layer_uses import Input
from secondorder.errors import InputError
from secondorder.kfac.layers import KroneckerLayer


@dataclass(eq=False)
class Forward:
    """One call of the model: rows of its output (None: it has none), and whether `update_curvature` has counted it."""

    rows: int | None = None
    counted: bool = False


@dataclass(eq=False)
class LayerCall(Input):
    """One call of a layer, and in which forward of the model; it keeps no part of the graph alive.

    Args:
        recorded: it may still enter the factors. pulled_in: the step in which it has, from logits. over: the user's backward was.
    """

    layer: KroneckerLayer
    forward: Forward
    order: int
    handles: list[RemovableHandle] = field(default_factory=list)
    recorded: bool = True
    pulled_in: int | None = None
    over: bool = False

    def check(self) -> None:
        """Raises InputError if the input has been changed in place since the layer used it."""
        if not self.intact:
            raise InputError(
                f"the input of layer {self.layer.name} was changed in place after the layer had used it; use inplace=False there"
            )

    def release(self) -> None:
        """Remove the hooks on the graph, and keep the input no longer."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.input = self.input.new_empty(0)


class Output(NamedTuple):
    """Where the output of a call is in a graph."""

    call: LayerCall
    edge: GradientEdge


def by_forward(calls: Sequence[LayerCall]) -> list[list[LayerCall]]:
    """The calls of each layer in each forward."""
    groups: dict[tuple[KroneckerLayer, Forward], list[LayerCall]] = {}
    for call in calls:
        groups.setdefault((call.layer, call.forward), []).append(call)
    return list(groups.values())


def rows_of(output: Any) -> int | None:
    """First dimension of the first tensor of two or more in what a model returns."""
    if isinstance(output, Tensor):
        return len(output) if output.ndim >= 2 else None
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((rows for rows in map(rows_of, output) if rows is not None), None)
    return None
