"""Functions of PSD matrices: values against scipy and closed forms, every fast way, difficult and bad input."""

from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from matrix_functions import F64, FUNCTIONS, features, psd
from torch import Tensor

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
    upper_triangle,
)
from secondorder.matrix_power.kernels import Eigen, Kernel, Products
from secondorder.matrix_power.scalar_functions import Logarithm, Power, SquareRoot
from secondorder.matrix_power.spectrum import NewtonSchulz, Spectral
from secondorder.matrix_power.strategies import OnFeatures, OnMatrix
from secondorder.matrix_power.two_level import evaluate

KERNELS: dict[str, Kernel] = {
    "products": Products(NewtonSchulz(5)),
    "one product": Products(NewtonSchulz(1)),
    "eigenvalues": Eigen(NewtonSchulz(5)),
    "root": Eigen(Spectral(SquareRoot())),
    "power": Eigen(Spectral(Power(0.3))),
    "log": Eigen(Spectral(Logarithm())),
    "shifted log": Eigen(Spectral(Logarithm(0.1))),
}


# ---------------------------------------------------------------------------------------------------------------- values


def test_values_against_scipy() -> None:
    S = psd(3, 5)
    for i, matrix in enumerate(S.numpy()):
        for mine, want in [
            (matrix_sqrt(S, "eigh"), scipy.linalg.sqrtm(matrix)),
            (matrix_sqrt(S, num_iter=60), scipy.linalg.sqrtm(matrix)),
            (matrix_power(S, 0.3), scipy.linalg.fractional_matrix_power(matrix, 0.3)),
            (matrix_power(S, -0.7), scipy.linalg.fractional_matrix_power(matrix, -0.7)),
            (matrix_power(S, 1), matrix),
            (matrix_power(S, 2), matrix @ matrix),
            (matrix_power(S, 3), matrix @ matrix @ matrix),
            (matrix_power(S, 0), scipy.linalg.fractional_matrix_power(matrix, 0)),
        ]:
            torch.testing.assert_close(mine[i], torch.as_tensor(want), rtol=1e-9, atol=1e-9)
        # by the inverse function: scipy's logm warns of its own inaccuracy
        torch.testing.assert_close(torch.as_tensor(scipy.linalg.expm(matrix_log(S)[i].numpy())), S[i])
        torch.testing.assert_close(
            torch.as_tensor(scipy.linalg.expm(matrix_log(S, 0.5)[i].numpy())), torch.eye(5, dtype=F64) + S[i] / 0.5
        )


def test_matrix_with_known_root() -> None:
    """a I + b 11^T has the eigenvalues a (C - 1 times) and a + b C: repeated, and null for a = 0."""
    C = 6
    P = torch.full((C, C), 1 / C, dtype=F64)
    for a, b in [(2.0, 3.0), (0.0, 1.5)]:
        S = a * torch.eye(C, dtype=F64) + b * C * P
        root = a**0.5 * (torch.eye(C, dtype=F64) - P) + (a + b * C) ** 0.5 * P
        torch.testing.assert_close(matrix_sqrt(S, "eigh"), root)
        torch.testing.assert_close(matrix_sqrt(S, num_iter=60), root)
    torch.testing.assert_close(matrix_log(S), torch.log(torch.tensor(9.0)).double() * P)
    torch.testing.assert_close(matrix_power(S, -1.0), P / 9)


def test_only_null_directions_are_left_out() -> None:
    """log(1) = 0 does not make a null direction; an infinite divisor makes f(a) / a and what follows from it zero."""
    a = torch.tensor([1e-20, 0.25, 1.0], dtype=F64)
    value, first, _, divisor = Spectral(Logarithm()).spectrum(a, torch.ones(1, dtype=F64), 3)
    log4 = torch.tensor(4.0, dtype=F64).log()
    torch.testing.assert_close(value, torch.stack((0 * log4, -log4, 0 * log4)))
    torch.testing.assert_close(divisor, torch.tensor([torch.inf, 0.25, 1.0], dtype=F64))
    want = [[0, -4 * log4, 0], [-4 * log4, 4, log4 / 0.75], [0, log4 / 0.75, 1]]  # f(a) / a beside the null direction
    torch.testing.assert_close(first, torch.tensor(want, dtype=F64))


