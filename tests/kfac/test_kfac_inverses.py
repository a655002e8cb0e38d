"""Damped inverses against torch.linalg.solve of the dense B kron A + lambda I, for every kind, shape and form of factors."""

import io
from collections import Counter

import pytest
import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.kfac.inverses import CLASSES, KINDS, CorrectedEigenbasis, Factors, Identity, Inverse, invert, restored

SHAPES = [(1, 5, 3), (1, 4, 7), (1, 6, 1), (1, 1, 4), (3, 4, 2)]  # G, D, O
DAMPING = [(0.1, True), (1e-4, True), (0.3, False)]


def semidefinite(groups: int, size: int, rank: int) -> Tensor:
    root = torch.randn(groups, rank, size, dtype=torch.float64)
    return root.mT @ root / rank


def dense(groups: int, D: int, O: int) -> Factors:  # noqa: E741
    return Factors("layer", semidefinite(groups, D, 3), None, 10 * semidefinite(groups, O, 3))


def wide(groups: int, D: int, O: int, R: int = 4) -> Factors:  # noqa: E741
    rows = torch.randn(groups, R, D, dtype=torch.float64)
    return Factors("layer", None, rows, 10 * semidefinite(groups, O, 3))


def input_factor(layer: Factors) -> Tensor:
    if layer.A is not None:
        return layer.A
    assert layer.rows is not None
    return layer.rows.mT @ layer.rows


def scales(layer: Factors) -> Tensor:
    blocks = [torch.kron(B, A) for B, A in zip(layer.B, input_factor(layer), strict=True)]
    eigenvalues = [torch.linalg.eigvalsh(block) for block in blocks]
    return torch.stack([one.square().sum() / one.sum() for one in eigenvalues])


def solved(layer: Factors, W: Tensor, damping: float, relative: bool) -> Tensor:
    """(B kron A + lambda I)^-1 vec(W), group by group."""
    lambdas = damping * scales(layer) if relative else [damping] * len(W)
    solutions = []
    for w, B, A, value in zip(W, layer.B, input_factor(layer), lambdas, strict=True):
        block = torch.kron(B, A)
        damped = block + value * torch.eye(len(block), dtype=block.dtype)
        solutions.append(torch.linalg.solve(damped, w.flatten()).view_as(w))
    return torch.stack(solutions)


def solved_by_factors(layer: Factors, W: Tensor, damping: float, relative: bool) -> Tensor:
    """((B + sqrt(lambda) / pi I) kron (A + pi sqrt(lambda) I))^-1 vec(W), group by group."""
    lambdas = damping * scales(layer) if relative else [damping] * len(W)
    solutions = []
    for w, B, A, value in zip(W, layer.B, input_factor(layer), lambdas, strict=True):
        pi = float((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
        right = A + pi * float(value) ** 0.5 * torch.eye(len(A), dtype=A.dtype)
        left = B + float(value) ** 0.5 / pi * torch.eye(len(B), dtype=B.dtype)
        solutions.append(torch.linalg.solve(torch.kron(left, right), w.flatten()).view_as(w))
    return torch.stack(solutions)


def made(layer: Factors, kind: str, damping: float = 0.1, relative: bool = True) -> Inverse:
    report: Counter[str] = Counter()
    inverse = invert([layer], kind, [damping], relative, {}, report)["layer"]
    assert not report
    return inverse


def gradient(layer: Factors) -> Tensor:
    return torch.randn(len(layer.B), layer.B.shape[-1], input_factor(layer).shape[-1], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [dense, wide])
@pytest.mark.parametrize(("damping", "relative"), DAMPING)
@pytest.mark.parametrize("kind", KINDS)
def test_solves_the_damped_system(shape, form, damping, relative, kind):
    layer = form(*shape)
    W = gradient(layer)
    expected = (solved_by_factors if kind == "cholesky" else solved)(layer, W, damping, relative)
    before = W.clone()
    torch.testing.assert_close(made(layer, kind, damping, relative).solve(W, damping, relative), expected)
    assert torch.equal(W, before)


@pytest.mark.parametrize("form", [dense, wide])
@pytest.mark.parametrize(("damping", "relative"), DAMPING)
@pytest.mark.parametrize("kind", KINDS)
def test_tells_its_lambda(form, damping, relative, kind):
    layer = form(2, 5, 3)
    expected = damping * scales(layer) if relative else torch.full((2,), damping, dtype=torch.float64)
    found = made(layer, kind, damping, relative).tikhonov(damping, relative)
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64).expand(2, 1, 1)[:, 0, 0], expected)


