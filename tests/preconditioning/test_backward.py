"""The backward pass of GCP in its forms: autograd, the Lyapunov equation, the formulas, adjoints; and whitened features."""

import numpy as np
import pytest
import scipy.linalg
import torch
from chosen_features import F64, SPECTRA, features_with
from scipy.sparse.linalg import svds
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError
from secondorder.pooling import pooling_head
from secondorder.preconditioning import FORMS, backward_operator, gcp_backward, head_spectrum, whitened_features


def case(name: str) -> Tensor:
    spectrum, height, width = SPECTRA[name]
    return features_with(spectrum, height, width)


def symmetric_gradient(x: Tensor) -> Tensor:
    G = torch.randn(len(x), x.shape[1], x.shape[1], dtype=F64)
    return G + G.mT


def gradient_of(pooling: str, x: Tensor, g: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(pooling_head(pooling, x.shape[1])(x), x, g)[0]


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("form", "pooling"), [("exact", "gcp_exact"), ("unpreconditioned", "covariance")])
def test_two_forms_are_gradients_of_heads(form: str, pooling: str, name: str) -> None:
    x = case(name)
    g = torch.randn(2, x.shape[1] * (x.shape[1] + 1) // 2, dtype=F64)
    truth = gradient_of(pooling, x, g)
    tolerance = (
        1e-7 if name == "ill-conditioned" else 1e-10
    )  # autograd rounds the smallest eigenvalue, kappa eps = 2e-8
    assert (gcp_backward(x, g, form) - truth).abs().max() <= tolerance * truth.abs().max()


def test_the_exact_form_solves_the_lyapunov_equation() -> None:
    x = case("spread")
    G = symmetric_gradient(x)
    found = gcp_backward(x, G, "exact").flatten(2).numpy()
    for image in range(2):
        Xc = x[image].flatten(1).numpy()
        Xc = Xc - Xc.mean(1, keepdims=True)
        root = scipy.linalg.sqrtm(Xc @ Xc.T / 12)
        D = scipy.linalg.solve_continuous_lyapunov(root, G[image].numpy())
        np.testing.assert_allclose(found[image], 2 * D @ Xc / 12, rtol=1e-10, atol=1e-11)


def test_the_trimmed_forms_are_their_formulas() -> None:
    x = case("spread")
    G = symmetric_gradient(x)
    literal, rotated = (gcp_backward(x, G, form).flatten(2).numpy() for form in ("trimmed", "trimmed_rotated"))
    for image in range(2):
        Xc = x[image].flatten(1).numpy()
        Xc = Xc - Xc.mean(1, keepdims=True)
        S = Xc @ Xc.T / 12
        lam = np.linalg.svd(S, compute_uv=False)
        np.testing.assert_allclose(
            literal[image], G[image].numpy() @ np.diag(lam**-0.5) @ Xc / 12, rtol=1e-9, atol=1e-11
        )
        inverse = np.linalg.inv(scipy.linalg.sqrtm(S))
        np.testing.assert_allclose(rotated[image], G[image].numpy() @ inverse @ Xc / 12, rtol=1e-9, atol=1e-11)


def test_the_trimmed_rotated_form_is_the_exact_one_with_unit_weights() -> None:
    """Exact minus rotated has the weights w - 1, antisymmetric: for G = U diag U^T, where only i = j counts, both agree."""
    x = case("spread")
    Xc = x.flatten(2) - x.flatten(2).mean(-1, keepdim=True)
    U = torch.linalg.eigh(Xc @ Xc.mT).eigenvectors
    G = U @ torch.randn(2, 6, dtype=F64).diag_embed() @ U.mT
    torch.testing.assert_close(gcp_backward(x, G, "exact"), gcp_backward(x, G, "trimmed_rotated"))
    assert (gcp_backward(x, G, "exact") - gcp_backward(x, G, "trimmed")).norm() > 0.1


@pytest.mark.parametrize("name", ["null channels", "fewer positions than channels", "two positions"])
def test_trimmed_forms_leave_null_directions_out(name: str) -> None:
    x = case(name)
    for form in ("trimmed", "trimmed_rotated"):
        found = gcp_backward(x, symmetric_gradient(x), form)
        assert found.isfinite().all()
        assert found.abs().max() < 1e3


def test_the_literal_trimmed_form_pairs_the_largest_eigenvalue_with_the_first_channel() -> None:
    x = torch.zeros(1, 2, 1, 4, dtype=F64)
    x[0, 0, 0] = torch.tensor([1.0, -1.0, 0.0, 0.0])  # variance 1/2, eigenvalue 2 of 2
    x[0, 1, 0] = torch.tensor([0.0, 0.0, 2.0, -2.0])  # variance 2, eigenvalue 1 of 2
    found = gcp_backward(x, torch.eye(2, dtype=F64)[None], "trimmed")[0, :, 0]
    expected = torch.stack([x[0, 0, 0] / 2**0.5, x[0, 1, 0] / 0.5**0.5]) / 4
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPECTRA)
def test_rmatvec_is_the_adjoint_of_matvec(form: str, name: str) -> None:
    x = case(name)
    operator = backward_operator(x, form)
    G, V = symmetric_gradient(x), torch.randn_like(x)
    torch.testing.assert_close((operator.matvec(G) * V).sum(), (G * operator.rmatvec(V)).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.rmatvec(V), operator.rmatvec(V).mT)
    view = operator.linear_operator()
    assert view.shape == operator.shape == (x.numel(), 2 * x.shape[1] * (x.shape[1] + 1) // 2)
    dense, transposed = view @ np.eye(view.shape[1]), view.H @ np.eye(view.shape[0])
    np.testing.assert_allclose(dense.T, transposed, atol=1e-9 * np.abs(dense).max())


@pytest.mark.parametrize("form", FORMS)
def test_the_triangle_of_a_gradient_is_the_matrix(form: str) -> None:
    x = case("spread")
    G = symmetric_gradient(x)
    row, column = torch.triu_indices(6, 6)
    triangle = G[:, row, column] * torch.where(row == column, 1, 2)
    torch.testing.assert_close(gcp_backward(x, triangle, form), gcp_backward(x, G, form))
    skew = torch.randn_like(G)
    torch.testing.assert_close(gcp_backward(x, G + skew - skew.mT, form), gcp_backward(x, G, form))


@pytest.mark.parametrize("name", ["spread", "repeated", "fewer positions than channels"])
@pytest.mark.parametrize(("form", "pooling"), [("exact", "gcp_exact"), ("unpreconditioned", "covariance")])
def test_singular_values_of_the_backward_pass_are_those_of_the_head(form: str, pooling: str, name: str) -> None:
    x = case(name)[:1]
    view = backward_operator(x, form).linear_operator()
    found = np.linalg.svd(view @ np.eye(view.shape[1]), compute_uv=False)
    expected = head_spectrum(x, pooling).singular_values[0].numpy()
    np.testing.assert_allclose(found, expected[: len(found)], atol=1e-10)
    largest = svds(view, k=1, return_singular_vectors=False, v0=np.ones(min(view.shape)))
    assert largest[0] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_identity_gives_whitened_features(name: str) -> None:
    x = case(name)
    identity = torch.eye(x.shape[1], dtype=F64).expand(2, -1, -1)
    Q = whitened_features(x)
    for form in ("exact", "trimmed_rotated"):
        torch.testing.assert_close(gcp_backward(x, identity, form), Q / (x.shape[2] * x.shape[3]) ** 0.5)


@pytest.mark.parametrize("name", SPECTRA)
def test_whitened_features_are_orthonormal_on_the_range(name: str) -> None:
    x = case(name)
    Q, Xc = whitened_features(x).flatten(2), x.flatten(2) - x.flatten(2).mean(-1, keepdim=True)
    projector = Q @ Q.mT
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector @ Xc, Xc)
    assert projector.diagonal(dim1=1, dim2=2).sum(1) == pytest.approx(head_spectrum(x, "gcp").rank.numpy())
    torch.testing.assert_close(Q.sum(-1), torch.zeros_like(Q[..., 0]))
    root = Q @ Xc.mT  # S^(1/2) sqrt(M): the factor of the polar form is symmetric and positive
    torch.testing.assert_close(root, root.mT)
    torch.testing.assert_close(root @ Q, Xc)
    assert torch.linalg.eigvalsh(root).min() > -1e-12


