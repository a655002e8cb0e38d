"""Stability along perturbation sequences: flip probability, flip rate, top-5 distance (arXiv 1903.12261).

With y_j the predicted class of frame j of J frames, d the distance of the frames that are compared,

    FP  = mean over sequences and over j = d .. J-1 of [y_j != y_(j-d)]      against the frame before
    FP  = mean over sequences and over j = 1 .. J-1 of [y_j != y_0]          against the first, for noises

and with sigma_k the rank (from 0) in frame j of the class that the other frame ranks k-th,

    T5D = mean over the same pairs of sum_(k<5) |k - min(sigma_k, 5)|

which is 0 for the same five classes in the same order and 15 for five others. Only the five best classes of each frame enter, in
their order. The mean flip rate divides each sequence's FP by a reference network's and is averaged over the sequences; so is the
mean T5D. Ten classes saturate T5D: at random five of ten stay among the best five half of the time.

Index letters: ``N`` sequences, ``J`` frames, ``P`` pairs of frames, ``K`` classes.
"""

from collections.abc import Mapping
from numbers import Real
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError, check_known, check_whole, short
from secondorder.robustness.sequences import comparison

AGAINST = ("previous", "first")
BEST = 5
"""Classes of a frame that the top-5 distance looks at."""

Numbers = Tensor | NDArray[Any]


def flips(predictions: Numbers, against: str = "previous", distance: int = 1) -> Tensor:
    """The share of pairs of frames of each sequence whose classes differ, float64 ``[N]``; its mean is the flip probability.

    Args:
        predictions: classes ``[N, J]``, whole numbers.
        against: "previous": the frame ``distance`` before; "first": frame 0.
        distance: of the frames, the difficulty; 1 against the first.

    Raises:
        InputError: for other predictions, unknown ``against``, no sequence, and a sequence too short for one pair.
    """
    classes = _whole_numbers(predictions, "predictions", 2)
    earlier, later = _pairs(classes, against, distance)
    return (earlier != later).double().mean(1)


def flip_probability(predictions: Numbers, against: str = "previous", distance: int = 1) -> float:
    """FP on [0, 1], the mean of `flips` over all sequences; arguments and errors are those of `flips`."""
    return float(flips(predictions, against, distance).mean())


def flip_probabilities(predictions: Mapping[str, Numbers], difficulty: int = 1) -> dict[str, float]:
    """FP of every perturbation: of noises against the first frame, of the others between frames ``difficulty`` apart.

    Args:
        predictions: perturbation -> classes ``[N, J]`` of its sequences, made at this difficulty.
        difficulty: 1 to 3.

    Raises:
        InputError: as `flips`, for no perturbation, an unknown one and a difficulty out of range.
    """
    if not isinstance(predictions, Mapping) or not predictions:
        raise InputError(f"predictions are {short(predictions)}; give a mapping: perturbation -> classes [N, frames]")
    return {name: flip_probability(classes, *comparison(name, difficulty)) for name, classes in predictions.items()}


def best_classes(logits: Numbers) -> Tensor:
    """The five classes with the largest logits ``[..., K]`` in their order, int64 ``[..., 5]``; of equal ones the first.

    Raises:
        InputError: for fewer than 6 classes, where no class can leave the best five.
        NonFiniteError: for logits that are not finite, which have no order.
    """
    logits = _tensor(logits, "logits")
    if logits.ndim < 1 or not logits.is_floating_point():
        raise InputError(
            f"logits are {logits.dtype} of shape {list(logits.shape)}; give floating-point numbers [..., classes]"
        )
    if logits.shape[-1] <= BEST:
        raise InputError(
            f"the top-5 distance needs at least 6 classes, got {logits.shape[-1]}; use the flip probability"
        )
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("the logits have values that are not finite; they have no order")
    return ranked(logits)[..., :BEST]


