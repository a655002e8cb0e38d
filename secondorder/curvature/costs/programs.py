"""What the programs of a block take: products, a dense matrix, a spectral summary.

Index letters: N samples, R columns of M's factor, P parameters, K vectors of a product.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from secondorder.curvature.costs.lanczos import LanczosCount, lanczos_counts
from secondorder.curvature.costs.rehearsal import Count, Rehearsal
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.memory import budget
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.quantities import CurvatureBlocks, Problem, Quantity
from secondorder.curvature.resuming.sums import Sums
from secondorder.curvature.spectrum.exact import EXACT_SIZE, decomposition_size, is_stored
from secondorder.curvature.spectrum.products import PROBES, STEPS, affordable


def count_making(rehearsal: Rehearsal, row: Quantity) -> tuple[Count, CurvatureBlocks]:
    """What is done before the first product, once: trials, the graph that is kept, and of stored blocks all; and the blocks."""
    jacobian, before = rehearsal.jacobian, rehearsal.trials
    if jacobian.kept:
        graph = rehearsal.count(lambda: next(jacobian.parts()))[0]
        before = Count(before.flops + graph.flops, max(before.nbytes, graph.nbytes))
    if row.stored:
        built, blocks = rehearsal.count_columns(row.build)
    else:
        blocks = row.build(rehearsal.problem)
        built = rehearsal.count_product(min(blocks.values(), key=lambda block: block.size))
    return Count(before.flops + built.flops, max(before.nbytes, built.nbytes)), blocks


@dataclass(frozen=True)
class Programs:
    """Those of one block, whose graph is there if it is kept."""

    rehearsal: Rehearsal
    operator: SymmetricOperator

    @cached_property
    def product(self) -> Count:
        """What a product A v with one vector takes."""
        return self._product(1)

    def products(self, K: int) -> float:
        """FLOPs of A V for K vectors, which share the graph of a part."""
        if K == 1 or self.stored or self.rehearsal.jacobian.kept:
            return K * self.product.flops
        return self.product.flops + (K - 1) * (self._two.flops - self.product.flops)

    @property
    def stored(self) -> bool:
        """Whether the block's numbers are in memory."""
        return is_stored(self.operator)

    @cached_property
    def dense(self) -> Count:
        """What making the matrix `[P, P]` takes, by rows or by products as the operator would."""
        A = self.operator
        if self.stored:
            return self.rehearsal.count(lambda: A.dense(math.inf))[0]  # type: ignore[arg-type]
        if isinstance(A, GaussNewtonOperator) and A.matrix.factored and not A.products_are_fewer():
            return self.rehearsal.count_columns(lambda problem: _of(problem, A.names).dense(math.inf))[0]  # type: ignore[arg-type]
        return Count(self.products(A.size), self.product.nbytes + 3 * self._matrix_bytes(A.size))

    @property
    def is_exact(self) -> bool:
        """Whether `spectral_summary` takes all eigenvalues: of a matrix that is small enough, and a factor that fits."""
        A = self.operator
        if decomposition_size(A) > EXACT_SIZE:
            return False
        fits = budget(self.rehearsal.problem.memory, A.device)
        return not self._by_gram or self._row_bytes <= fits

    @cached_property
    def eigenvalues(self) -> Count:
        """All P, of the matrix or of its factor's Gram matrix."""
        A = self.operator
        if self.stored:
            return self.rehearsal.count(A.eigenvalues)[0]
        if not isinstance(A, GaussNewtonOperator) or not A.gram_is_smaller():
            return Count(self.dense.flops + 4 / 3 * A.size**3, self.dense.nbytes + self._matrix_bytes(A.size))
        NR = decomposition_size(A)

        def rows(problem: Problem) -> None:
            for name in A.names:
                for _ in _of(problem, [name]).gradients.blocks(Sums("rows", dict)):
                    pass

        one, _ = self.rehearsal.count_columns(rows)
        flops = one.flops + 2 * NR**2 * A.size + 4 / 3 * NR**3
        return Count(flops, one.nbytes + self._row_bytes + 2 * self._matrix_bytes(NR))

    @cached_property
    def lanczos(self) -> tuple[Count, Count]:
        """The least and the most that a summary by Lanczos takes."""
        least, most = map(self._lanczos, self._lanczos_counts)
        return least, most

    @property
    def lanczos_products(self) -> tuple[int, int]:
        """Vectors that Lanczos multiplies, at least and at most."""
        least, most = self._lanczos_counts
        return least.products, most.products

    @property
    def _lanczos_counts(self) -> tuple[LanczosCount, LanczosCount]:
        room = affordable(PROBES * (STEPS + 4), self.operator, self.rehearsal.problem.memory)
        return lanczos_counts(self.operator.size, room)

    def _lanczos(self, count: LanczosCount) -> Count:
        A = self.operator
        flops = count.single * self.product.flops + count.runs * self.products(count.probes) + count.flops
        columns = 3 * count.probes * A.size * A.dtype.itemsize
        return Count(flops, self.product.nbytes + columns + count.nbytes)

    @cached_property
    def _two(self) -> Count:
        return self._product(2)

    def _product(self, K: int) -> Count:
        count = self.rehearsal.count_product(self.operator, K)
        return count if self.stored else count._replace(flops=count.flops * self.rehearsal.parts)

    @property
    def _by_gram(self) -> bool:
        return isinstance(self.operator, GaussNewtonOperator) and self.operator.gram_is_smaller()

    @property
    def _row_bytes(self) -> int:
        """Bytes of the factor `[N R, P]` of the largest parameter."""
        A = self.operator
        assert isinstance(A, GaussNewtonOperator)
        largest = max(A.jacobian.network.weights[name].numel() for name in A.names)
        return len(A.jacobian.images) * A.columns * largest * A.dtype.itemsize

    def _matrix_bytes(self, rows: int) -> int:
        return rows**2 * self.operator.dtype.itemsize


def _of(problem: Problem, names: list[str]) -> GaussNewtonOperator:
    return GaussNewtonOperator(problem.jacobian, problem.matrix, names, problem.memory)
