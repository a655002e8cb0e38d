"""Matrix functions where numbers end: many steps, the ends of float32, rounding, samples that are not finite, other precision."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from matrix_functions import F64, features, psd
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from secondorder.errors import InputError
from secondorder.matrix_power import (
    covariance,
    covariance_log,
    covariance_power,
    covariance_sqrt,
    matrix_log,
    matrix_power,
    matrix_sqrt,
    newton_schulz_sqrt,
)
from secondorder.matrix_power.newton_schulz import NewtonSchulzPolynomial, polynomial
from secondorder.matrix_power.precision import full_precision
from secondorder.pooling import POOLINGS, pooling_head

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

METHODS = ["auto", "newton_schulz"]
STEPS = [1, 5, 10, 11, 28, 200]


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient of <G, f> and gradient of <V, gradient> for fixed G and V."""
    x = x.detach().clone().requires_grad_()
    Z = function(x)
    G, V = (
        torch.linspace(-1, 1, y.shape[-2] * y.shape[-1], dtype=F64).cos().view(y.shape[-2:]).to(y.dtype) for y in (Z, x)
    )
    (gradient,) = torch.autograd.grad((Z * G).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gradient * V).sum(), x)
    return Z.detach(), gradient.detach(), second


# ------------------------------------------------------------------------------------------------- many steps, any method


def published(S: Tensor, num_iter: int) -> Tensor:
    """The coupled iteration on the eigenvalues in float64, negative ones as zero."""
    lam, U = torch.linalg.eigh(S.double())
    lam = lam.clamp_min(0)
    t = lam.sum(-1, keepdim=True)
    y = torch.where(t > 0, lam / t, 0)
    z = torch.ones_like(y)
    for _ in range(num_iter):
        y, z = y * (3 - z * y) / 2, z * (3 - z * y) / 2
    return (U * (t.sqrt() * y)[..., None, :]) @ U.mT


def deficient(size: int) -> Tensor:
    A = features(size, (size + 1) // 2)
    return A @ A.mT


MATRICES: dict[str, tuple[Callable[[int], Tensor], float]] = {
    "well-conditioned": (psd, 1e-5),
    # a rounded null eigenvalue up to C eps l_max is left out or not, and has a root of sqrt(C eps) at most
    "rank-deficient": (deficient, 3e-3),
    "zero": (lambda size: torch.zeros(size, size, dtype=F64), 0.0),
    "identity": (lambda size: 3 * torch.eye(size, dtype=F64), 1e-5),
    "one direction": (lambda size: torch.diag(torch.eye(size, dtype=F64)[0]), 1e-5),
    "slightly negative": (lambda size: torch.diag(1 - 1.0003 * torch.eye(size + 1, dtype=F64)[0]), 1e-5),
    "rounded to bfloat16": (lambda size: deficient(size).bfloat16().double(), 1e-3),
}


@pytest.mark.parametrize(
    ("size", "case"),
    [*((size, case) for size in (1, 6) for case in MATRICES), (20, "well-conditioned"), (20, "rank-deficient")],
)
def test_one_polynomial_for_every_method_and_number_of_steps(size: int, case: str) -> None:
    make, tolerance = MATRICES[case]
    S = make(size).float()
    batch = torch.stack((S, psd(S.shape[-1], dtype=torch.float32), torch.zeros_like(S)))
    for num_iter in STEPS:
        want = published(batch, num_iter)
        Z, gradient, second = derivatives(partial(matrix_sqrt, num_iter=num_iter, validate=False), batch)
        assert torch.equal(matrix_sqrt(batch, "newton_schulz", num_iter, validate=False), Z)
        assert (Z - want).abs().amax() <= tolerance * want.abs().amax() + 1e-5 * want.abs().amax(), num_iter
        assert Z[2].abs().max() == 0
        assert gradient.isfinite().all(), num_iter
        assert second.isfinite().all(), num_iter


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("S", "num_iter", "largest"),
    [
        (torch.diag(torch.tensor([1.0, 1.0, -3e-4])), 15, 1.0),
        (torch.eye(3), 30, 1.0),
        (torch.diag(torch.tensor([1.0, 0.0])), 300, 1.0),
    ],
    ids=["slightly negative", "converged", "hundreds of steps"],
)
def test_published_examples_of_blow_up(method: str, S: Tensor, num_iter: int, largest: float) -> None:
    Z = matrix_sqrt(S, method, num_iter)
    torch.testing.assert_close(Z.max(), torch.tensor(largest), rtol=1e-4, atol=0)
    torch.testing.assert_close(Z - torch.diag(Z.diagonal()), torch.zeros_like(Z))


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_deficient_matrix_in_bfloat16(method: str) -> None:
    A = torch.randn(12, 4)
    S = (A @ A.T).bfloat16()
    Z = matrix_sqrt(S, method)
    torch.testing.assert_close(Z, published(S, 5).bfloat16(), rtol=1e-2, atol=1e-2)


