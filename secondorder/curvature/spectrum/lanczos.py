"""Extreme eigenvalues by block Lanczos with full reorthogonalisation and thick restart.

K. Wu, H. Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems", SIMAX 22 (2000). SciPy's `eigsh`
runs on ``operator.linear_operator()`` too and needs about as many products. Own code because it copies each vector to the
CPU and back, gives no residuals, and misses copies of a repeated eigenvalue without saying so: of 3, 2, 2, 1.9 above 1996
eigenvalues up to 1, at tolerance 1e-8, it returned 3, 2, 1.9 from each of 20 starts.

Index letters: P rows of the operator, k wanted eigenvalues, M basis vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.resuming.long_run import planned, resumable
from secondorder.curvature.spectrum.krylov_basis import KrylovBasis, RitzPairs
from secondorder.curvature.spectrum.products import (
    MAX_ITERATIONS,
    affordable,
    check_count,
    check_name,
    check_operator,
    check_positive,
    default_tolerance,
    generator,
    norm,
    product,
    refuse_memory,
)
from secondorder.errors import InputError

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: -values,
    "smallest": lambda values: values,
    "magnitude": lambda values: -values.abs(),
}
SEARCH = 10  # least number of blocks in which a missed copy of an eigenvalue is looked for


@dataclass(frozen=True)
class TopEigenvalues:
    """k eigenvalues, the most wanted first, float64 on the CPU.

    values `[k]`; vectors `[P, k]`, orthonormal; residuals `[k]`, || A v - theta v || by a product of its own, so that an
    eigenvalue lies within `residuals` of each value; converged `[k]`, whether the residual is at most the tolerance times
    the largest magnitude met; products, the number of vectors that the operator was multiplied with.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int


@resumable
def top_eigenvalues(
    operator: SymmetricOperator,
    k: int,
    which: str = "largest",
    *,
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    block: int = 1,
    seed: int = 0,
    memory: int | None = None,
) -> TopEigenvalues:
    """The k largest or smallest eigenvalues, or those of largest magnitude, counted with multiplicity, and their eigenvectors.

    Since a Krylov space holds at most `block` copies of a repeated eigenvalue, the search goes on from random vectors after
    convergence, until they find nothing new.

    Args:
        operator: A `[P, P]`.
        k: eigenvalues, at most P.
        which: "largest", "smallest" or "magnitude".
        tolerance: bound of the residuals, relative to the largest magnitude; None: 1e-8, for float32 operators 1.2e-5.
        max_iterations: products of `block` vectors after which an eigenvalue that is not reached is returned with its larger
            residual and converged = False.
        block: vectors multiplied at a time; one needs the fewest products, more pay where several cost little more than one.
        seed: of the random vectors.
        memory: bytes of the basis; None: what is available, and 2 GiB at least.

    Raises:
        InputError: for a k larger than the operator, an unknown `which`, other bad arguments, and too little memory.
        NonFiniteError: for a product that is not finite.
    """
    check_operator(operator)
    check_count("k", k)
    if k > operator.size:
        raise InputError(f"k must be at most the number of rows, {operator.size}, got {k}")
    check_name("order", which, tuple(ORDERS))
    check_count("max_iterations", max_iterations)
    check_count("block", block)
    tolerance = default_tolerance(operator.dtype) if tolerance is None else tolerance
    check_positive("tolerance", tolerance)
    block = min(block, operator.size)
    if max_iterations * block < k:
        raise InputError(f"{max_iterations} products of {block} vectors cannot give {k} eigenvalues; raise either")
    planned(min(operator.size, k + 1 + SEARCH) + k)
    basis = KrylovBasis(operator, _capacity(operator, k, block, memory), block, generator(seed))
    pairs = _search(basis, k, ORDERS[which], tolerance, max_iterations)
    return _result(basis, k, pairs, tolerance)


def _capacity(operator: SymmetricOperator, k: int, block: int, memory: int | None) -> int:
    """The number of basis vectors: all that fit, up to max(3 k, k + 60, k + 16 blocks); a restart needs as many again."""
    size = operator.size
    capacity = affordable(2 * min(size, max(3 * k, k + 60, k + 16 * block)), operator, memory) // 2
    needed = min(size, k + 3 * block)
    if capacity < needed:
        raise refuse_memory(2 * needed, operator, memory, "ask for fewer eigenvalues, a smaller block, or raise memory")
    return capacity


def _search(
    basis: KrylovBasis, k: int, order: Callable[[Tensor], Tensor], tolerance: float, max_iterations: int
) -> RitzPairs:
    """Expand and restart until k Ritz pairs have converged and random vectors bring no better ones."""
    found: Tensor | None = None  # the wanted values at the last start from random vectors
    steps = needed = 0  # blocks since that start, and until the convergence before it
    for _ in range(max_iterations):
        pairs = _grow(basis, k, order)
        steps += 1
        if basis.complete:
            break
        scale = float(pairs.values.abs().max())
        if basis.done <= k or (pairs.residuals[:k] > tolerance * scale).any():
            continue
        if found is not None:
            if steps < SEARCH or (steps < needed and float(pairs.residuals[k]) > tolerance * scale):
                continue
            if float((pairs.values[:k] - found).abs().max()) <= tolerance * scale:
                break
        found, needed, steps = pairs.values[:k], steps, 0
        basis.restart(found, pairs.coefficients[:, :k], fresh=True)
    return _sorted(basis.ritz(), order)


def _grow(basis: KrylovBasis, k: int, order: Callable[[Tensor], Tensor]) -> RitzPairs:
    """The Ritz pairs, most wanted first, after another block; a full basis first shrinks to the better half."""
    if basis.full:
        pairs = _sorted(basis.ritz(), order)
        keep = k + (basis.capacity - k - 2 * basis.block) // 2
        basis.restart(pairs.values[:keep], pairs.coefficients[:, :keep], fresh=False)
    basis.expand()
    return _sorted(basis.ritz(), order)


def _sorted(pairs: RitzPairs, order: Callable[[Tensor], Tensor]) -> RitzPairs:
    index = order(pairs.values).argsort(stable=True)
    return RitzPairs(pairs.values[index], pairs.coefficients[:, index], pairs.residuals[index])


def _result(basis: KrylovBasis, k: int, pairs: RitzPairs, tolerance: float) -> TopEigenvalues:
    values = pairs.values[:k]
    V = basis.vectors(pairs.coefficients[:, :k]).mT
    residuals = norm(product(basis.operator, V) - V * values.to(V.device), 0).cpu()
    return TopEigenvalues(
        values=values,
        vectors=V.cpu().contiguous(),
        residuals=residuals,
        converged=residuals <= tolerance * pairs.values.abs().max(),
        products=basis.products + k,
    )
