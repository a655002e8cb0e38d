"""Smoothness of a loss along a line: loss variation, gradient predictiveness, effective beta-smoothness.

The line is ``A + eta d``, where A is the activation after a network's stem (feature space) or the parameters (weight
space), and ``g(A) = dL/dA`` is the gradient of the mini-batch loss L. For every eta of a range are measured

    loss                L(A + eta d)                        its spread over eta is the loss variation ("Lipschitzness")
    gradient distance   || g(A + eta d) - g(A) ||_2         small: the gradient predicts itself
    cosine              cos(g(A + eta d), g(A))             the same, whatever the gradient's length
    beta                || g(A + eta d) - g(A) ||_2 / || eta d ||_2

and the largest beta over the range is the effective beta-smoothness. Directions: ``ascent`` is d = +g, the direction of
the published measurement (Wang et al., CVPR 2020, arXiv 2003.11241), ``descent`` is d = -g. In weight space d is a step
given by the caller, for instance the optimiser's own (Santurkar et al., NeurIPS 2018, arXiv 1805.11604).

Index letters: N images, K measured values of eta.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from secondorder.accelerator import widest
from secondorder.errors import InputError, check_flag, check_known, check_whole, failures_of
from secondorder.landscape.checks import MOST, Loss, check_arguments, check_etas, described, loss_at, trainable
from secondorder.landscape.directions import Direction, inner_product, shifts_of
from secondorder.untouched import same_randomness, untouched

DIRECTIONS = {"ascent": 1.0, "descent": -1.0}
LARGEST = 1e300
"""Value of eta."""


class StemAndRest(Protocol):
    """A network in two parts: ``model(x) == model.rest(model.stem(x))``."""

    def stem(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to the activation at which feature space is entered."""

    def rest(self, activation: Tensor) -> Tensor:
        """The activation that `stem` gives to the network's output."""


@dataclass(frozen=True)
class LandscapeLine:
    """The loss and its gradient g at K points ``A + eta d`` of a line, all tensors float64 [K] on the CPU.

    etas, loss L; gradient_distance || g(A + eta d) - g(A) ||; cosine of the two gradients, nan where one is zero; loss_at_origin
    L(A); gradient_norm || g(A) ||; direction_norm || d ||.
    """

    etas: Tensor
    loss: Tensor
    gradient_distance: Tensor
    cosine: Tensor
    loss_at_origin: float
    gradient_norm: float
    direction_norm: float

    @property
    def loss_variation(self) -> float:
        """max L - min L over the line: the width of the published "Lipschitzness" band."""
        return float(self.loss.max() - self.loss.min())

    @property
    def betas(self) -> Tensor:
        """|| g(A + eta d) - g(A) || / || eta d || at every eta, [K]; nan if d = 0."""
        return self.gradient_distance / (self.etas.abs() * self.direction_norm)

    @property
    def beta(self) -> float:
        """Effective beta-smoothness, the largest of the betas; nan if d = 0."""
        return float(self.betas.max())

    @property
    def relative_gradient_distance(self) -> float:
        """max over eta of || g(A + eta d) - g(A) || / || g(A) ||, free of the gradient's scale; nan if g = 0."""
        return float(self.gradient_distance.max()) / self.gradient_norm if self.gradient_norm else float("nan")


def equally_spaced(low: float, high: float, points: int = 50) -> Tensor:
    """`points` equally spaced values of eta in [low, high], float64; InputError unless 0 < low <= high, 1 <= points <= MOST."""
    numbers = all(isinstance(end, Real) and not isinstance(end, bool) for end in (low, high))
    ends = (math.nan, math.nan)
    if numbers:
        with suppress(OverflowError):  # of an integer beyond floats
            ends = float(low), float(high)
    if not 0.0 < ends[0] <= ends[1] < LARGEST:
        raise InputError(f"the eta range [{low}, {high}] is empty or not positive; use numbers with 0 < low <= high")
    check_whole("points", points, 1, MOST)
    return torch.linspace(*ends, points, dtype=torch.float64)


