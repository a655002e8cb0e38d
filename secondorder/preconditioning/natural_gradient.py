"""The natural gradient (G + lambda I)^-1 g with the exact Gauss-Newton matrix G, by conjugate gradients, for small networks.

S. Amari, "Natural gradient works efficiently in learning", Neural Computation 1998; for cross-entropy and squared error G is
the Fisher matrix (J. Martens, "New insights and perspectives on the natural gradient method", JMLR 2020).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.curvature.conjugate_gradients import CGSolution, conjugate_gradients
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.loss_curvature import Loss
from secondorder.curvature.operators import FactoredOperator, SymmetricOperator
from secondorder.curvature.relative_damping import norm_over_trace
from secondorder.errors import NonFiniteError, check_flag
from secondorder.kfac.options import check_number
from secondorder.preconditioning.directions import Batch, Direction, checked_gradient, loss_gradient, names_of

FACTOR_BYTES = 512 * 2**20
"""Largest factor of G that is held: products with it are many times cheaper than passes through the network."""
EXACT_ROWS = 1024
"""Rows of a factor up to which the scale of G is exact; the Gram matrix of more takes longer than everything else."""
PROBES = 32
"""Random vectors that estimate the scale of any other G, to a standard error of at most sqrt(2 / PROBES), 25 %."""


@dataclass(frozen=True)
class NaturalGradient:
    """A direction and how well it solves (G + lambda I) d = g."""

    direction: Direction
    solution: CGSolution
    damping: float
    """lambda."""


def natural_gradient_direction(
    network: nn.Module,
    batch: Batch,
    damping: float,
    *,
    loss: Loss = F.cross_entropy,
    params: Iterable[str] | None = None,
    relative: bool = True,
    tolerance: float = 1e-6,
    iterations: int = 200,
    curvature_batch: Batch | None = None,
    gradient: Mapping[str, Tensor] | None = None,
) -> NaturalGradient:
    """(G + lambda I)^-1 g for the named parameters together, G the Gauss-Newton matrix of the loss, g its gradient.

    Without convergence `solution.status` says so, and the direction is the best iterate.

    Args:
        network: any network, in its present mode; it is left as it is.
        batch: images `[N, ...]` and labels, of g and G.
        damping: at least 0; lambda where it is not `relative`.
        loss: a function of outputs and labels to one number.
        params: names of parameters; None: all that require gradients.
        relative: lambda = damping |G|_F^2 / tr G, the mean eigenvalue of G where each counts with its own size. This is what
            relative damping is in K-FAC, there for each layer's block by itself: for a single layer whose block is a Kronecker
            product both are equal. It is exact where a factor of G with at most EXACT_ROWS rows is held, else estimated from
            PROBES products. A G of zero counts as scale 1.
        tolerance, iterations: of conjugate gradients, see `conjugate_gradients`.
        curvature_batch: of G, when that is not `batch`.
        gradient: g, when it is another one, with the names of `params`.

    Raises:
        InputError: for bad input.
        NonFiniteError: for NaN or infinity in images, g or G.
    """
    check_number("damping", damping, 0.0)
    check_flag("relative", relative)
    if params is None and gradient is not None:
        params = names_of(gradient)
    chosen = batch if curvature_batch is None else curvature_batch
    whole = curvature_blocks(network, loss, chosen, "ggn", params).whole
    assert isinstance(whole, GaussNewtonOperator)
    weights = whole.jacobian.network.weights
    names = whole.names
    if gradient is None:
        gradient = loss_gradient(network, batch, loss=loss, params=names)
    g = checked_gradient(gradient, {name: weights[name].detach() for name in names})
    G = _held(whole, iterations)
    lam = damping * weighted_eigenvalue(G) if relative else damping
    solution = conjugate_gradients(
        lambda v: G @ v.detach(),
        torch.cat([tensor.flatten() for tensor in g.values()]),
        damping=lam,
        tolerance=tolerance,
        iterations=iterations,
    )
    parts = solution.x.split([tensor.numel() for tensor in g.values()])
    direction = {name: part.view_as(g[name]) for name, part in zip(names, parts, strict=True)}
    return NaturalGradient(direction, solution, lam)


def weighted_eigenvalue(G: SymmetricOperator) -> float:
    """|G|_F^2 / tr G of a positive semi-definite operator, 1 for zero; exact for few rows, else from PROBES products.

    The estimate is mean |G v|^2 / mean v^T G v over random signs v, the same on every call.
    """
    if isinstance(G, FactoredOperator) and len(G.rows) <= EXACT_ROWS:
        squares, trace = float(G.frobenius_norm().double() ** 2), float(G.trace())
    else:
        generator = torch.Generator().manual_seed(0)
        V = (torch.randint(0, 2, (G.size, PROBES), generator=generator) * 2 - 1).to(G.device, G.dtype)
        GV = G @ V
        squares, trace = float(GV.double().square().sum()), float((V * GV).double().sum())
    if not squares + trace < float("inf"):
        raise NonFiniteError("the Gauss-Newton matrix contains NaN or infinity; check the network's weights")
    return norm_over_trace(squares, trace) or 1.0


def _held(G: GaussNewtonOperator, products: int) -> SymmetricOperator:
    """G by its factor, where that is known, not too large, and no more work than so many products.

    Where images depend on each other, as by batch norm in training mode, each row is a backward pass of the whole batch.
    """
    if not G.matrix.factored:
        return G
    rows = len(G.jacobian.images) * G.columns
    if G.jacobian.coupled and rows > products:
        return G
    return G.factored() if rows * G.size * G.dtype.itemsize <= FACTOR_BYTES else G
