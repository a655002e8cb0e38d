"""The rows J_n^T F_n of a Gauss-Newton factor: the gradient of every sample for every column of F.

Index letters: N samples, n of one part, m of one block, K outputs of a sample, R columns of F `[n, K, R]`, r of one block, P
parameters. Parameters of layers that `per_sample` knows are done for all samples at once, others sample by sample.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.jacobian import Jacobian, flattened
from secondorder.curvature.matrix_free.layer_uses import LayerUse
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.output_matrix import OutputMatrix
from secondorder.curvature.matrix_free.per_sample import PER_SAMPLE, sites, unfolded, without_batch
from secondorder.curvature.matrix_free.sample_coupling import same_alone
from secondorder.curvature.matrix_free.trial import random_like, sample_scales
from secondorder.curvature.resuming.sums import Sums


class SampleGradients:
    """The rows `[N, R, P]` of a batch for the named parameters, block by block."""

    def __init__(self, jacobian: Jacobian, matrix: OutputMatrix, names: Sequence[str]) -> None:
        self.jacobian = jacobian
        self.matrix = matrix
        self.names = list(names)
        network = jacobian.network
        self.sizes = [network.weights[name].numel() for name in names]
        self.sites = sites(network.module, {name: network.parameters[name] for name in names})
        self._right: list[str] | None = None

    def blocks(self, sums: Sums) -> Iterator[tuple[slice, slice, Tensor]]:
        """Samples, columns, and their rows `[m, r, P]`, those which are not in the sums."""
        if not sums.finished:
            self.jacobian.check_backward()
        for part in sums.parts(self.jacobian):
            self.jacobian.check_part(part)
            self.jacobian.check_apart(part)
            by_layers = self.by_layers(part)
            uses = self._uses(part, by_layers)
            P, most = sum(self.sizes), self.jacobian.block_bytes
            for columns, F, s in pulled_columns(part, self.matrix, uses, most, sums, P):
                numbers = F.shape[-1] * P + max(map(unfolded, uses), default=0)
                for rows in slices(len(F), numbers * F.itemsize, most):
                    block = self._block(part, rows, F[rows], by_layers, uses, s)
                    yield slice(part.rows.start + rows.start, part.rows.start + rows.stop), columns, block

    def by_layers(self, part: Linearisation) -> list[str]:
        """The parameters of a part whose rows follow from the inputs and output gradients of layers.

        Those with rules that are right, and that the network reads in calls of their layers only.
        """
        if self.jacobian.coupled:
            return []
        if self._right is None:
            self._right = self._tried()
        known = [name for name in self._right if self._has_rules(part, name)]
        elsewhere = part.used_elsewhere({name: [layer for layer, _ in self.sites[name]] for name in known})
        return [name for name in known if name not in elsewhere]

    def _tried(self) -> list[str]:
        """The parameters for which sum_n c_n row_n = J^T (c u), with random u `[n, K]` and a scale c_n of each sample.

        The scales tell whether each row is that of its own sample: a layer's first dimension may be another one.
        """
        if not self.jacobian.network.has_numbers:
            return self.names
        trial = self.jacobian.trial()
        known = [name for name in self.names if self._has_rules(trial, name)]
        source = torch.Generator().manual_seed(0)
        u, c = random_like(trial.z, source), sample_scales(trial.z, source)
        uses, most = self._uses(trial, known), self.jacobian.block_bytes
        s = pulled_back(trial, u[..., None], uses)
        truth = dict(zip(known, trial.pull_back(c * u, known), strict=True)) if known else {}
        right = []
        for name in known:
            numbers = truth[name].numel() + max(map(unfolded, uses))
            parts = slices(len(u), numbers * u.itemsize, most)
            sums = (torch.einsum("m,mrp->p", c[rows, 0], self._rows(name, rows, uses, s)) for rows in parts)
            if _close(sum(sums, start=torch.zeros_like(truth[name].flatten())), truth[name].flatten()):
                right.append(name)
        return right

    @property
    def _alone(self) -> bool:
        """Whether a sample has the same outputs without the rest of the batch: no batch statistics, no dropout."""
        return not (self.jacobian.coupled or self.jacobian.network.random.drawn or len(self.jacobian.images) == 1)

    def _has_rules(self, part: Linearisation, name: str) -> bool:
        places = self.sites[name]
        used = [use for use in part.uses if any(use.layer is layer for layer, _ in places)]
        return (
            bool(used)
            and all(use.intact and len(use.input) == use.output_shape[0] == len(part.z) for use in used)
            and not any(map(without_batch, used))
            and all(attribute in PER_SAMPLE.get(type(layer), {}) for layer, attribute in places)
        )

    def _uses(self, part: Linearisation, names: Sequence[str]) -> list[LayerUse]:
        layers = {layer for name in names for layer, _ in self.sites[name]}
        return [use for use in part.uses if use.layer in layers]

    def _rows(self, name: str, rows: slice, uses: Sequence[LayerUse], s: Sequence[Tensor]) -> Tensor:
        """Gradients `[m, r, P]` of one parameter, summed over the uses of its layers."""
        attributes = dict(self.sites[name])
        terms = [
            PER_SAMPLE[type(use.layer)][attributes[use.layer]](use, use.input[rows], gradient[rows]).flatten(2)
            for use, gradient in zip(uses, s, strict=True)
            if use.layer in attributes
        ]
        return sum(terms[1:], start=terms[0])

    def _block(
        self,
        part: Linearisation,
        rows: slice,
        F: Tensor,
        by_layers: Sequence[str],
        uses: Sequence[LayerUse],
        s: Sequence[Tensor],
    ) -> Tensor:
        m, _, r = F.shape
        block = F.new_empty(m, r, sum(self.sizes))
        pieces = dict(zip(self.names, block.split(self.sizes, -1), strict=True))
        for name in by_layers:
            pieces[name].copy_(self._rows(name, rows, uses, s))
        others = [name for name in self.names if name not in by_layers]
        for i in self.jacobian.samples(m if others else 0):
            rest = self._one_by_one(part, rows.start + i, F[i], others)
            for name, piece in zip(others, rest.split([pieces[name].shape[-1] for name in others], -1), strict=True):
                pieces[name][i] = piece
        return block

    def _one_by_one(self, part: Linearisation, sample: int, F: Tensor, names: Sequence[str]) -> Tensor:
        """Rows `[r, P]` of one sample for its columns `[K, r]`, from a graph of its own where that is the same."""
        index = part.rows.start + sample
        graph = self.jacobian.linearised(slice(index, index + 1), part.part) if self._alone else part
        if graph is not part and not same_alone(graph.z, part.z[sample : sample + 1]):
            self.jacobian.found_coupled()
            graph = part
        U = torch.zeros(F.shape[1], *graph.z.shape, dtype=F.dtype, device=F.device)
        U[:, sample if graph is part else 0] = F.mT
        return torch.stack([flattened(graph.pull_back(u, names)) for u in U])


def pulled_columns(
    part: Linearisation, matrix: OutputMatrix, uses: Sequence[LayerUse], most_bytes: int, sums: Sums, extra: int = 0
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Some columns F `[n, K, r]` of a matrix, as many as fit into `most_bytes`, and their gradients `[n, r, *out]` at the uses.

    Those which are not in the sums. `extra` numbers more are held for each column.
    """
    numbers = sum(use.output_shape.numel() for use in uses) + extra + 2 * part.z.numel()
    for columns in sums.units(slices(matrix.count(part.z.shape[1]), numbers * part.z.itemsize, most_bytes)):
        F = matrix.columns(part.z, part.rows, columns)
        yield columns, F, pulled_back(part, F, uses)


def pulled_back(part: Linearisation, F: Tensor, uses: Sequence[LayerUse]) -> list[Tensor]:
    """The gradients s `[n, r, *out]` at each use's output of the columns F `[n, K, r]`."""
    pulled = [part.output_gradients(f, uses) for f in F.unbind(-1)] if uses else []
    # A single column, most often all that fits, is not copied.
    return [s[0][:, None] if len(s) == 1 else torch.stack(s, 1) for s in zip(*pulled, strict=True)]


def slices(count: int, item_bytes: int, most_bytes: int) -> list[slice]:
    """`count` items of this size in slices of at most `most_bytes`, of one item at least."""
    step = min(count, max(1, most_bytes // max(1, item_bytes)))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, in float32 also with matrix units of reduced precision; a wrong formula is off by much more."""
    power = 0.25 if a.dtype == torch.float32 else 0.5
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** power * b.abs().max())
