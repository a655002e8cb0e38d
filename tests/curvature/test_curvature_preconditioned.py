"""Preconditioned curvature against dense P^(1/2) F P^(1/2) in float64, and where K-FAC is exact."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from small_networks import relative, true_ggn
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.curvature.operators import (
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    PreconditionedOperator,
    SymmetricOperator,
    damped_inverse_root,
    in_eigenbasis,
    preconditioned,
)
from secondorder.errors import InputError, NonFiniteError
from secondorder.kfac.inverses.eigenbasis import eigenbases
from secondorder.kfac.inverses.inverse import Factors

DAMPINGS = (1e-4, 0.01, 3.0)


def psd(size: int, rank: int | None = None) -> Tensor:
    rows = torch.randn(rank or size, size, dtype=torch.float64)
    return rows.mT @ rows


def kfac_block(rank: int | None = None) -> KroneckerOperator:
    return KroneckerOperator(psd(3), psd(4, rank))


def true_root(block: KroneckerOperator, damping: float, relative_damping: bool = True) -> Tensor:
    """(F + lambda I)^(-1/2) of the dense block by its own eigen-decomposition."""
    matrix = block.dense()
    added = damping * float(matrix.square().sum() / matrix.trace()) if relative_damping else damping
    values, vectors = torch.linalg.eigh(matrix + added * torch.eye(len(matrix), dtype=torch.float64))
    return vectors @ torch.diag(values**-0.5) @ vectors.mT


def factored() -> tuple[SymmetricOperator, Tensor]:
    rows = torch.randn(5, 12, dtype=torch.float64)
    return FactoredOperator(rows), rows.mT @ rows


def many_rows() -> tuple[SymmetricOperator, Tensor]:
    rows = torch.randn(20, 12, dtype=torch.float64)
    return FactoredOperator(rows), rows.mT @ rows


def indefinite() -> tuple[SymmetricOperator, Tensor]:
    matrix = psd(12) - 5 * torch.eye(12, dtype=torch.float64)
    return DenseOperator(matrix), matrix


def by_products() -> tuple[SymmetricOperator, Tensor]:
    block = kfac_block()
    return block, block.dense()


CASES: dict[Callable[[], tuple[SymmetricOperator, Tensor]], type[SymmetricOperator]] = {
    factored: FactoredOperator,
    many_rows: FactoredOperator,
    indefinite: DenseOperator,
    by_products: PreconditionedOperator,
}
"""A curvature matrix -> the form in which it is preconditioned."""


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_product(case: Callable[[], tuple[SymmetricOperator, Tensor]], damping: float) -> None:
    operator, matrix = case()
    block = kfac_block()
    root = true_root(block, damping)
    truth = root @ matrix @ root
    found = preconditioned(operator, damped_inverse_root(block, damping))
    by_class = PreconditionedOperator(operator, damped_inverse_root(block, damping))
    assert type(found) is CASES[case]
    V = torch.randn(12, 3, dtype=torch.float64)
    for one in (found, by_class):
        assert relative(one @ V, truth @ V) < 1e-11
        assert relative(one.dense(), truth) < 1e-11
        assert relative(one.trace(), truth.trace()) < 1e-11
        assert relative(one.eigenvalues(), torch.linalg.eigvalsh(truth)) < 1e-11


def test_the_spectrum_is_that_of_the_preconditioner_times_the_matrix() -> None:
    operator, matrix = indefinite()
    block = kfac_block()
    root = damped_inverse_root(block, 0.01)
    product = torch.linalg.eigvals(true_root(block, 0.01) @ true_root(block, 0.01) @ matrix)
    assert float(product.imag.abs().max()) < 1e-10
    assert relative(preconditioned(operator, root).eigenvalues(), product.real.sort().values) < 1e-9
    assert relative(preconditioned(operator, root).eigenvalues(), torch.linalg.eigvalsh(matrix)) > 0.01


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("is_relative", [True, False])
def test_root_is_that_of_the_optimiser(rank: int | None, damping: float, is_relative: bool) -> None:
    block = kfac_block(rank)
    root = damped_inverse_root(block, damping, is_relative)
    assert relative(root.dense(), true_root(block, damping, is_relative)) < 1e-10
    factors = Factors("layer", block.input.dense()[None], None, block.gradient.dense()[None])
    inverse = eigenbases([factors], {})[0]  # type: ignore[arg-type]
    assert inverse is not None
    W = torch.randn(1, 3, 4, dtype=torch.float64)
    assert relative(root @ (root @ W.flatten()), inverse.solve(W, damping, is_relative).flatten()) < 1e-10


def test_an_input_given_by_few_rows_has_a_complete_root() -> None:
    rows = torch.randn(2, 5, dtype=torch.float64)
    block = KroneckerOperator(DenseOperator(psd(3)), FactoredOperator(rows))
    root = damped_inverse_root(block, 0.01)
    assert root.scales.shape == (3, 5)
    assert relative(root.dense(), true_root(block, 0.01)) < 1e-10


def test_tiny_factors_keep_their_relative_root_and_a_zero_block_is_damped_absolutely() -> None:
    block = kfac_block()
    tiny = KroneckerOperator((1e-30 * block.gradient.dense()).float(), (1e14 * block.input.dense()).float())
    found = damped_inverse_root(tiny, 0.01).dense().double() * 1e-8
    assert relative(found, true_root(block, 0.01)) < 1e-3  # float32
    zero = KroneckerOperator(torch.zeros(3, 3).double(), psd(4))
    assert relative(damped_inverse_root(zero, 0.01).dense(), 10 * torch.eye(12, dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize("rows", [5, 20])
def test_the_eigenbasis_changes_coordinates_and_not_the_spectrum(rows: int) -> None:
    operator = FactoredOperator(torch.randn(rows, 12, dtype=torch.float64))
    block = kfac_block()
    roots = {damping: damped_inverse_root(block, damping) for damping in DAMPINGS}
    turned = in_eigenbasis(operator, roots[0.01])
    Q = torch.kron(roots[0.01].gradient_basis, roots[0.01].input_basis)
    assert relative(turned.dense(), Q.mT @ operator.dense() @ Q) < 1e-13
    for root in roots.values():
        diagonal = preconditioned(turned, DiagonalOperator(root.scales.flatten()))
        assert relative(diagonal.eigenvalues(), preconditioned(operator, root).eigenvalues()) < 1e-12


def one_layer() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Its Gauss-Newton matrix of the squared error is I kron A."""
    return nn.Linear(6, 3, bias=False).double(), (torch.randn(4, 6).double(), torch.randn(4, 3).double())


