"""Eigenvalues of symmetric matrices for which LAPACK fails, as is pretended here: where it does depends on the machine."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secondorder.curvature.operators import DenseOperator
from secondorder.matrix_power.decomposition import symmetric_eigen, symmetric_eigenvalues
from secondorder.pooling import pooling_head

EIGH, EIGVALSH = torch.linalg.eigh, torch.linalg.eigvalsh


def marked(S: Tensor, marks: Tensor) -> bool:
    """Whether one of the matrices has a trace that one of `marks` has."""
    return bool(torch.isclose(S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None].double(), marks.double()).any())


def raises(S: Tensor) -> tuple[Tensor, Tensor]:
    raise torch.linalg.LinAlgError("The algorithm failed to converge")


def gives_nan(S: Tensor) -> tuple[Tensor, Tensor]:
    lam, U = EIGH(S)
    return lam * torch.nan, U * torch.nan


def covariances(count: int = 4, size: int = 6) -> Tensor:
    x = torch.randn(count, size, 3)
    return x @ x.mT


@pytest.fixture(params=[raises, gives_nan])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes LAPACK fail for matrices of some traces, in float32 or in all formats, also within a batch."""

    def fail(marks: Tensor, formats: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
        def eigh(S: Tensor) -> tuple[Tensor, Tensor]:
            return request.param(S) if S.dtype in formats and marked(S, marks) else EIGH(S)

        def eigvalsh(S: Tensor) -> Tensor:
            return raises(S)[0] if S.dtype in formats and marked(S, marks) else EIGVALSH(S)

        monkeypatch.setattr(torch.linalg, "eigh", eigh)
        monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)

    return fail


def test_those_that_fail_are_decomposed_otherwise_and_no_others(failing: Callable[..., None]) -> None:
    S = covariances()
    lam, U = EIGH(S)
    failing(torch.trace(S[2]))
    again, V = symmetric_eigen(S)
    assert torch.equal(again[[0, 1, 3]], lam[[0, 1, 3]])
    assert torch.equal(V[[0, 1, 3]], U[[0, 1, 3]])
    assert torch.allclose((V[2] * again[2]) @ V[2].mT, S[2], atol=1e-5)
    assert again.dtype == V.dtype == torch.float32
    assert torch.allclose(symmetric_eigenvalues(S), lam, atol=1e-5)


def test_float64_that_fails_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    S = covariances(2).double()
    calls: list[Tensor] = []

    def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(A)
        return EIGH(A) if A.ndim == 2 and not torch.equal(A, S[1]) else raises(A)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    lam, U = symmetric_eigen(S)
    assert len(calls) == 5  # both, each, the second once more as it is in float64 already, and turned
    assert torch.allclose((U * lam[:, None]) @ U.mT, S, atol=1e-12)


def test_what_is_not_finite_fails_still() -> None:
    S = torch.full((3, 3), torch.nan)
    try:
        lam, _ = symmetric_eigen(S)
    except torch.linalg.LinAlgError:
        return
    assert bool(lam.isnan().any())  # LAPACK of some kinds


@pytest.mark.parametrize("method", ["gcp", "gcp_exact", "gcp_power", "gcp_log"])
def test_heads_do_not_fail(method: str, failing: Callable[..., None]) -> None:
    channels, side = (64, 9) if method == "gcp" else (6, 2)  # of fewer by products
    head = pooling_head(method, channels)
    x = torch.rand(4, channels, side, side, requires_grad=True)
    y = head(x)
    (g,) = torch.autograd.grad(y.square().sum(), x)
    kept: list[Tensor] = []

    def seen(S: Tensor) -> tuple[Tensor, Tensor]:
        kept.append(S.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1))
        return EIGH(S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", seen)
        head(x)
    failing(torch.cat(kept)[1])
    again = head(x)
    (h,) = torch.autograd.grad(again.square().sum(), x)
    assert torch.allclose(again, y, rtol=1e-4, atol=1e-5)
    assert torch.allclose(h, g, rtol=1e-3, atol=1e-4)


def test_operators_do_not_fail(failing: Callable[..., None]) -> None:
    S = covariances(1)[0]
    truth = EIGVALSH(S)
    failing(torch.trace(S))
    assert torch.allclose(DenseOperator(S).eigenvalues(), truth, atol=1e-5)
