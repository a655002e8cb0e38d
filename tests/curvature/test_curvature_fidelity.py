"""Fidelity of approximate blocks and differences of operators: definitions, structures, probes, networks, bad input."""

import math
from collections.abc import Callable

import pytest
import torch
from known_spectra import F64, MatrixFree, rotated, uniform, values
from small_networks import batch, chain, straight, true_ggn, true_hessian
from torch import Tensor, nn

from secondorder.curvature.blocks import curvature_blocks
from secondorder.curvature.kronecker.fidelity import Fidelity, fidelity, fidelity_table
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.operators.difference import DifferenceOperator
from secondorder.curvature.spectrum import relative_difference, spectral_summary
from secondorder.curvature.spectrum.exact import inner_product
from secondorder.errors import InputError, NonFiniteError

P = 60  # 5 x 12


def psd(size: int) -> Tensor:
    X = torch.randn(size, size, dtype=F64)
    return X @ X.mT / size


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64)).Q


STRUCTURES: dict[str, Callable[[], SymmetricOperator]] = {
    "dense": lambda: DenseOperator(psd(P)),
    "factored": lambda: FactoredOperator(torch.randn(70, P, dtype=F64)),
    "thin factored": lambda: FactoredOperator(torch.randn(4, P, dtype=F64)),
    "diagonal": lambda: DiagonalOperator(torch.rand(P, dtype=F64)),
    "kronecker": lambda: KroneckerOperator(psd(5), psd(12)),
    "factored kronecker": lambda: KroneckerOperator(
        DenseOperator(psd(5)), FactoredOperator(torch.randn(3, 12, dtype=F64))
    ),
    "other kronecker": lambda: KroneckerOperator(psd(6), psd(10)),
    "eigenbasis": lambda: EigenbasisOperator(orthonormal(5, 5), orthonormal(12, 12), torch.rand(5, 12, dtype=F64)),
    "thin eigenbasis": lambda: EigenbasisOperator(orthonormal(5, 5), orthonormal(12, 3), torch.rand(5, 3, dtype=F64)),
    "groups": lambda: BlockDiagonalOperator([KroneckerOperator(psd(5), psd(4)) for _ in range(3)]),
    "blocks": lambda: BlockDiagonalOperator([DenseOperator(psd(20)), FactoredOperator(torch.randn(2, 40, dtype=F64))]),
}


def by_definition(A: Tensor, B: Tensor) -> dict[str, float]:
    scale = float((A * B).sum() / A.square().sum())
    return {
        "cosine": float((A * B).sum() / (A.norm() * B.norm())),
        "relative_error": float((A - B).norm() / B.norm()),
        "best_scale": scale,
        "scaled_error": float((scale * A - B).norm() / B.norm()),
    }


def check_exact(found: Fidelity, A: Tensor, B: Tensor, rel: float = 1e-10) -> None:
    for name, want in by_definition(A, B).items():
        value, error = getattr(found, name)
        assert error == 0
        assert value == pytest.approx(want, rel=rel), name


# ------------------------------------------------------------------------------------------------------ inner products


