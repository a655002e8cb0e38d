"""Summaries of spectra: closed forms, scale, thresholds, exact against Lanczos, structures, real networks, bad input."""

import math

import pytest
import torch
from known_spectra import F64, SPECTRA, MatrixFree, rotated, uniform, values
from small_networks import batch, chain, true_ggn, true_hessian
from torch import Tensor, nn

from secondorder.curvature.blocks import curvature_blocks
from secondorder.curvature.operators import DenseOperator, DiagonalOperator, FactoredOperator, KroneckerOperator
from secondorder.curvature.spectrum import (
    Estimate,
    SpectralSummary,
    spectral_statistics,
    spectral_summary,
    summary_table,
)
from secondorder.curvature.spectrum import exact as exact_module
from secondorder.errors import InputError, NonFiniteError

RANK_LIKE = ("rank", "effective_rank", "stable_rank", "participation", "negative_share")
CONDITIONS = ("condition", "median_condition", "trace_quantile_condition")


def by_definition(truth: Tensor, threshold: float) -> dict[str, float]:
    """The summary written out for all eigenvalues."""
    magnitudes = truth.abs().sort(descending=True).values
    beyond = magnitudes[magnitudes > threshold * magnitudes[0]]
    p = magnitudes / magnitudes.sum()
    shares = p.cumsum(0)
    a, b = (float(magnitudes[int((shares < share - 1e-12).sum())]) for share in (0.1, 0.9))
    return {
        "largest": float(truth.max()),
        "smallest": float(truth.min()),
        "largest_magnitude": float(magnitudes[0]),
        "trace": float(truth.sum()),
        "frobenius_norm": float(truth.norm()),
        "rank": len(beyond),
        "condition": float(magnitudes[0] / beyond[-1]),
        "median_condition": float(
            magnitudes[0] / beyond.median().clamp_min(beyond.sort().values[(len(beyond) - 1) // 2])
        ),
        "trace_quantile_condition": a / b,
        "effective_rank": math.exp(-sum(float(x) * math.log(float(x)) for x in p if x > 0)),
        "stable_rank": float((magnitudes / magnitudes[0]).square().sum()),
        "participation": float((truth / magnitudes[0]).sum() ** 2 / (truth / magnitudes[0]).square().sum()),
        "negative_share": float(p.sum() - (truth.clamp_min(0) / magnitudes.sum()).sum()),
    }


def compare(summary: SpectralSummary, want: dict[str, float], rel: float) -> None:
    for name, value in want.items():
        found = getattr(summary, name)
        assert found.value == pytest.approx(value, rel=rel, abs=rel * (1e-3 if name in RANK_LIKE else 0)), name
        assert found.error == 0, name


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name != "all zero"])
def test_exact_by_definition(spectrum: str) -> None:
    truth = SPECTRA[spectrum]
    threshold = len(truth) * torch.finfo(F64).eps
    summary = spectral_summary(DiagonalOperator(truth[torch.randperm(len(truth))]))
    assert (summary.method, summary.size) == ("exact", len(truth))
    assert summary.threshold == threshold
    compare(summary, by_definition(truth, threshold), rel=1e-12)


def test_a_spectrum_by_hand() -> None:
    summary = spectral_summary(DenseOperator(rotated(values([8.0, 4.0, 2.0, -2.0, 0.0]))))
    want = {
        "largest": 8.0,
        "smallest": -2.0,
        "trace": 12.0,
        "frobenius_norm": math.sqrt(88),
        "rank": 4.0,
        "condition": 4.0,
        "median_condition": 4.0,  # 8 over the lower median of 2, 2, 4, 8
        "trace_quantile_condition": 4.0,  # 10 % and 90 % of 16 are reached at 8 and at 2
        "effective_rank": 2 ** (0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3),
        "stable_rank": 88 / 64,
        "participation": 144 / 88,
        "negative_share": 0.125,
    }
    compare(summary, want, rel=1e-12)


