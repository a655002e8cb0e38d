"""A spectrum in numbers, each with its error: extremes, sums, ranks, condition numbers.

    exact      all eigenvalues; the errors are 0 (rounding of the operator's number format)
    lanczos    extremes by `top_eigenvalues` with residual bounds, everything else by `spectral_density` (the leading
               eigenvalues apart, probes for the rest) with standard errors and what Lanczos cannot see (`counting_bounds`):
               it tells a dense cluster from a single eigenvalue, or a decay from a null space, by weights alone

The usual condition number is |A|_2 over the smallest magnitude above a threshold, and as much a statement about the
threshold as about A: a spectrum that decays through it has as large a condition number as one allows. It is given with
the threshold it was computed at, beside two measures that are not ruled by the smallest eigenvalues:

    median_condition            |A|_2 / median magnitude on the range (depends weakly on the threshold)
    trace_quantile_condition    a / b, where the magnitudes >= a carry 10 % and those >= b carry 90 % of sum |lambda|:
                                no threshold, but blind to outliers: 1 for rank one too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.resuming.long_run import resumable
from secondorder.curvature.spectrum import spectral_statistics as statistics
from secondorder.curvature.spectrum.density import SpectralDensity, exact_density, spectral_density
from secondorder.curvature.spectrum.estimate import Estimate, exact
from secondorder.curvature.spectrum.exact import decomposition_size, known_eigenvalues, rounding
from secondorder.curvature.spectrum.lanczos import top_eigenvalues
from secondorder.curvature.spectrum.open_numbers import exact_numbers, largest_magnitude, quadrature_numbers
from secondorder.curvature.spectrum.products import (
    DEFLATE,
    PROBES,
    STEPS,
    check_count,
    check_operator,
    check_threshold,
    default_tolerance,
)
from secondorder.errors import InputError
from secondorder.optional import needed_by

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SpectralSummary:
    """The numbers of a spectrum [P eigenvalues lambda] as (value, error).

    Args:
        threshold: relative to the largest magnitude; smaller magnitudes are outside the range of A
        largest, smallest, largest_magnitude: max lambda, min lambda, |A|_2
        trace, frobenius_norm: sum lambda, sqrt(sum lambda^2)
        rank: number of magnitudes above the threshold
        condition, median_condition, trace_quantile_condition: see the module; NaN for the zero matrix
        effective_rank: exp of the entropy of |lambda| / sum |lambda|; stable_rank: |A|_F^2 / |A|_2^2;
        participation: (tr A)^2 / |A|_F^2; negative_share: sum of the negative |lambda| / sum |lambda|
    """

    size: int
    method: str
    threshold: float
    largest: Estimate
    smallest: Estimate
    largest_magnitude: Estimate
    trace: Estimate
    frobenius_norm: Estimate
    rank: Estimate
    condition: Estimate
    median_condition: Estimate
    trace_quantile_condition: Estimate
    effective_rank: Estimate
    stable_rank: Estimate
    participation: Estimate
    negative_share: Estimate

    def row(self) -> dict[str, float | int | str]:
        """One row of a table: each value, and its error in a column of its own."""
        row: dict[str, float | int | str] = {}
        for name, value in vars(self).items():
            row |= {name: value.value, f"{name}_error": value.error} if isinstance(value, Estimate) else {name: value}
        return row


@resumable
def spectral_summary(
    operator: SymmetricOperator,
    method: str = "auto",
    *,
    threshold: float | None = None,
    probes: int = PROBES,
    steps: int = STEPS,
    deflate: int = DEFLATE,
    seed: int = 0,
    memory: int | None = None,
) -> SpectralSummary:
    """The numbers of one operator's spectrum, each with its error.

    By Lanczos the lower end of the range is where the averaged weights reach half an eigenvalue. Errors reach as far as the truth
    is open, up to the condition number 1 / threshold where eigenvalues decay through the threshold; those of the sums (trace,
    frobenius_norm, stable_rank, participation) are standard errors.

    Args:
        operator: A `[P, P]`.
        method: "auto" is "exact" where no matrix with more than 2048 rows has to be decomposed (that of a factored operator is
            its smaller Gram matrix), else "lanczos".
        threshold: magnitudes up to this share of the largest are outside the range of A, in [0, 1); None: P eps of the operator's
            number format when exact, and at least what Lanczos can resolve, 1e-8 (float32: 1.2e-5), else.
        probes, steps, deflate, seed, memory: of "lanczos", as of `spectral_density`.

    Raises:
        InputError: for bad arguments and too little memory.
        NonFiniteError: for a matrix or product that is not finite.
    """
    check_operator(operator)
    check_count("deflate", deflate, least=0)
    if threshold is not None:
        check_threshold("threshold", threshold)
    values = known_eigenvalues(operator, method)
    if values is not None:
        return _exact_summary(operator, values, threshold)
    return _lanczos_summary(operator, threshold, probes, steps, deflate, seed, memory)


def _exact_summary(operator: SymmetricOperator, values: Tensor, threshold: float | None) -> SpectralSummary:
    relative = min(rounding(operator), 0.5) if threshold is None else threshold
    top = float(values.abs().max())
    density = exact_density(values, relative * top)
    # what a decomposition may have moved across the threshold
    doubt = rounding(operator) * top / 2 if decomposition_size(operator) > 0 else 0.0
    return _summary("exact", relative, density, exact(values[-1]), exact(values[0]), exact_numbers(density, doubt))


def _lanczos_summary(
    operator: SymmetricOperator,
    threshold: float | None,
    probes: int,
    steps: int,
    deflate: int,
    seed: int,
    memory: int | None,
) -> SpectralSummary:
    resolved = max(rounding(operator), default_tolerance(operator.dtype))
    relative = min(resolved, 0.5) if threshold is None else threshold
    deflate = min(deflate, operator.size - 1)
    density = spectral_density(
        operator, "lanczos", probes=probes, steps=steps, deflate=deflate, zero=relative, seed=seed, memory=memory
    )
    largest, smallest = (_extreme(operator, density, which, seed, memory) for which in ("largest", "smallest"))
    numbers = quadrature_numbers(density, largest, smallest)
    return _summary("lanczos", relative, density, largest, smallest, numbers)


def _extreme(
    operator: SymmetricOperator, density: SpectralDensity, which: str, seed: int, memory: int | None
) -> Estimate:
    """An extreme eigenvalue with its residual, or, not converged, with how far beyond it another may be."""
    top = top_eigenvalues(operator, 1, which, seed=seed, memory=memory)
    value, error = float(top.values[0]), float(top.residuals[0])
    if not bool(top.converged[0]) and density.bounds is not None:
        error = max(error, density.bounds.reach(value, upwards=which == "largest"))
    return Estimate(value, error)


def _summary(
    method: str,
    threshold: float,
    density: SpectralDensity,
    largest: Estimate,
    smallest: Estimate,
    numbers: Mapping[str, Estimate],
) -> SpectralSummary:
    magnitude = largest_magnitude(largest, smallest)
    return SpectralSummary(
        size=density.size,
        method=method,
        threshold=threshold,
        largest=largest,
        smallest=smallest,
        largest_magnitude=magnitude,
        trace=density.trace,
        frobenius_norm=density.frobenius_norm,
        trace_quantile_condition=density.statistic(statistics.trace_quantile_condition, smooth=False),
        effective_rank=density.statistic(statistics.effective_rank),
        stable_rank=density.statistic(partial(statistics.stable_rank, largest=magnitude.value)),
        participation=density.statistic(statistics.participation),
        negative_share=density.statistic(statistics.negative_share),
        **numbers,
    )


def summary_table(
    blocks: Mapping[str, SymmetricOperator],
    method: str = "auto",
    *,
    threshold: float | None = None,
    probes: int = PROBES,
    steps: int = STEPS,
    deflate: int = DEFLATE,
    seed: int = 0,
    memory: int | None = None,
) -> pd.DataFrame:
    """A pandas table with a row of `spectral_summary`, whose arguments and errors it has, for each block, in order.

    Raises InputError when there is no block.
    """
    with needed_by("summary_table"):
        import pandas as pd
    if not blocks:
        raise InputError("needs at least one block, got none")
    summarised = partial(
        spectral_summary,
        method=method,
        threshold=threshold,
        probes=probes,
        steps=steps,
        deflate=deflate,
        seed=seed,
        memory=memory,
    )
    rows = {name: summarised(block).row() for name, block in blocks.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")
