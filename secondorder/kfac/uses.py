"""One call of a layer, and the forward pass of the model that it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from secondorder.errors import InputError
from secondorder.kfac.layers import KroneckerLayer


@dataclass(eq=False)
class Forward:
    """One call of the model: rows of its output (None: it has none), and whether they are counted."""

    rows: int | None = None
    counted: bool = False


@dataclass(eq=False)
class Use:
    """One call of a layer: its input, in which forward of the model, and the state of the input then.

    recorded: it may still enter the factors. pulled_in: the step in which it has, from logits. over: the user's backward was.
    """

    layer: KroneckerLayer
    input: Tensor
    version: int
    forward: Forward
    order: int
    handles: list[RemovableHandle] = field(default_factory=list)
    recorded: bool = True
    pulled_in: int | None = None
    over: bool = False

    def check(self) -> None:
        """InputError if the input has changed since."""
        if self.input._version != self.version:
            raise InputError(
                f"the input of layer {self.layer.name} was changed in place after the layer had used it; use inplace=False there"
            )


def by_forward(uses: Sequence[Use]) -> list[list[Use]]:
    """The uses of each layer in each forward."""
    groups: dict[tuple[KroneckerLayer, Forward], list[Use]] = {}
    for use in uses:
        groups.setdefault((use.layer, use.forward), []).append(use)
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
