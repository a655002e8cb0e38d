"""Gradients at the logits whose outer products are the Hessian of a sample's own loss, against torch.func."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import hessian
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import options
from secondorder.kfac.exact_columns import parts_of_columns
from secondorder.kfac.fisher import BACKPROPAGATED, FISHERS, LIKELIHOODS, REDUCTIONS, output_gradients

SHAPES = [(3, 4), (3, 4, 2), (3, 4, 2, 2)]


def own_loss(likelihood: str, reduction: str, z: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of one sample with some labels: torch's, on a batch of one."""
    if likelihood == "cross_entropy":
        y = torch.randint(z.shape[0], (1, *z.shape[1:]))
        return lambda row: F.cross_entropy(row[None], y, reduction=reduction)
    if likelihood == "mse":
        return lambda row: F.mse_loss(row, torch.ones_like(row), reduction=reduction)
    return lambda row: F.binary_cross_entropy_with_logits(row, torch.ones_like(row), reduction=reduction)


def second_moments(g: Tensor) -> Tensor:
    """sum_v g g^T [N, E, E]."""
    g = g.flatten(2)
    return torch.einsum("vne,vnf->nef", g, g)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_and_drawn_gradients(likelihood: str, reduction: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape).double()
    truth = torch.stack([hessian(own_loss(likelihood, reduction, row))(row).reshape(row.numel(), -1) for row in z])
    exact = output_gradients(z, "exact", likelihood, reduction)
    assert exact.shape[1:] == z.shape
    torch.testing.assert_close(second_moments(exact), truth, rtol=1e-13, atol=1e-15)
    drawn = output_gradients(z, "mc", likelihood, reduction, torch.Generator().manual_seed(0), 20_000)
    assert drawn.shape == (20_000, *shape)
    error = (second_moments(drawn) - truth).abs().max() / truth.abs().max()
    assert float(error) < 0.05  # 4 standard deviations of 20,000 draws


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2)])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_columns_come_in_parts(likelihood: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(*shape)
    whole = output_gradients(z, "exact", likelihood)
    for most, count in ((3 * z.nbytes, -(-z[0].numel() // 3)), (1, z[0].numel()), (2**30, 1)):
        monkeypatch.setattr("secondorder.kfac.exact_columns.BYTES_AT_A_TIME", most)
        parts = [output_gradients(z, "exact", likelihood, columns=part) for part in parts_of_columns(z)]
        assert len(parts) == count
        assert torch.equal(torch.cat(parts), whole)


def test_classes_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(7, 5, 2)
    whole = output_gradients(z, "mc", generator=torch.Generator().manual_seed(0), samples=3)
    monkeypatch.setattr("secondorder.curvature.matrix_free.separable_losses.DRAWN_AT_A_TIME", 11)
    assert torch.equal(output_gradients(z, "mc", generator=torch.Generator().manual_seed(0), samples=3), whole)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_draws_come_from_the_generator_alone(likelihood: str) -> None:
    z, state = torch.randn(3, 4), torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    first, second = (output_gradients(z, "mc", likelihood, generator=generator) for _ in range(2))
    again = output_gradients(z, "mc", likelihood, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_of_single_logits() -> None:
    z = torch.randn(5).double()
    p = z.sigmoid()
    torch.testing.assert_close(output_gradients(z, "exact", "bce"), (p * (1 - p)).sqrt()[None])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["mc", "exact"])
def test_extreme_and_half_logits(kind: str, likelihood: str) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.bfloat16)
    g = output_gradients(z, kind, likelihood, generator=torch.Generator())
    assert g.dtype == torch.float32
    assert bool(torch.isfinite(g).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exakt",), "unknown fisher 'exakt'; choose one of: mc, exact"),
        (("mc", "poisson"), "unknown likelihood 'poisson'; choose one of: cross_entropy, mse, bce"),
        (("mc", "mse", "none"), "unknown reduction 'none'; choose one of: mean, sum"),
    ],
)
def test_unknown_words(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        output_gradients(torch.zeros(2, 2), *arguments)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"logits of shape \[3\]; cross_entropy needs \[N, K, ...\]"):
        output_gradients(torch.zeros(3), "mc")
    with pytest.raises(InputError, match="takes a backward pass for each of 5000 outputs of a sample"):
        output_gradients(torch.zeros(1, 2, 2500), "exact")


@pytest.mark.parametrize("shape", [(3, 1), (3, 1, 4, 4)])
@pytest.mark.parametrize("kind", BACKPROPAGATED)
def test_a_softmax_of_one_output(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"cross_entropy has no curvature; use Fisher\(likelihood='bce'\)"):
        output_gradients(torch.zeros(shape), kind)


def test_options_know_the_same_words() -> None:
    assert (options.FISHERS, options.LIKELIHOODS, options.REDUCTIONS) == (FISHERS, LIKELIHOODS, REDUCTIONS)
    assert options.LIKELIHOODS is LIKELIHOODS
    assert set(BACKPROPAGATED) == set(FISHERS) - {"empirical"}
