"""The projections of nn.MultiheadAttention, which uses its weights without calling any layer, seen by K-FAC as calls of layers.

What tells of them is `attention_calls`. A version of torch that projects in another way leaves the layer without a call, which
the scaling check of the first step finds.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secondorder.curvature.matrix_free.attention_calls import Projection, ProjectionWatch
from secondorder.kfac.capture.hooks import Hook, remove
from secondorder.kfac.layers import KroneckerLayer

Record = Callable[..., None]


class AttentionWatch:
    """Tells of the projections in the forward passes of attention modules, until `remove`.

    Args:
        records: by layer, what takes (module, (input `[N, T, D]`,), {}, output `[N, T, E]`) of each call, as a forward hook does.
    """

    def __init__(self, records: Mapping[KroneckerLayer, Record]) -> None:
        self._projections: dict[Tensor, Projection] = {
            layer.weight: Projection(layer.groups, layer.outputs, partial(_as_hook, layer, record))
            for layer, record in records.items()
            if layer.callers
        }
        self._entered: list[TorchFunctionMode] = []
        self._handles: list[Any] = []
        for module in {caller: None for layer in records for caller in layer.callers}:
            enter, leave = Hook(self, AttentionWatch._enter), Hook(self, AttentionWatch._leave)
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Remove the hooks: calls of attention modules are not told of any longer."""
        remove(self._handles)

    def _enter(self, module: nn.Module, args: Any) -> None:
        mode = ProjectionWatch(self._projections)
        mode.__enter__()
        self._entered.append(mode)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._entered.pop().__exit__(None, None, None)


def _as_hook(layer: KroneckerLayer, record: Record, x: Tensor, y: Tensor) -> None:
    record(layer.module, (x,), {}, y)
