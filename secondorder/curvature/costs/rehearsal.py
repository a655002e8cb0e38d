"""The program that computes a quantity, run on tensors without numbers: what it does is counted, and nothing is computed.

It is the same code as that of `curvature_blocks`, with the same division of the batch into parts; what tries formulas on numbers
is left out. Of the parts of a batch two are run, of the columns of M's factor one and two: all others take as much.

Index letters: N samples, n of them in the parts that are run, R columns, P parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from secondorder.curvature.costs.meter import Meter
from secondorder.curvature.matrix_free.backward_check import SCALES
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.linearisation import Linearisation, along
from secondorder.curvature.matrix_free.memory import BLOCK_COPIES
from secondorder.curvature.matrix_free.output_matrix import OutputMatrix
from secondorder.curvature.matrix_free.sample_coupling import splits
from secondorder.curvature.matrix_free.samples import floating_tensors
from secondorder.curvature.matrix_free.second_derivatives import gradients
from secondorder.curvature.matrix_free.trial import FEW, trial_count
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.quantities import Problem
from secondorder.curvature.resuming.long_run import within
from secondorder.errors import InputError

READS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What is raised for a program that depends on numbers."""


class Count(NamedTuple):
    """FLOPs, and bytes that are alive at the peak."""

    flops: float
    nbytes: float


class FirstParts(Jacobian):
    """J of a batch of which the first parts, two or one, are all that is seen. Formulas are taken for right; K is known."""

    def __init__(self, *args: Any, width: int, meter: Meter) -> None:
        super().__init__(*args)
        self._meter = meter
        self.forward_mode = self.twice_differentiable = True
        self.most = 2
        """Parts that are seen."""
        self._width = width

    @property
    def width(self) -> int:
        """K, the numbers in the outputs of a sample."""
        return self._width

    @property
    def seen(self) -> int:
        """n, the samples of the parts that are seen."""
        return min(self.most * self.chunk, len(self.images))

    @property
    def kept(self) -> bool:
        """Whether the batch is one part, with a graph that is kept."""
        return self.chunk >= len(self.images)

    def samples(self, count: int) -> Iterator[int]:
        """The first of so many; what is done for it counts for all."""
        before = self._meter.flops
        yield from range(min(1, count))
        self._meter.flops += (count - 1) * (self._meter.flops - before)

    def parts(self, first: int = 0) -> Iterator[Linearisation]:
        """The linearised parts that are seen, from the part number `first` on."""
        return islice(super().parts(first), self.most)


@dataclass(frozen=True)
class FewColumns(OutputMatrix):
    """M with a few columns of its factor only."""

    most: int = 1

    def count(self, K: int) -> int:
        """The columns that are left."""
        return min(self.most, super().count(K))


