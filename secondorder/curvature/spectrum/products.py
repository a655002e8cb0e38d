"""Products with vectors that are kept in float64, and what the estimators ask of their arguments.

Every vector of this package is float64 on the operator's device; an operator in float32 multiplies in float32 and its
result is widened, so that orthogonalisation and all sums are float64. Random numbers come from a generator on the CPU:
a seed gives the same probes on every device and leaves the global random state alone.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from secondorder.accelerator import check_float64
from secondorder.curvature.matrix_free.memory import UNLIMITED, budget
from secondorder.curvature.operators import DenseOperator, SymmetricOperator
from secondorder.errors import InputError, NonFiniteError, check_known, check_number, check_seed, check_whole

MEMORY = 2 * 2**30  # bytes of float64 vectors that an estimator may always hold at a time, where it is given no budget
DOUBLE = 8  # bytes
PROBES, STEPS, DEFLATE = 10, 80, 10
"""Random vectors, steps of Lanczos from each, and eigenvalues of largest magnitude that are computed by themselves."""
MAX_ITERATIONS = 300
"""Products in the search for extreme eigenvalues."""
MOST = 2**31 - 1  # of everything that is counted
COLUMNS = 64  # vectors multiplied at a time where their number is free


def product(operator: SymmetricOperator, V: Tensor) -> Tensor:
    """A V in float64 for V `[P, K]`. Raises NonFiniteError when the result is not finite."""
    return finite("product", operator, operator @ V)


def finite(what: str, operator: SymmetricOperator, values: Tensor) -> Tensor:
    """The values in float64. Raises NonFiniteError, which names the operator, unless all are finite."""
    check_float64(values.device, "a spectral estimate")
    values = values.double()
    if not values.isfinite().all():
        raise NonFiniteError(
            f"a {what} of {type(operator).__name__} ({operator.size} rows, {operator.dtype}) has "
            f"{int((~values.isfinite()).sum())} non-finite entries; check the network's values, or use float64"
        )
    return values


def columns(operator: SymmetricOperator) -> Iterator[tuple[slice, Tensor]]:
    """The operator's columns in float64, `[P, <= 64]` at a time, each with the slice of the columns that it is."""
    for start in range(0, operator.size, COLUMNS):
        place = slice(start, min(start + COLUMNS, operator.size))
        if isinstance(operator, DenseOperator):
            yield place, finite("matrix", operator, operator.matrix[:, place])
            continue
        unit = torch.zeros(operator.size, place.stop - start, dtype=torch.float64, device=operator.device)
        unit[start:].fill_diagonal_(1)
        yield place, product(operator, unit)


def generator(seed: int) -> torch.Generator:
    """A seeded source of random numbers of its own. Raises InputError unless the seed is a whole number from 0."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed)


def gaussian(operator: SymmetricOperator, count: int, source: torch.Generator) -> Tensor:
    """Standard normal vectors `[P, count]` for products with the operator."""
    check_float64(operator.device, "a spectral estimate")
    return torch.randn(operator.size, count, generator=source, dtype=torch.float64).to(operator.device)


def rademacher(operator: SymmetricOperator, count: int, source: torch.Generator) -> Tensor:
    """Vectors of random signs `[P, count]` for products with the operator."""
    signs = torch.randint(2, (operator.size, count), generator=source, dtype=torch.int8)
    return (2 * signs - 1).to(operator.device, torch.float64)


def default_tolerance(dtype: torch.dtype) -> float:
    """What an iteration can resolve, relative to the largest magnitude: 1e-8, and 100 eps of a short number format."""
    return max(1e-8, 100 * torch.finfo(dtype).eps)


def norm(vectors: Tensor, dim: int) -> Tensor:
    """Euclidean lengths of vectors along `dim`, also of such whose squares would vanish or overflow."""
    largest = vectors.abs().amax(dim, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    return (vectors / scale).norm(dim=dim) * scale.squeeze(dim)


def allowed(operator: SymmetricOperator, memory: int | None) -> int:
    """Bytes of vectors on the operator's device: `memory`, else what is available there, 2 GiB at least.

    Below that results do not depend on how much a machine happens to have. InputError for a bad memory.
    """
    if memory is None:
        return max(MEMORY, budget(None, operator.device))
    check_positive("memory", memory)
    return int(min(memory, UNLIMITED))


def affordable(rows: int, operator: SymmetricOperator, memory: int | None) -> int:
    """How many of at most `rows` float64 vectors of the operator's size are `allowed`. InputError for a bad memory."""
    return min(rows, allowed(operator, memory) // (DOUBLE * max(operator.size, 1)))


def refuse_memory(rows: int, operator: SymmetricOperator, memory: int | None, way_out: str) -> InputError:
    """The error for vectors that do not fit, with the numbers."""
    return InputError(
        f"{rows} float64 vectors of {operator.size} entries take {rows * operator.size * DOUBLE / 2**30:.2g} GiB, more than "
        f"memory = {allowed(operator, memory) / 2**30:.2g} GiB; {way_out}"
    )


def check_operator(operator: SymmetricOperator) -> None:
    """Raises InputError unless it is a symmetric operator with at least one row, on a device that holds numbers."""
    if not isinstance(operator, SymmetricOperator):
        raise InputError(f"needs a SymmetricOperator, got {type(operator).__name__}; wrap a matrix in DenseOperator")
    if operator.size < 1:
        raise InputError("needs an operator with at least one row, got size 0")
    if operator.device.type == "meta":
        raise InputError(f"the {type(operator).__name__} is on the device 'meta', which holds no numbers")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises InputError unless the value is a whole number of at least `least` and at most MOST."""
    check_whole(name, value, least, MOST)


def check_positive(name: str, value: float) -> None:
    """Raises InputError unless the value is a positive finite number."""
    check_number(name, value, 0, math.inf, "()")


def check_threshold(name: str, value: float) -> None:
    """Raises InputError unless the value is at least 0 and below 1."""
    check_number(name, value, 0, 1, hint="; relative to the largest magnitude")


def check_name(kind: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises InputError for a value that is not among the allowed names; `kind` is what the message calls it."""
    check_known(kind, value, allowed)