@pytest.mark.parametrize("form", [dense, wide])
def test_the_lambda_of_factored_damping_is_that_of_its_making(form):
    inverse = made(form(2, 5, 3), "cholesky", 0.2, False)
    torch.testing.assert_close(inverse.tikhonov(0.7, False), torch.full((2, 1, 1), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("form", [dense, wide])
def test_the_damping_of_the_solution_is_that_of_the_call(form):
    layer = form(2, 5, 3)
    W = gradient(layer)
    inverse = made(layer, "eigen", 0.1, True)
    torch.testing.assert_close(inverse.solve(W, 0.7, False), solved(layer, W, 0.7, False))
    torch.testing.assert_close(inverse.solve(W, 0.02, True), solved(layer, W, 0.02, True))


@pytest.mark.parametrize("kind", KINDS)
def test_relative_damping_ignores_the_scale_of_the_loss_and_the_inputs(kind):
    layer = dense(2, 5, 3)
    W = gradient(layer)
    scaled = Factors("layer", 1e4 * input_factor(layer), None, 1e-6 * layer.B)
    torch.testing.assert_close(
        made(scaled, kind).solve(W, 0.1, True) * 1e-2, made(layer, kind).solve(W, 0.1, True), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_their_product_give_the_same(kind):
    layer = wide(2, 9, 3)
    W = gradient(layer)
    product = Factors("layer", input_factor(layer), None, layer.B)
    for damping, relative in DAMPING:
        torch.testing.assert_close(
            made(layer, kind, damping, relative).solve(W, damping, relative),
            made(product, kind, damping, relative).solve(W, damping, relative),
        )


@pytest.mark.parametrize("R", [1, 3, 4, 9, 12])
def test_rows_of_any_number_and_rank(R):
    layer = wide(2, 9, 3, R)
    assert layer.rows is not None
    repeated = Factors("layer", None, torch.cat([layer.rows, layer.rows, 0 * layer.rows], 1), layer.B)
    for given in (layer, repeated):
        W = gradient(given)
        torch.testing.assert_close(made(given, "eigen").solve(W, 1e-3, True), solved(given, W, 1e-3, True))


def test_wide_layers_are_never_dense():
    layer = Factors("layer", None, torch.randn(1, 6, 40_000), torch.eye(4)[None])
    inverse = made(layer, "eigen")
    assert inverse.nbytes < 2 * layer.given.nbytes
    assert inverse.solve(torch.randn(1, 4, 40_000), 0.1, True).isfinite().all()


@pytest.mark.parametrize("kind", ["eigen", "cholesky"])
def test_a_wide_float32_gradient_in_the_range_of_strongly_curved_rows(kind):
    # beta alpha / lambda is about 10^6: the terms inside the range cancel to all digits of float32 in Woodbury's form.
    R, D = 16, 20_000
    rows = torch.randn(1, R, D, dtype=torch.float64) + 10 * torch.randn(1, 1, D, dtype=torch.float64)
    B = torch.diag(torch.tensor([4.0, 1, 0.1], dtype=torch.float64))[None]
    layer = Factors("layer", None, rows.float(), B.float())
    exact = Factors("layer", None, layer.given.double(), layer.B.double())
    W = (torch.ones(1, 3, R, dtype=torch.float64) @ exact.given).float()
    damping = 0.01
    expected = made(exact, kind, damping).solve(W.double(), damping, True)
    found = made(layer, kind, damping).solve(W, damping, True)
    assert found.dtype == torch.float32
    span = torch.linalg.qr(exact.given[0].mT).Q
    assert ((found - expected) @ span).norm() < 1e-4 * (expected @ span).norm()  # without a second projection 0.04
    # Outside the range there is the rounding of W to float32, amplified by 1 / lambda in `expected`, too.
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_layers_together_are_the_layers_alone():
    layers = [dense(1, 5, 3), wide(1, 9, 3), dense(2, 4, 2), dense(1, 5, 3), wide(2, 12, 2)]
    layers = [Factors(f"layer{i}", layer.A, layer.rows, layer.B) for i, layer in enumerate(layers)]
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    for kind in KINDS:
        found = invert(layers, kind, values, True, {}, Counter())
        assert list(found) == [layer.name for layer in layers]
        for layer, value in zip(layers, values, strict=True):
            W = gradient(layer)
            alone = invert([layer], kind, [value], True, {}, Counter())[layer.name]
            assert torch.equal(found[layer.name].solve(W, value, True), alone.solve(W, value, True))


@pytest.mark.parametrize("form", [dense, wide])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_restores_the_inverse_bit_for_bit(form, kind):
    layer = form(2, 5, 3)
    inverse = made(layer, kind)
    file = io.BytesIO()
    torch.save(inverse.tensors(), file)
    file.seek(0)
    copy = restored(torch.load(file, weights_only=True))
    assert type(copy) is type(inverse)
    assert copy.nbytes == inverse.nbytes > 0
    W = gradient(layer)
    assert torch.equal(copy.solve(W, 0.2, True), inverse.solve(W, 0.2, True))


def test_every_kind_is_in_the_table():
    assert all(CLASSES[kind].kind == kind for kind in CLASSES)
    assert set(KINDS) < set(CLASSES)
    identity = restored(Identity(torch.full((2, 1, 1), 4.0)).tensors())
    W = torch.randn(2, 3, 5)
    torch.testing.assert_close(identity.solve(W, 0.5, True), W / 2)
    torch.testing.assert_close(identity.solve(W, 0.5, False), W / 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_factors_and_gradients(kind):
    layer = dense(1, 5, 3)
    half = Factors("layer", input_factor(layer).bfloat16(), None, layer.B.bfloat16())
    exact = Factors("layer", half.given.double(), None, half.B.double())
    W = gradient(layer).bfloat16()
    found = made(half, kind).solve(W, 0.1, True)
    assert found.dtype == torch.bfloat16
    expected = made(exact, kind).solve(W.double(), 0.1, True)
    assert (found.double() - expected).norm() < 0.01 * expected.norm()  # bfloat16 has 8 bits


def test_autocast_does_not_reach_the_decompositions():
    layer, other = dense(1, 9, 3), dense(1, 9, 3)
    before = made(layer, "ekfac")
    assert isinstance(before, CorrectedEigenbasis)
    before.update(torch.rand_like(before.S), 0.9)
    single = CorrectedEigenbasis(*(t.float() for t in (before.Q_B, before.Q_A, before.S, before.scale)), before.weight)
    factors = Factors("layer", other.given.float(), None, other.B.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = invert([factors], "ekfac", [0.1], True, {"layer": single}, Counter())["layer"]
    expected = invert([factors], "ekfac", [0.1], True, {"layer": single}, Counter())["layer"]
    W = gradient(layer).float()
    assert torch.equal(found.solve(W, 0.1, True), expected.solve(W, 0.1, True))


def test_bad_input_is_refused():
    layer = dense(1, 3, 2)
    with pytest.raises(InputError, match="unknown kind of inverse 'svd'; choose one of: eigen, cholesky, ekfac"):
        made(layer, "svd")
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"damping .* of layer 'layer': must be positive and finite"):
            made(layer, "eigen", damping)
    with pytest.raises(InputError, match="unknown kind of inverse 'svd'"):
        restored({"kind": "svd"})
    with pytest.raises(InputError, match="inverse lacks 'scale': the state is damaged or of another version"):
        restored({"kind": "identity"})
    assert invert([], "eigen", [], True, {}, Counter()) == {}
