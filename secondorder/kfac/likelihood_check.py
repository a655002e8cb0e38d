"""Whether a gradient d at the outputs z is that of the declared likelihood, from z and d alone: the labels are not known.

    cross_entropy   d = c w (softmax z - y), sum_k y_k = 1     sums to zero over the classes, whatever labels and weights
    bce             d = c w (sigmoid z - y), y in [0, 1]       lies in c w (sigmoid z - 1, sigmoid z)
    mse             d = 2 c (z - y), any y                     can be anything

with c = 1 / N T, 1 / elements and 1 / elements for reduction "mean", 1 for "sum", and weights w of classes, samples or masks.
A squared error is another loss where the labels y that this would have had take few values. A bernoulli gradient that leaves
its interval may have weights or a factor: with hard labels the weights |d| / |sigmoid z - y| take few values or are of one size,
and with soft ones anything that is not another loss by its labels is possible, which is a doubt and no error.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secondorder.accelerator import widest
from secondorder.errors import InputError

SUM, HALF_SUM, SURE = 1e-3, 2e-2, 1e-5
"""How far from zero the gradient at the logits may sum over the classes: shares of its size, and of that of one class, which a
network that is sure of every label rounds away."""
TERM = 2e-2
"""The same where all sums have one sign, as a small further term on the logits has it: a doubt."""
BOUND, HALF_BOUND = 1e-2, 5e-2
"""How far a gradient may be outside of its interval, and a factor from 1: relative."""
SAME, HALF_SAME = 1e-4, 1e-2
"""Differences of equal values, in units of the largest: half precision keeps three digits or fewer."""
SATURATED = 0.05
"""Probabilities of the other label below which a gradient is mostly rounding."""
LEAST_VALUES, MOST_VALUES, HALF_VALUES = 8, 256, 32
"""Elements that are compared: with fewer there is no verdict, among more some values are equal by chance."""
MOST = 0.8
"""Share of equal values that hard or smoothed labels have."""
WEIGHTS = 10.0
"""Ratio of the largest to the smallest weight of an element that is believed."""
LARGEST_WEIGHT = 1e3
"""Weight of an element from which on it is none, in units of a sum over the elements of a sample."""
PROBABILITIES = ("Sigmoid", "Softmax")
"""Operations whose results are no logits."""


def verify_likelihood(
    logits: Tensor, gradient: Tensor, likelihood: str, reduction: str, shrunk: float = 1.0, made_by: str = ""
) -> str | None:
    """InputError for a gradient at the outputs that the declared likelihood cannot have; a sentence for one that raises doubts.

    Args:
        logits: outputs z `[N, K, ...]`, for "bce" and "mse" also `[N]`.
        gradient: d of the loss, in the same shape.
        likelihood: "cross_entropy", "mse" or "bce".
        reduction: "mean" or "sum".
        shrunk: by how much gradients were made smaller since (a scaler that is not known, clipping): 1 for not at all.
        made_by: the operation that made the outputs, as `secondorder.kfac.graph.made_by` names it.
    """
    if not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
        return None
    if made_by in PROBABILITIES and likelihood != "mse":
        raise InputError(
            f"the outputs are probabilities, made by a {made_by.lower()}, and likelihood={likelihood!r} takes logits: leave it "
            "to the loss (F.cross_entropy, F.binary_cross_entropy_with_logits have their own); Options(check=False) accepts it"
        )
    half = min(logits.dtype.itemsize, gradient.dtype.itemsize) < 4
    return CHECKS[likelihood](logits, gradient * min(1.0, shrunk) if likelihood == "bce" else gradient, reduction, half)


def _verify_cross_entropy(z: Tensor, d: Tensor, reduction: str, half: bool) -> str | None:
    """Over the classes, dim 1, the gradient sums to zero, whatever the labels are: soft, smoothed, weighted or ignored."""
    d = _wide(d)
    least = SURE * (d.numel() / d.shape[1] if reduction == "sum" else 1)
    sums, size = d.sum(1), float(d.abs().sum())
    most = (HALF_SUM if half else SUM) * size + least
    found = float(sums.abs().sum())
    if found <= most:
        return None
    if d.ndim > 2 and float(d.sum(-1).abs().sum()) <= most:
        raise InputError(
            f"outputs {list(d.shape)} have their classes in the last dimension, likelihood='cross_entropy' has them in dim 1: "
            f"pass logits.flatten(0, {d.ndim - 2}) to update_curvature, and to the loss, or logits.movedim(-1, 1)"
        )
    if found <= TERM * size and found <= (1 + SURE) * abs(float(sums.sum())):
        return (
            f"the loss's gradient at the outputs sums to {found / size:.1%} of its size over dim 1, that of a cross-entropy to "
            "zero: a small further term on the logits, as a z-loss, is not in the curvature; for another loss pass "
            "Fisher(likelihood=...)"
        )
    raise InputError(
        "the loss's gradient at the outputs does not sum to zero over dim 1, as that of a cross-entropy of logits does: pass "
        "fisher=Fisher(likelihood='mse') or 'bce', or logits without the model's own sigmoid or softmax; Options(check=False) "
        "accepts a further term on the logits"
    )


def _verify_bernoulli(z: Tensor, d: Tensor, reduction: str, half: bool) -> str | None:
    """The gradient lies in c (sigmoid - 1, sigmoid), c of the elements that are not masked, or in that times weights."""
    z, d = _wide(z), _wide(d)
    u, far = d.abs() / _constant(z, "bce", reduction), _other(z, d)
    masked = d.numel() / int((d != 0).sum()) if reduction == "mean" else 1.0
    tolerance, rounding = (HALF_BOUND, HALF_BOUND) if half else (BOUND, SURE)
    if bool((u <= masked * ((1 + tolerance) * far + rounding)).all()):
        return None
    weights = torch.where(far > SATURATED, u / far, 0.0)
    w = _some(weights, half)
    w = w[w > 0]
    if len(w) < LEAST_VALUES or _take_few_values(w, half):
        return None
    largest, outputs = float((u / far.clamp(min=rounding)).max()), d[0].numel()
    others = ("cross_entropy", "mse")
    if (
        largest > LARGEST_WEIGHT * outputs
        or _is_of_classes(d, half)
        or _has_targets_in_unit_interval(z, d, reduction)
        or _other_likelihood(z, d, others, reduction, half)
    ):
        raise InputError(
            "the loss's gradient at the outputs is not c (sigmoid - label), that of a binary cross-entropy of logits: pass "
            "Fisher(likelihood='mse') or 'cross_entropy', logits without the model's own sigmoid, or the factor of the loss as "
            "Fisher(weights=...); Options(check=False) accepts uneven weights"
        )
    if float(w.max()) < WEIGHTS * float(w.min()):
        return None
    known = f" (Fisher(weights={outputs}) for a sum over outputs, mean over samples)" * (
        reduction == "mean" and outputs > 1
    )
    return (
        f"the loss's gradient at the outputs is up to {float(weights.max()):.3g} times that of bce with reduction {reduction!r}: "
        f"harmless if weights or a factor make it so{known}; for another loss pass Fisher(likelihood='mse') or 'cross_entropy'"
    )


def _verify_squared_error(z: Tensor, d: Tensor, reduction: str, half: bool) -> str | None:
    """The gradient is not that of another likelihood with hard or smoothed labels."""
    other = _other_likelihood(_wide(z), _wide(d), ("cross_entropy", "bce"), reduction, half)
    if other:
        raise InputError(
            f"the loss's gradient at the outputs is that of likelihood {other!r}, and likelihood='mse' is declared: pass "
            f"fisher=Fisher(likelihood={other!r}); Options(check=False) accepts it"
        )
    return None


def _is_of_classes(d: Tensor, half: bool) -> bool:
    """Whether the gradient sums to zero over dim 1."""
    sums = d.ndim > 1 and d.shape[1] > 1
    return sums and float(d.sum(1).abs().sum()) <= (HALF_SUM if half else SUM) * float(d.abs().sum())


def _has_targets_in_unit_interval(z: Tensor, d: Tensor, reduction: str) -> bool:
    """Whether targets of a squared error would all lie in [0, 1], though some outputs do not and errors have both signs."""
    targets = z - d / (2 * _constant(z, "mse", reduction))
    outside = (z < 0) | (z > 1)
    both = bool((d > 0).any()) and bool((d < 0).any())
    inside = (targets >= -SURE) & (targets <= 1 + SURE)
    return both and int(outside.sum()) >= LEAST_VALUES and bool(inside.all())


def _other_likelihood(z: Tensor, d: Tensor, others: Sequence[str], reduction: str, half: bool) -> str | None:
    """The likelihood with mean m(z) whose labels, m(z) less the gradient, would take few values while m(z) does not."""
    for other in others:
        if other != "cross_entropy" or (z.ndim > 1 and z.shape[1] > 1):
            mean, slope = MEANS[other]
            ratio = loss_ratio(z, d, other, reduction) or 1.0
            m = mean(z)
            labels = _some(m - d / (slope * ratio * _constant(z, other, reduction)), half)
            m = _some(m, half)
            if not _take_few_values(m, half) and _take_few_values(labels, half, MOST, float(m.abs().median())):
                return other
    return None


MEANS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "cross_entropy": (lambda z: z.softmax(1), 1.0),
    "mse": (lambda z: z, 2.0),
    "bce": (torch.sigmoid, 1.0),
}
"""m and s of each likelihood's gradient, d = s c (m(z) - y)."""

