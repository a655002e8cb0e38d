"""Singular values of the head's Jacobian: closed form, autograd, finite differences, and the theorem on the square root."""

from importlib import import_module

import numpy as np
import pytest
import torch
from chosen_features import F64, SPECTRA, features_with
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError
from secondorder.pooling import RandomLift
from secondorder.preconditioning import HEAD_FUNCTIONS, head_spectrum, varying_images

HEADS = [
    ("gap", {}),
    ("covariance", {}),
    ("gcp_exact", {}),
    *(("gcp", {"num_iter": steps}) for steps in (1, 3, 5, 8, 12)),
    ("gcp", {"method": "eigh"}),
    ("gcp", {"method": "newton_schulz"}),
    *(("gcp_power", {"exponent": exponent}) for exponent in (0.25, 0.5, 0.75, 1, 1.5, -0.5)),
    ("gcp_log", {}),
    ("gcp_log", {"eps": 0.0}),
    ("gcp_log", {"eps": 0.1}),
    ("gap_lifted", {}),
    ("gap_lifted", {"seed": 3}),
]
ROOT2 = 2**0.5
TOLERANCE = {
    "ill-conditioned": 1e-7
}  # rounding of the smallest eigenvalue, kappa eps = 2e-8, in autograd's Jacobian too


def case(name: str) -> Tensor:
    spectrum, height, width = SPECTRA[name]
    return features_with(spectrum, height, width)


def scaled(features: Tensor, values: Tensor) -> Tensor:
    """Singular values in units of 1 / sqrt(M)."""
    return values * (features.shape[2] * features.shape[3]) ** 0.5


DEFICIENT = [
    name
    for name in SPECTRA
    if (spectrum := SPECTRA[name])[0].count(0.0) or spectrum[1] * spectrum[2] <= len(spectrum[0])
]
"""Spectra of features of a rank below their channels."""


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", DEFICIENT)
def test_the_plain_logarithm_of_rank_deficient_features_is_refused(name: str, exact: bool) -> None:
    """It jumps from the smallest number to zero there, and log(1) = 0 beside a null direction is a rounded zero."""
    with pytest.raises(InputError, match=r"image 0 have rank \d for \d channels, .*use eps > 0"):
        head_spectrum(case(name), "gcp_log", exact=exact, eps=0.0)
    assert head_spectrum(case(name), "gcp_log", eps=1e-3).condition.isfinite().all()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("pooling", "options"), HEADS, ids=str)
def test_the_closed_form_is_the_jacobian_of_autograd(pooling: str, options: dict, name: str) -> None:
    if options.get("eps") == 0 and name in DEFICIENT:
        pytest.skip("refused, see above")
    x = case(name)
    if name == "ill-conditioned" and options.get("exponent", 1) < 0:
        x = features_with([5.0, 2.0, 1.1, 0.7, 0.2, 0.1], 3, 4)  # 1 / l^(3/2) magnifies the rounding of l = 1e-8
    closed, exact = head_spectrum(x, pooling, **options), head_spectrum(x, pooling, exact=True, **options)
    difference = (closed.singular_values - exact.singular_values).abs().amax(1)
    assert (difference <= TOLERANCE.get(name, 1e-10) * exact.largest).all()
    assert torch.equal(closed.support, exact.support)
    beyond = torch.arange(closed.singular_values.shape[1]) >= closed.support[:, None]
    assert (closed.singular_values[beyond] == 0).all()
    assert (closed.smallest > 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 2, 3), (1, 5, 1, 4)])
