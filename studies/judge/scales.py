"""Scales on which values are averaged: each makes a quantity with bounds unbounded, so that a t interval stays in its range."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from secondorder.errors import InputError

Array = NDArray[np.float64]

ROUNDING = 1e-6
"""How far beyond the ends of its range rounding may bring a fraction or a correlation."""


@dataclass(frozen=True)
class Scale:
    """An increasing function g of values in (low, high) onto all numbers, and its inverse.

    bounded: whether a value beyond [low, high] is a mistake (a percentage where a fraction is meant), not a measurement.
    """

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    low: float
    high: float
    bounded: bool = False

    def transformed(self, values: ArrayLike) -> Array:
        """g of the values, those beyond the range moved to its ends, where g is infinite; nan stays nan."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.forward(np.clip(np.asarray(values, dtype=float), self.low, self.high)))

    def natural(self, values: ArrayLike) -> Array:
        """The values that g takes to these; beyond the largest number is infinite."""
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(self.inverse(np.asarray(values, dtype=float)))


SCALES = {
    "identity": Scale(np.positive, np.positive, -np.inf, np.inf),
    "log": Scale(np.log, np.exp, 0.0, np.inf),
    "logit": Scale(special.logit, special.expit, 0.0, 1.0, bounded=True),
    "fisher": Scale(np.arctanh, np.tanh, -1.0, 1.0, bounded=True),
}
"""identity; log for positive values; logit, log(p / (1 - p)), for fractions; Fisher's z, artanh(r), for correlations."""


def check_range(name: str, values: Array) -> None:
    """InputError for a finite value beyond the range of a bounded scale by more than ROUNDING."""
    scale = SCALES[name]
    finite = values[np.isfinite(values)]
    beyond = finite[(finite < scale.low - ROUNDING) | (finite > scale.high + ROUNDING)]
    if scale.bounded and beyond.size:
        raise InputError(
            f"value {beyond[0]:g}: {name!r} takes values from {scale.low:g} to {scale.high:g}; divide percentages by 100"
        )