CHECKS: dict[str, Callable[[Tensor, Tensor, str, bool], str | None]] = {
    "cross_entropy": _verify_cross_entropy,
    "mse": _verify_squared_error,
    "bce": _verify_bernoulli,
}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(widest(tensor.device))


def terms(logits: Tensor, likelihood: str) -> int:
    """Number of terms of a loss, of which reduction "mean" is the mean: positions for a cross-entropy, else elements."""
    return max(1, logits.numel() // (logits.shape[1] if likelihood == "cross_entropy" else 1))


def _constant(logits: Tensor, likelihood: str, reduction: str) -> float:
    """c of this reduction."""
    return 1 / terms(logits, likelihood) if reduction == "mean" else 1.0


def _other(z: Tensor, d: Tensor) -> Tensor:
    """|sigmoid z - y| of the hard label y that the gradient's sign belongs to: the probability of the other label."""
    return torch.where(d > 0, z, -z).sigmoid()


def _some(x: Tensor, half: bool) -> Tensor:
    """The elements of some rows and columns, so that weights of either show; in a line."""
    x = x.flatten(1) if x.ndim > 1 else x[:, None]
    most = HALF_VALUES if half else MOST_VALUES
    rows = min(len(x), max(math.isqrt(most), most // x.shape[1]))
    return x[:rows, : max(1, most // rows)].flatten()


def _take_few_values(x: Tensor, half: bool, share: float = 0.5, unit: float = 0.0) -> bool:
    """Whether this share of the numbers are equal to another one, given a size of them if they may all be rounding.

    False for fewer than LEAST_VALUES.
    """
    if len(x) < LEAST_VALUES:
        return False
    same = (HALF_SAME if half else SAME) * max(unit, float(x.abs().max()))
    return float((x.sort().values.diff() <= same).double().mean()) >= share


def loss_ratio(logits: Tensor, gradient: Tensor, likelihood: str, reduction: str, scale: float = 1.0) -> float | None:
    """How many times larger the loss's gradient at the logits is than that of this likelihood and reduction, labels hard.

    scale: a factor of the loss that is known. None: not such a loss (labels smoothed, mixed, weighted or ignored), a squared
    error, whose factor its labels hide, or half precision, where the loss is likely scaled.
    """
    if likelihood not in HARD_WEIGHTS or logits.dtype.itemsize < 4:
        return None
    z, d = _wide(logits), _wide(gradient)
    mean = HARD_WEIGHTS[likelihood](z, d)
    return None if mean is None else mean / _constant(z, likelihood, reduction) / scale


def _weight_of_classes(z: Tensor, d: Tensor) -> float | None:
    """The one c of d = c (softmax z - e_y) at all positions but those that are sure of their label."""
    if z.ndim < 2:
        return None
    z, d = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (z, d))
    p = z.softmax(-1)
    y = d.argmin(-1, keepdim=True)
    direction = p.scatter_add(-1, y, -torch.ones_like(y, dtype=p.dtype))  # p - e_y
    length = direction.square().sum(-1)
    sure = length > 1e-4
    if not bool(sure.any()):
        return None
    d, direction, length = d[sure], direction[sure], length[sure]
    c = (d * direction).sum(-1) / length
    mean = c.mean()
    residual = (d - mean * direction).norm(dim=-1) / length.sqrt()
    if not bool((residual <= 1e-2 * mean.abs()).all()) or not float(mean) > 0:
        return None
    return float(mean)


def _weight_of_labels(z: Tensor, d: Tensor) -> float | None:
    """The one c of d = c (sigmoid z - y) of labels 0 and 1, of both: the weight of one could be `pos_weight`."""
    far = _other(z, d)
    known = far > SATURATED
    w, labels = d[known].abs() / far[known], d[known] > 0
    if len(w) < LEAST_VALUES or bool(labels.all()) or not bool(labels.any()):
        return None
    mean = w.mean()
    return float(mean) if bool(((w - mean).abs() <= 1e-2 * mean).all()) else None


HARD_WEIGHTS: dict[str, Callable[[Tensor, Tensor], float | None]] = {
    "cross_entropy": _weight_of_classes,
    "bce": _weight_of_labels,
}


def is_close(a: float, b: float) -> bool:
    """Whether two factors a and b are equal within BOUND, relative to b."""
    return abs(a / b - 1) <= BOUND


def verify_loss(
    ratio: float | None, likelihood: str, reduction: str, batches: int = 1, expected: float | None = None
) -> None:
    """InputError for a loss whose scale is off by more than 1 % from `expected`: 1, or 1 / batches for accumulated means."""
    if expected is None:
        expected = 1 / batches if reduction == "mean" else 1.0
    if ratio is None or is_close(ratio, expected):
        return
    other = "sum" if reduction == "mean" else "mean"
    advice = f"pass reduction={other!r} if that is the loss's, or divide the loss by the factor"
    if batches > 1:
        advice = f"divide the loss of each of the {batches} accumulated batches by {batches}, or weight it by its share of rows"
    raise InputError(
        f"the loss's gradient is {ratio / expected:.4g} times that of {likelihood} with reduction {reduction!r}; {advice}; "
        "a deliberate factor on the loss is harmless with relative damping: Options(check=False) accepts it"
    )