def test_the_root_against_finite_differences_in_numpy(shape: tuple[int, int, int, int]) -> None:
    """Independent of this package and of autograd; with 4 positions the rank is 3 all around the point."""
    x, h = torch.randn(*shape, dtype=F64).numpy().reshape(shape[1], -1), 1e-5

    def svec(x: np.ndarray) -> np.ndarray:
        xc = x - x.mean(1, keepdims=True)
        u, r, _ = np.linalg.svd(xc / np.sqrt(x.shape[1]), full_matrices=False)
        row, column = np.triu_indices(len(x))
        return ((u * r) @ u.T)[row, column] * np.where(row == column, 1.0, ROOT2)

    columns = []
    for entry in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[entry] = h
        columns.append((svec(x + step) - svec(x - step)) / (2 * h))
    truth = np.linalg.svd(np.stack(columns, 1), compute_uv=False)
    found = head_spectrum(torch.as_tensor(x).reshape(shape), "gcp_exact").singular_values[0].numpy()
    np.testing.assert_allclose(found[: len(truth)], truth, atol=1e-8)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_square_root_is_within_the_root_of_two_for_every_spectrum(name: str) -> None:
    x = case(name)
    found = head_spectrum(x, "gcp_exact")
    assert (scaled(x, found.smallest) >= 1 - 1e-12).all()
    assert (scaled(x, found.largest) <= ROOT2 + 1e-12).all()
    assert (found.condition <= ROOT2 + 1e-12).all()


@pytest.mark.parametrize("exponent", [0.25, 0.45, 0.55, 0.75, 1.0])
def test_no_other_power_keeps_the_bound(exponent: float) -> None:
    x = features_with([1.0, 1e-2, 1e-4], 2, 4)
    found = head_spectrum(x, "gcp_power", exponent=exponent)
    assert (found.condition >= 1e4 ** abs(exponent - 0.5) - 1e-6).all()  # the pairs i = j alone
    assert (found.condition > ROOT2).all()


def test_the_covariance_has_the_root_of_the_condition_of_the_features() -> None:
    found = head_spectrum(features_with([9.0, 4.0, 1.0, 0.25], 3, 3), "covariance")
    torch.testing.assert_close(found.feature_condition, torch.full((2,), 36.0, dtype=F64))
    torch.testing.assert_close(found.condition, torch.full((2,), 6.0, dtype=F64))
    torch.testing.assert_close(found.eigenvalues[0], torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=F64))


@pytest.mark.parametrize(
    ("name", "rank", "support"),
    [("null channels", 3, 12), ("one direction", 1, 3), ("fewer positions than channels", 3, 18), ("spread", 6, 21)],
)
def test_the_range_is_that_of_the_features(name: str, rank: int, support: int) -> None:
    found = head_spectrum(case(name), "gcp")
    assert found.rank.tolist() == [rank, rank]
    assert found.support.tolist() == [support, support]
    assert (found.eigenvalues[:, rank:] == 0).all()
    assert found.feature_condition.isfinite().all()


def test_images_of_different_rank_in_one_batch() -> None:
    x = torch.cat([features_with([3.0, 1.0, 0.4, 0.1], 3, 3, 1), features_with([3.0, 1.0, 0.0, 0.0], 3, 3, 1)])
    both = head_spectrum(x, "gcp", num_iter=2)
    for image in range(2):
        alone = head_spectrum(x[image : image + 1], "gcp", num_iter=2)
        torch.testing.assert_close(both.singular_values[image], alone.singular_values[0], atol=1e-12, rtol=0)
        assert both.condition[image] == pytest.approx(float(alone.condition[0]))


def test_many_images_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = features_with([3.0, 1.0, 0.4], 2, 3, images=7)
    whole = head_spectrum(x, "gcp")
    monkeypatch.setattr(import_module("secondorder.preconditioning.head_spectrum"), "BLOCK_BYTES", 8 * 9 * 8 * 3)
    torch.testing.assert_close(head_spectrum(x, "gcp").singular_values, whole.singular_values, atol=1e-13, rtol=0)


def test_the_published_triangle_has_a_condition_of_at_most_two() -> None:
    for name in SPECTRA:
        found = head_spectrum(case(name), "gcp_exact", exact=True, coordinates="triangle")
        assert (found.condition <= 2 + 1e-9).all()
    wide = head_spectrum(features_with([1.0, 1e-3, 1e-6], 2, 4), "gcp_exact", exact=True, coordinates="triangle")
    assert (wide.condition > ROOT2 + 0.01).all()