@pytest.mark.parametrize("method", ["auto", "newton_schulz"])
@pytest.mark.parametrize("size", [5, 60])  # products and eigenvalues
@pytest.mark.parametrize("num_iter", [1, 3, 5, 10])
def test_newton_schulz_is_the_published_iteration(method: str, size: int, num_iter: int) -> None:
    S = psd(2, size).requires_grad_()
    G = features(2, size, size)
    want, got = newton_schulz_sqrt(S, num_iter), matrix_sqrt(S, method, num_iter)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    gradient = torch.autograd.grad((want * (G + G.mT) / 2).sum(), S)[0]
    torch.testing.assert_close(torch.autograd.grad((got * G).sum(), S)[0], gradient, rtol=1e-9, atol=1e-11)


def test_newton_schulz_of_a_diagonal_matrix() -> None:
    """By hand: S = diag(1, 3), t = 4, one step y (3 - y) / 2 of y = 1/4, 3/4, times sqrt(4)."""
    want = torch.diag(torch.tensor([2 * 0.25 * 2.75 / 2, 2 * 0.75 * 2.25 / 2], dtype=F64))
    torch.testing.assert_close(newton_schulz_sqrt(torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), 1), want)


SIZED = ("auto", "newton_schulz", "eigh", "log")
"""Functions of large matrices: that which changes its way with the size, its two ways, and one that is steep at zero."""


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in FUNCTIONS for shape in ((3, 4, 9), (3, 9, 4), (5, 3), (2, 2, 3, 4))),
        *((name, shape) for name in SIZED for shape in ((2, 60, 90), (2, 90, 60))),
    ],
)
def test_fused_equals_function_of_covariance(name: str, shape: tuple[int, ...]) -> None:
    """Values, gradients and Hessian-vector products."""
    of_matrix, of_features = FUNCTIONS[name]
    x, v = features(*shape).requires_grad_(), features(*shape)
    G = features(*shape[:-1], shape[-2])
    results = []
    for Z in (of_features(x), of_matrix(covariance(x))):
        gradient = torch.autograd.grad((Z * G).sum() + (Z**2).sum(), x, create_graph=True)[0]
        results.append((Z, gradient, torch.autograd.grad((gradient * v).sum(), x)[0]))
    for got, want in zip(*results, strict=True):
        # 1e-7: the pseudo-logarithm and inverse root of a singular matrix of 90 channels amplify rounding
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * float(want.detach().abs().max()))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("triangle", [False, True])
def test_every_strategy_equals_its_definition(name: str, triangle: bool) -> None:
    kernel = KERNELS[name]
    for shape in ((2, 5, 9), (2, 9, 5)):
        for gram in (False, True):
            if gram and isinstance(kernel, Eigen) and isinstance(kernel.function, Spectral) and shape[2] > shape[1]:
                continue  # more positions than channels: never chosen
            _assert_equals_definition(OnFeatures(kernel, gram, triangle), features(*shape))
    if isinstance(kernel, Eigen):
        _assert_equals_definition(OnMatrix(kernel), psd(2, 5))


