"""Curvature of a network's loss, parameter by parameter, as symmetric linear operators.

    ggn                 J^T H J, J = df/dw of the network's outputs, H the loss's Hessian at them (generalised Gauss-Newton)
    hessian             d^2 L / dw^2
    mc_fisher           the GGN with labels drawn from the model: unbiased, `samples` columns instead of one for each class
    empirical_fisher    1/N sum_n g_n g_n^T, g_n the gradient of a sample's own loss (sum_n for a summed loss; class weights
                        weight the samples): mc_fisher with the given labels in place of drawn ones
    kfac_expand         B kron A for each layer, positions as samples (KFC)
    kfac_reduce         B kron A for each layer, positions averaged first
    ekfac               the best diagonal in the eigenbasis of kfac_expand
    diagonal            the diagonal of the GGN

For the Kronecker-factored quantities `fisher` says what B is made of: the exact Hessian H, labels that the model draws (mc),
or the given labels (empirical). Of images that act on one another (batch norm in training mode) B has the gradients of each
column of each image, at all images: N times as many pull-backs, but for mc.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from secondorder.curvature.kronecker.blocks import kronecker_blocks, kronecker_bytes, kronecker_layers
from secondorder.curvature.kronecker.ekfac import ekfac_blocks, ekfac_bytes
from secondorder.curvature.matrix_free.batch_parts import Probe
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.hessian import HessianOperator
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.memory import BLOCK_COPIES
from secondorder.curvature.matrix_free.output_matrix import OutputMatrix
from secondorder.curvature.matrix_free.separable_losses import LossParts
from secondorder.curvature.operators import BlockDiagonalOperator, DiagonalOperator, SymmetricOperator


class CurvatureBlocks(Mapping[str, SymmetricOperator]):
    """Parameter name -> its curvature block `[P, P]`, a `SymmetricOperator`, in the network's order.

    Of `blocks` by name, P entries of a parameter flattened row by row, and `whole`, all at once. KeyError for a name without one.
    """

    def __init__(self, blocks: Mapping[str, SymmetricOperator], whole: SymmetricOperator) -> None:
        self._blocks = dict(blocks)
        self.whole = whole
        """All parameters at once, in this order; block diagonal for Kronecker-factored quantities and the diagonal."""

    def __getitem__(self, name: str) -> SymmetricOperator:
        if name not in self._blocks:
            raise KeyError(f"no block for {name!r}; there are: {', '.join(self._blocks)}")
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


@dataclass(frozen=True)
class Problem:
    """What a quantity is made from: Jacobian, loss, the matrix M at the outputs, and bytes that may be used."""

    jacobian: Jacobian
    loss: LossParts
    matrix: OutputMatrix
    memory: int | None


@dataclass(frozen=True)
class Quantity:
    """One kind of curvature.

    fisher: columns of M, None for those that the caller chooses; any_loss: whether products with M are enough;
    graphs: memory in units of the graph of the samples that are evaluated at once; fixed: other bytes, for N samples.
    """

    build: Callable[[Problem], CurvatureBlocks]
    fisher: str | None
    any_loss: bool
    graphs: float
    fixed: Callable[[FrozenNetwork, Probe, int], int]
    kronecker: bool = False

    @property
    def stored(self) -> bool:
        """Whether the blocks hold their numbers; else they are products with the network."""
        return self.kronecker or self.build is gauss_newton_diagonal


def gauss_newton(problem: Problem) -> CurvatureBlocks:
    """The blocks J^T M J of each parameter and of all together, M `[N K, N K]` at the outputs, known by products."""

    def operator(names: Iterable[str]) -> GaussNewtonOperator:
        return GaussNewtonOperator(problem.jacobian, problem.matrix, list(names), problem.memory)

    names = problem.jacobian.network.weights
    return CurvatureBlocks({name: operator([name]) for name in names}, operator(names))


def hessian(problem: Problem) -> CurvatureBlocks:
    """The blocks of the Hessian d^2 L / dw^2 of each parameter and of all together, known by their products."""
    names = list(problem.jacobian.network.weights)
    operators = {name: HessianOperator(problem.jacobian, problem.loss, [name]) for name in names}
    return CurvatureBlocks(operators, HessianOperator(problem.jacobian, problem.loss, names))


def gauss_newton_diagonal(problem: Problem) -> CurvatureBlocks:
    """The diagonal of J^T M J, M the matrix at the outputs, as a diagonal block of each parameter; `whole` is diagonal too."""
    network = problem.jacobian.network
    whole = GaussNewtonOperator(problem.jacobian, problem.matrix, list(network.weights), problem.memory).diagonal()
    parts = whole.split([w.numel() for w in network.weights.values()])
    blocks = {name: DiagonalOperator(part) for name, part in zip(network.weights, parts, strict=True)}
    return CurvatureBlocks(blocks, DiagonalOperator(whole))


def kronecker(problem: Problem, sharing: str) -> CurvatureBlocks:
    """The K-FAC blocks B kron A of each parameter, with `sharing` "expand" (positions as samples) or "reduce" (their mean)."""
    blocks = kronecker_blocks(problem.jacobian, problem.matrix, kronecker_layers(problem.jacobian.network), sharing)
    return CurvatureBlocks(blocks, BlockDiagonalOperator(list(blocks.values())))


def ekfac(problem: Problem) -> CurvatureBlocks:
    """The EKFAC block of each parameter: the best diagonal in the eigenbasis of its "expand" factors B kron A."""
    blocks = ekfac_blocks(problem.jacobian, problem.matrix, kronecker_layers(problem.jacobian.network))
    return CurvatureBlocks(blocks, BlockDiagonalOperator(list(blocks.values())))


def vectors(network: FrozenNetwork, probe: Probe, samples: int, count: int) -> int:
    """Bytes of `count` vectors `[P]` over all chosen parameters of the network; probe and samples do not matter."""
    return count * sum(w.nbytes for w in network.weights.values())


PRODUCTS, ROWS = partial(vectors, count=4), partial(vectors, count=4 + BLOCK_COPIES)
EXPAND, REDUCE = (partial(kronecker_bytes, sharing=sharing) for sharing in ("expand", "reduce"))

QUANTITIES: dict[str, Quantity] = {
    "ggn": Quantity(gauss_newton, "exact", any_loss=True, graphs=2.5, fixed=PRODUCTS),
    "hessian": Quantity(hessian, "exact", any_loss=True, graphs=4, fixed=PRODUCTS),
    "empirical_fisher": Quantity(gauss_newton, "empirical", any_loss=False, graphs=2.5, fixed=PRODUCTS),
    "mc_fisher": Quantity(gauss_newton, "mc", any_loss=False, graphs=2.5, fixed=PRODUCTS),
    "kfac_expand": Quantity(
        partial(kronecker, sharing="expand"), None, any_loss=False, graphs=3, fixed=EXPAND, kronecker=True
    ),
    "kfac_reduce": Quantity(
        partial(kronecker, sharing="reduce"), None, any_loss=False, graphs=3, fixed=REDUCE, kronecker=True
    ),
    "ekfac": Quantity(ekfac, None, any_loss=False, graphs=3, fixed=ekfac_bytes, kronecker=True),
    "diagonal": Quantity(gauss_newton_diagonal, "exact", any_loss=False, graphs=3, fixed=ROWS),
}
"""Name -> how it is computed."""
