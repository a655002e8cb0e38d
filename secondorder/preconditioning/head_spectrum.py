"""Singular values of the Jacobian of a pooling head: how far the head is from an isometry of the features.

For Z = f(S), S = Xc Xc^T / M with eigenvalues l_i, the Jacobian d svec(Z) / dX has one singular value for each pair i <= j,

    sigma_ij = sqrt(2 (l_i + l_j) / M) |f[l_i, l_j]|,    f[a, b] = (f(a) - f(b)) / (a - b),  f'(a) for equal arguments

(the chain rule of X -> S and of Daleckii and Krein for S -> f(S)). The covariance, f(l) = l, has the condition number
sqrt(l_max / l_min); for the square root 1 <= sqrt(M) sigma_ij <= sqrt(2) whatever the spectrum, and for no other power.

Newton-Schulz divides by the trace t = tr(S) and multiplies by its root, f = f(l; t). That couples the diagonal: d f_ii is
f'(l_i) dS_ii + df(l_i)/dt tr(dS) and dS_ii = sqrt(4 l_i / M) times a unit coordinate of dX, so the pairs i = j have the singular
values of the small matrix

    (diag(f'(l_i)) + (df(l_i)/dt) 1^T) diag(sqrt(4 l_i / M)),

and the pairs i < j keep theirs. The closed form is exact with one singular value decomposition of rank x rank an image.

Null directions, l <= C eps l_max, count as l = 0 with f[l, 0] = f(l) / l and sigma = 0 for pairs of them. The logarithm with
eps = 0 has no such limit: its Jacobian is that of features of full rank only.

Heads of the mean of the positions, `gap` and `gap_lifted`, have C singular values, see `head_functions.MeanFunction`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from secondorder.accelerator import check_float64
from secondorder.curvature.matrix_free.memory import BLOCK_BYTES
from secondorder.errors import InputError, NonFiniteError, check_flag, check_known
from secondorder.matrix_power import upper_triangle
from secondorder.matrix_power.decomposition import symmetric_eigenvalues
from secondorder.matrix_power.scalar_functions import Logarithm
from secondorder.matrix_power.spectral import null_directions
from secondorder.matrix_power.spectrum import MatrixFunction, Spectral
from secondorder.preconditioning.features import centred, check_features
from secondorder.preconditioning.head_functions import MeanFunction, head_and_function
from secondorder.preconditioning.head_jacobian import jacobian_singular_values

COORDINATES = ("svec", "triangle")


@dataclass(frozen=True)
class HeadSpectrum:
    """Singular values of a head's Jacobian, one row an image, in float64."""

    singular_values: Tensor
    """`[N, D]` descending, D = C (C + 1) / 2 outputs (gap: C); zero outside the range (exact=True: rounding errors)."""
    eigenvalues: Tensor
    """`[N, C]` of the covariance S, descending, zero in null directions."""
    rank: Tensor
    """`[N]`, the number of eigenvalues that are not null."""
    support: Tensor
    """`[N]`, how many singular values lie on the range: r (r + 1) / 2 + r (C - r) for rank r (of the mean: C)."""

    @property
    def largest(self) -> Tensor:
        """The largest singular value of each image, float64 `[N]`."""
        return self.singular_values[:, 0]

    @property
    def smallest(self) -> Tensor:
        """The smallest singular value on the range of each image, float64 `[N]`."""
        return self.singular_values.gather(1, self.support[:, None] - 1)[:, 0]

    @property
    def condition(self) -> Tensor:
        """Largest / smallest singular value on the range `[N]`; inf if f is flat somewhere (a power of 0)."""
        return torch.where(self.smallest > 0, self.largest / self.smallest, torch.inf)

    @property
    def feature_condition(self) -> Tensor:
        """kappa `[N]`, largest / smallest eigenvalue of the covariance on its range."""
        return self.eigenvalues[:, 0] / self.eigenvalues.gather(1, self.rank[:, None] - 1)[:, 0]