SHAPES = [(2, 4, 9), (2, 12, 7), (2, 24, 1)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("null", [False, True], ids=["full", "null channels"])
def test_features_in_float32_are_as_in_float64(method: str, shape: tuple[int, ...], null: bool) -> None:
    """1e-2: with many steps the second derivative of the root of a rounded null direction."""
    x = features(*shape, dtype=torch.float32)
    if null:
        x[:, shape[1] // 2 :] = 0
    # by products, where the two ways to evaluate the polynomial part, and through eigenvalues alone
    for num_iter in (5, 10, 11, 200) if method == "newton_schulz" else (5, 10):
        function = partial(covariance_sqrt, method=method, num_iter=num_iter)
        got, want = derivatives(function, x), derivatives(function, x.double())
        for order, (mine, truth) in enumerate(zip(got, want, strict=True)):
            if null and order == 2 and num_iter > 10:
                assert (
                    mine.isfinite().all()
                )  # the slope at zero, 1.5^K, is left out from 11 steps in float32, 25 in float64
                continue
            tolerance = 1e-2 if order else 1e-4
            assert (mine - truth).norm() <= tolerance * truth.norm(), (num_iter, order)


@pytest.mark.parametrize("num_iter", [24, 300])
def test_derivatives_of_many_steps(num_iter: int) -> None:
    for shape, function in (
        ((1, 3, 4), lambda x: covariance_sqrt(x, "newton_schulz", num_iter)),
        ((1, 4, 3), lambda x: matrix_sqrt(covariance(x), num_iter=num_iter)),
    ):
        x = features(*shape).requires_grad_()
        assert gradcheck(function, x)
        assert gradgradcheck(function, x, fast_mode=True)


def test_the_polynomial_as_a_scalar_function() -> None:
    """First differences as in closed form, second ones by their definition."""
    a = torch.tensor([1e-3, 0.05, 0.2, 0.7], dtype=F64)
    for num_iter in (1, 3, 8, 40):
        f = NewtonSchulzPolynomial(num_iter)
        value, difference = polynomial(a, num_iter)
        torch.testing.assert_close(f.value(a), value)
        torch.testing.assert_close(f.first(a[:, None], a[None, :]), difference)
        got = f.second(a[:, None, None], a[None, :, None], a[None, None, :])
        for i, j, k in ((0, 1, 2), (3, 1, 0), (2, 0, 3)):
            want = (difference[i, j] - difference[j, k]) / (a[i] - a[k])
            torch.testing.assert_close(got[i, j, k], want, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(got[2, 2, 2], got[2, 2, 2] * 0 + _half_curvature(f, a[2]), rtol=1e-8, atol=1e-8)


def _half_curvature(f: NewtonSchulzPolynomial, a: Tensor) -> Tensor:
    return torch.func.grad(torch.func.grad(f.value))(a) / 2


def test_clearly_indefinite_matrices_have_the_root_of_their_positive_part() -> None:
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # eigenvalues 1 and -1, trace 0
    for method in (*METHODS, "eigh"):
        for num_iter in (5, 30):
            Z = matrix_sqrt(torch.stack((swap, -torch.eye(2))), method, num_iter, validate=False)
            torch.testing.assert_close(Z[0], torch.full((2, 2), 0.5))
            assert Z[1].abs().max() == 0


# --------------------------------------------------------------------------------------------------- the ends of a format

OF_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "auto": covariance_sqrt,
    "newton_schulz": lambda x: covariance_sqrt(x, "newton_schulz"),
    "eigh": lambda x: covariance_sqrt(x, "eigh"),
    "power 0.3": lambda x: covariance_power(x, 0.3),
    "power -0.5": lambda x: covariance_power(x, -0.5),
    "power 1": lambda x: covariance_power(x, 1),
    "power 2": lambda x: covariance_power(x, 2),
    "log": covariance_log,
    "shifted log": lambda x: covariance_log(x, 1e-3),
}
OF_MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "auto": matrix_sqrt,
    "eigh": lambda S: matrix_sqrt(S, "eigh"),
    "power 0.3": lambda S: matrix_power(S, 0.3),
    "power -0.5": lambda S: matrix_power(S, -0.5),
    "power 2": lambda S: matrix_power(S, 2),
    "log": matrix_log,
    "shifted log": lambda S: matrix_log(S, 1e-3),
}


def assert_as_rounded(got: Tensor, truth: Tensor) -> None:
    """Never NaN; as the truth to the precision of float32 relative to its largest entry, infinite where that is."""
    want = truth.to(got.dtype)
    assert not got.isnan().any()
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    error = (got - want)[finite].double().abs()
    assert (error <= 3e-5 * truth.abs().max() + 1e-44).all()


@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 9, 4)])
@pytest.mark.parametrize("scale", [1e-41, 1e-38, 1e-23, 1e20, 3e38])
def test_features_of_any_scale(name: str, shape: tuple[int, ...], scale: float) -> None:
    x = (features(*shape).clamp(-1, 1) * scale).float()
    got, want = (derivatives(OF_FEATURES[name], x) for x in (x, x.double()))
    for mine, truth in zip(got[:2], want[:2], strict=True):
        assert_as_rounded(mine, truth)
    if want[2].abs().max() < 1e38 and want[1].abs().max() < 1e38:
        assert got[2].isfinite().all()


