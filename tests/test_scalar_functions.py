"""Divided differences against closed forms, against extended precision, and at coinciding arguments."""

import itertools

import numpy as np
import pytest
import torch

from secondorder.matrix_power.newton_schulz import polynomial
from secondorder.matrix_power.scalar_functions import Logarithm, Power, ScalarFunction, SquareRoot

# f, f' and f'' in numpy, for extended precision
FUNCTIONS = {
    "sqrt": (SquareRoot(), np.sqrt, lambda a: 0.5 * a**-0.5, lambda a: -0.25 * a**-1.5),
    "power 0.5": (Power(0.5), np.sqrt, lambda a: 0.5 * a**-0.5, lambda a: -0.25 * a**-1.5),
    "power 0.3": (Power(0.3), lambda a: a**0.3, lambda a: 0.3 * a**-0.7, lambda a: -0.21 * a**-1.7),
    "power -0.5": (Power(-0.5), lambda a: a**-0.5, lambda a: -0.5 * a**-1.5, lambda a: 0.75 * a**-2.5),
    "power 3": (Power(3.0), lambda a: a**3, lambda a: 3 * a**2, lambda a: 6 * a),
    "power 0": (Power(0.0), np.ones_like, np.zeros_like, np.zeros_like),
    "log": (Logarithm(), np.log, lambda a: 1 / a, lambda a: -1 / a**2),
    "log 0.1": (Logarithm(0.1), lambda a: np.log1p(a / 0.1), lambda a: 1 / (a + 0.1), lambda a: -1 / (a + 0.1) ** 2),
}
POINTS = [1e-6, 0.02, 0.3, 0.7, 2.0, 900.0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_differences_of_separated_arguments(name: str) -> None:
    """The defining recursion, in 80-bit arithmetic."""
    function, f, _, _ = FUNCTIONS[name]
    for points in itertools.permutations(POINTS, 3):
        a, b, c = np.longdouble(points)
        ab, bc = (f(a) - f(b)) / (a - b), (f(b) - f(c)) / (b - c)
        tensors = [torch.tensor(point, dtype=torch.float64) for point in points]
        assert float(function.value(tensors[0])) == pytest.approx(float(f(a)), rel=1e-13)
        assert float(function.first(*tensors[:2])) == pytest.approx(float(ab), rel=1e-12, abs=1e-300)
        assert float(function.second(*tensors)) == pytest.approx(float((ab - bc) / (a - c)), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9, 1e-6, 1e-4, 3e-4, 1e-3])
def test_differences_of_near_and_equal_arguments(name: str, gap: float) -> None:
    """f[a, b] = f'(mean) + O(gap^2) and f[a, b, c] = f''(mean) / 2 + O(gap^2)."""
    function, _, slope, curvature = FUNCTIONS[name]
    a, b, c = (torch.tensor(0.7 * (1 + step * gap), dtype=torch.float64) for step in (0, 1, -2))
    assert float(function.first(a, b)) == pytest.approx(float(slope((a + b).numpy() / 2)), rel=1e-13 + 2 * gap**2)
    # 1e-11: eps / gap where the recursion takes over from Taylor's series, at a gap of eps^(1/4) = 1.2e-4
    want = float(curvature((a + b + c).numpy() / 3)) / 2
    assert float(function.second(a, b, c)) == pytest.approx(want, rel=2e-11 + 10 * gap**2)


def test_second_differences_are_symmetric() -> None:
    arguments = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.30001, 5.0)]
    for function in (Power(0.3), Logarithm(), SquareRoot()):
        values = [float(function.second(*order)) for order in itertools.permutations(arguments)]
        assert max(values) - min(values) < 1e-14 * abs(values[0])


@pytest.mark.parametrize("function", [Power(0.3), Power(-0.5), Logarithm()])
def test_float32_loses_no_more_than_stated(function: ScalarFunction) -> None:
    """Relative error of second differences at most about eps^(3/4) = 6e-6, over gaps from 1e-7 to 1."""
    gap = torch.logspace(-7, 0, 50)
    a, b, c = torch.ones(50), 1 + gap / 3, 1 + gap
    exact = function.second(a.double(), b.double(), c.double())
    assert ((function.second(a, b, c) - exact) / exact).abs().max() < 3e-5


@pytest.mark.parametrize("num_iter", [1, 2, 5, 12])
def test_newton_schulz_polynomial(num_iter: int) -> None:
    """Value by the published coupled iteration on numbers, divided differences by the chain rule and by definition."""
    a = torch.tensor([1e-9, 1e-3, 0.2, 0.2, 0.5996], dtype=torch.float64)

    def coupled(a: torch.Tensor) -> torch.Tensor:
        y, z = a, torch.ones_like(a)
        for _ in range(num_iter):
            y, z = y * (3 - z * y) / 2, z * (3 - z * y) / 2
        return y

    value, difference = polynomial(a, num_iter)
    torch.testing.assert_close(value, coupled(a), rtol=1e-14, atol=0)
    slope = torch.func.vmap(torch.func.grad(coupled))(a)
    gaps = a[:, None] - a[None, :]
    want = torch.where(gaps == 0, slope[:, None], (coupled(a)[:, None] - coupled(a)[None, :]) / gaps)
    torch.testing.assert_close(difference, want, rtol=1e-12, atol=1e-14)
