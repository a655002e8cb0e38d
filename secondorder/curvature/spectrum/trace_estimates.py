"""Trace, Frobenius norm and diagonal of an operator from products with random vectors.

    hutchinson    mean of omega^T A omega                             one product a probe; error ~ |A|_F / sqrt(K)
    hutch++       the exact trace on a sketch, chance on the rest     three products a probe; far smaller error when the
                                                                      eigenvalues decay (see `sketch`)
    exact         stored numbers, or P products

M. Hutchinson (1990); C. Bekas, E. Kokiopoulou, Y. Saad (2007) for the diagonal; R. Meyer et al. (2021).

Index letters: P rows of the operator, K probes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.estimate import Estimate, exact, mean, mean_and_error
from secondorder.curvature.spectrum.exact import has_diagonal, in_memory, inner_product, is_stored
from secondorder.curvature.spectrum.products import (
    COLUMNS,
    check_count,
    check_name,
    check_operator,
    columns,
    finite,
    gaussian,
    generator,
    product,
    rademacher,
)
from secondorder.curvature.spectrum.sketch import Sketch
from secondorder.curvature.spectrum.units import scaled, squares_are_lost, unit_of

METHODS = ("auto", "exact", "hutchinson", "hutch++")
DISTRIBUTIONS: dict[str, Callable[[SymmetricOperator, int, torch.Generator], Tensor]] = {
    "rademacher": rademacher,
    "gaussian": gaussian,
}


class DiagonalEstimate(NamedTuple):
    """The diagonal `[P]` and the standard error of each entry `[P]` (0 when exact), float64 on the CPU."""

    value: Tensor
    error: Tensor


def trace_estimate(
    operator: SymmetricOperator,
    method: str = "auto",
    *,
    probes: int = 20,
    distribution: str = "rademacher",
    seed: int = 0,
    memory: int | None = None,
) -> Estimate:
    """tr A and its standard error, by an exact or a random method.

    Args:
        operator: A `[P, P]`.
        method: "exact"; "hutchinson", the mean of omega^T A omega; "hutch++", exact on a sketch of A, chance on the rest. "auto"
            is exact for stored operators, Gauss-Newton matrices with a known factor, and where P products are no more than those
            of hutch++; else hutch++.
        probes: random vectors; hutch++ multiplies three times as many.
        distribution: of Hutchinson's probes: "rademacher" (signs) or "gaussian"; those of hutch++ are Gaussian directions.
        seed: of the probes.
        memory: bytes of hutch++'s vectors; None: what is available, and 2 GiB at least.

    Raises:
        InputError: for bad arguments and too little memory.
        NonFiniteError: for a product that is not finite.
    """
    _check(operator, method, probes, distribution)
    method = _resolved(operator, method, probes, has_diagonal(operator))
    if method == "exact":
        return exact(_exact_diagonal(operator).sum())
    if method == "hutch++":
        sketch = Sketch([operator], probes, generator(seed), memory)
        return mean(sketch.trace(sketch.images[0]))
    samples = [(V * AV).sum(0).cpu() for V, AV in _probes(operator, probes, distribution, seed)]
    return mean(torch.cat(samples))


def frobenius_norm_estimate(
    operator: SymmetricOperator,
    method: str = "auto",
    *,
    probes: int = 20,
    distribution: str = "rademacher",
    seed: int = 0,
    memory: int | None = None,
) -> Estimate:
    """|A|_F = sqrt(tr A^2) and its standard error by the delta method; arguments and errors as of `trace_estimate`."""
    _check(operator, method, probes, distribution)
    if method in ("auto", "exact"):
        operator = in_memory(operator)
    method = _resolved(operator, method, probes, is_stored(operator))
    found = _frobenius_norm(operator, method, probes, distribution, seed, memory)
    if not squares_are_lost(found.value * found.value):
        return found
    unit = unit_of(operator)
    value, error = _frobenius_norm(scaled(operator, 1 / unit), method, probes, distribution, seed, memory)
    return Estimate(value * unit, error * unit)


def _frobenius_norm(
    operator: SymmetricOperator, method: str, probes: int, distribution: str, seed: int, memory: int | None
) -> Estimate:
    if method == "exact":
        return exact(_exact_squared_norm(operator) ** 0.5)
    if method == "hutch++":
        sketch = Sketch([operator], probes, generator(seed), memory)
        squared = mean(sketch.inner(sketch.images[0], sketch.images[0]))
    else:
        samples = [AV.square().sum(0).cpu() for _, AV in _probes(operator, probes, distribution, seed)]
        squared = mean(torch.cat(samples))
    norm = squared.value**0.5
    return Estimate(norm, squared.error / (2 * norm) if norm > 0 else squared.error)


def diagonal_estimate(
    operator: SymmetricOperator,
    method: str = "auto",
    *,
    probes: int = 20,
    distribution: str = "rademacher",
    seed: int = 0,
    memory: int | None = None,
) -> DiagonalEstimate:
    """The diagonal `[P]`, mean of omega * A omega, and standard errors `[P]`; arguments and errors as of `trace_estimate`."""
    _check(operator, method, probes, distribution)
    method = _resolved(operator, method, probes, has_diagonal(operator))
    if method == "exact":
        entries = _exact_diagonal(operator).cpu()
        return DiagonalEstimate(entries, torch.zeros_like(entries))
    if method == "hutch++":
        sketch = Sketch([operator], probes, generator(seed), memory)
        return DiagonalEstimate(*mean_and_error(sketch.diagonal(sketch.images[0])))
    samples = [(V * AV).mT.cpu() for V, AV in _probes(operator, probes, distribution, seed)]
    return DiagonalEstimate(*mean_and_error(torch.cat(samples)))


def _check(operator: SymmetricOperator, method: str, probes: int, distribution: str) -> None:
    check_operator(operator)
    check_name("method", method, METHODS)
    check_count("probes", probes)
    check_name("distribution", distribution, tuple(DISTRIBUTIONS))


def _resolved(operator: SymmetricOperator, method: str, probes: int, known: bool) -> str:
    """The method that is used: hutch++ with as many products as rows is only a longer way to the exact value."""
    if method == "auto":
        method = "exact" if known else "hutch++"
    return "exact" if method == "hutch++" and operator.size <= 3 * probes else method


def _probes(operator: SymmetricOperator, probes: int, distribution: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random vectors and their products, a few at a time."""
    source = generator(seed)
    for start in range(0, probes, COLUMNS):
        V = DISTRIBUTIONS[distribution](operator, min(COLUMNS, probes - start), source)
        yield V, product(operator, V)


def _exact_diagonal(operator: SymmetricOperator) -> Tensor:
    if has_diagonal(operator):
        return finite("diagonal", operator, operator.diagonal())
    return torch.cat([part[place].diagonal() for place, part in columns(operator)])


def _exact_squared_norm(operator: SymmetricOperator) -> float:
    known = inner_product(operator, operator)
    return known if known is not None else sum(float(part.square().sum()) for _, part in columns(operator))
