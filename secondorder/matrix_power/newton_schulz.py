"""K steps of the Newton-Schulz iteration for the matrix square root, as in iSQRT-COV.

P. Li, J. Xie, Q. Wang, Z. Gao, "Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square
Root Normalization", CVPR 2018. With t = tr(S), Y_0 = S / t and Z_0 = I, for k = 0..K-1

    T_k = (3 I - Z_k Y_k) / 2,    Y_{k+1} = Y_k T_k,    Z_{k+1} = T_k Z_k,    result sqrt(t) Y_K.

K steps are a polynomial q_K of S / t, the result of which is an approximation: with 5 steps the root of the covariance of
typical features is off by about 20 %. All iterates commute, so the iteration needs only m_k = z_k y_k:

    t_k = (3 - m_k) / 2,    m_{k+1} = m_k t_k^2,    y_K = a prod_k t_k,    z_K = prod_k t_k,    m_0 = a (eigenvalue of S / t).

An eigenvalue that is zero up to rounding grows 2.25-fold a step in m, negative ones without end: products are right for a
matrix that is PSD to rounding and for STABLE_STEPS. For more steps, and for matrices of unknown rounding, the same polynomial is
evaluated through eigenvalues, negative ones as zero. From CONVERGED_STEPS on it no longer changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.matrix_power import checks
from secondorder.matrix_power.covariance import centred
from secondorder.matrix_power.crossover import gram_is_faster
from secondorder.matrix_power.transforms import known_shape, with_transpose

STABLE_STEPS = {torch.float32: 10, torch.float64: 24}
"""Steps for which 2.25^K times the rounding error stays small: 4e-4, 6e-8. Beyond, null directions (`spectral`) are left out."""
CONVERGED_STEPS = {torch.float32: 30, torch.float64: 56}
"""Steps after which every eigenvalue above the rounding level has converged: 2.25^K eps > 1, and six more."""


def newton_schulz_sqrt(S: Tensor, num_iter: int = 5) -> Tensor:
    """sqrt(tr S) Y_K `[..., C, C]`: K Newton-Schulz steps as printed, three matrix products each in plain autograd.

    The zero matrix gives zero. The reference of the tests and the baseline of the performance study; `matrix_sqrt` is the fast
    and stable form: this one blows up for many steps (STABLE_STEPS) and for negative eigenvalues, as published. Values are not
    checked.

    Args:
        S: symmetric PSD matrices `[..., C, C]`.
        num_iter: K, at least 1.

    Raises:
        InputError: for other shapes, types and numbers of steps.
    """
    checks.check_matrices(S)
    checks.check_iterations(num_iter)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    live = trace > 0
    trace = torch.where(live, trace, 1)  # before the division: 0 / 0 would poison the gradient of the whole batch
    Y, Z = S / trace, eye
    for _ in range(num_iter):
        T = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return torch.where(live, trace.sqrt() * Y, 0)


def newton_schulz_covariance(x: Tensor, num_iter: int) -> Tensor:
    """K steps on the covariance of features `[..., C, M]` in plain autograd, on the smaller of C x C and M x M matrices.

    With A = Xn Xn^T and K = Xn^T Xn of trace 1: sqrt(t) y_K(A) = sqrt(t) Xn z_K(K) Xn^T.
    """
    Xc = centred(x)
    square = Xc.square().sum((-2, -1), keepdim=True)
    live = square > 0
    square = torch.where(live, square, 1)
    Xn, root = Xc / square.sqrt(), (square / x.shape[-1]).sqrt()
    if gram_is_faster(*known_shape(x)[-2:]):
        Z = Xn @ iterate(Xn.mT @ Xn, num_iter, inverse=True)[0] @ Xn.mT
    else:
        Z = iterate(Xn @ Xn.mT, num_iter, inverse=False)[0]
    return torch.where(live, root * Z, 0)


def iterate(A: Tensor, num_iter: int, inverse: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y_K(A), or z_K(A) with `inverse`, for symmetric A `[..., n, n]` of trace 1, and what `pull_back` needs.

    3 K - 2 products (3 K - 3 with `inverse`); differentiable as plain autograd, too.
    """
    three_halves = 1.5 * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    m, product = A, A
    iterates: list[Tensor] = [A]
    squares: list[Tensor] = []
    factors: list[Tensor] = []
    for k in range(num_iter):
        T = torch.add(three_halves, m, alpha=-0.5)
        if k > 0:
            factors.append(product)
        product = T if inverse and k == 0 else product @ T
        if k < num_iter - 1:
            squares.append(T @ T)
            m = m @ squares[-1]
            iterates.append(m)
    return product, (*iterates, *squares, *factors)


def pull_back(G: Tensor, saved: tuple[Tensor, ...], inverse: bool) -> Tensor:
    """dL/dA for symmetric G = dL/d iterate(A), 5 K - 3 products (5 K - 5): all iterates and adjoints are symmetric.

    The symmetric part of a product is that of half of it and its transpose: the half costs a product nothing.
    """
    shape, num_iter = G.shape, (len(saved) + 2) // 3
    G, *kept = (t.reshape(-1, *shape[-2:]) for t in (G, *saved))
    m, squares, factors = kept[:num_iter], kept[num_iter : 2 * num_iter - 1], [kept[0], *kept[2 * num_iter - 1 :]]
    three_halves = 1.5 * torch.eye(shape[-1], dtype=G.dtype, device=G.device)
    gradient_m: Tensor | None = None
    for k in reversed(range(num_iter)):
        T = torch.add(three_halves, m[k], alpha=-0.5)
        half = None  # of the adjoint of m
        if gradient_m is not None:
            half = _product(-0.25, T, with_transpose(m[k] @ gradient_m), onto=_product(0.5, gradient_m, squares[k]))
        if inverse and k == 0:  # z_1 = T_0, whose adjoint is G
            half = -0.25 * G if half is None else torch.add(half, G, alpha=-0.25)
        else:
            half, G = _product(-0.25, factors[k], G, onto=half), with_transpose(_product(0.5, G, T))
        gradient_m = with_transpose(half)
    assert gradient_m is not None
    return (gradient_m if inverse else gradient_m + G).reshape(shape)  # A is the first factor of y_K