@pytest.mark.parametrize("second", STRUCTURES)
@pytest.mark.parametrize("first", STRUCTURES)
def test_inner_products(first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = STRUCTURES[first](), STRUCTURES[second]()
    a, b = A.dense().clone(), B.dense().clone()
    assert inner_product(A, B) == pytest.approx(float((a * b).sum()), rel=1e-12)
    check_exact(fidelity(A, B), a, b)
    monkeypatch.setattr("secondorder.curvature.spectrum.frobenius_products.EXACT_SIZE", 1)
    structured = fidelity(A, B, probes=1)
    assert structured.method == "structured"
    check_exact(structured, a, b)


def test_an_operator_with_itself() -> None:
    for make in STRUCTURES.values():
        A = make()
        found = fidelity(A, A)
        assert found.cosine.value == pytest.approx(1, abs=1e-14)
        assert found.relative_error.value == 0
        assert found.scaled_error.value < 1e-14
        assert inner_product(A, A) == pytest.approx(float(A.frobenius_norm()) ** 2, rel=1e-12)
    assert inner_product(MatrixFree(psd(4)), DenseOperator(psd(4))) is None


def test_a_thin_factor_takes_as_many_products_as_rows() -> None:
    class Counted(KroneckerOperator):
        products = 0

        def _matmat(self, V: Tensor) -> Tensor:
            self.products += V.shape[1]
            return super()._matmat(V)

    for first in (True, False):
        factored, other = FactoredOperator(torch.randn(4, P, dtype=F64)), Counted(psd(5), psd(12))
        value = inner_product(factored, other) if first else inner_product(other, factored)
        assert value == pytest.approx(
            float((factored.dense() * torch.kron(other.gradient.dense(), other.input.dense())).sum())
        )
        assert other.products == 4


def test_scale() -> None:
    B = DenseOperator(psd(9))
    for factor in (1e-30, 0.5, 3.0, 1e30):
        found = fidelity(DenseOperator(factor * B.matrix), B)
        assert found.cosine.value == pytest.approx(1, abs=1e-14)
        assert found.best_scale.value == pytest.approx(1 / factor, rel=1e-12)
        assert found.relative_error.value == pytest.approx(abs(factor - 1), rel=1e-12)
        assert found.scaled_error.value < 1e-14
    small = (DenseOperator(1e-30 * psd(9)), DenseOperator(1e-30 * psd(9)))
    check_exact(fidelity(*small), small[0].matrix, small[1].matrix)


def test_zero_blocks() -> None:
    zero, one = DenseOperator(torch.zeros(6, 6, dtype=F64)), DenseOperator(torch.eye(6, dtype=F64))
    for method in ("auto", "stochastic"):
        nothing = fidelity(zero, one, method)
        assert [nothing.cosine.value, nothing.relative_error.value, nothing.best_scale.value] == [0, 1, 0]
        assert fidelity(one, zero, method).relative_error.value == math.inf
        assert fidelity(zero, zero, method).relative_error.value == 0
    large = MatrixFree(torch.zeros(300, 300, dtype=F64))
    found = fidelity(large, MatrixFree(torch.eye(300, dtype=F64)), "stochastic", probes=5)
    assert (found.cosine.value, found.relative_error.value) == (0, 1)
    assert found.relative_error.error == pytest.approx(0, abs=1e-12)


# --------------------------------------------------------------------------------------------------------------- probes


def pair(size: int = 300) -> tuple[MatrixFree, MatrixFree]:
    """A matrix with outliers and one near it."""
    B = rotated(values([30.0, 10.0, 5.0], uniform(size - 3, 0, 1)))
    E = rotated(uniform(size, -0.5, 0.5), seed=1)
    return MatrixFree(0.8 * B + E), MatrixFree(B)


def test_probes_within_their_errors() -> None:
    A, B = pair()
    want = by_definition(A.matrix, B.matrix)
    scores: dict[str, list[float]] = {name: [] for name in want}
    for seed in range(40):
        found = fidelity(A, B, "stochastic", probes=10, seed=seed)
        assert found.method == "stochastic"
        for name, goal in want.items():
            value, error = getattr(found, name)
            assert error < 0.05
            scores[name].append((value - goal) / error)
    for name, z in scores.items():
        assert max(map(abs, z)) < 5, name
        assert abs(float(torch.tensor(z).mean())) < 0.8, name
        assert 0.6 < float(torch.tensor(z).std()) < 1.7, name
    assert A.products == 40 * 40  # 10 for the sketch, 20 of the sketch, 10 for the test


def test_a_small_difference_is_not_lost_in_rounding() -> None:
    A, B = pair()
    near = MatrixFree(B.matrix + 1e-11 * A.matrix)
    want = 1e-11 * float(A.matrix.norm() / B.matrix.norm())
    assert relative_difference(near, B).value == pytest.approx(want, rel=1e-3)
    found = relative_difference(near, B, "stochastic", probes=10)
    assert abs(found.value - want) < 4 * found.error + 1e-3 * want
    assert found.error < 0.1 * want


def test_the_scale_of_the_other_operator_does_not_matter_to_the_sketch() -> None:
    A, B = pair()
    small = MatrixFree(1e-20 * A.matrix)
    one, other = (fidelity(X, B, "stochastic", probes=10) for X in (A, small))
    assert other.cosine.value == pytest.approx(one.cosine.value, rel=1e-9)
    assert other.best_scale.value == pytest.approx(1e20 * one.best_scale.value, rel=1e-9)


def test_auto_uses_probes_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = pair()
    assert fidelity(A, B).method == "dense"
    monkeypatch.setattr("secondorder.curvature.spectrum.frobenius_products.EXACT_SIZE", 100)
    assert fidelity(A, B).method == "stochastic"
    assert fidelity(DenseOperator(A.matrix), DiagonalOperator(B.matrix.diagonal())).method == "structured"
    with pytest.raises(
        InputError, match=r"no exact inner product of MatrixFree and MatrixFree with 300 rows \(dense up to 100"
    ):
        fidelity(A, B, "exact")


def test_seeded_and_without_the_global_generator() -> None:
    A, B = pair()
    before = torch.get_rng_state()
    first, again, other = (fidelity(A, B, "stochastic", probes=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert first.cosine != other.cosine


def test_float32() -> None:
    A, B = pair()
    want = by_definition(A.matrix, B.matrix)
    for method, rel in (("exact", 1e-5), ("stochastic", 0.05)):
        found = fidelity(MatrixFree(A.matrix.float()), MatrixFree(B.matrix.float()), method)
        assert found.cosine.value == pytest.approx(want["cosine"], rel=rel)
        assert found.relative_error.value == pytest.approx(want["relative_error"], rel=rel)


# -------------------------------------------------------------------------------------------------------------- networks


def test_kfac_is_exact_for_a_deep_linear_network() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    data = torch.randn(7, 5, dtype=F64), torch.randn(7, 3, dtype=F64)
    exact = curvature_blocks(network, nn.MSELoss(), data, "ggn")
    for quantity in ("kfac_expand", "kfac_reduce", "ekfac"):
        table = fidelity_table(curvature_blocks(network, nn.MSELoss(), data, quantity), exact)
        assert list(table.index) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert float((table["cosine"] - 1).abs().max()) < 1e-13
        assert float(table["relative_error"].max()) < 1e-12


@pytest.mark.parametrize("head", ["gap", "gcp"])
def test_blocks_of_a_network(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = nn.CrossEntropyLoss()
    network, data = chain(head, nn.Tanh), batch(loss)
    matrix = true_ggn(network, loss, data)
    exact = curvature_blocks(network, loss, data, "ggn")
    starts = torch.tensor([0, *[p.numel() for p in network.parameters()]]).cumsum(0).tolist()
    for quantity in ("kfac_expand", "ekfac", "diagonal"):
        approximate = curvature_blocks(network, loss, data, quantity)
        table = fidelity_table(approximate, exact)
        for name, start, end in zip(exact, starts, starts[1:], strict=False):
            want = by_definition(approximate[name].dense(), matrix[start:end, start:end])
            for column, value in want.items():
                assert table.loc[name, column] == pytest.approx(value, rel=1e-9), (quantity, name, column)
                assert table.loc[name, f"{column}_error"] == 0
            assert table.loc[name, "size"] == end - start
    # EKFAC's scales are the best in the basis of K-FAC; the exact diagonal is the best diagonal
    kfac, ekfac = (curvature_blocks(network, loss, data, quantity) for quantity in ("kfac_expand", "ekfac"))
    gain = fidelity_table(ekfac, exact)["relative_error"] - fidelity_table(kfac, exact)["relative_error"]
    assert float(gain.max()) < 1e-12
    # the same from the factor of the Gauss-Newton matrix, and for all parameters at once
    dense = fidelity(kfac["0.weight"], exact["0.weight"])
    monkeypatch.setattr("secondorder.curvature.spectrum.frobenius_products.EXACT_SIZE", 1)
    structured, whole = (
        fidelity(*blocks, probes=1) for blocks in ((kfac["0.weight"], exact["0.weight"]), (kfac.whole, exact.whole))
    )
    assert (dense.method, structured.method, whole.method) == ("dense", "structured", "structured")
    assert structured.cosine.value == pytest.approx(dense.cosine.value, rel=1e-9)
    assert structured.relative_error.value == pytest.approx(dense.relative_error.value, rel=1e-9)
    assert whole.cosine.value == pytest.approx(by_definition(kfac.whole.dense(), matrix)["cosine"], rel=1e-9)


def test_kfac_vanishes_below_a_covariance() -> None:
    loss = nn.CrossEntropyLoss()
    network, data = straight(), batch(loss)
    exact = curvature_blocks(network, loss, data, "ggn")
    found = fidelity_table(curvature_blocks(network, loss, data, "kfac_reduce"), exact).loc["0.weight"]
    assert found["relative_error"] == pytest.approx(1, abs=1e-12)  # gradients summed over positions are zero
    assert abs(found["best_scale"]) > 1e6 or found["cosine"] == 0
    assert fidelity_table(curvature_blocks(network, loss, data, "kfac_expand"), exact).loc["0.weight"]["cosine"] > 0.1


def test_hessian_against_gauss_newton() -> None:
    loss = nn.CrossEntropyLoss()
    network, data = chain("gcp"), batch(loss)
    H, G = true_hessian(network, loss, data), true_ggn(network, loss, data)
    hessian, ggn = (curvature_blocks(network, loss, data, quantity).whole for quantity in ("hessian", "ggn"))
    want = float((G - H).norm() / H.norm())
    assert want > 0.1  # the covariance is quadratic in the features: H differs from G even for a ReLU network
    assert relative_difference(ggn, hessian) == (pytest.approx(want, rel=1e-10), 0)
    found = relative_difference(ggn, hessian, "stochastic", probes=15)
    assert abs(found.value - want) < 4 * found.error
    assert found.error < 0.1 * want


# ----------------------------------------------------------------------------------------------------------- difference


def test_difference_operator() -> None:
    A, B = DenseOperator(psd(8)), FactoredOperator(torch.randn(3, 8, dtype=F64))
    difference = DifferenceOperator(A, B)
    want = A.matrix - B.rows.mT @ B.rows
    V = torch.randn(8, 2, dtype=F64)
    torch.testing.assert_close(difference @ V, want @ V, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(difference.dense(), want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(difference.diagonal(), want.diagonal(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(difference.trace(), want.trace(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(difference.eigenvalues(), torch.linalg.eigvalsh(want), rtol=1e-12, atol=1e-12)
    assert spectral_summary(difference).negative_share.value > 0.1
    with pytest.raises(InputError, match="a dense matrix of 8 x 8"):
        difference.dense(limit=8)


@pytest.mark.parametrize("combine", [DifferenceOperator, fidelity, relative_difference])
def test_operators_that_do_not_fit(combine: Callable[..., object]) -> None:
    one = DiagonalOperator(torch.ones(4))
    for other, message in [
        (DiagonalOperator(torch.ones(5)), "two operators need the same size, got 4 and 5"),
        (
            DiagonalOperator(torch.ones(4, dtype=F64)),
            "two operators need the same dtype, got torch.float32 and torch.float64",
        ),
        (DiagonalOperator(torch.ones(4, device="meta")), "two operators need the same device, got cpu and meta"),
    ]:
        with pytest.raises(InputError) as error:
            combine(one, other)
        assert str(error.value) == message


@pytest.mark.parametrize("measure", [fidelity, relative_difference])
def test_bad_arguments(measure: Callable[..., object]) -> None:
    A, B = pair(100)
    for options, message in [
        ({"method": "dense"}, "unknown method 'dense'; choose one of: auto, exact, stochastic"),
        ({"probes": 0}, "probes must be a whole number of at least 1, got 0"),
        ({"method": "stochastic", "seed": "a"}, "seed must be a whole number from 0 to 2^63 - 1, got 'a'"),
        (
            {"method": "stochastic", "memory": 1000},
            "180 float64 vectors of 100 entries take 0.00013 GiB, more than memory = 9.3e-07 GiB; take fewer probes, a "
            "smaller block, or raise memory",
        ),
    ]:
        with pytest.raises(InputError) as error:
            measure(A, B, **options)
        assert str(error.value) == message
    with pytest.raises(InputError, match="needs a SymmetricOperator, got Tensor; wrap a matrix in DenseOperator"):
        measure(A.matrix, B)
    bad = MatrixFree(torch.full((100, 100), math.nan, dtype=F64))
    for method in ("exact", "stochastic"):
        with pytest.raises(NonFiniteError, match="non-finite entries"):
            measure(bad, B, method)


def test_bad_tables() -> None:
    one = {"a": DiagonalOperator(torch.ones(4))}
    with pytest.raises(InputError, match="unknown parameter among the exact blocks 'a'; choose one of: b"):
        fidelity_table(one, {"b": one["a"]})
    with pytest.raises(InputError, match="needs at least one approximate block, got none"):
        fidelity_table({}, one)