class Rehearsal:
    """Counts what programs take. held: bytes that are there beside what is counted, copies of parameters and batch."""

    def __init__(self, problem: Problem, meter: Meter, fakes: FakeTensorMode, held: int) -> None:
        assert isinstance(problem.jacobian, FirstParts)
        self.problem, self.jacobian = problem, problem.jacobian
        self.meter, self.fakes, self.held = meter, fakes, held
        self.column_bytes = 0
        """Of the gradients of one column at the outputs of all layers: with all columns these may be the peak."""
        self.trials = Count(0, 0)
        """What trying formulas on few samples takes."""

    def count(self, program: Callable[[], Any]) -> tuple[Count, Any]:
        """What a program takes that runs once, and what it returns."""
        with counted(self.meter, self.fakes):
            before, self.meter.peak = self.meter.flops, self.meter.live
            result = program()
        return Count(self.meter.flops - before, self.held + self.meter.peak), result

    def count_columns(self, program: Callable[[Problem], Any]) -> tuple[Count, Any]:
        """What a program takes that runs over all parts and all columns of M's factor, and what it returns for one column.

        It takes c + N (g + R b): from runs with two columns, with one, and with one part of the batch. So many columns are held
        at a time as their number, and the memory of a block, allow.
        """
        N, n, R = len(self.jacobian.images), self.jacobian.seen, self.problem.matrix.count(self.jacobian.width)
        two = self._count_few(program, 2)[0] if R > 1 else Count(0, 0)
        half = self._count_half(program) if n < N else Count(0, 0)
        one, result = self._count_few(program, 1)
        more = Count(two.flops - one.flops, max(0, two.nbytes - one.nbytes)) if R > 1 else Count(0, 0)
        flops = one.flops + more.flops * (R - 1) * N / n
        if n < N:
            flops += (one.flops - half.flops) * (N - n) / (n - self.jacobian.chunk)
        most = self.jacobian.block_bytes
        held = max(min((R - 1) * self.column_bytes, most), min((R - 1) * more.nbytes, BLOCK_COPIES * most))
        return Count(flops, one.nbytes + held), result

    def _count_few(self, program: Callable[[Problem], Any], columns: int) -> tuple[Count, Any]:
        matrix = self.problem.matrix
        few = FewColumns(matrix.loss, matrix.fisher, matrix.noise, columns)
        return self.count(lambda: program(replace(self.problem, matrix=few)))

    def _count_half(self, program: Callable[[Problem], Any]) -> Count:
        self.jacobian.most = 1
        try:
            return self._count_few(program, 1)[0]
        finally:
            self.jacobian.most = 2

    def count_product(self, operator: SymmetricOperator, vectors: int = 1) -> Count:
        """What a product of an operator with some vectors takes in the parts that are seen."""

        def product() -> None:
            operator @ torch.empty(operator.size, vectors, dtype=operator.dtype, device=operator.device)

        return self.count(product)[0]

    def count_trial(self, few: int, apart: bool, whole: bool, products: bool, twice: bool) -> Count:
        """What it takes to try formulas on few samples: J^T u, and for `products` J v or, if `twice`, H v.

        Where samples are to be taken `apart`, how they act on outputs is asked of `few`; `whole`: and of all samples, in layers.
        """
        network, names = self.jacobian.network, list(self.jacobian.network.weights)
        tried = FEW if twice else trial_count(len(self.jacobian.images), self.jacobian.chunk)

        def coupling() -> None:
            x = self.jacobian.images[:few].detach()
            inputs = [t.requires_grad_() for t in floating_tensors(x)]
            z = network.outputs(x)
            if inputs and z.requires_grad:
                _ = [torch.autograd.grad(z, inputs, z, retain_graph=True, allow_unused=True) for _ in range(2)]
            for _ in splits(len(x)):  # in other company
                network.outputs(x)

        def trial() -> None:
            if apart and not self.jacobian.coupled:  # as modules have not told
                with torch.enable_grad():
                    coupling()
            if twice or not products:  # whether it is linear
                part = Linearisation(network, self.jacobian.images, slice(0, FEW), 0, self.jacobian.layers)
                _ = [part.pull_back(part.z, names) for _ in range(1 + len(SCALES))]
                if whole and not self.jacobian.coupled:  # whether images act on one another in layers
                    for part in self.jacobian.parts():
                        _ = [part.output_gradients(part.z, part.uses) for _ in range(2)]
            part = Linearisation(network, self.jacobian.images, slice(0, tried), 0, self.jacobian.layers)
            if not products:  # whether sums over layers are right
                _ = [part.pull_back(part.z, names) for _ in range(2)]
                return
            v = dict(zip(names, part.pull_back(part.z, names), strict=True))
            if twice:
                with torch.enable_grad():
                    g = gradients(part.graph.square().sum(), network.weights)
                along(dict(zip(names, g, strict=True)), v, list(network.weights.values()))
                return
            try:
                part.push_forward(v)
            except NotImplementedError:
                self.jacobian.forward_mode = False
                part.push_forward_by_reverse(v)

        return self.count(trial)[0]

    @property
    def parts(self) -> float:
        """N / n, how often the parts that are seen make the batch."""
        return len(self.jacobian.images) / self.jacobian.seen


@contextmanager
def counted(meter: Meter, fakes: FakeTensorMode) -> Iterator[None]:
    """Inside, tensors have no numbers, and what is done with them is counted. InputError for a program that reads numbers."""
    try:
        with fakes, meter, within(step_of_sum=False):
            yield
    except (InputError, *READS) as error:
        cause = error if isinstance(error, READS) else error.__cause__
        if not isinstance(cause, READS):
            raise
        raise InputError(
            f"network or loss depend on numbers, which an estimate of costs does without: {type(cause).__name__} ({cause}); time "
            "products with few samples instead"
        ) from error