def ranked(logits: Tensor) -> Tensor:
    """Classes ``[..., K]`` by falling logits; equal ones in their order, so that the same logits give the same order anywhere."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


def top5_distances(outputs: Numbers, against: str = "previous", distance: int = 1) -> Tensor:
    """The top-5 distance of each sequence, float64 ``[N]`` on [0, 15].

    Args:
        outputs: logits, floating-point ``[N, J, K]``, or the best five classes in their order, whole numbers ``[N, J, 5]``.
        against: "previous": the frame ``distance`` before; "first": frame 0.
        distance: of the frames, the difficulty; 1 against the first.

    Raises:
        InputError: as `flips` and `best_classes`, and for best classes that are not five different ones.
    """
    given = _tensor(outputs, "outputs")
    if given.ndim != 3 or not len(given):
        raise InputError(
            f"outputs have the shape {list(given.shape)}; give logits [N, J, K] or the best five classes [N, J, 5] of at "
            "least 1 sequence"
        )
    best = best_classes(given) if given.is_floating_point() else _whole_numbers(given, "outputs", 3)
    if best.shape[2] != BEST or bool((best.sort(2).values.diff(dim=2) == 0).any()):
        raise InputError(
            f"outputs {list(best.shape)} of whole numbers are not the best five classes [N, J, 5] of each frame"
        )
    earlier, later = _pairs(best, against, distance)  # [N, P, 5] both
    same = earlier[..., :, None] == later[..., None, :]  # [N, P, k, rank]: whether the k-th class has this rank later
    position = torch.arange(BEST, device=best.device)
    sigma = torch.where(same.any(-1), same.byte().argmax(-1), BEST)
    return (position - sigma).abs().sum(-1).double().mean(1)


def top5_distance(outputs: Numbers, against: str = "previous", distance: int = 1) -> float:
    """T5D on [0, 15], the mean of `top5_distances` over all sequences; arguments and errors are those of `top5_distances`."""
    return float(top5_distances(outputs, against, distance).mean())


def mean_flip_rate(probabilities: Mapping[str, float], normaliser: Mapping[str, float] | None) -> float:
    """The mFR: mean over the sequences of FP / FP of the reference; the mean FP without one.

    Args:
        probabilities: perturbation -> FP of the network.
        normaliser: that of a reference network, for the same perturbations; None for none. AlexNet's are not at hand.

    Raises:
        InputError: for "alexnet", values that are not finite or negative, perturbations that differ, and a reference of 0.
    """
    return _mean_ratio(probabilities, normaliser, "flip probability", 1.0)


def mean_top5_distance(distances: Mapping[str, float], normaliser: Mapping[str, float] | None) -> float:
    """The mT5D: mean over the sequences of T5D / T5D of the reference; arguments and errors as of `mean_flip_rate`."""
    return _mean_ratio(distances, normaliser, "top-5 distance", 15.0)


def _mean_ratio(
    values: Mapping[str, float], normaliser: Mapping[str, float] | None, quantity: str, highest: float
) -> float:
    """The mean over perturbations of value / reference."""
    if normaliser is not None and not isinstance(normaliser, Mapping):
        published = (
            "no published values of alexnet are at hand (they are in a spreadsheet linked in issue 49 of hendrycks/robustness)"
            if normaliser == "alexnet"
            else f"unknown normaliser {short(normaliser)}"
        )
        raise InputError(f"{quantity}: {published}; give a reference network's values by perturbation, or None")
    checked = _checked(values, f"the {quantity}", highest)
    if normaliser is None:
        return fmean(checked.values())
    reference = _checked(normaliser, f"the normaliser's {quantity}", highest)
    if odd := sorted(checked.keys() ^ reference.keys()):
        raise InputError(f"{', '.join(odd)}: in one of the network's and the normaliser's values only; give both")
    if still := [name for name, value in reference.items() if value == 0]:
        raise InputError(
            f"the normaliser's {quantity} of {', '.join(still)} is 0; leave it out or choose normaliser None"
        )
    return fmean(checked[name] / reference[name] for name in checked)


def _checked(values: Mapping[str, float], what: str, highest: float) -> dict[str, float]:
    """The values as floats on [0, highest]."""
    if not isinstance(values, Mapping) or not values:
        raise InputError(f"{what} is {short(values)}; give a mapping: perturbation -> number")
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= highest:
            raise InputError(f"{what} of {short(name)} is {short(value)}; it is a number from 0 to {highest:g}")
    return {name: float(value) for name, value in values.items()}


def _tensor(values: Numbers, what: str) -> Tensor:
    """The values as a tensor; InputError for what is no array of numbers."""
    try:
        return values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} are {short(values)}; give an array of numbers") from error


def _whole_numbers(values: Numbers, what: str, dimensions: int) -> Tensor:
    """The values as int64 ``[N, J, ...]``; InputError for another number of dimensions or kind, or no sequence."""
    given = _tensor(values, what)
    if given.ndim != dimensions or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"{what} are {given.dtype} of shape {list(given.shape)}; give whole numbers [N, frames]")
    if not len(given):
        raise InputError(f"{what} have the shape {list(given.shape)}: no sequence; at least 1 is needed")
    return given.to(torch.int64)


def _pairs(frames: Tensor, against: str, distance: int) -> tuple[Tensor, Tensor]:
    """The frames ``[N, J, ...]`` that are compared, ``[N, P, ...]`` twice: the earlier and the later of each pair."""
    check_known("against", against, AGAINST)
    check_whole("distance", distance)
    if against == "first" and distance != 1:
        raise InputError(f"distance {distance} against the first frame; it is 1 there, difficulty is in the noise")
    if frames.shape[1] <= distance:
        raise InputError(
            f"sequences of {frames.shape[1]} frames have no two that are {distance} apart; give longer ones"
        )
    later = frames[:, distance:]
    return (frames[:, :1].expand_as(later) if against == "first" else frames[:, :-distance]), later
