"""The projections of nn.MultiheadAttention, which uses its weights without calling any layer, seen by K-FAC as calls of layers.

While a watched module's forward runs, a mode of torch's function overrides takes `multi_head_attention_forward` and runs the same
code with another `linear`, which also tells the projection's input and output. Nothing is replaced in the module or in torch,
and outputs are the same, bit for bit. A version of torch that projects in another way leaves the layer without a call,
which the scaling check of the first step finds.

Index letters: N samples, T positions, E outputs and D inputs of a projection. Inside, positions come first: `[T, N, *]`.
"""

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secondorder.kfac.capture.hooks import Hook, remove
from secondorder.kfac.layers import KroneckerLayer

Linear = Callable[..., Tensor]
INNER = ("_in_projection_packed", "_in_projection")
"""Functions of torch that `multi_head_attention_forward` leaves the projections of query, key and value to."""


class AttentionWatch:
    """Tells of the projections in the forward passes of attention modules, until `remove`.

    records: by layer, what takes (module, (input `[N, T, D]`,), {}, output `[N, T, E]`) of each call, as a forward hook does.
    """

    def __init__(self, records: Mapping[KroneckerLayer, Callable[..., None]]) -> None:
        self._projections = {layer.weight: (layer, record) for layer, record in records.items() if layer.callers}
        self._entered: list[TorchFunctionMode] = []
        self._handles: list[Any] = []
        for module in {caller: None for layer in records for caller in layer.callers}:
            enter, leave = Hook(self, AttentionWatch._enter), Hook(self, AttentionWatch._leave)
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Tell no more."""
        remove(self._handles)

    def _enter(self, module: nn.Module, args: Any) -> None:
        mode = _Mode(self)
        mode.__enter__()
        self._entered.append(mode)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._entered.pop().__exit__(None, None, None)

    def attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`multi_head_attention_forward`, that tells of its projections."""
        shape = query.unsqueeze(1).shape[:2] if query.ndim == 2 else query.shape[:2]  # T, N
        linear = lambda x, weight, bias=None: self._linear(shape, x, weight, bias)  # noqa: E731
        return _with(linear)(query, *args, **kwargs)

    def _linear(self, shape: torch.Size, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b; where W is a layer's weight or some of its groups, its call is recorded."""
        out = F.linear(x, weight, bias)
        base: Any = weight if weight in self._projections else weight._base
        if base not in self._projections:
            return out
        layer, record = self._projections[base]
        if layer.groups == 1:  # the output projection has [T N, D]
            whole = x.unflatten(0, tuple(shape)) if x.ndim == 2 else x
            y = (out.unflatten(0, tuple(shape)) if x.ndim == 2 else out).transpose(0, 1)
            record(layer.module, (whole.detach().transpose(0, 1),), {}, y)
            return y.transpose(0, 1).reshape(out.shape)
        first = int(weight.storage_offset() - base.storage_offset()) // weight[: layer.outputs].numel()
        last = first + len(weight) // layer.outputs
        y = out.transpose(0, 1)
        if last - first < layer.groups:
            y = F.pad(y, (first * layer.outputs, (layer.groups - last) * layer.outputs))
        record(layer.module, (grouped_inputs(x.detach().transpose(0, 1), first, last, layer.groups),), {}, y)
        return y[..., first * layer.outputs : last * layer.outputs].transpose(0, 1).contiguous()


def grouped_inputs(x: Tensor, first: int, last: int, groups: int) -> Tensor:
    """Inputs `[N, T, D]` of some of the groups as `[N, T, G, D + 1]`, which ends with a one; all zero in the other groups."""
    ones = F.pad(x, (0, 1), value=1.0)[:, :, None]
    if last - first == groups:
        return ones.expand(-1, -1, groups, -1)
    whole = ones.new_zeros(*ones.shape[:2], groups, ones.shape[-1])
    whole[:, :, first:last] = ones
    return whole


class _Mode(TorchFunctionMode):
    def __init__(self, watch: AttentionWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        called = self.watch.attend if func is F.multi_head_attention_forward else func
        return called(*args, **(kwargs or {}))


def _with(linear: Linear) -> Callable[..., Any]:
    """`multi_head_attention_forward` with this `linear`: the same code, that finds it under the name of the other."""
    names: dict[str, Any] = {**vars(F), "linear": linear, "has_torch_function": lambda _: False}
    names |= {name: _copied(getattr(F, name), names) for name in INNER}
    return _copied(F.multi_head_attention_forward, names)


def _copied(function: Any, names: dict[str, Any]) -> FunctionType:
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