def _product(factor: float, A: Tensor, B: Tensor, onto: Tensor | None = None) -> Tensor:
    """factor A B of matrices `[N, n, n]`, added to `onto`, in one pass."""
    return torch.baddbmm(A if onto is None else onto, A, B, beta=0 if onto is None else 1, alpha=factor)


def polynomial(a: Tensor, num_iter: int) -> tuple[Tensor, Tensor]:
    """q_K(a) `[..., n]` and q_K[a_i, a_j] `[..., n, n]` for eigenvalues 0 < a <= 1.

    m_K[a_i, a_j] is the product over the steps of t_i^2 + t_i t_j + t_j^2 - 3/2 (t_i + t_j), and since y_K^2 = a m_K,
    y_K[a_i, a_j] = (m_j + a_i m_K[a_i, a_j]) / (y_i + y_j). All terms are positive: nothing cancels.
    """
    m, y = a, a
    one = torch.ones_like(a)
    slope: Tensor | None = None
    for _ in range(num_iter):
        t = 1.5 - 0.5 * m
        p = t * t - 1.5 * t
        step = torch.stack((p, one, t), -1) @ torch.stack((one, p, t), -2)  # p_i + p_j + t_i t_j
        slope = step if slope is None else slope.mul_(step)
        m, y = m * t * t, y * t
    assert slope is not None
    numerator = (a[..., :, None] * slope).add_(m[..., None, :])
    return y, numerator.div_(y[..., :, None] + y[..., None, :])


@dataclass(frozen=True)
class NewtonSchulzPolynomial:
    """f(a) = q_K(a) of eigenvalues 0 <= a <= 1 as a scalar function, with second divided differences from the chain rule.

    With phi(m) = m (3 - m)^2 / 4, a step of m, and its divided differences phi[x, y] and phi[x, y, z] = (x + y + z - 6) / 4

        m[a, b] <- phi[m_a, m_b] m[a, b],    m[a, b, c] <- phi[m_a, m_b] m[a, b, c] + phi[m_a, m_b, m_c] m[b, c] m[a, c]

    and from y^2 = a m:    (y_a + y_b) y[a, b, c] = a m[a, b, c] + m[b, c] - y[b, c] y[a, c].
    """

    num_iter: int
    degree = None
    factored = False

    def singular_at(self, level: Tensor) -> bool:
        """True: it is used for so many steps only that the slope at 0, 1.5^K, is that of a singularity."""
        return True

    def value(self, a: Tensor) -> Tensor:
        """q_K(a), the polynomial of K Newton-Schulz steps, of eigenvalues 0 <= a <= 1, elementwise."""
        return _iterates(a, self.num_iter)[1]

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """q_K[a, b], the first divided difference of the polynomial, elementwise and without cancellation."""
        (_, y_a), (m_b, y_b) = _iterates(a, self.num_iter), _iterates(b, self.num_iter)
        return (m_b + a * _slope(a, b, self.num_iter)) / (y_a + y_b)

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """q_K[a, b, c], the second divided difference, in the order a > b, c, so that nothing is divided by a small y."""
        a, b, c = torch.stack(torch.broadcast_tensors(a, b, c)).sort(0, descending=True).values
        m = torch.stack((a, b, c))
        y = m
        ab_bc_ca, abc = torch.ones_like(m), torch.zeros_like(a)  # m[a, b], m[b, c], m[c, a] and m[a, b, c]
        for _ in range(self.num_iter):
            step = _step(m, m.roll(-1, 0))
            abc = step[0] * abc + (m.sum(0) - 6) / 4 * ab_bc_ca[1] * ab_bc_ca[2]
            t = 1.5 - 0.5 * m
            ab_bc_ca, m, y = step * ab_bc_ca, m * t * t, y * t
        _, bc, ac = ab_bc_ca.unbind(0)
        y_ac, y_bc = (m[2] + a * ac) / (y[0] + y[2]), (m[2] + b * bc) / (y[1] + y[2])
        return (a * abc + bc - y_bc * y_ac) / (y[0] + y[1])


def _iterates(a: Tensor, num_iter: int) -> tuple[Tensor, Tensor]:
    """m_K and y_K."""
    m, y = a, a
    for _ in range(num_iter):
        t = 1.5 - 0.5 * m
        m, y = m * t * t, y * t
    return m, y


def _step(x: Tensor, y: Tensor) -> Tensor:
    """The divided difference phi[x, y] = t_x^2 + t_x t_y + t_y^2 - 3/2 (t_x + t_y)."""
    s, t = 1.5 - 0.5 * x, 1.5 - 0.5 * y
    return s * (s - 1.5) + t * (t - 1.5) + s * t


def _slope(a: Tensor, b: Tensor, num_iter: int) -> Tensor:
    """The divided difference m_K[a, b]."""
    slope = torch.ones_like(a + b)
    for _ in range(num_iter):
        slope = slope * _step(a, b)
        a, b = a * (1.5 - 0.5 * a) ** 2, b * (1.5 - 0.5 * b) ** 2
    return slope