def _assert_equals_definition(strategy: OnFeatures | OnMatrix, x: Tensor) -> None:
    x.requires_grad_()
    got, want = evaluate(strategy, x), strategy.reference(x)
    G = torch.randn_like(got)
    if not getattr(strategy, "triangle", False):
        G = (G + G.mT) / 2
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad((Z * G).sum(), x)[0] for Z in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("name", FUNCTIONS)
def test_invariances(name: str) -> None:
    function = FUNCTIONS[name][1]
    for shape in ((2, 4, 9), (2, 6, 4)):
        x = features(*shape)
        Q = torch.linalg.qr(features(shape[1], shape[1])).Q
        Z = function(x)
        torch.testing.assert_close(Z, Z.mT)
        torch.testing.assert_close(function(x[..., torch.randperm(shape[2])]), Z, rtol=1e-8, atol=1e-9)  # positions
        torch.testing.assert_close(function(x + features(shape[1], 1)), Z, rtol=1e-8, atol=1e-9)  # shift
        torch.testing.assert_close(function(Q @ x), Q @ Z @ Q.mT, rtol=1e-8, atol=1e-9)  # f(Q S Q^T) = Q f(S) Q^T
    scales = {"power": 0.6, "inverse_root": -1.0, "identity": 2.0, "square": 4.0}
    if name not in ("log", "shifted_log"):
        torch.testing.assert_close(function(3 * x), 3 ** scales.get(name, 1.0) * Z, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------- difficult inputs, types

DIFFICULT = {
    "zero": lambda: torch.zeros(3, 4, 4),
    "one zero matrix": lambda: psd(3, 4, dtype=torch.float32) * torch.tensor([1.0, 0.0, 1.0])[:, None, None],
    "1x1": lambda: torch.tensor([[[0.0]], [[2.0]]]),
    "rank one": lambda: torch.ones(2, 4, 4),
    "repeated": lambda: torch.eye(4).expand(2, 4, 4),
    "huge": lambda: 1e6 * psd(2, 4, dtype=torch.float32),
    "tiny": lambda: 1e-12 * psd(2, 4, dtype=torch.float32),
    "scales": lambda: psd(3, 4, dtype=torch.float32) * torch.tensor([1e-12, 1e6, 0.0])[:, None, None],
    "large": lambda: torch.cov(torch.randn(60, 20)).expand(2, 60, 60),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", DIFFICULT)
@pytest.mark.parametrize("autocast", [False, True])
def test_finite_for_difficult_matrices(name: str, case: str, autocast: bool) -> None:
    """Value and gradient in float32, the root in float32 under autocast, too."""
    S = DIFFICULT[case]().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        Z = FUNCTIONS[name][0](S)
    gradient = torch.autograd.grad(Z.sum(), S)[0]
    assert Z.dtype == torch.float32
    assert Z.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["auto", "newton_schulz", "eigh", "power"])
@pytest.mark.parametrize("scale", [1e-12, 1e6])
@pytest.mark.parametrize("shape", [(2, 6, 20), (2, 20, 6), (2, 60, 90), (2, 90, 60)])
def test_float32_is_as_accurate_at_any_scale(name: str, scale: float, shape: tuple[int, ...]) -> None:
    function = FUNCTIONS[name][1]
    x = features(*shape, dtype=torch.float32).mul(scale).requires_grad_()
    exact = x.detach().double().requires_grad_()
    values, gradients = [], []
    for point in (x, exact):
        Z = function(point)
        values.append(Z.detach().double())
        gradients.append(torch.autograd.grad((Z / Z.detach().norm()).sum(), point)[0].double())
    # 5e-3: for the exact root the smallest eigenvalues' relative error is eps * kappa, the iteration's is 1e-5
    tolerance = 2e-5 if name in ("auto", "newton_schulz") else 5e-3
    for got, want in (values, gradients):
        assert (got - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in FUNCTIONS for shape in ((3, 4, 9), (3, 9, 4), (2, 4, 1))),
        *((name, shape) for name in SIZED for shape in ((2, 60, 70), (2, 70, 60))),
    ],
)
@pytest.mark.parametrize("constant", [7.0, 0.0])
def test_zero_sample_and_single_position_poison_nothing(name: str, shape: tuple[int, ...], constant: float) -> None:
    function = FUNCTIONS[name][1]
    x = features(*shape)
    alone = function(x[:1])
    x[1] = constant  # the covariance is zero
    x.requires_grad_()
    Z = function(x)
    gradient = torch.autograd.grad((Z**2).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(gradient.sum(), x)[0]
    assert Z[1].abs().max() == 0
    assert gradient[1].abs().max() == 0
    torch.testing.assert_close(Z[:1], alone)
    for tensor in (Z, gradient, second):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["auto", "eigh", "power"])
def test_a_covariance_rounded_to_any_type_is_accepted(name: str, dtype: torch.dtype) -> None:
    S = covariance(features(10, 64, 20, dtype=torch.float32)).to(dtype)
    Z = FUNCTIONS[name][0](S)
    assert Z.dtype == dtype
    assert Z.isfinite().all()


