"""The projections of nn.MultiheadAttention, which uses its weights without calling any layer, seen as calls of layers.

While a watched module's forward runs, a mode of torch's function overrides takes `multi_head_attention_forward` and runs the same
code with another `linear`, which also tells the projection's input and output. Nothing is replaced in the module or in torch,
and outputs are the same, bit for bit.

Index letters: N samples, T positions, E outputs and D inputs of a projection, G groups (query, key and value of one weight).
Inside, positions come first: `[T, N, *]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Linear = Callable[..., Tensor]
INNER = ("_in_projection_packed", "_in_projection")
"""Functions of torch that `multi_head_attention_forward` leaves the projections of query, key and value to."""


@dataclass(frozen=True)
class Projection:
    """A weight of G groups with E outputs each, and what takes (input `[N, T, D]`, output `[N, T, G E]`) of each of its calls.

    For G > 1 the input is `[N, T, G, D + 1]`, see `grouped_inputs`.
    """

    groups: int
    outputs: int
    record: Callable[[Tensor, Tensor], None]


class ProjectionWatch(TorchFunctionMode):
    """While it is entered, tells of the projections by these weights."""

    def __init__(self, projections: Mapping[Tensor, Projection]) -> None:
        super().__init__()
        self.projections = projections

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Any function of torch as it is, but for attention."""
        called = self.attend if func is F.multi_head_attention_forward else func
        return called(*args, **(kwargs or {}))

    def attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`F.multi_head_attention_forward`, with torch's arguments and result, which tells of its projections."""
        N = 1 if query.ndim == 2 else query.shape[1]
        linear = lambda x, weight, bias=None: self._linear(N, x, weight, bias)  # noqa: E731
        return _with(linear)(query, *args, **kwargs)

    def _linear(self, N: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b; where W is a known weight or some of its groups, its call is recorded."""
        out = F.linear(x, weight, bias)
        base: Any = weight if weight in self.projections else weight._base
        if base not in self.projections:
            return out
        layer = self.projections[base]
        if layer.groups == 1:  # the output projection has [T N, D]
            whole = x.unflatten(0, (-1, N)) if x.ndim == 2 else x
            y = (out.unflatten(0, (-1, N)) if x.ndim == 2 else out).transpose(0, 1)
            layer.record(whole.detach().transpose(0, 1), y)
            return y.transpose(0, 1).reshape(out.shape)
        first = int(weight.storage_offset() - base.storage_offset()) // weight[: layer.outputs].numel()
        last = first + len(weight) // layer.outputs
        y = out.transpose(0, 1)
        if last - first < layer.groups:
            y = F.pad(y, (first * layer.outputs, (layer.groups - last) * layer.outputs))
        layer.record(grouped_inputs(x.detach().transpose(0, 1), first, last, layer.groups), y)
        return y[..., first * layer.outputs : last * layer.outputs].transpose(0, 1).contiguous()


def grouped_inputs(x: Tensor, first: int, last: int, groups: int) -> Tensor:
    """Inputs `[N, T, D]` of some of the groups as `[N, T, G, D + 1]`, which ends with a one; all zero in the other groups."""
    ones = F.pad(x, (0, 1), value=1.0)[:, :, None]
    if last - first == groups:
        return ones.expand(-1, -1, groups, -1)
    whole = ones.new_zeros(*ones.shape[:2], groups, ones.shape[-1])
    whole[:, :, first:last] = ones
    return whole


def _with(linear: Linear) -> Callable[..., Any]:
    """`multi_head_attention_forward` with this `linear`: the same code, that finds it under the name of the other."""
    names: dict[str, Any] = {**vars(F), "linear": linear, "has_torch_function": lambda _: False}
    names |= {name: _copied(getattr(F, name), names) for name in INNER}
    return _copied(F.multi_head_attention_forward, names)


def _copied(function: Any, names: dict[str, Any]) -> FunctionType:
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