def test_threshold() -> None:
    truth = values([1.0, 0.1, 1e-3, 1e-6, 0.0])
    operator = DiagonalOperator(truth)
    for threshold, rank, condition in ((0.0, 4, 1e6), (1e-7, 4, 1e6), (1e-5, 3, 1e3), (0.05, 2, 10), (0.5, 1, 1)):
        summary = spectral_summary(operator, threshold=threshold)
        assert summary.threshold == threshold
        assert summary.rank.value == rank
        assert summary.condition.value == pytest.approx(condition, rel=1e-12)
        assert summary.trace_quantile_condition.value == pytest.approx(1.0)  # 1 holds 10 % and 90 % of the trace
    free = [spectral_summary(DiagonalOperator(uniform(50, 0, 1)), threshold=t) for t in (0.0, 0.3)]
    assert free[0].trace_quantile_condition == free[1].trace_quantile_condition
    assert free[0].condition.value > 10 * free[1].condition.value


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_zero_matrix(method: str) -> None:
    summary = spectral_summary(MatrixFree(torch.zeros(30, 30, dtype=F64)), method)
    for name in ("largest", "smallest", "largest_magnitude", "trace", "frobenius_norm", *RANK_LIKE):
        assert getattr(summary, name) == (0, 0), name
    for name in CONDITIONS:
        assert math.isnan(getattr(summary, name).value), name


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_scale_free(method: str) -> None:
    matrix = rotated(SPECTRA["spread"])
    one, huge, tiny = (spectral_summary(MatrixFree(scale * matrix), method) for scale in (1.0, 1e30, 1e-30))
    for name in (*RANK_LIKE, *CONDITIONS):
        for other in (huge, tiny):
            assert getattr(other, name).value == pytest.approx(getattr(one, name).value, rel=1e-6, abs=1e-12), name
    for name in ("largest", "smallest", "trace", "frobenius_norm"):
        assert getattr(huge, name).value == pytest.approx(1e30 * getattr(one, name).value, rel=1e-9)
        assert getattr(tiny, name).value == pytest.approx(1e-30 * getattr(one, name).value, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2])
def test_smallest_sizes(size: int) -> None:
    truth = torch.arange(1.0, size + 1, dtype=F64)
    for method in ("exact", "lanczos"):
        summary = spectral_summary(MatrixFree(rotated(truth)), method)
        assert summary.trace.value == pytest.approx(float(truth.sum()))
        assert summary.condition.value == pytest.approx(size)
        assert summary.rank.value == pytest.approx(size)


LARGE = {
    "outliers over a bulk": values([100.0, 50.0, 20.0, -10.0], uniform(296, -0.1, 1)),
    "half zero": values([0.0] * 150, uniform(150, 1, 3)),
    "indefinite": uniform(300, -1, 2),
    "decaying": torch.logspace(0, -4, 300, dtype=F64),
}


@pytest.mark.parametrize("spectrum", LARGE)
def test_lanczos_within_its_errors(spectrum: str) -> None:
    truth = LARGE[spectrum].flip(0)
    found = spectral_summary(MatrixFree(rotated(truth)), "lanczos", steps=60, probes=20)
    assert found.method == "lanczos"
    assert found.threshold == 1e-8
    want = by_definition(truth, 1e-8)
    for name in ("largest", "smallest", "largest_magnitude"):
        value, error = getattr(found, name)
        assert abs(value - want[name]) <= error + 1e-12 * want["largest_magnitude"], name
        assert error <= (1e-3 if (spectrum, name) == ("decaying", "smallest") else 1e-8) * want["largest_magnitude"], (
            name
        )
    for name in ("trace", "frobenius_norm", "rank", "effective_rank", "stable_rank", "participation", "negative_share"):
        value, error = getattr(found, name)
        rounding = 1e-12  # a share that is zero, and its error, are whatever a sum of rounded terms leaves
        assert abs(value - want[name]) <= 4 * error + 1e-6 * abs(want[name]) + rounding, name
        assert error <= 0.2 * abs(want[name]) + 1e-3, name
    value, error = found.trace_quantile_condition
    assert abs(value - want["trace_quantile_condition"]) <= 5 * error + 0.02 * want["trace_quantile_condition"]
    assert error <= 0.2 * want["trace_quantile_condition"]
    value, error = found.median_condition  # between bounds: steps are few below where the spectrum decays
    assert abs(value - want["median_condition"]) <= min(error, 0.1 * value)
    assert error <= (0.5 if spectrum == "decaying" else 0.2) * want["median_condition"]
    assert 0.1 < found.condition.value / want["condition"] < 10