@pytest.mark.parametrize("name", ["auto", "newton_schulz", "eigh", "power", "shifted_log"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    """Computed in float32; the input's type comes back, and float32 under autocast."""
    x = features(2, 6, 9, dtype=torch.float32).mul(50).to(dtype)
    want = FUNCTIONS[name][1](x.float())
    torch.testing.assert_close(FUNCTIONS[name][1](x), want.to(dtype))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        Z = FUNCTIONS[name][1](x)
        gradient = torch.autograd.grad(Z.sum(), x)[0]  # the backward pass may run inside autocast, too
        S = covariance(x)
    assert Z.dtype == S.dtype == torch.float32
    torch.testing.assert_close(Z, want)
    plain = x.detach().float().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(FUNCTIONS[name][1](plain).sum(), plain)[0].to(dtype))


# ------------------------------------------------------------------------------------------------------------- bad input

EYE = torch.eye(3)
BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "not square": (lambda: matrix_sqrt(torch.ones(3, 4)), r"square .*\[3, 4\]"),
    "one dimension": (lambda: matrix_sqrt(torch.ones(3)), r"\[3\]"),
    "empty batch": (lambda: matrix_power(torch.ones(0, 3, 3), 0.5), r"\[0, 3, 3\]"),
    "empty matrix": (lambda: matrix_log(torch.ones(2, 0, 0)), r"\[2, 0, 0\]"),
    "integers": (lambda: matrix_sqrt(EYE.long()), "int64"),
    "complex": (lambda: matrix_log(EYE.cfloat()), "complex64"),
    "no tensor": (lambda: matrix_sqrt([[1.0]]), "list"),  # type: ignore[arg-type]
    "not symmetric": (lambda: matrix_sqrt(torch.ones(3, 3).triu()), r"symmetric .* up to 1;"),
    "not finite": (lambda: matrix_log(EYE / 0), "9 non-finite|finite"),
    "nan": (lambda: matrix_sqrt(torch.full((2, 2), torch.nan), "eigh"), "4 non-finite"),
    "negative": (lambda: matrix_power(torch.diag(torch.tensor([1.0, -0.5])), 0.5), "eigenvalue of -0.5"),
    "no steps": (lambda: matrix_sqrt(EYE, num_iter=0), "from 1 to 1000, got 0"),
    "negative steps": (lambda: covariance_sqrt(EYE, num_iter=-1), "got -1"),
    "half a step": (lambda: matrix_sqrt(EYE, num_iter=2.5), "got 2.5"),  # type: ignore[arg-type]
    "method": (lambda: matrix_sqrt(EYE, "newton"), "unknown method 'newton'.*auto, newton_schulz, eigh"),
    "method of features": (lambda: covariance_sqrt(EYE, "svd"), "unknown method 'svd'"),
    "exponent": (lambda: matrix_power(EYE, float("inf")), "got inf"),
    "exponent of features": (lambda: covariance_power(EYE, float("nan")), "got nan"),
    "eps": (lambda: matrix_log(EYE, -1.0), "got -1.0"),
    "features": (lambda: covariance(torch.ones(4)), r"\[4\]"),
    "float8": (lambda: covariance_power(EYE.to(torch.float8_e4m3fn), 2), "float8_e4m3fn"),
    "too many steps": (lambda: matrix_sqrt(EYE, num_iter=10**9), "num_iter must be .* to 1000, got 1000000000"),
    "exponent beyond float": (lambda: matrix_power(EYE, 10**400), "got 1000"),
    "exponent beyond float32": (lambda: covariance_power(EYE, 1e300), "exponent must be .* 1000\\], got"),
    "flag": (lambda: covariance_sqrt(EYE, triangle=torch.zeros(0)), "triangle must be True or False"),  # type: ignore[arg-type]
    "flag of checks": (lambda: matrix_sqrt(EYE, validate="no"), "validate must be True or False, got 'no'"),  # type: ignore[arg-type]
    "printed iteration, no number": (lambda: newton_schulz_sqrt(EYE, ""), "num_iter must be .* got ''"),  # type: ignore[arg-type]
    "printed iteration, many steps": (lambda: newton_schulz_sqrt(EYE, 2**63), "num_iter must be .* to 1000"),
    "printed iteration, oblong": (lambda: newton_schulz_sqrt(torch.ones(2, 2, 3)), r"square .*\[2, 2, 3\]"),
    "printed iteration, complex": (lambda: newton_schulz_sqrt(EYE.cfloat()), "complex64"),
    "oblong triangle": (lambda: upper_triangle(torch.ones(2, 2, 3)), r"square .*\[2, 2, 3\]"),
    "triangle of no tensor": (lambda: upper_triangle([[1.0]]), "list"),  # type: ignore[arg-type]
    "no positions": (lambda: covariance_log(torch.ones(2, 4, 0)), r"\[2, 4, 0\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(InputError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors_have_shapes_alone(name: str) -> None:
    of_matrix, of_features = FUNCTIONS[name]
    assert of_matrix(torch.empty(2, 3, 3, device="meta")).shape == (2, 3, 3)
    assert of_features(torch.empty(2, 3, 5, device="meta")).shape == (2, 3, 3)


def test_checks_of_values_can_be_left_out_and_are_inside_transforms() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -0.5]))
    assert matrix_sqrt(indefinite, validate=False).isfinite().all()
    assert torch.func.vmap(matrix_sqrt)(indefinite[None]).isfinite().all()