@pytest.mark.parametrize(("pooling", "options"), [head for head in HEADS if head[0] != "gap_lifted"], ids=str)
def test_positions_may_be_permuted_channels_rotated_and_means_moved(pooling: str, options: dict) -> None:
    x = case("spread")
    expected = head_spectrum(x, pooling, **options).singular_values
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=F64)).Q
    moved = {
        "permuted": x.flatten(2)[..., torch.randperm(12)].reshape(x.shape),
        "rotated": torch.einsum("dc,nchw->ndhw", Q, x),
        "shifted": x + torch.randn(1, 6, 1, 1, dtype=F64),
    }
    for other in moved.values():
        torch.testing.assert_close(head_spectrum(other, pooling, **options).singular_values, expected)


def test_only_degree_one_half_ignores_the_scale_of_the_features() -> None:
    x = case("spread")
    for pooling, degree in (("gcp_exact", 0), ("gcp", 0), ("covariance", 1)):
        small, large = (head_spectrum(scale * x, pooling).singular_values for scale in (1e-3, 1e3))
        torch.testing.assert_close(large, 1e6**degree * small, rtol=1e-8, atol=0)


def test_the_plain_formula_leaves_out_the_trace_of_newton_schulz_only() -> None:
    x = case("spread")
    for pooling in ("gcp_exact", "covariance", "gcp_log"):
        with_term, without = (head_spectrum(x, pooling, trace_term=term).singular_values for term in (True, False))
        assert torch.equal(with_term, without)
    gaps = []
    for steps in (1, 5, 12):
        true, plain = (head_spectrum(x, "gcp", trace_term=term, num_iter=steps) for term in (True, False))
        gaps.append(float(scaled(x, (true.singular_values - plain.singular_values).abs().max())))
    assert gaps[0] > 0.05 > gaps[1] > 1e-4
    assert gaps[2] < 1e-6


def test_many_steps_of_newton_schulz_are_the_root() -> None:
    x = case("spread")
    root = head_spectrum(x, "gcp_exact").singular_values
    torch.testing.assert_close(head_spectrum(x, "gcp", num_iter=25).singular_values, root, atol=1e-12, rtol=0)


