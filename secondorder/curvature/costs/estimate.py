"""FLOPs, memory and time of curvature before anything is computed, for a network, a loss and data of which shapes are enough.

A quantity's own program runs on tensors without numbers (PyTorch's FakeTensor): nothing is computed and nothing allocated while
FLOPs are counted and live bytes followed (`meter`). What depends on numbers is not known: images that act on one another where
no module tells of it, a forward mode that is wrong, how many steps Lanczos takes.

Index letters: P parameters.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from secondorder.curvature.costs.programs import Programs, count_making
from secondorder.curvature.costs.rehearsal import Count, Rehearsal
from secondorder.curvature.costs.without_numbers import rehearsal
from secondorder.curvature.matrix_free.loss_curvature import Loss
from secondorder.curvature.matrix_free.memory import GIB
from secondorder.curvature.matrix_free.network_outputs import Output
from secondorder.curvature.matrix_free.output_matrix import FISHERS
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.quantities import QUANTITIES
from secondorder.errors import check_known, check_number


@dataclass(frozen=True)
class Cost:
    """What a computation takes.

    Args:
        flops: of matrix products, convolutions, attention and decompositions; a multiplication and an addition are two.
        nbytes: at the peak, with the copies of parameters and batch and the graph that is kept, without the network itself.
        seconds: at the rate that was given; None without one.
    """

    flops: float
    nbytes: int
    seconds: float | None

    @classmethod
    def of(cls, count: Count, rate: float | None) -> "Cost":
        """At a rate in FLOPs per second, or none."""
        return cls(count.flops, int(count.nbytes), None if rate is None else count.flops / rate)

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f", {self.seconds:.3g} s"
        return f"{self.flops:.3g} FLOPs, {self.nbytes / GIB:.3g} GiB{seconds}"


class BlockCosts:
    """What one block `[P, P]` takes, after `making`; each number is counted when it is asked for.

    Two are equal when all their numbers are.
    """

    def __init__(self, programs: Programs, rate: float | None) -> None:
        self._programs, self._rate = programs, rate
        self.size = programs.operator.size
        """P, the number of rows."""
        self.matrix_bytes = self.size**2 * programs.operator.dtype.itemsize
        """Bytes of the dense matrix alone."""

    @cached_property
    def product(self) -> Cost:
        """A product with one vector."""
        return self._cost(self._programs.product)

    @cached_property
    def dense(self) -> Cost:
        """Making the dense matrix, by rows or by products."""
        return self._cost(self._programs.dense)

    @property
    def method(self) -> str:
        """That of `spectral_summary` with its defaults, "exact" or "lanczos"."""
        return "exact" if self._programs.is_exact else "lanczos"

    @cached_property
    def summary(self) -> Cost:
        """The least that a spectral summary takes: how soon Lanczos converges is not known before."""
        return self._cost(self._programs.eigenvalues if self._programs.is_exact else self._programs.lanczos[0])

    @cached_property
    def summary_most(self) -> Cost:
        """The most that a spectral summary takes, the same for "exact"."""
        return self.summary if self._programs.is_exact else self._cost(self._programs.lanczos[1])

    @property
    def products(self) -> tuple[int, int]:
        """Vectors that "lanczos" multiplies, at least and at most; 0 for "exact"."""
        return (0, 0) if self._programs.is_exact else self._programs.lanczos_products

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockCosts) and self._numbers() == other._numbers()

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        summary = f"{self.summary}" if self.method == "exact" else f"{self.summary} to {self.summary_most}"
        return f"{self.size} rows; a product {self.product}; dense {self.dense}; summary ({self.method}) {summary}"

    def _numbers(self) -> tuple[object, ...]:
        return (
            *(self.size, self.matrix_bytes, self.product, self.dense),
            *(self.method, self.summary, self.summary_most, self.products),
        )

    def _cost(self, count: Count) -> Cost:
        return Cost.of(count, self._rate)


class CurvatureCosts(Mapping[str, BlockCosts]):
    """`BlockCosts` of each parameter by its name, and of all parameters at once (`whole`)."""

    def __init__(self, rehearsal: Rehearsal, quantity: str, rate: float | None) -> None:
        self._rehearsal, self._rate = rehearsal, rate
        made, self._blocks = count_making(rehearsal, QUANTITIES[quantity])
        self.making = Cost.of(made, rate)
        """`curvature_blocks` and what is done once before the first product; for Kronecker factors and diagonals all of it."""
        self.samples = len(rehearsal.jacobian.images)
        """Samples of the data."""
        self.chunk = rehearsal.jacobian.chunk
        """Samples that are evaluated at once."""
        self._known: dict[str, BlockCosts] = {}

    @cached_property
    def whole(self) -> BlockCosts:
        """Costs of the block of all parameters at once."""
        return self._of(self._blocks.whole)

    def __getitem__(self, name: str) -> BlockCosts:
        if name not in self._known:
            self._known[name] = self._of(self._blocks[name])
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def _of(self, operator: SymmetricOperator) -> BlockCosts:
        return BlockCosts(Programs(self._rehearsal, operator), self._rate)


def curvature_costs(
    network: nn.Module,
    loss: Loss,
    batch: tuple[Any, Any] | Iterable[tuple[Any, Any]],
    quantity: str,
    params: Iterable[str] | None = None,
    *,
    output: Output | None = None,
    samples: int = 1,
    fisher: str = "exact",
    chunk: int | None = None,
    memory: int | None = None,
    flops_per_second: float | None = None,
) -> CurvatureCosts:
    """What `curvature_blocks` with these arguments, products with the blocks, dense matrices and spectral summaries take.

    Nothing is computed and no activations are allocated. Network and batch may be on the device meta, where only shapes are;
    costs are those on the CPU then. Of a DataLoader the first batch is read, of other data sets all. FLOPs of products were those
    that PyTorch counts in the computation, to 2 %, memory 0.8 to 1.3 times what its allocator counts (CPU, float32).

    Args:
        network: in its present mode.
        loss: see `curvature_blocks`.
        batch: images `[N, ...]` and labels, or a data set.
        quantity: a key of QUANTITIES.
        params: names of parameters; None: all that require gradients.
        output: what of several outputs the loss reads.
        samples: Monte-Carlo columns.
        fisher: a key of FISHERS, for Kronecker-factored quantities.
        chunk: samples that are evaluated at once; None: as many as the memory allows.
        memory: bytes that may be used; None: most of what is available. Give that of the machine that is meant.
        flops_per_second: what the machine does, for `Cost.seconds`: that of a product you have timed.

    Raises:
        InputError: as `curvature_blocks`, and for a network or a loss that reads numbers while it runs.
    """
    check_known("quantity", quantity, QUANTITIES)
    check_known("fisher", fisher, FISHERS)
    if flops_per_second is not None:
        check_number("flops_per_second", flops_per_second, 0, float("inf"), "()", hint="; or None (no seconds)")
    prepared = rehearsal(
        network,
        loss,
        batch,
        quantity,
        params,
        output=output,
        samples=samples,
        fisher=fisher,
        chunk=chunk,
        memory=memory,
    )
    return CurvatureCosts(prepared, quantity, flops_per_second)