def test_whitening_does_not_see_a_linear_map_of_the_channels_beyond_its_rotation() -> None:
    x = case("spread")
    A = torch.randn(6, 6, dtype=F64)
    Q, mixed = (whitened_features(y).flatten(2) for y in (x, torch.einsum("dc,nchw->ndhw", A, x)))
    torch.testing.assert_close(Q.mT @ Q, mixed.mT @ mixed)


@pytest.mark.parametrize("form", FORMS)
def test_constant_features_get_a_zero_gradient(form: str) -> None:
    x = torch.cat([case("spread")[:1], torch.ones(1, 6, 3, 4, dtype=F64)])
    found = gcp_backward(x, symmetric_gradient(x), form)
    assert (found[1] == 0).all()
    assert found[0].abs().max() > 0
    assert (whitened_features(x)[1] == 0).all()


def test_precision_follows_the_features() -> None:
    x, G = case("spread"), symmetric_gradient(case("spread"))
    found = gcp_backward(x.float(), G, "exact")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), gcp_backward(x, G, "exact"), rtol=1e-3, atol=1e-4)


GOOD, GRAD = torch.randn(2, 3, 2, 2, dtype=F64), torch.eye(3, dtype=F64).expand(2, 3, 3)
BAD = {
    "unknown form": (GOOD, GRAD, "trimed", r"'trimed'; choose one of: exact, trimmed, trimmed_rotated, unpreconditioned"),
    "one position": (GOOD[..., :1, :1], GRAD, "exact", r"1 position"),
    "three dimensions": (GOOD[0], GRAD, "exact", r"shape \[3, 2, 2\]"),
    "another gradient": (GOOD, GRAD[:, :2], "exact", r"\[2, 3, 3\] or, of the upper triangle, \[2, 6\], got \[2, 2, 3\]"),
    "gradient of one image": (GOOD, GRAD[:1], "trimmed", r"got \[1, 3, 3\]"),
    "infinite gradient": (GOOD, GRAD / 0, "exact", r"needs a finite dL/dZ, got 18"),
    "infinite features": (GOOD / 0, GRAD, "exact", r"needs finite features"),
    "features without values": (GOOD.to("meta"), GRAD, "exact", r"needs features with values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    features, grad, form, message = BAD[name]
    with pytest.raises(InputError, match=message) as error:
        gcp_backward(features, grad, form)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, NonFiniteError) == name.startswith("infinite")


def test_the_adjoint_refuses_another_shape() -> None:
    with pytest.raises(InputError, match=r"needs features \[2, 3, 2, 2\], got \[2, 3, 4\]"):
        backward_operator(GOOD).rmatvec(GOOD.flatten(2))


def test_whitening_refuses_what_the_backward_pass_refuses() -> None:
    with pytest.raises(InputError, match="1 position"):
        whitened_features(GOOD[..., :1, :1])


@pytest.mark.parametrize(("grad", "kind"), [(torch.zeros(2, 6, dtype=torch.complex128), "complex128"), ([1.0], "list")])
def test_a_gradient_that_is_no_real_tensor_is_named(grad: object, kind: str) -> None:
    with pytest.raises(InputError, match=f"real floating-point numbers, got .*{kind}"):
        gcp_backward(torch.randn(2, 3, 2, 2), grad)  # type: ignore[arg-type]
