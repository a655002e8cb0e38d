"""Hessian products of many vectors at once: only where torch's rules for batches exist and are right."""

from typing import Any

import pytest
import torch
from small_networks import around, batch, chain, relative, rows, true_hessian
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.errors import NonFiniteError


class _NoBatches(torch.autograd.Function):
    """x^3, with a second derivative that looks at a value: it cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _NoBatchesBackward.apply(*ctx.saved_tensors, g)


class _NoBatchesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        assert float(h.sum()) == float(h.sum())
        return 6 * x * g * h, 3 * x**2 * h


class _Cube(nn.Module):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        return x**3 if self.plain else _NoBatches.apply(x)


def test_hessian_of_a_function_without_a_rule_for_batches() -> None:
    layers = nn.Linear(4, 3).double(), nn.Linear(3, 3).double()
    plain, opaque = (nn.Sequential(layers[0], _Cube(is_plain), layers[1]) for is_plain in (True, False))
    data = torch.randn(5, 4).double(), torch.randint(3, (5,))
    expected = curvature_blocks(plain, nn.CrossEntropyLoss(), data, "hessian").whole
    found = curvature_blocks(opaque, nn.CrossEntropyLoss(), data, "hessian").whole
    assert relative(found.dense(), expected.dense()) <= 1e-12
    assert [next(iter(H.jacobian.parts()))._batches for H in (expected, found)] == [True, False]


def test_hessian_does_not_trust_a_wrong_rule_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = chain("gap"), batch(nn.CrossEntropyLoss(), 3)
    H = true_hessian(model, nn.CrossEntropyLoss(), data)
    real = torch.autograd.grad

    def wrong(*arguments: Any, is_grads_batched: bool = False, **options: Any) -> Any:
        found = real(*arguments, is_grads_batched=is_grads_batched, **options)
        return [None if g is None else 1.001 * g for g in found] if is_grads_batched else found

    monkeypatch.setattr(torch.autograd, "grad", wrong)
    found = curvature_blocks(model, nn.CrossEntropyLoss(), data, "hessian").whole.dense()
    assert relative(found, H) <= 1e-12


def test_second_derivatives_that_are_no_numbers_are_named() -> None:
    """Of a square root at 0, whose first derivative relu takes away."""
    model = around(lambda h: h.relu().sqrt())
    with torch.no_grad():
        model[0].bias.sub_(100)
    assert bool(curvature_blocks(model, nn.CrossEntropyLoss(), rows(), "ggn").whole.dense().isfinite().all())
    block = curvature_blocks(model, nn.CrossEntropyLoss(), rows(), "hessian").whole
    for use in (block.dense, lambda: block @ torch.ones(block.size).double()):
        with pytest.raises(NonFiniteError, match="Hessian is not finite: a second derivative"):
            use()
