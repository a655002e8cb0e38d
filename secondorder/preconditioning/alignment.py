"""How far two directions in parameter space agree, layer by layer and as a whole, and what one adds beyond a third.

A layer is a weight with its bias; all inner products are in float64. Where an angle does not exist the value is 0, "no
agreement found", never NaN: a direction that is zero, or of which nothing is left beside the one that is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError, check_number, check_whole

MOST_RESAMPLES = 10**7
ROUNDING = 64
"""In units of the directions' machine epsilon: a remainder below it, relative to the direction, is that of rounding."""


@dataclass(frozen=True)
class Alignment:
    """A number in [-1, 1] for each layer, and for all layers as one vector."""

    layers: dict[str, float]
    whole: float


def alignment(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Alignment:
    """cos(a, b) = a . b / (|a| |b|) of each layer and of all together, 0 where one of them is zero.

    Args:
        a, b: tensors of real numbers by parameter names. Raises InputError for different names or shapes,
            NonFiniteError.
    """
    return _by_layer(_cosine, a, b)


def partial_correlation(a: Mapping[str, Tensor], b: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Alignment:
    """cos(a', b') of what is left of a and b without their components along c = `given`, a' = a - (a . c) c / |c|^2:

    (r_ab - r_ac r_bc) / sqrt((1 - r_ac^2)(1 - r_bc^2))     with r the cosines; nothing is centred

    computed from the remainders, not from this difference, which cancels. The whole removes one component of all layers
    together. A zero `given` removes nothing; 0 where a or b is a multiple of `given` up to rounding, so that nothing is left.
    Raises InputError for different names or shapes, NonFiniteError.
    """
    return _by_layer(_partial, a, b, given)


@dataclass(frozen=True)
class Bootstrap:
    """A statistic of n values and its two-sided confidence interval."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., object] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Bootstrap:
    """The percentile interval of a statistic over resampled values, for example mini-batches.

    The percentile interval exists for every statistic and for equal values, unlike BCa (B. Efron, R. Tibshirani, 1993); of few
    values it is somewhat too short.

    Args:
        values: `[n]`, at least 2 numbers.
        statistic: a function of values with an `axis` argument.
        confidence: of the interval, in (0, 1).
        resamples: at least 100.
        seed: of the resampling.

    Raises:
        InputError: for fewer than 2 values and bad options.
        NonFiniteError: for values or a statistic that are not finite.
    """
    try:
        x = np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"values {values!r}: a bootstrap needs a list of at least 2 numbers") from None
    if x.ndim != 1 or x.size < 2:
        raise InputError(f"values of shape {list(x.shape)}: a bootstrap needs a list of at least 2 numbers")
    if not np.isfinite(x).all():
        raise NonFiniteError("values contain NaN or infinity")
    _check_bootstrap(statistic, confidence, resamples, seed)
    with np.errstate(over="ignore", invalid="ignore"):  # a statistic that overflows is refused below
        found = stats.bootstrap(
            (x,),
            statistic,
            n_resamples=resamples,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        if not np.isfinite([np.asarray(statistic(x, axis=0)), found.low, found.high]).all():
            raise NonFiniteError(f"the statistic of values up to {np.abs(x).max():.3g} is not finite; rescale them")
    return Bootstrap(float(np.asarray(statistic(x, axis=0))), float(found.low), float(found.high), x.size, confidence)


def _check_bootstrap(statistic: object, confidence: float, resamples: int, seed: int) -> None:
    """InputError for options of `bootstrap_interval` that cannot be used."""
    if not callable(statistic) or isinstance(statistic, type):
        raise InputError(
            f"statistic {statistic!r}: must be a function of values with an axis, for example numpy.median"
        )
    check_number("confidence", confidence, 0, 1, "()")
    check_whole("resamples", resamples, 100, MOST_RESAMPLES)
    check_whole("seed", seed, 0)


def _by_layer(measure: Callable[..., float], *directions: Mapping[str, Tensor]) -> Alignment:
    """The measure of each layer's part of the directions, scaled to norm 1, and of all parts together."""
    first, *others = directions
    for direction in directions:
        _check_direction(direction)
    if not first:
        raise InputError("a direction without a tensor has no angle; give at least one parameter")
    for other in others:
        _check_alike(first, other)
    layers: dict[str, list[str]] = {}
    for name in first:
        layers.setdefault(name.removesuffix(".weight").removesuffix(".bias"), []).append(name)
    rounding = ROUNDING * max(torch.finfo(tensor.dtype).eps for d in directions for tensor in d.values())
    parts = {layer: [_vector(d, names) for d in directions] for layer, names in layers.items()}
    whole = [_unit(torch.cat(columns), "all") for columns in zip(*parts.values(), strict=True)]
    return Alignment(
        {layer: measure(*(_unit(v, layer) for v in vectors), rounding) for layer, vectors in parts.items()},
        measure(*whole, rounding),
    )


def _cosine(a: Tensor, b: Tensor, rounding: float) -> float:
    """a . b of unit vectors, in [-1, 1] whatever rounding does."""
    return max(-1.0, min(1.0, float(a @ b)))


def _partial(a: Tensor, b: Tensor, c: Tensor, rounding: float) -> float:
    rest_a, rest_b = _remainder(a, c), _remainder(b, c)
    sizes = float(rest_a.norm()), float(rest_b.norm())
    if min(sizes) <= rounding:
        return 0.0
    return _cosine(rest_a / sizes[0], rest_b / sizes[1], rounding)


def _remainder(a: Tensor, c: Tensor) -> Tensor:
    """a without its component along c."""
    return a - (a @ c) * c


def _unit(v: Tensor, layer: str) -> Tensor:
    """v / |v|, also where squares would overflow or vanish; zero for zero. NonFiniteError."""
    largest = float(v.abs().max()) if v.numel() else 0.0
    if largest == 0.0:
        return torch.zeros_like(v)
    if not largest < float("inf"):
        raise NonFiniteError(f"the direction of {layer} contains NaN or infinity")
    scaled = v / largest
    return scaled / scaled.norm()


def _vector(direction: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([direction[name].detach().double().flatten() for name in names])


def _check_direction(direction: Mapping[str, Tensor]) -> None:
    """InputError unless it is tensors of real numbers by name."""
    if not isinstance(direction, Mapping):
        raise InputError(f"direction {direction!r}: must be tensors by the names of parameters")
    for name, tensor in direction.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.device.type == "meta":
            kind = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"direction of {name!r} is {kind}: must be a tensor of real floating-point numbers")


def _check_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    for name in [*a, *b]:
        if name not in a or name not in b or a[name].shape != b[name].shape:
            shapes = [str(list(d[name].shape)) if name in d else "missing" for d in (a, b)]
            raise InputError(
                f"directions of different parameters: {name} is {shapes[0]} in one and {shapes[1]} in another"
            )