def feature_landscape(
    model: nn.Module,
    loss: Loss,
    images: Tensor,
    labels: Tensor,
    etas: Tensor,
    direction: str = "ascent",
    *,
    predicted: bool = False,
) -> LandscapeLine:
    """The line ``X + eta g`` (ascent) or ``X - eta g`` (descent), X = ``model.stem(images)``, g = dL/dX.

    The model is measured in its present mode, in training mode therefore with the statistics of the batch, with the same random
    draws (dropout) at every eta, and is left as it was: parameters, buffers, gradients, mode and random state (tested bit for
    bit).

    Args:
        model: any module with ``stem`` and ``rest`` (see StemAndRest).
        loss: a function of outputs and labels to one number.
        images: `[N, ...]`.
        labels: `[N, ...]`.
        etas: `[K]` finite numbers other than zero, see `equally_spaced`.
        direction: "ascent" or "descent".
        predicted: whether `etas` are shares of the loss that g predicts as its change, eta |g|^2 = share L at the origin. At
            equal shares networks are compared whatever the length of their g; the line's own etas are then eta = share L / |g|^2.

    Raises:
        InputError: for bad arguments, and where the model or the loss fails.
    """
    check_known("direction", direction, DIRECTIONS)
    check_arguments(model, loss, images, labels)
    check_etas("etas", etas)
    check_flag("predicted", predicted)
    if not (callable(getattr(model, "stem", None)) and callable(getattr(model, "rest", None))):
        raise InputError(f"{type(model).__name__} has no stem and rest; give it both, with model(x) = rest(stem(x))")
    parts = cast(StemAndRest, model)
    with untouched(model):
        with torch.no_grad(), failures_of(described(model, images)):
            origin = parts.stem(images).detach()

        def gradient_at(shift: Tensor | None) -> tuple[Tensor, list[Tensor]]:
            activation = (origin if shift is None else origin + shift).requires_grad_()
            with torch.enable_grad(), same_randomness():
                value = loss_at(model, parts.rest, loss, activation, labels)
            return value.detach(), _derivatives(value, [activation])

        value, gradient = gradient_at(None)
        if predicted:
            L, square = torch.stack([value.to(widest(value.device)), inner_product(gradient, gradient)]).cpu().double()
            etas = (
                L * etas.double().cpu() / square.sqrt() ** 2
            )  # as from the line's `loss_at_origin` and `gradient_norm`
            check_etas("etas", etas)
        step = [DIRECTIONS[direction] * g for g in gradient]
        return _walk(lambda eta: gradient_at(eta * step[0]), etas, step, value, gradient)


def weight_landscape(
    model: nn.Module, loss: Loss, images: Tensor, labels: Tensor, etas: Tensor, step: Direction | None = None
) -> LandscapeLine:
    """The line ``w + eta step`` through the parameters w that require gradients; the model is left as it was.

    Args:
        model: any network.
        loss: a function of outputs and labels to one number.
        images: `[N, ...]`.
        labels: `[N, ...]`.
        etas: `[K]` finite numbers other than zero, see `equally_spaced`.
        step: one tensor for each such parameter, in their order, or a dict of tensors by parameter names (others stay); None: the
            steepest descent -dL/dw. `optimiser_step` gives the step that an optimiser is about to take, so that eta = 1 is where
            training goes next, `filter_normalised_direction` and `parameter_directions` give others.

    Raises:
        InputError: for bad arguments, and where the model or the loss fails.
    """
    check_arguments(model, loss, images, labels)
    check_etas("etas", etas)
    named = trainable(model)
    parameters = list(named.values())
    given = None if step is None else shifts_of("step", step, named, named)
    with untouched(model):
        origin = [p.detach().clone() for p in parameters]

        def gradient_at(eta: float) -> tuple[Tensor, list[Tensor]]:
            with torch.no_grad():
                for parameter, start, shift in zip(parameters, origin, shifts, strict=True):
                    parameter.copy_(start + eta * shift)
            with torch.enable_grad(), same_randomness():
                value = loss_at(model, model, loss, images, labels)
            return value.detach(), _derivatives(value, parameters)

        shifts: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        value, gradient = gradient_at(0.0)
        if given is None:
            shifts = [-g for g in gradient]
        else:
            shifts = [given.get(name, zero) for name, zero in zip(named, shifts, strict=True)]
        return _walk(gradient_at, etas, shifts, value, gradient)


def _derivatives(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Those of a number with respect to its inputs. InputError where a function has none."""
    with failures_of("the gradient"):
        return list(torch.autograd.grad(value, inputs, materialize_grads=True))


def _walk(
    gradient_at: Callable[[float], tuple[Tensor, list[Tensor]]],
    etas: Tensor,
    step: list[Tensor],
    value: Tensor,
    gradient: list[Tensor],
) -> LandscapeLine:
    """The line, measured without waiting for the device but once at its end: the numbers stay there until then."""
    wide = widest(value.device)
    points = [value.to(wide), inner_product(gradient, gradient), inner_product(step, step)]
    for eta in etas.tolist():
        loss, there = gradient_at(eta)
        change = [a - b for a, b in zip(there, gradient, strict=True)]
        points += [
            loss.to(wide),
            inner_product(change, change),
            inner_product(there, there),
            inner_product(there, gradient),
        ]
    numbers = torch.stack(points).cpu().double()
    norms = numbers[1:3].sqrt()
    losses, squares, lengths, products = numbers[3:].view(-1, 4).T
    lengths = norms[0] * lengths.sqrt()
    return LandscapeLine(
        etas=etas.double().cpu(),
        loss=losses,
        gradient_distance=squares.sqrt(),
        cosine=torch.where(lengths > 0, products / lengths, torch.nan),
        loss_at_origin=float(numbers[0]),
        gradient_norm=float(norms[0]),
        direction_norm=float(norms[1]),
    )
