"""One autograd function with a fast value and first derivative, and with all other derivatives from a plain definition.

Training needs F(x) and the pull-back (x, G) -> dF(x)^T G, which a strategy computes in closed form. Everything else (double
backward, forward mode, forward over reverse, ...) is derived by autograd from `strategy.pull_back`, the gradient of a plain
definition of the same function, so it is exact however the fast path is written.

Forward mode is the transpose of the pull-back, which is linear in G: dF(x) V = d/dG <dF(x)^T G, V>, and as fast: the
strategy's own pull-back is transposed. And a `jvp` calls nothing but an autograd function (`_PushForward`, `_Plain`), because
PyTorch drops the outer tangents of ordinary operations inside it: nested forward mode would silently return zero.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from secondorder.matrix_power.precision import full_precision
from secondorder.matrix_power.transforms import exporting, mapped_first, primals, without_mutation


class Strategy(Protocol):
    """A fast way of computing a function F of one tensor."""

    def reference(self, x: Tensor) -> Tensor:
        """F(x) in plain differentiable operations, for tests and for programs that are recorded (`exporting`)."""

    def pull_back(self, x: Tensor, G: Tensor) -> Tensor:
        """The pull-back dL/dx of G = dL/dF in plain differentiable operations."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """F(x), and tensors for `gradient`; any number of leading batch dimensions."""

    def gradient(self, G: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """The pull-back dL/dx of G = dL/dF by the fast way, from the tensors that `forward` has saved."""


def evaluate(strategy: Strategy, x: Tensor) -> Tensor:
    """F(x), differentiable as often as the plain definition is."""
    if exporting():
        with full_precision(x):
            return strategy.reference(x)
    return _Value.apply(x, strategy)[0]


class _Value(Function):
    """x -> F(x), and what the pull-back needs as constants."""

    @staticmethod
    def forward(x: Tensor, strategy: Strategy) -> tuple[Tensor, ...]:
        with full_precision(x):
            Z, saved = without_mutation(strategy.forward)(x)
        return Z, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, ctx.strategy = inputs
        ctx.constants = len(output) - 1
        ctx.tail = output[0].shape[x.ndim - 2 :]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *output[1:])
        ctx.save_for_forward(x, *output[1:])

    @staticmethod
    def backward(ctx: Any, G: Tensor | None, *_: Any) -> tuple:
        if G is None:
            return None, None
        x, *saved = ctx.saved_tensors
        return _PullBack.apply(x, G, ctx.strategy, *saved), None

    @staticmethod
    def jvp(ctx: Any, V: Tensor, *_: Any) -> tuple:
        x, *saved = primals(ctx.saved_tensors)
        return _PushForward.apply(x, V, ctx.strategy, ctx.tail, *saved), *[None] * ctx.constants

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        output = _Value.apply(*mapped_first(info.batch_size, in_dims, arguments))
        return output, (0,) * len(output)


class _PullBack(Function):
    """(x, G) -> dF(x)^T G."""

    @staticmethod
    def forward(x: Tensor, G: Tensor, strategy: Strategy, *saved: Tensor) -> Tensor:
        with full_precision(x):
            return without_mutation(strategy.gradient)(G, saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, G, strategy, *saved = inputs
        ctx.function = strategy.pull_back
        ctx.constants = len(saved)
        ctx.save_for_backward(x, G)
        ctx.save_for_forward(x, G)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> tuple:
        return *_transposed(ctx.function, ctx.saved_tensors, H), None, *[None] * ctx.constants

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dG: Tensor, *_: Any) -> Tensor:
        return _Plain.apply(partial(_push_forward, ctx.function), *primals(ctx.saved_tensors), dx, dG)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _PullBack.apply(*mapped_first(info.batch_size, in_dims, arguments)), 0


class _PushForward(Function):
    """(x, V) -> dF(x) V `[..., *tail]`."""

    @staticmethod
    def forward(x: Tensor, V: Tensor, strategy: Strategy, tail: torch.Size, *saved: Tensor) -> Tensor:
        with full_precision(x):
            G = V.new_zeros(*V.shape[:-2], *tail)
            gradient = without_mutation(strategy.gradient)
            return torch.func.vjp(lambda G: gradient(G, saved), G)[1](V)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, V, strategy, tail, *saved = inputs
        ctx.function = partial(_transposed_pull_back, strategy, tail)
        ctx.constants = len(saved)
        ctx.save_for_backward(x, V)
        ctx.save_for_forward(x, V)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> tuple:
        return *_transposed(ctx.function, ctx.saved_tensors, H), None, None, *[None] * ctx.constants

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dV: Tensor, *_: Any) -> Tensor:
        return _Plain.apply(partial(_push_forward, ctx.function), *primals(ctx.saved_tensors), dx, dV)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _PushForward.apply(*mapped_first(info.batch_size, in_dims, arguments)), 0


class _Plain(Function):
    """A function in plain operations, batched over leading dimensions, that may stand in a `jvp`."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        with full_precision(arguments[0]):
            return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.function, *arguments = inputs
        ctx.save_for_backward(*arguments)
        ctx.save_for_forward(*arguments)

    @staticmethod
    def backward(ctx: Any, H: Tensor) -> tuple:
        return None, *_transposed(ctx.function, ctx.saved_tensors, H)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Tensor:
        return _Plain.apply(partial(_push_forward, ctx.function), *primals(ctx.saved_tensors), *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _Plain.apply(*mapped_first(info.batch_size, in_dims, arguments)), 0


def _transposed(function: Callable[..., Tensor], arguments: tuple, H: Tensor) -> tuple[Tensor, ...]:
    """The transposed derivative of a function at its arguments, applied to H, in full precision."""
    with full_precision(H):
        return torch.func.vjp(function, *arguments)[1](H)


def _transposed_pull_back(strategy: Strategy, tail: torch.Size, x: Tensor, V: Tensor) -> Tensor:
    """dF(x) V `[..., *tail]`."""
    G = torch.zeros(*V.shape[:-2], *tail, dtype=V.dtype, device=V.device)
    return torch.func.vjp(lambda G: strategy.pull_back(x, G), G)[1](V)[0]


def _push_forward(function: Callable[..., Tensor], *arguments_and_tangents: Tensor) -> Tensor:
    """The derivative of a function at its arguments, applied to tangents: the transpose of its transpose."""
    count = len(arguments_and_tangents) // 2
    transpose: Callable[..., Any]
    output, transpose = torch.func.vjp(function, *arguments_and_tangents[:count])  # type: ignore[misc]
    return torch.func.vjp(transpose, torch.zeros_like(output))[1](arguments_and_tangents[count:])[0]