def deep_linear() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise((5, 4, 3, 2))]
    return nn.Sequential(*layers).double(), (torch.randn(9, 5).double(), torch.randn(9, 2).double())


@pytest.mark.parametrize("case", [one_layer, deep_linear])
def test_exact_kfac_turns_eigenvalues_f_into_f_over_f_plus_lambda(
    case: Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]],
) -> None:
    model, batch = case()
    dense, place = true_ggn(model, nn.MSELoss(), batch), 0
    ggn = curvature_blocks(model, nn.MSELoss(), batch, "ggn")
    kfac = curvature_blocks(model, nn.MSELoss(), batch, "kfac_expand", fisher="exact")
    for name, weight in model.named_parameters():
        part = slice(place, place + weight.numel())
        place = part.stop
        f = torch.linalg.eigvalsh(dense[part, part])
        on_range = f > 1e-12 * f.max()
        for damping in (1.0, 1e-3, 1e-7):
            lam = damping * f.square().sum() / f.sum()
            found = preconditioned(ggn[name].factored(), damped_inverse_root(kfac[name], damping)).eigenvalues()  # type: ignore[attr-defined]
            assert relative(found, (f / (f + lam)).clamp_min(0).sort().values) < 1e-7
        assert bool(on_range.any())
        identity = found[-int(on_range.sum()) :]
        assert float((identity - 1).abs().max()) < 1e-3
        assert float(found[: -int(on_range.sum())].abs().sum()) < 1e-6


def test_relu_network_of_cross_entropy() -> None:
    """Where K-FAC is not exact: the rows of the network, preconditioned, against the dense matrices."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = torch.randn(5, 1, 4, 4).double(), torch.randint(3, (5,))
    ggn = curvature_blocks(model, F.cross_entropy, batch, "ggn", ["0.weight"])["0.weight"]
    kfac = curvature_blocks(model, F.cross_entropy, batch, "kfac_expand", ["0.weight"])["0.weight"]
    assert isinstance(kfac, KroneckerOperator)
    root = true_root(kfac, 0.01)
    truth = root @ true_ggn(model, F.cross_entropy, batch)[:27, :27] @ root  # type: ignore[arg-type]
    given = damped_inverse_root(kfac, 0.01)
    for form in (ggn, ggn.factored(), DenseOperator(ggn.dense())):  # type: ignore[attr-defined]
        assert relative(preconditioned(form, given).dense(), truth) < 1e-9


@pytest.mark.parametrize("operator", [psd(11), torch.randn(4, 11, dtype=torch.float64)])
@pytest.mark.parametrize("make", [preconditioned, PreconditionedOperator, in_eigenbasis])
def test_wrong_sizes_are_refused(make: Callable[..., object], operator: Tensor) -> None:
    with pytest.raises(InputError, match="same size, got 11 and 12"):
        make(FactoredOperator(operator), damped_inverse_root(kfac_block(), 0.01))


def test_bad_input_is_refused() -> None:
    block = kfac_block()
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"damping {damping}"):
            damped_inverse_root(block, damping)
    with pytest.raises(InputError, match="DenseOperator is no B kron A"):
        damped_inverse_root(DenseOperator(psd(3)), 0.01)
    with pytest.raises(NonFiniteError, match="factor"):
        damped_inverse_root(KroneckerOperator(torch.full((2, 2), torch.nan), torch.eye(2)), 0.01)
    with pytest.raises(InputError, match="same dtype"):
        preconditioned(DenseOperator(torch.eye(12)), damped_inverse_root(block, 0.01))
    half = EigenbasisOperator(torch.eye(3).double(), torch.eye(4, 2).double(), torch.ones(3, 2).double())
    with pytest.raises(InputError, match="6 of 12 vectors"):
        in_eigenbasis(FactoredOperator(torch.ones(1, 12).double()), half)
