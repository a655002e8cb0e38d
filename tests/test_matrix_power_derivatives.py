"""First and second derivatives of the matrix functions, against finite differences and across torch.func."""

from collections.abc import Callable

import pytest
import torch
from matrix_functions import F64, FUNCTIONS, features, psd
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from secondorder.matrix_power import covariance, matrix_log

# PyTorch's own forward mode calls its deprecated torch.jit.script on first use
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


SHAPES = {"more positions": (1, 3, 4), "fewer positions": (1, 4, 3), "one position more": (1, 3, 3)}


def symmetrised(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda A: function((A + A.mT) / 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_matrix_functions(name: str) -> None:
    function = symmetrised(FUNCTIONS[name][0])
    _check_derivatives(function, psd(1, 3))


# a null direction of the channels: one function of each way to leave it out
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *((shape, name) for shape in ("more positions", "fewer positions") for name in FUNCTIONS),
        *(("one position more", name) for name in ("newton_schulz", "eigh", "inverse_root", "log", "shifted_log")),
    ],
)
def test_derivatives_of_fused_functions(shape: str, name: str) -> None:
    _check_derivatives(FUNCTIONS[name][1], features(*SHAPES[shape]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_through_rank_deficient_covariance(name: str) -> None:
    """Fewer positions than channels: S has null directions, X -> f(S) is smooth all the same."""
    of_matrix = FUNCTIONS[name][0]
    _check_derivatives(lambda x: of_matrix(covariance(x)), features(1, 4, 3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_modes_agree_in_directions_that_are_not_symmetric(name: str) -> None:
    """<W, J V> = <J^T W, V> and every order of forward and reverse mode gives one Hessian, without symmetrising S."""
    function, S, (V, W) = FUNCTIONS[name][0], psd(4), torch.randn(2, 4, 4, dtype=F64)
    forward = (W * torch.func.jvp(function, (S,), (V,))[1]).sum()
    reverse = (V * torch.func.vjp(function, S)[1](W)[0]).sum()
    torch.testing.assert_close(forward, reverse)
    first, last = torch.func.jacfwd, torch.func.jacrev
    hessians = [
        outer(inner(lambda A: (W * function(A)).sum()))(S) for outer in (first, last) for inner in (first, last)
    ]
    for hessian in hessians[1:]:
        torch.testing.assert_close(hessian, hessians[0])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_second_derivatives_are_finite_at_any_scale_in_float32(name: str, scale: float) -> None:
    S = (psd(5) * scale).float().requires_grad_()
    Z = FUNCTIONS[name][0](S)
    (gradient,) = torch.autograd.grad((Z.square() * torch.linspace(-1, 1, 25).view(5, 5)).sum(), S, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.eye(5)).sum(), S)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def some_sums(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Two random sums of the function's entries as a function of steps in two random directions, and no step.

    Every wrong derivative shows in them, for a fraction of the time.
    """
    W = torch.randn(2, *function(x).shape, dtype=x.dtype)
    D = torch.randn(2, *x.shape, dtype=x.dtype)
    sums = lambda t: (W * function(x + torch.tensordot(t, D, 1))).flatten(1).sum(1)  # noqa: E731
    return sums, torch.zeros(2, dtype=x.dtype, requires_grad=True)


def _check_derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    sums, t = some_sums(function, x)
    assert gradcheck(sums, t, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(sums, t, check_fwd_over_rev=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_repeated_eigenvalues(name: str) -> None:
    """Where eigenvectors are not differentiable: equal, and equal up to rounding."""
    function = symmetrised(FUNCTIONS[name][0])
    U = torch.linalg.qr(features(4, 4)).Q
    for eigenvalues in ([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0 + 1e-13, 3.0], [1.0, 1.0 + 1e-5, 1.0 + 3e-5, 3.0]):
        S = (U * torch.tensor(eigenvalues, dtype=F64)) @ U.mT
        sums, t = some_sums(function, S)
        assert gradcheck(sums, t)
        assert gradgradcheck(sums, t)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2)])
def test_func_transforms_agree(name: str, shape: tuple[int, ...]) -> None:
    """Four ways to the Hessian, and jvp, vjp, vmap; PyTorch loses tangents of nested forward mode in a careless `jvp`."""
    function = FUNCTIONS[name][1]
    x, v = features(*shape), features(*shape)

    def loss(x: Tensor) -> Tensor:
        return (function(x) ** 3).sum()

    hessian = torch.func.hessian(loss)(x)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(inner(loss))(x), hessian, rtol=1e-8, atol=1e-9)
    y, tangent = torch.func.jvp(function, (x,), (v,))
    _, pull_back = torch.func.vjp(function, x)
    torch.testing.assert_close((tangent * y).sum(), (pull_back(y)[0] * v).sum())
    torch.testing.assert_close(torch.func.vmap(function)(x), function(x), rtol=1e-10, atol=1e-10)
    stacked = torch.stack((x, v), 2)
    torch.testing.assert_close(torch.func.vmap(function, in_dims=2)(stacked)[1], function(v), rtol=1e-10, atol=1e-10)
    per_sample = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(per_sample, torch.func.grad(loss)(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["auto", "eigh", "shifted_log"])
def test_hessian_vector_product_by_finite_differences(name: str) -> None:
    function = FUNCTIONS[name][1]
    x, v, h = features(2, 8, 5), features(2, 8, 5), 1e-5

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (function(x) ** 2).sum().sin())(x)

    x.requires_grad_()
    g = torch.autograd.grad((function(x) ** 2).sum().sin(), x, create_graph=True)[0]
    product = torch.autograd.grad((g * v).sum(), x)[0]
    x = x.detach()
    want = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
    torch.testing.assert_close(product, want, rtol=1e-6, atol=1e-6)


def test_third_derivative_of_exact_functions_raises() -> None:
    S = psd(3).requires_grad_()
    second = matrix_log(S)
    for _ in range(2):
        second = torch.autograd.grad(second.sum(), S, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), S)
