"""The Gauss-Newton matrix of a network's loss, and the Fisher matrices, which differ from it in M only."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from secondorder.curvature.matrix_free.adjoint_check import forward_mode_is_right, no_adjoint
from secondorder.curvature.matrix_free.backward_check import check_backward
from secondorder.curvature.matrix_free.jacobian import Jacobian, flattened, shaped
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.memory import budget, check_memory
from secondorder.curvature.matrix_free.output_matrix import OutputMatrix
from secondorder.curvature.matrix_free.product_check import ProductCheck
from secondorder.curvature.matrix_free.sample_gradients import SampleGradients
from secondorder.curvature.matrix_free.trial import all_finite
from secondorder.curvature.operators import DENSE_LIMIT, FactoredOperator, SymmetricOperator
from secondorder.curvature.operators.symmetric import check_bytes, mirror_, norm_at_any_scale
from secondorder.curvature.resuming.keys import Key, digest
from secondorder.curvature.resuming.sums import Sums
from secondorder.errors import InputError, first_line
from secondorder.matrix_power.decomposition import symmetric_eigenvalues
from secondorder.matrix_power.transforms import full_precision
from secondorder.untouched import same_randomness


class GaussNewtonOperator(SymmetricOperator):
    """J^T M J `[P, P]` for the named parameters: J = df/dw of the outputs `[N, K]`, M = F F^T of the loss.

    A product is J v by forward mode where that is right (`adjoint_check`), M in closed form, J^T by reverse mode. Where F is
    known (cross-entropy, squared error) the matrix has the exact factor `rows` `[N R, P]`, which gives everything else without P
    products.
    """

    def __init__(
        self, jacobian: Jacobian, matrix: OutputMatrix, names: Sequence[str], memory: int | None = None
    ) -> None:
        network = jacobian.network
        super().__init__(sum(network.weights[name].numel() for name in names), network.dtype, network.device)
        self.jacobian = jacobian
        self.matrix = matrix
        self.names = list(names)
        self.memory = memory
        self.gradients = SampleGradients(jacobian, matrix, self.names)
        share = self.size / sum(w.numel() for w in network.weights.values())
        self.check = ProductCheck(int(jacobian.block_bytes * share))

    def _matmat(self, V: Tensor) -> Tensor:
        result = torch.zeros_like(V)
        sums_of = Sums("product", lambda: self._key(V), {"result": result}, vectors=V.shape[1])
        with same_randomness(), sums_of as sums:  # a backward pass may draw
            if self.jacobian.forward_mode is None and not sums.finished:
                trial, check = self.jacobian.trial(), partial(self.jacobian.check_backward, at_once=True)
                tried = self.jacobian.random_pull_back(trial)
                self.jacobian.forward_mode = forward_mode_is_right(trial, tried, check)
            for part in sums.parts(self.jacobian):
                for k in sums.units(range(V.shape[1])):
                    result[:, k] += self._product(part, V[:, k])
        return result

    def fingerprint(self) -> Key:
        """What the matrix is made from, as a long run notes it."""
        return {
            **self.jacobian.fingerprint(self.matrix.loss),
            **self.matrix.fingerprint(),
            "the parameters of the block": ", ".join(self.names),
        }

    def _key(self, V: Tensor | None = None) -> Key:
        return self.fingerprint() | ({} if V is None else {"the vectors of the product": digest(V)})

    def _product(self, part: Linearisation, v: Tensor) -> Tensor:
        """J^T M J v of a part, J v by the mode that was found right, or by reverse mode where that is wrong for this part."""
        tangents, failures = shaped(v, self.jacobian.network, self.names), []
        first = bool(self.jacobian.forward_mode)
        for forward in (True, False) if first else (False,):
            try:
                Jv = (part.push_forward if forward else part.push_forward_by_reverse)(tangents)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as failure:
                failures.append(first_line(failure))
                continue
            MJv = self.matrix.product(part.z, Jv, part.rows)
            random_state = torch.get_rng_state()
            gradients = part.pull_back(MJv, self.names)
            named = dict(zip(self.names, gradients, strict=True))
            holds = self.check.holds(part, MJv, Jv, named, tangents, random_state)
            if holds and (forward is first or all(map(all_finite, gradients))):
                self.jacobian.forward_mode = forward
                return flattened(gradients)
        if not failures:
            check_backward(part, part.random_pull_back())
        raise no_adjoint(part, failures)

    def rows(self) -> Tensor:
        """The exact factor `[N R, P]`: rows^T rows is the matrix. InputError when it does not fit into the memory."""
        self._check_factored()
        N, R = len(self.jacobian.images), self.columns
        needed = N * R * self.size * self.dtype.itemsize
        available = budget(self.memory, self.device)
        check_memory(
            needed, available, f"a factor of {N * R} x {self.size}", "use products (operator @ v), or a smaller block"
        )
        rows = torch.empty(N, R, self.size, dtype=self.dtype, device=self.device)
        with full_precision(rows), Sums("rows", self._key, {"rows": rows}) as sums:
            for samples, columns, block in self.gradients.blocks(sums):
                rows[samples, columns] = block
        return rows.flatten(0, 1)

    def factored(self) -> FactoredOperator:
        """The same matrix held as its exact factor rows `[N R, P]`. Raises InputError as `rows` does."""
        return FactoredOperator(self.rows())

    @property
    def columns(self) -> int:
        """R, the number of columns of F for each sample: M = F F^T."""
        return self.matrix.count(self.jacobian.width)

    def gram(self, limit: int = DENSE_LIMIT) -> Tensor:
        """rows rows^T `[N R, N R]`, parameter by parameter: it has the non-zero eigenvalues of the matrix.

        Raises InputError when it takes more than `limit` bytes, and where no factor is known in closed form.
        """
        self._check_factored()
        check_bytes(len(self.jacobian.images) * self.columns, self.dtype, limit)
        gram: Tensor | None = None
        for name in self.names:
            rows = GaussNewtonOperator(self.jacobian, self.matrix, [name], self.memory).rows()
            with full_precision(rows):
                gram = rows @ rows.mT if gram is None else gram + rows @ rows.mT
        assert gram is not None
        return gram

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix itself `[P, P]`, exactly symmetric. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        if not self.matrix.factored or self.products_are_fewer():
            return super().dense(limit)
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        with full_precision(matrix), Sums("dense", self._key, {"matrix": matrix}) as sums:
            for _, _, block in self.gradients.blocks(sums):
                rows = block.flatten(0, 1)
                matrix.addmm_(rows.mT, rows)
        return mirror_(matrix)

    def diagonal(self) -> Tensor:
        """The diagonal `[P]`: squared norms of the factor's columns where a factor is known, else from the dense matrix."""
        if not self.matrix.factored:
            return super().diagonal()
        diagonal = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with full_precision(diagonal), Sums("diagonal", self._key, {"diagonal": diagonal}) as sums:
            for _, _, block in self.gradients.blocks(sums):
                diagonal += block.square().sum((0, 1))
        return diagonal

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """All P eigenvalues in ascending order, through the smaller of the matrix and the Gram matrix of its factor.

        Raises InputError when that one takes more than `limit` bytes.
        """
        if not self.gram_is_smaller():
            return super().eigenvalues(limit)
        values = symmetric_eigenvalues(self.gram(limit)).clamp_min(0)
        return F.pad(values, (self.size - len(values), 0))

    def frobenius_norm(self) -> Tensor:
        """|J^T M J|_F, that of the smaller of the matrix and the Gram matrix of its factor; a scalar tensor."""
        return norm_at_any_scale(self.gram() if self.gram_is_smaller() else self.dense())

    def gram_is_smaller(self) -> bool:
        """Whether the Gram matrix of the factor is known and smaller than the matrix."""
        return self.matrix.factored and len(self.jacobian.images) * self.columns < self.size

    def products_are_fewer(self) -> bool:
        """Whether P products take less than rows. Of coupled samples a row takes a pull-back through all, a product about two."""
        return self.jacobian.coupled and len(self.jacobian.images) * self.columns > 2 * self.size

    def _check_factored(self) -> None:
        if not self.matrix.factored:
            raise InputError(
                "only cross-entropy and squared error have a factor in closed form; use products (operator @ v)"
            )