def test_average_pooling_is_an_isometry_up_to_scale() -> None:
    found = head_spectrum(case("null channels"), "gap")
    torch.testing.assert_close(found.singular_values, torch.full((2, 5), 12**-0.5, dtype=F64))
    assert (found.condition == 1).all()


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 1e9])
def test_the_lift_has_the_singular_values_of_its_jacobian_over_those_of_the_mean(scale: float) -> None:
    """Of means from nothing to far above 1, without the mean in the derivative; two channels lose a direction of the products."""
    for channels in (1, 2, 5):
        x = torch.randn(2, channels, 3, 4, dtype=F64)
        x += scale * torch.randn(2, channels, 1, 1, dtype=F64) - x.mean((2, 3), keepdim=True)
        lift = RandomLift(channels)
        jacobian = torch.func.jacrev(lambda z, lift=lift: lift(z).sum(0))(x.mean((2, 3))).movedim(1, 0)
        truth = torch.linalg.svdvals(jacobian) / 12**0.5
        values = head_spectrum(x, "gap_lifted").singular_values
        assert values.shape == (2, channels * (channels + 1) // 2)
        assert (values[:, channels:] == 0).all()
        error = (values[:, :channels] - truth).abs().amax(1)
        assert (error <= 1e-7 * truth[:, 0]).all()  # squares lose half of the digits of the smallest
        exact = head_spectrum(x, "gap_lifted", exact=True, coordinates="triangle").singular_values
        torch.testing.assert_close(values, exact, rtol=0, atol=1e-7 * float(truth.max()))


def test_a_direction_that_the_head_loses_gives_an_infinite_condition() -> None:
    found = head_spectrum(case("spread"), "gcp_power", exponent=0)
    assert found.condition.isinf().all()


def test_features_in_single_precision_are_measured_in_double() -> None:
    x = case("spread").float()
    assert torch.equal(head_spectrum(x, "gcp").singular_values, head_spectrum(x.double(), "gcp").singular_values)


def test_a_dense_jacobian_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secondorder.preconditioning.head_jacobian.available_memory", lambda device: 1000)
    with pytest.raises(
        InputError, match=r"21 outputs with respect to 72 features \(36288 bytes\).*exact=False"
    ) as error:
        head_spectrum(case("spread"), "gcp", exact=True)
    assert "\n" not in str(error.value)


GOOD = torch.randn(2, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
BAD = {
    "one position": ((GOOD[..., :1, :1], "gcp"), {}, r"1 position"),
    "three dimensions": ((GOOD[0], "gcp"), {}, r"shape \[3, 2, 2\]"),
    "no image": ((GOOD[:0], "gcp"), {}, r"no empty dimension"),
    "whole numbers": ((GOOD.long(), "gcp"), {}, r"torch.int64"),
    "no tensor": ((GOOD.tolist(), "gcp"), {}, r"got list"),
    "constant": ((torch.cat([GOOD, torch.full((1, 3, 2, 2), 0.1, dtype=F64)]), "gcp"), {}, r"image 2 are the same"),
    "unknown pooling": ((GOOD, "gpc"), {}, r"'gpc'; choose one of: gap, covariance, gcp"),
    "a head without a function": ((GOOD, "dropcov"), {}, r"'dropcov'; choose one of"),
    "unknown option": ((GOOD, "gcp_exact"), {"num_iter": 3}, r"unknown option 'num_iter'"),
    "bad option": ((GOOD, "gcp"), {"num_iter": 0}, r"got 0"),
    "coordinates": ((GOOD, "gcp"), {"coordinates": "vec"}, r"'vec'; choose one of: svec, triangle"),
    "triangle in closed form": ((GOOD, "gcp"), {"coordinates": "triangle"}, r"use exact=True"),
    "exact without trace": ((GOOD, "gcp"), {"exact": True, "trace_term": False}, r"use exact=False"),
    "underflow": ((1e-250 * GOOD, "gcp"), {}, r"beyond float64"),
    "overflow": ((1e250 * GOOD, "gcp_power"), {"exponent": 2}, r"beyond float64"),
}


def test_images_that_have_a_covariance_are_told_from_constant_ones() -> None:
    constant = torch.full((1, 3, 2, 2), 0.1, dtype=F64)
    features = torch.cat([GOOD, constant, 1e-3 * GOOD, constant + 1e-9 * GOOD[:1], 0 * constant])
    assert varying_images(features).tolist() == [True, True, False, True, True, False, False]
    assert head_spectrum(features[varying_images(features)], "gcp").condition.isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    arguments, options, message = BAD[name]
    with pytest.raises(InputError, match=message) as error:
        head_spectrum(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    x = GOOD.clone()
    x[1, 2, 0, 1] = value
    with pytest.raises(NonFiniteError, match="got 1 non-finite"):
        head_spectrum(x, "gcp")


def test_every_pooling_with_a_closed_form_is_among_the_tested() -> None:
    assert set(HEAD_FUNCTIONS) == {pooling for pooling, _ in HEADS}


@pytest.mark.parametrize("scale", [1e160, 1e-170])
@pytest.mark.parametrize("pooling", ["covariance", "gcp", "gcp_exact", "gcp_power", "gcp_log"])
def test_a_covariance_beyond_the_range_of_numbers_is_named(pooling: str, scale: float) -> None:
    features = scale * torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="beyond float64"):
        head_spectrum(features, pooling)
