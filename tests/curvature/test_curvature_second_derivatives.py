"""Functions whose second derivative autograd gets wrong: Hessians of networks and losses with them are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_functions import Sine as OnceDifferentiable
from small_networks import around, chain, relative, rows
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.errors import InputError
from secondorder.networks import network
from secondorder.pooling import POOLINGS

CE = nn.CrossEntropyLoss()


class Constant(torch.autograd.Function):
    """x^3 with a derivative that is kept as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class NoGraph(OnceDifferentiable):
    """sin with a backward pass without a graph."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return g * ctx.saved_tensors[0].cos()


class Lopsided(torch.autograd.Function):
    """x y, whose backward pass forgets that x is a variable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return g * y, g * x.detach()


class Cube(torch.autograd.Function):
    """x^3, right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


WRONG: dict[str, tuple[Callable[[], nn.Module], str, list[list[str] | None]]] = {
    "once differentiable": (lambda: around(OnceDifferentiable.apply), "Sine can be .* once only", [None, ["0.weight"]]),
    "constant": (lambda: around(Constant.apply), "not those of its gradient: the autograd Function Constant", [None, ["0.bias"]]),
    "lopsided": (lambda: around(lambda x: Lopsided.apply(x, x.sin())), "autograd Function Lopsided", [None, ["0.weight"]]),
    "no graph": (lambda: around(NoGraph.apply), "autograd Function NoGraph has", [None, ["0.weight"], ["0.bias"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(("chunk", "dtype"), [(None, torch.float64), (2, torch.float32)])
def test_hessians_with_wrong_second_derivatives_are_refused(name: str, chunk: int | None, dtype: torch.dtype) -> None:
    build, message, choices = WRONG[name]
    model, batch = build().to(dtype), (rows()[0].to(dtype), rows()[1])
    for params in choices:
        block = next(iter(curvature_blocks(model, CE, batch, "hessian", params, chunk=chunk).values()))
        for use in (lambda block=block: block @ torch.ones(block.size), block.dense, block.trace):
            with pytest.raises(InputError, match=f"{message}.*use quantity 'ggn'"):
                use()
    assert curvature_blocks(model, CE, batch, "ggn").whole.dense().norm() > 0


def test_parameters_above_a_wrong_function_have_their_hessian() -> None:
    model, batch = around(OnceDifferentiable.apply), rows()
    plain = nn.Sequential(model[0], around(torch.sin)[1], *model[2:])
    for name in ("2.weight", "4.bias"):
        H, truth = (curvature_blocks(m, CE, batch, "hessian", [name]).whole.dense() for m in (model, plain))
        assert relative(H, truth) <= 1e-12


def with_second(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, y: F.cross_entropy(z, y) + function(z).square().mean()


@pytest.mark.parametrize("function", [OnceDifferentiable, Constant])
@pytest.mark.parametrize("quantity", ["ggn", "hessian"])
def test_losses_with_wrong_second_derivatives_are_refused(function: Any, quantity: str) -> None:
    with pytest.raises(InputError, match=f"autograd Function {function.__name__}.*replace it"):
        curvature_blocks(around(torch.tanh), with_second(function.apply), rows(), quantity)


def test_right_functions_are_not_refused() -> None:
    batch = rows()
    own, plain = around(Cube.apply), around(lambda x: x**3)
    plain.load_state_dict(own.state_dict())
    for quantity in ("ggn", "hessian"):
        found, truth = (
            curvature_blocks(model, with_second(function), batch, quantity).whole.dense()
            for model, function in ((own, Cube.apply), (plain, lambda z: z**3))
        )
        assert relative(found, truth) <= 1e-12
    hinge = lambda z, y: (1 + z - z.gather(1, y[:, None])).relu().sum()  # noqa: E731  piecewise linear
    found, truth = (curvature_blocks(model, hinge, batch, "hessian").whole.dense() for model in (own, plain))
    assert relative(found, truth) <= 1e-12
    assert truth.norm() > 0


@pytest.mark.parametrize("head", POOLINGS)
def test_networks_of_this_package_are_not_refused_in_single_precision(head: str) -> None:
    model, batch = chain(head).float().eval(), (torch.randn(3, 2, 6, 6), torch.randint(3, (3,)))
    batch[0][0] = 0
    assert bool((curvature_blocks(model, CE, batch, "hessian")["0.bias"] @ torch.ones(3)).isfinite().all())


def test_batch_norm_in_training_mode_is_symmetric_in_single_precision() -> None:
    model = network("cifar_resnet8", "gcp", 3).train()
    block = curvature_blocks(model, CE, (torch.randn(4, 3, 16, 16), torch.randint(3, (4,))), "hessian")[
        "classifier.bias"
    ]
    assert bool((block @ torch.ones(block.size)).isfinite().all())