@pytest.mark.parametrize("name", OF_MATRICES)
@pytest.mark.parametrize("scale", [1e-41, 1e-39, 1e-20, 1e20, 2e38])
def test_matrices_of_any_scale(name: str, scale: float) -> None:
    S = psd(4)
    S = (S / S.abs().max() * scale).float()
    if scale < 1e-38:
        S = torch.diag_embed(S.diagonal())  # subnormal numbers are too coarse to keep it PSD
    got, want = (derivatives(OF_MATRICES[name], S) for S in (S, S.double()))
    for mine, truth in zip(got[:2], want[:2], strict=True):
        assert_as_rounded(mine, truth)
    if want[2].abs().max() < 1e38 and want[1].abs().max() < 1e38:
        assert got[2].isfinite().all()


def test_gradients_near_the_end_of_the_format_go_through_many_steps() -> None:
    x, G = features(2, 6, 9).float().requires_grad_(), features(2, 6, 6).float()
    gradients = [torch.autograd.grad(covariance_sqrt(x, "newton_schulz", 10), x, c * G)[0] for c in (1.0, 2.0**118)]
    torch.testing.assert_close(gradients[1] / 2.0**118, gradients[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 64, 20), (2, 16, 5), (2, 20, 64)])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_the_shifted_logarithm_has_no_noise_in_null_directions(shape: tuple[int, ...], scale: float) -> None:
    x = features(*shape, dtype=torch.float32) * scale
    want = covariance_log(x.double(), 1e-3)
    torch.testing.assert_close(covariance_log(x, 1e-3).double(), want, rtol=0, atol=5e-3)
    torch.testing.assert_close(matrix_log(covariance(x), 1e-3).double(), want, rtol=0, atol=5e-3)


# ------------------------------------------------------------------------------------------------- samples not finite

