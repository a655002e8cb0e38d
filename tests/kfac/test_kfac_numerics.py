"""Every rung of the ladder of decompositions, and that no input, however bad, gives numbers that are not finite."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from secondorder.curvature.relative_damping import min_scale
from secondorder.kfac.inverses import EVENTS, KINDS, NO_CURVATURE, Factors, Identity, Inverse, build, invert
from secondorder.kfac.inverses.numerics import Eigen, Problem, all_finite, solutions

G, D, O, R = 2, 6, 3, 4  # noqa: E741


def eigen(matrices: Sequence[Tensor], report: Counter[str]) -> list[Eigen | None]:
    found = solutions([Problem(S) for S in matrices], report)
    return [None if pair is None else (pair[0], pair[1]) for pair in found]


def inverses(matrices: Sequence[Tensor], shifts: Sequence[Tensor], report: Counter[str]) -> list[Tensor | None]:
    found = solutions([Problem(S, shift) for S, shift in zip(matrices, shifts, strict=True)], report)
    return [None if inverse is None else inverse[0] for inverse in found]


def factors(form: str = "dense", dtype: torch.dtype = torch.float64) -> Factors:
    rows = torch.randn(G, R, D, dtype=dtype)
    gradients = torch.randn(G, R, O, dtype=dtype)
    B = gradients.mT @ gradients
    return Factors("layer", None, rows, B) if form == "wide" else Factors("layer", rows.mT @ rows, None, B)


def inverted(layer: Factors, kind: str, previous: dict[str, Inverse], relative: bool = True) -> tuple[Inverse, Counter]:
    report: Counter[str] = Counter()
    found = invert([layer], kind, [0.1], relative, previous, report)["layer"]
    assert set(report) <= {*EVENTS, f"layer: {NO_CURVATURE}"}
    return found, report


def indefinite(least: float) -> Tensor:
    """Eigenvalues 1, 1, 1 and `least`."""
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    return ((Q * torch.tensor([1, 1, 1, least], dtype=torch.float64)) @ Q.mT)[None]


@pytest.mark.parametrize("form", ["dense", "wide"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["input", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_leave_the_last_inverse(form, kind, which, value):
    good, bad = factors(form), factors(form)
    (bad.given if which == "input" else bad.B)[1, 0, 0] = value
    before, report = inverted(good, kind, {})
    assert not report
    kept, report = inverted(bad, kind, {"layer": before})
    assert kept is before
    assert report == {"kept": 1}
    first, report = inverted(bad, kind, {})
    assert isinstance(first, Identity)
    assert report == {"identity": 1}
    W = torch.ones(G, O, D, dtype=torch.float64)
    found = first.solve(W, 0.1, True)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1], W[1] / 0.1)
    again, report = inverted(bad, kind, {"layer": first})
    assert isinstance(again, Identity)
    assert report == {"identity": 1}


def test_one_bad_layer_spoils_no_other():
    good, bad = factors(), factors()
    bad.B[0] = float("nan")
    report: Counter[str] = Counter()
    layers = [Factors("bad", bad.A, None, bad.B), Factors("good", good.A, None, good.B)]
    found = invert(layers, "eigen", [0.1, 0.1], True, {}, report)
    W = torch.randn(G, O, D, dtype=torch.float64)
    assert torch.equal(found["good"].solve(W, 0.1, True), inverted(good, "eigen", {})[0].solve(W, 0.1, True))
    assert report == {"identity": 1}


@pytest.mark.parametrize("form", ["dense", "wide"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", ["input", "gradient", "both"])
def test_zero_factors_damp_by_the_damping_itself(form, kind, relative, dtype, zero):
    layer = factors(form, dtype)
    if zero != "gradient":
        layer.given.zero_()
    if zero != "input":
        layer.B.zero_()
    inverse, report = inverted(layer, kind, {}, relative)
    assert report == ({f"layer: {NO_CURVATURE}": 1} if relative else {})
    torch.testing.assert_close(torch.as_tensor(inverse.tikhonov(0.1, relative)).max().item(), 0.1)
    W = torch.randn(G, O, D, dtype=dtype)
    found = inverse.solve(W, 0.1, relative)
    assert found.isfinite().all()
    assert not inverse.solve(0 * W, 0.1, relative).any()
    if kind != "cholesky" or zero == "both":
        torch.testing.assert_close(found, W / 0.1)


@pytest.mark.parametrize("form", ["dense", "wide"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_tiny_and_huge_float32_factors_stay_finite(form, kind, scale):
    layer = factors(form, torch.float32)
    layer.B.mul_(scale)
    inverse, report = inverted(layer, kind, {})
    assert report == ({f"layer: {NO_CURVATURE}": 1} if scale == 1e-30 else {})
    assert inverse.solve(scale**0.5 * torch.randn(G, O, D), 0.1, True).isfinite().all()


def test_layers_without_curvature_are_named_and_cost_one_synchronisation(monkeypatch):
    flat, half, good = factors(), factors(), factors()
    flat.B.zero_()
    half.B[0].zero_()
    layers = [Factors(name, one.A, None, one.B) for name, one in (("flat", flat), ("half", half), ("good", good))]
    asked, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: asked.append(len(tensor)) or tolist(tensor))
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: pytest.fail("a synchronisation for each layer"))
    assert build._finite_and_curved(layers) == ([True, True, True], [False, False, True])
    assert asked == [6]
    monkeypatch.undo()
    report: Counter[str] = Counter()
    for _ in range(2):
        invert(layers, "eigen", [0.1] * 3, True, {}, report)
    assert report == {f"flat: {NO_CURVATURE}": 2, f"half: {NO_CURVATURE}": 2}


def test_all_decompositions_cost_one_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind and size: on an accelerator each would wait for what was asked of it before."""
    S = [torch.eye(n, dtype=dtype)[None] * 2 for n in (1, 2, 3, 3) for dtype in (torch.float32, torch.float64)]
    shift, diagonal = torch.ones(1, 1, 1), torch.ones(1, 4)
    problems = [*map(Problem, S), *(Problem(s, shift.to(s)) for s in S), Problem(diagonal), Problem(diagonal, shift)]
    asked, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: asked.append(len(tensor)) or tolist(tensor))
    for name in ("__bool__", "item", "__float__"):
        monkeypatch.setattr(Tensor, name, lambda tensor: pytest.fail("a synchronisation for each matrix"))
    found = solutions(problems, Counter())
    assert asked == [2 * len(S)]
    monkeypatch.undo()
    for problem, solution in zip(problems, found, strict=True):
        assert solution is not None
        scale = 1.0 if problem.S.ndim == 2 else 2.0
        expected = scale if problem.shift is None else 1 / (scale + 1)
        torch.testing.assert_close(solution[0].amax(), torch.tensor(expected).to(problem.S))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_diagonals_leave_the_last_inverse(kind: str) -> None:
    good, bad = factors(), factors()
    good, bad = (Factors("layer", one.A, None, one.B.diagonal(dim1=1, dim2=2).clone()) for one in (good, bad))
    bad.B[1, 0] = float("nan")
    before, report = inverted(good, kind, {})
    assert not report
    kept, report = inverted(bad, kind, {"layer": before})
    assert kept is before
    assert report == {"kept": 1}
    flat = Factors("layer", good.A, None, 0 * good.B)
    inverse, report = inverted(flat, kind, {})
    assert report == {f"layer: {NO_CURVATURE}": 1}
    assert inverse.solve(torch.ones(G, O, D, dtype=torch.float64), 0.1, True).isfinite().all()