@torch.no_grad()
def head_spectrum(
    features: Tensor,
    pooling: str,
    exact: bool = False,
    coordinates: str = "svec",
    *,
    trace_term: bool = True,
    **options: Any,
) -> HeadSpectrum:
    """Singular values of d svec(Z) / dX of a pooling head, in float64, by a closed form or from the dense Jacobian.

    Args:
        features: X `[N, C, H, W]` of at least 2 positions, not the same at all positions of an image.
        pooling: key of HEAD_FUNCTIONS.
        exact: take the dense Jacobian that autograd gives, not the closed form of this module.
        coordinates: "svec", or "triangle", the published ones without sqrt(2) off the diagonal (condition at most 2 for the exact
            root), with `exact` only.
        trace_term: False leaves out the trace in Newton-Schulz, in the closed form only.
        options: those of the pooling, e.g. `num_iter` of "gcp".

    Raises:
        InputError: for unknown names and options, another shape, constant features, rank-deficient ones (always: with no more
            positions than channels) for the logarithm with eps = 0, and a dense Jacobian that does not fit in memory.
        NonFiniteError: for features that are not finite, and a covariance or Jacobian beyond float64.
    """
    check_features(features)
    check_float64(features.device, "head_spectrum")
    _check_form(exact, coordinates, trace_term)
    head, function = head_and_function(pooling, features.shape[1], options)
    x = features.detach().double()
    C, M = x.shape[1], x.shape[2] * x.shape[3]
    a, t = _normalised_eigenvalues(x)
    if not (t.isfinite().all() and (t > 0).all()):
        raise NonFiniteError(f"the covariance of features up to {x.abs().max():.3g} is beyond float64; rescale them")
    null = null_directions(a, C)
    a = torch.where(null, 0, a)
    rank = (~null).sum(-1)
    if isinstance(function, Spectral) and function.function == Logarithm(0.0) and (rank < C).any():
        image = int((rank < C).nonzero()[0])
        raise InputError(
            f"features of image {image} have rank {int(rank[image])} for {C} channels, where the logarithm with eps=0 is not "
            "differentiable; use eps > 0"
        )
    if exact:
        values = jacobian_singular_values(x, head, coordinates == "svec" and not isinstance(function, MeanFunction))
    else:
        images = max(1, BLOCK_BYTES // (8 * C**2 * x.dtype.itemsize))
        if isinstance(function, MeanFunction):
            values = torch.cat([function.singular_values(z, M) for z in x.mean((2, 3)).split(images)])
            values = pad(values, (0, head.out_features - C))
        else:
            parts = zip(a.split(images), t.split(images), strict=True)
            values = torch.cat([_closed_form(a, t, M, function, trace_term) for a, t in parts])
    if not values.isfinite().all():
        raise NonFiniteError(
            f"the Jacobian of {pooling!r} is beyond float64 for features up to {x.abs().max():.3g}; rescale them"
        )
    of_mean = isinstance(function, MeanFunction)
    support = torch.full_like(rank, C) if of_mean else rank * (rank + 1) // 2 + rank * (C - rank)
    return HeadSpectrum(values, (a * t).flip(-1), rank, support)


def _check_form(exact: bool, coordinates: str, trace_term: bool) -> None:
    """InputError for unknown coordinates, and for options of the closed form and of the dense Jacobian together."""
    check_known("coordinates", coordinates, COORDINATES)
    check_flag("exact", exact)
    check_flag("trace_term", trace_term)
    if coordinates == "triangle" and not exact:
        raise InputError("coordinates 'triangle' have no closed form; use exact=True, or coordinates 'svec'")
    if exact and not trace_term:
        raise InputError("trace_term=False is an option of the closed form; use exact=False")


def _normalised_eigenvalues(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of S / t `[N, C]`, ascending, and t = tr(S) `[N, 1]`; from the Gram matrix of positions if that is smaller."""
    scale = x.abs().amax((1, 2, 3), keepdim=True)  # squares of huge or tiny features leave the range of numbers
    Xc = centred(x / torch.where(scale > 0, scale, 1))
    norm = torch.linalg.vector_norm(Xc, dim=(-2, -1), keepdim=True)
    if (constant := norm <= torch.finfo(x.dtype).eps * Xc[0].numel() ** 0.5).any():
        image = int(constant.flatten().nonzero()[0])
        raise InputError(f"the features of image {image} are the same at all positions: no covariance; leave it out")
    Xn = Xc / norm
    small = Xn.mT @ Xn if Xn.shape[2] < Xn.shape[1] else Xn @ Xn.mT
    a = symmetric_eigenvalues(small)
    return pad(a, (Xn.shape[1] - a.shape[-1], 0)), (scale[..., 0, 0] * norm[..., 0]).square() / Xn.shape[2]


def _closed_form(a: Tensor, t: Tensor, M: int, function: MatrixFunction, trace_term: bool) -> Tensor:
    """sigma `[N, P]`, descending, from eigenvalues a `[N, C]` of S / t, ascending and exactly zero in null directions."""
    found = function.spectrum(a, t, a.shape[-1])
    null = a == 0
    ratio = torch.where(null, 0, found.value / found.a)
    first = torch.where(
        null[:, :, None], ratio[:, None, :], found.first
    )  # null come first: for i <= j, i is null if j is
    sigma = (2 * (a[:, :, None] + a[:, None, :]) / (M * t[..., None])).sqrt() * first.abs()
    if trace_term and found.trace.any():
        sigma.diagonal(dim1=1, dim2=2).copy_(_diagonal_pairs(a, t, M, first, torch.where(null, 0, found.trace)))
    return upper_triangle(sigma).sort(-1, descending=True).values


def _diagonal_pairs(a: Tensor, t: Tensor, M: int, first: Tensor, trace: Tensor) -> Tensor:
    """Singular values `[N, C]` of (diag(f'(l_i)) + (df(l_i)/dt) 1^T) diag(sqrt(4 l_i / M)), zero for null pairs."""
    size = int((a > 0).sum(-1).max())  # null directions come first: rows and columns of zeros
    a, slope, trace = a[:, -size:], first.diagonal(dim1=1, dim2=2)[:, -size:], trace[:, -size:]
    small = (slope.diag_embed() + trace[..., None]) * (4 * a / (M * t)).sqrt()[:, None, :]
    values = torch.linalg.svdvals(small)
    rank = (a > 0).sum(-1, keepdim=True)
    values = torch.where(torch.arange(size, device=a.device) < rank, values, 0)
    return pad(values, (first.shape[-1] - size, 0))