UNCHECKED: dict[str, Callable[[Tensor], Tensor]] = {
    "auto": lambda S: matrix_sqrt(S, validate=False),
    "many steps": lambda S: matrix_sqrt(S, num_iter=50, validate=False),
    "eigh": lambda S: matrix_sqrt(S, "eigh", validate=False),
    "power 0.3": lambda S: matrix_power(S, 0.3, validate=False),
    "power 2": lambda S: matrix_power(S, 2, validate=False),
    "log": lambda S: matrix_log(S, validate=False),
    "shifted log": lambda S: matrix_log(S, 0.1, validate=False),
}


@pytest.mark.parametrize(("size", "value"), [(5, torch.nan), (12, torch.inf)])
@pytest.mark.parametrize("name", [*OF_FEATURES, *(f"matrix: {name}" for name in UNCHECKED)])
def test_one_sample_that_is_not_finite(name: str, size: int, value: float) -> None:
    """NaN in its value and derivatives, and all others bit by bit as without it."""
    matrix = name.startswith("matrix: ")
    function = UNCHECKED[name.removeprefix("matrix: ")] if matrix else OF_FEATURES[name]
    x = psd(3, size, dtype=torch.float32) if matrix else features(3, size, 8, dtype=torch.float32)
    bad = x.clone()
    bad[1, 2, 1] = bad[1, 1, 2] = value
    got = derivatives(function, bad)
    for mine, clean in zip(got, derivatives(function, x), strict=True):
        assert torch.equal(mine[::2], clean[::2])
    for order, mine in enumerate(got):
        if order < 2 or not name.endswith(("power 1", "power 2")):  # their second derivative is constant
            assert mine[1].isnan().all()


@pytest.mark.parametrize("pooling", sorted(set(POOLINGS) - {"dropcov"}))
def test_one_image_that_is_not_finite(pooling: str) -> None:
    head = pooling_head(pooling, 8)
    x = features(4, 8, 3, 3, dtype=torch.float32)
    bad = x.clone()
    bad[1, 3, 2, 0] = torch.nan
    assert torch.equal(head(bad)[[0, 2, 3]], head(x)[[0, 2, 3]])
    assert head(bad)[1].isnan().any()


# ------------------------------------------------------------------------------------------------- precision of products


class Recorder(TorchDispatchMode):
    """The precision at every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "matmul"):
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["medium", "high"])
@pytest.mark.parametrize("name", [*OF_FEATURES, *(f"matrix: {name}" for name in OF_MATRICES)])
def test_products_are_in_full_precision(name: str, precision: str) -> None:
    matrix = name.startswith("matrix: ")
    function = OF_MATRICES[name.removeprefix("matrix: ")] if matrix else OF_FEATURES[name]
    x = (psd(2, 5, dtype=torch.float32) if matrix else features(2, 5, 4, dtype=torch.float32)).requires_grad_()
    with matmul_precision(precision), Recorder() as record:
        Z = function(x)
        (gradient,) = torch.autograd.grad(Z.square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), x)
        torch.func.jvp(function, (x.detach(),), (torch.ones_like(x),))
        assert torch.get_float32_matmul_precision() == precision
    assert len(record.seen) >= 3
    assert set(record.seen) == {"highest"}


def test_the_switch_comes_back_after_an_error_and_when_backends_are_set_apart() -> None:
    with matmul_precision("medium"):
        with pytest.raises(InputError), full_precision(torch.ones(1)):
            matrix_sqrt(torch.ones(2))
        assert torch.get_float32_matmul_precision() == "medium"
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # now PyTorch has no word for both
        with full_precision(torch.ones(1)):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


def test_the_last_of_several_threads_turns_the_switch_back() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with full_precision(torch.ones(1)):
            inside.set()
            leave.wait(20)
            seen.append(torch.get_float32_matmul_precision())

    with matmul_precision("high"):
        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(20)
        with full_precision(torch.ones(1)):
            pass
        leave.set()
        thread.join(20)
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"


def test_the_reference_is_as_printed() -> None:
    """It stays the published iteration, blow-up included: the tests compare with it."""
    assert not newton_schulz_sqrt(torch.diag(torch.tensor([1.0, 1.0, -3e-4])), 60).isfinite().all()
