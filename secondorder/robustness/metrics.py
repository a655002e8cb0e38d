"""Corruption errors as functions of error tables: CE, mCE and relative mCE (Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261).

With E_sc the top-1 error of a network on corruption c at severity s = 1..5 and R that of a reference network,

    CE_c           = sum_s E_sc / sum_s R_sc                            mCE: its mean over the corruptions
    relative CE_c  = sum_s (E_sc - E_clean) / sum_s (R_sc - R_clean)    relative mCE: its mean over the corruptions

An error table is a mapping: corruption -> errors at severities 1 to 5, fractions on [0, 1]. The reference, ``normaliser``, is

    "alexnet"   AlexNet's published errors on ImageNet-C, for the 15 corruptions of the benchmark
    a table     errors of another network on the same images, such as the GAP network beside a GCP network
    None        nothing: 5 below the line, so that CE_c is the mean error over the severities, relative CE_c the mean loss

Published numbers are percentages: 100 CE.
"""

from collections.abc import Mapping, Sequence
from numbers import Real
from statistics import fmean

from secondorder.errors import InputError, check_known, short
from secondorder.robustness.alexnet import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS

SEVERITIES = (1, 2, 3, 4, 5)

ErrorTable = Mapping[str, Sequence[float]]

NORMALISERS: dict[str, tuple[ErrorTable, float]] = {"alexnet": (ALEXNET_ERRORS, ALEXNET_CLEAN_ERROR)}
"""Name -> published errors of a reference network and its clean error."""


def corruption_errors(errors: ErrorTable, normaliser: str | ErrorTable | None) -> dict[str, float]:
    """CE_c = sum_s E_sc / sum_s R_sc of every corruption c of the table, R the reference's errors (5 below the line without one).

    Args:
        errors: of the network: corruption -> fractions at severities 1 to 5.
        normaliser: "alexnet", the error table of a reference network, or None.

    Raises:
        InputError: for an empty table, a number of errors other than 5, an error that is no fraction, a corruption that the
            reference lacks, and a reference that makes no error on one.
    """
    table = _checked(errors, "the error table")
    reference, _ = _reference(normaliser, None)
    return _ratios(table, 0.0, reference, 0.0)


def mean_corruption_error(errors: ErrorTable, normaliser: str | ErrorTable | None) -> float:
    """The mCE: mean of `corruption_errors` over the corruptions of the reference; without one, over those of the table.

    Args:
        errors: of the network: corruption -> fractions at severities 1 to 5.
        normaliser: "alexnet", the error table of a reference network, or None.

    Raises:
        InputError: as `corruption_errors`, and for a table that lacks a corruption of the reference.
    """
    reference, _ = _reference(normaliser, None)
    _check_complete(errors, reference)
    return fmean(corruption_errors(errors, normaliser).values())


def relative_corruption_errors(
    errors: ErrorTable, clean: float, normaliser: str | ErrorTable | None, normaliser_clean: float | None = None
) -> dict[str, float]:
    """Relative CE_c = sum_s (E_sc - E_clean) / sum_s (R_sc - R_clean) of every corruption c of the table.

    Args:
        errors: of the network: corruption -> fractions at severities 1 to 5.
        clean: its error on the images without corruption.
        normaliser: "alexnet", the error table of a reference network, or None.
        normaliser_clean: clean error of the reference network; for a table only.

    Raises:
        InputError: as `corruption_errors`, for a clean error that is no fraction or missing, and a reference that loses nothing
            by a corruption.
    """
    table = _checked(errors, "the error table")
    clean = _fraction(clean, "clean error")
    if isinstance(normaliser, Mapping) and normaliser_clean is None:
        raise InputError("normaliser_clean is None; a relative error needs the reference network's clean error")
    reference, reference_clean = _reference(normaliser, normaliser_clean)
    return _ratios(table, clean, reference, reference_clean)


def relative_mean_corruption_error(
    errors: ErrorTable, clean: float, normaliser: str | ErrorTable | None, normaliser_clean: float | None = None
) -> float:
    """The relative mCE: mean of `relative_corruption_errors` over the corruptions of the reference, or of the table without one.

    Arguments and errors are those of `relative_corruption_errors`; InputError, too, for a table that lacks a corruption of the
    reference.
    """
    reference, _ = _reference(normaliser, normaliser_clean)
    _check_complete(errors, reference)
    return fmean(relative_corruption_errors(errors, clean, normaliser, normaliser_clean).values())


def _ratios(
    table: dict[str, list[float]], clean: float, reference: dict[str, list[float]] | None, reference_clean: float
) -> dict[str, float]:
    """sum_s (E_sc - clean) / sum_s (R_sc - reference_clean) of every corruption; 5 below the line without a reference."""
    ratios = {}
    for name, row in table.items():
        denominator = float(len(SEVERITIES))
        if reference is not None:
            if name not in reference:
                raise InputError(
                    f"the normaliser has no errors of {short(name)}, only of {', '.join(map(str, reference))}"
                )
            denominator = sum(reference[name]) - len(SEVERITIES) * reference_clean
            if not denominator > 0:
                raise InputError(
                    f"the normaliser loses nothing by {name} (sum of errors above {reference_clean:g}: {denominator:g}); "
                    "leave the corruption out or choose normaliser None"
                )
        ratios[name] = (sum(row) - len(SEVERITIES) * clean) / denominator
    return ratios


def _reference(normaliser: str | ErrorTable | None, clean: float | None) -> tuple[dict[str, list[float]] | None, float]:
    """The checked table of the reference network and its clean error; None and 0 without one."""
    if isinstance(normaliser, Mapping):
        return _checked(normaliser, "the normaliser"), 0.0 if clean is None else _fraction(clean, "normaliser_clean")
    if clean is not None:
        raise InputError(f"normaliser_clean is {short(clean)}: it goes with a table as normaliser; leave it out")
    if normaliser is None:
        return None, 0.0
    check_known("normaliser (or give an error table, or None)", normaliser, NORMALISERS)
    published, published_clean = NORMALISERS[normaliser]
    return _checked(published, normaliser), published_clean


def _check_complete(errors: ErrorTable, reference: dict[str, list[float]] | None) -> None:
    """InputError where the table lacks a corruption of the reference: a mean over fewer is another quantity."""
    table = _checked(errors, "the error table")
    missing = [str(name) for name in reference or () if name not in table]
    if missing:
        raise InputError(f"the error table lacks {', '.join(missing)}; a mean takes every corruption of the normaliser")


def _checked(table: ErrorTable, what: str) -> dict[str, list[float]]:
    """The table in plain numbers, errors named by corruption and severity; ``what`` begins the message."""
    if not isinstance(table, Mapping) or not table:
        raise InputError(f"{what} is {short(table)}; give a mapping: corruption -> errors at severities 1 to 5")
    checked = {}
    for name, row in table.items():
        try:
            values = [] if isinstance(row, Mapping | str) else list(row)
        except TypeError:  # a number, None
            values = []
        if len(values) != len(SEVERITIES):
            raise InputError(
                f"{what} has {short(row)} for {short(name)}; give {len(SEVERITIES)} errors, severities 1 to 5"
            )
        checked[name] = [_fraction(v, f"{name} at severity {s}") for s, v in zip(SEVERITIES, values, strict=True)]
    return checked


def _fraction(value: float, what: str) -> float:
    """The value as a float on [0, 1]; InputError that begins with ``what`` for anything else, NaN among it."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise InputError(f"{what}: error {short(value)}; an error is a fraction from 0 to 1")
    return float(value)
