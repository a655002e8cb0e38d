"""Conjugate gradients against SciPy's and a dense solve, and what ends them without a solution."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError
from secondorder.preconditioning import conjugate_gradients


def matrix(eigenvalues: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64)).Q
    return ((Q * eigenvalues) @ Q.mT).to(dtype)


def times(A: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: A @ v


DECAYING = torch.logspace(0, -6, 40, dtype=torch.float64)
CASES = {
    "well conditioned": (DECAYING**0.2, 0.0),
    "damped": (DECAYING, 1e-2),
    "singular, damped": (DECAYING.round(), 0.3),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_dense_solve_and_scipy(case: str) -> None:
    eigenvalues, damping = CASES[case]
    A, b = matrix(eigenvalues), torch.randn(40, dtype=torch.float64)
    found = conjugate_gradients(times(A), b, damping=damping, tolerance=1e-11)
    damped = A + damping * torch.eye(40, dtype=torch.float64)
    dense = torch.linalg.solve(damped, b)
    operator = LinearOperator((40, 40), matvec=lambda v: (damped @ torch.as_tensor(v)).numpy(), dtype=np.float64)
    theirs, failed = cg(operator, b.numpy(), rtol=1e-11, atol=0.0)
    assert failed == 0
    torch.testing.assert_close(found.x, dense, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.x, torch.as_tensor(theirs), rtol=1e-7, atol=1e-8)
    assert found.converged
    assert found.status.startswith("converged")
    assert "\n" not in found.status


def test_takes_as_many_steps_as_scipy() -> None:
    A, b, steps = matrix(DECAYING**0.5), torch.randn(40, dtype=torch.float64), []
    cg(A.numpy(), b.numpy(), rtol=1e-6, atol=0.0, callback=lambda x: steps.append(x))
    found = conjugate_gradients(times(A), b, tolerance=1e-6)
    # more steps than rows: rounding has cost the directions their conjugacy, so a machine moves both numbers by some
    assert abs(found.iterations - len(steps)) <= 0.1 * len(steps)
    assert found.residual <= 1e-6


def test_as_many_steps_as_distinct_eigenvalues() -> None:
    A = matrix(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).repeat(10))
    found = conjugate_gradients(times(A), torch.randn(30, dtype=torch.float64), tolerance=1e-10)
    assert found.converged
    assert found.iterations == 3


def test_residual_is_that_of_x_of_any_shape() -> None:
    A, B = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    A = A @ A.mT
    found = conjugate_gradients(times(A), B, damping=0.1, iterations=3)
    assert found.x.shape == B.shape
    residual = float((B - A @ found.x - 0.1 * found.x).norm() / B.norm())
    assert found.residual == pytest.approx(residual, rel=1e-8)
    assert not found.converged
    assert "tolerance 1e-06 not reached" in found.status
    assert found.iterations == 3


def test_best_iterate_not_the_last() -> None:
    A, b = matrix(torch.logspace(0, -3, 40, dtype=torch.float64)), torch.randn(40, dtype=torch.float64)
    ours = [
        conjugate_gradients(times(A), b, tolerance=1e-15, iterations=n).residual for n in range(1, 19)
    ]  # later ones differ by rounding
    last: list[Tensor] = []
    cg(A.numpy(), b.numpy(), rtol=0.0, atol=0.0, maxiter=18, callback=lambda x: last.append(torch.as_tensor(x.copy())))
    theirs = [float((b - A @ x).norm() / b.norm()) for x in last]
    assert max(np.diff(theirs)) > 0.01  # the plain iteration goes up and down
    np.testing.assert_allclose(ours, np.minimum.accumulate([1.0, *theirs])[1:], rtol=1e-3)


def test_start() -> None:
    A, b = matrix(DECAYING**0.5), torch.randn(40, dtype=torch.float64)
    x = torch.linalg.solve(A, b)
    solved = conjugate_gradients(times(A), b, start=x)
    assert solved.iterations == 0
    assert solved.converged
    near = conjugate_gradients(times(A), b, start=x * (1 + 1e-4))
    far = conjugate_gradients(times(A), b)
    assert near.converged
    assert near.iterations < far.iterations
    torch.testing.assert_close(near.x, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_of_b_does_not_matter_in_float32(size: float) -> None:
    A, b = matrix(DECAYING**0.3, torch.float32), torch.randn(40)
    plain, scaled = (conjugate_gradients(times(A), c, tolerance=1e-4) for c in (b, b * size))
    assert scaled.converged
    torch.testing.assert_close(scaled.x / size, plain.x, rtol=1e-3, atol=1e-3)


def test_rounding_is_not_taken_for_convergence() -> None:
    A, b = matrix(DECAYING, torch.float32), torch.randn(40)
    found = conjugate_gradients(times(A), b, damping=1e-3, tolerance=1e-7, iterations=2000)
    true = float((b.double() - A.double() @ found.x.double() - 1e-3 * found.x.double()).norm() / b.double().norm())
    assert found.residual == pytest.approx(true, rel=0.5)
    assert not found.converged
    assert "rounding" in found.status


def test_zero() -> None:
    found = conjugate_gradients(times(matrix(DECAYING)), torch.zeros(40, dtype=torch.float64), start=torch.ones(40))
    assert found.converged
    assert not found.x.any()
    assert found.residual == 0


@pytest.mark.parametrize(
    ("eigenvalues", "damping"),
    [([1.0, 2.0, -3.0], 0.0), ([1.0, 0.0, 0.0], 0.0), ([0.0, 0.0, 0.0], 0.0), ([-1.0, 1.0, 1.0], 0.5)],
)
def test_non_positive_curvature_stops(eigenvalues: list[float], damping: float) -> None:
    A, b = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    found = conjugate_gradients(times(A), b, damping=damping)
    assert not found.converged
    assert "not positive" in found.status
    assert torch.isfinite(found.x).all()
    assert found.residual <= 1


def test_singular_with_b_in_its_range() -> None:
    A = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64))
    found = conjugate_gradients(times(A), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found.x, torch.tensor([1.0, 1 / 3, 0.0], dtype=torch.float64))
    assert found.converged


def test_keeps_no_graph() -> None:
    A = matrix(DECAYING**0.2).requires_grad_()
    assert not conjugate_gradients(times(A), torch.ones(40, dtype=torch.float64, requires_grad=True)).x.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping must be .*, got -1.0"),
        ({"damping": float("nan")}, "damping must be .*, got nan"),
        ({"tolerance": 0.0}, "tolerance must be .* got 0.0"),
        ({"tolerance": 1.0}, "tolerance must be .* got 1.0"),
        ({"iterations": 0}, "iterations must be .*, got 0"),
        ({"iterations": 2.5}, "iterations must be .*, got 2.5"),
        ({"start": torch.ones(3)}, r"start has the shape \[3\]"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        conjugate_gradients(times(torch.eye(2)), torch.ones(2), **options)


def test_bad_tensors() -> None:
    with pytest.raises(InputError, match="floating point"):
        conjugate_gradients(times(torch.eye(2)), torch.ones(2, dtype=torch.int64))
    with pytest.raises(InputError, match="the product has the shape"):
        conjugate_gradients(lambda v: v[:1], torch.ones(2))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="b has 1 numbers"):
            conjugate_gradients(times(torch.eye(2)), torch.tensor([1.0, bad]))
        with pytest.raises(NonFiniteError, match="the product has 2 numbers"):
            conjugate_gradients(lambda v, bad=bad: v * bad, torch.ones(2))
        with pytest.raises(NonFiniteError, match="start"):
            conjugate_gradients(times(torch.eye(2)), torch.ones(2), start=torch.tensor([0.0, bad]))