def test_condition_by_lanczos_where_a_gap_ends_the_range() -> None:
    truth = values([0.0] * 100, [0.01] * 5, uniform(195, 1, 3))
    found = spectral_summary(MatrixFree(rotated(truth)), "lanczos")
    assert found.condition.value == pytest.approx(300, rel=1e-9)
    assert abs(found.rank.value - 200) < 4 * found.rank.error
    # the same through a threshold that cuts the five off
    cut = spectral_summary(MatrixFree(rotated(truth)), "lanczos", threshold=0.1)
    assert cut.condition.value == pytest.approx(3, rel=0.05)


def test_nodes_that_stand_for_less_than_an_eigenvalue_are_passed_over() -> None:
    nodes, numbers = torch.tensor([3.0, -1e-3, 1.0, 2.0], dtype=F64), torch.tensor([1.0, 0.4, 5.0, 2.0], dtype=F64)
    assert spectral_statistics.smallest_above(nodes, numbers, 0.0) == 1
    assert spectral_statistics.smallest_above(nodes, numbers, 1.0) == 2
    assert spectral_statistics.median_above(nodes, numbers, 1e-2) == 1
    assert math.isnan(spectral_statistics.smallest_above(nodes, numbers, 3.0))


def test_float32() -> None:
    truth = values([0.0] * 50, uniform(100, 1, 3))
    exact = spectral_summary(DenseOperator(rotated(truth).float()))
    assert exact.threshold == 150 * torch.finfo(torch.float32).eps
    assert exact.rank.value == 100
    assert exact.condition.value == pytest.approx(3, rel=1e-5)
    lanczos = spectral_summary(MatrixFree(rotated(truth).float()), "lanczos")
    assert lanczos.threshold == exact.threshold
    assert abs(lanczos.rank.value - 100) < 4 * lanczos.rank.error
    assert lanczos.largest.value == pytest.approx(3, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- structures


def test_auto_is_exact_where_the_decomposition_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(20, 5000, dtype=F64)
    factored = spectral_summary(FactoredOperator(rows))
    truth = torch.linalg.svdvals(rows).square()
    assert factored.method == "exact"
    assert factored.rank.value == 20
    assert factored.condition.value == pytest.approx(float(truth[0] / truth[-1]), rel=1e-10)
    B, A = rotated(uniform(60, 1, 2)), rotated(uniform(70, 1, 3))
    product = spectral_summary(KroneckerOperator(B, A))
    assert (product.method, product.size) == ("exact", 4200)
    assert product.condition.value == pytest.approx(6, rel=1e-10)
    monkeypatch.setattr("secondorder.curvature.spectrum.exact.EXACT_SIZE", 40)
    assert spectral_summary(MatrixFree(A)).method == "lanczos"
    assert spectral_summary(MatrixFree(A), "exact").method == "exact"


@pytest.mark.parametrize("head", ["gap", "gcp"])
def test_blocks_of_a_network(head: str) -> None:
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss()
    network, data = chain(head, nn.Tanh), batch(loss)
    for quantity, truth_of in (("ggn", true_ggn), ("hessian", true_hessian)):
        matrix = truth_of(network, loss, data)
        blocks = curvature_blocks(network, loss, data, quantity)
        whole = spectral_summary(blocks.whole)
        want = by_definition(torch.linalg.eigvalsh(matrix), whole.threshold)
        for name in ("largest", "trace", "frobenius_norm", "effective_rank", "stable_rank", "participation"):
            assert getattr(whole, name).value == pytest.approx(want[name], rel=1e-9), name
        table = summary_table(blocks)
        assert list(table.index) == [name for name, _ in network.named_parameters()]
        start = 0
        for name, parameter in network.named_parameters():
            part = matrix[start : start + parameter.numel(), start : start + parameter.numel()]
            start += parameter.numel()
            assert table.loc[name, "largest"] == pytest.approx(float(torch.linalg.eigvalsh(part)[-1]), rel=1e-9)
            assert table.loc[name, "trace"] == pytest.approx(float(part.trace()), rel=1e-9)
            assert table.loc[name, "trace_error"] == 0


def test_gauss_newton_by_lanczos_and_by_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = nn.CrossEntropyLoss()
    network, data = chain("gap", nn.Tanh), batch(loss, n=4)
    whole = curvature_blocks(network, loss, data, "ggn").whole
    assert exact_module.decomposition_size(whole) == 4 * 3
    exact, lanczos = spectral_summary(whole), spectral_summary(whole, "lanczos", threshold=1e-8)
    assert exact.method == "exact"
    assert exact.rank.value >= 8  # N (K - 1); rounding in the Gram matrix may lie above P eps
    assert lanczos.trace.value == pytest.approx(exact.trace.value, rel=1e-7)
    assert lanczos.condition.value == pytest.approx(spectral_summary(whole, threshold=1e-8).condition.value, rel=1e-6)

    def refuse(limit: int = 0) -> Tensor:
        raise InputError("does not fit")

    monkeypatch.setattr(whole, "eigenvalues", refuse)
    assert spectral_summary(whole).method == "lanczos"
    with pytest.raises(InputError, match="does not fit"):
        spectral_summary(whole, "exact")


def test_rows_of_a_table() -> None:
    table = summary_table({"a": DiagonalOperator(uniform(5, 0, 1)), "b": DiagonalOperator(uniform(9, 0, 2))})
    assert table.index.name == "parameter"
    assert list(table["size"]) == [5, 9]
    assert list(table["method"]) == ["exact", "exact"]
    assert list(table["largest"]) == [1.0, 2.0]
    names = {
        name
        for name, value in vars(spectral_summary(DiagonalOperator(torch.ones(1)))).items()
        if isinstance(value, Estimate)
    }
    assert names | {f"{name}_error" for name in names} | {"size", "method", "threshold"} == set(table.columns)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "eigh"}, "unknown method 'eigh'; choose one of: auto, exact, lanczos"),
        (
            {"threshold": -0.1},
            "threshold must be a number in [0, 1), got -0.1; relative to the largest magnitude",
        ),
        (
            {"threshold": math.nan},
            "threshold must be a number in [0, 1), got nan; relative to the largest magnitude",
        ),
        ({"method": "lanczos", "probes": 0}, "probes must be a whole number of at least 1, got 0"),
        ({"method": "lanczos", "steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"deflate": -2}, "deflate must be a whole number of at least 0, got -2"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        spectral_summary(DiagonalOperator(torch.ones(20, dtype=F64)), **options)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_bad_operators() -> None:
    with pytest.raises(InputError, match="needs at least one block, got none"):
        summary_table({})
    bad = torch.eye(30, dtype=F64)
    bad[2, 2] = math.inf
    for operator in (DenseOperator(bad), DiagonalOperator(bad.diagonal()), MatrixFree(bad)):
        for method in ("auto", "lanczos"):
            with pytest.raises(NonFiniteError, match="non-finite entries"):
                spectral_summary(operator, method)