def test_the_floor_can_be_divided_by():
    for dtype in (torch.float32, torch.float64):
        assert torch.tensor(1e10, dtype=dtype).div(min_scale(dtype)).isfinite()


def test_one_sample_and_repeated_eigenvalues():
    for kind in KINDS:
        row = torch.ones(1, 1, D)
        one = Factors("layer", row.mT @ row, None, torch.ones(1, O, O))
        flat = Factors("layer", torch.eye(D)[None], None, torch.eye(O)[None])
        for layer in (one, flat):
            inverse, report = inverted(layer, kind, {})
            assert not report
            assert inverse.solve(torch.ones(1, O, D), 1e-3, True).isfinite().all()


def test_jitter_grows_until_cholesky_succeeds():
    S = torch.cat([indefinite(-1e-5), indefinite(0.5)])
    shift = torch.full((2, 1, 1), 1e-9, dtype=torch.float64)
    report: Counter[str] = Counter()
    [found] = inverses([S], [shift], report)
    assert report == {"jitter": 1}
    mean = (S + shift * torch.eye(4)).diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    torch.testing.assert_close(found, torch.linalg.inv(S + (shift + 1e-4 * mean) * torch.eye(4)))


def test_eigenvalues_in_float64_when_no_jitter_helps():
    S, shift = indefinite(-0.5), torch.full((1, 1, 1), 0.25, dtype=torch.float64)
    report: Counter[str] = Counter()
    [found] = inverses([S.float()], [shift.float()], report)
    assert report == {"float64": 1}
    values, Q = torch.linalg.eigh(S)
    expected = Q @ torch.diag_embed(1 / (values.clamp(min=0) + shift[0])) @ Q.mT
    torch.testing.assert_close(found, expected.float())


def test_negative_eigenvalues_are_zero():
    [found] = eigen([indefinite(-1e-3)], Counter())
    assert found is not None
    assert found[0].min() == 0


@pytest.fixture
def failing(monkeypatch):
    """eigh fails for the given dtypes, by an error or without a word."""

    def install(dtypes: set[torch.dtype], silently: bool) -> None:
        original = torch.linalg.eigh

        def eigh(S: Tensor):
            if S.dtype not in dtypes:
                return original(S)
            if silently:
                return S[..., 0] * float("nan"), S
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(torch.linalg, "eigh", eigh)

    return install


@pytest.mark.parametrize("silently", [False, True])
@pytest.mark.parametrize("kind", ["eigen", "ekfac"])
def test_float64_when_float32_fails(failing, silently, kind):
    layer = factors(dtype=torch.float32)
    W = torch.randn(G, O, D)
    expected = inverted(layer, kind, {})[0].solve(W, 0.1, True)
    failing({torch.float32}, silently)
    inverse, report = inverted(layer, kind, {})
    assert report == {"float64": 2}
    torch.testing.assert_close(inverse.solve(W, 0.1, True), expected, rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("form", ["dense", "wide"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_inverse_when_everything_fails(failing, monkeypatch, form, kind):
    layer = factors(form, torch.float32)
    before, _ = inverted(layer, kind, {})
    failing({torch.float32, torch.float64}, False)
    cholesky_ex = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda S: (cholesky_ex(S)[0], torch.ones(len(S))))
    kept, report = inverted(layer, kind, {"layer": before})
    assert kept is before
    assert report["kept"] == 1
    first, report = inverted(layer, kind, {})
    assert isinstance(first, Identity)
    assert report["identity"] == 1
    scale = 0.0
    for B, given in zip(layer.B, layer.given, strict=True):
        A = given if form == "dense" else given.mT @ given
        scale = float(B.square().sum() / B.trace() * A.square().sum() / A.trace())
    W = torch.randn(G, O, D)
    torch.testing.assert_close(first.solve(W, 0.1, True)[-1], W[-1] / (0.1 * scale))


def test_sizes_that_go_together_are_stacked_and_taken_apart(monkeypatch):
    # As on an accelerator, where all matrices of a size are one call.
    monkeypatch.setattr(
        "secondorder.kfac.inverses.numerics._of_one_size",
        lambda matrices: [[0, 2], [1]] if len(matrices) == 3 else [[0]],
    )
    good, small, bad = indefinite(0.1), torch.eye(2, dtype=torch.float64)[None].repeat(3, 1, 1), indefinite(-1e-5)
    pairs = eigen([good.repeat(2, 1, 1), small, bad], Counter())
    assert [pair[0].shape for pair in pairs if pair is not None] == [(2, 4), (3, 2), (1, 4)]
    report: Counter[str] = Counter()
    shift = torch.zeros(1, 1, 1, dtype=torch.float64)
    found = inverses([good, small, bad], [shift, shift + 1, shift], report)
    assert report == {"jitter": 1}
    torch.testing.assert_close(found[0], torch.linalg.inv(good))
    torch.testing.assert_close(found[1], small / 2)
    assert found[2] is not None


def test_finite_means_all_numbers():
    assert all_finite([]) == []
    assert all_finite(
        [torch.ones(3), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), -float("inf")])]
    ) == [
        True,
        False,
        False,
    ]
