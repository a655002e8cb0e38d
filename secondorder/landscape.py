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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.graph import check_checkpoints, graph_nodes
from secondorder.errors import InputError, check_flag, check_known, check_whole, failures_of
from secondorder.untouched import same_randomness, untouched

DIRECTIONS = {"ascent": 1.0, "descent": -1.0}
MOST, LARGEST = 10**6, 1e300
"""Values of eta on a line, and the largest."""
Loss = Callable[[Tensor, Tensor], Tensor]


class StemAndRest(Protocol):
    """A network in two parts: ``model(x) == model.rest(model.stem(x))``."""

    def stem(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to the activation at which feature space is entered."""

    def rest(self, activation: Tensor) -> Tensor:
        """That activation to the network's output."""


@dataclass(frozen=True)
class LandscapeLine:
    """The loss and its gradient at K points ``A + eta d`` of a line, all tensors float64 [K] on the CPU."""

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
    if not (numbers and 0.0 < low <= high < LARGEST):
        raise InputError(f"the eta range [{low}, {high}] is empty or not positive; use numbers with 0 < low <= high")
    check_whole("points", points, 1, MOST)
    return torch.linspace(low, high, points, dtype=torch.float64)


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

    predicted: whether `etas` are shares of the loss that g predicts as its change, eta |g|^2 = share L at the origin. At equal
        shares networks are compared whatever the length of their g; the line's own etas are then eta = share L / |g|^2.

    `model` is any module with ``stem`` and ``rest`` (see StemAndRest). It is measured in its present mode, in training
    mode therefore with the statistics of the batch, with the same random draws (dropout) at every eta, and is left as
    it was: parameters, buffers, gradients, mode and random state (tested bit for bit). Raises InputError for bad arguments, and
    where the model or the loss fails.
    """
    check_known("direction", direction, DIRECTIONS)
    _check_arguments(model, loss, images, labels)
    _check_etas(etas)
    check_flag("predicted", predicted)
    if not (callable(getattr(model, "stem", None)) and callable(getattr(model, "rest", None))):
        raise InputError(f"{type(model).__name__} has no stem and rest; give it both, with model(x) = rest(stem(x))")
    parts = cast(StemAndRest, model)
    with untouched(model):
        with torch.no_grad(), failures_of(_described(model, images)):
            origin = parts.stem(images).detach()

        def gradient_at(shift: Tensor | None) -> tuple[Tensor, list[Tensor]]:
            activation = (origin if shift is None else origin + shift).requires_grad_()
            with torch.enable_grad(), same_randomness():
                value = _loss_at(model, parts.rest, loss, activation, labels)
            return value.detach(), _derivatives(value, [activation])

        value, gradient = gradient_at(None)
        if predicted:
            L, square = torch.stack([value.to(widest(value.device)), _dot(gradient, gradient)]).cpu().double()
            etas = (
                L * etas.double().cpu() / square.sqrt() ** 2
            )  # as from the line's `loss_at_origin` and `gradient_norm`
            _check_etas(etas)
        step = [DIRECTIONS[direction] * g for g in gradient]
        return _walk(lambda eta: gradient_at(eta * step[0]), etas, step, value, gradient)


def weight_landscape(
    model: nn.Module, loss: Loss, images: Tensor, labels: Tensor, etas: Tensor, step: Sequence[Tensor] | None = None
) -> LandscapeLine:
    """The line ``w + eta step`` through the parameters w that require gradients, in their order in the model.

    `step` is one tensor for each such parameter, by default the steepest descent -dL/dw; `optimiser_step` gives the
    step that an optimiser is about to take, so that eta = 1 is where training goes next. Leaves the model as it was. Raises
    InputError for bad arguments, and where the model or the loss fails.
    """
    _check_arguments(model, loss, images, labels)
    _check_etas(etas)
    parameters = _trainable(model)
    if step is not None and not (isinstance(step, list | tuple) and all(isinstance(s, Tensor) for s in step)):
        raise InputError(f"step {type(step).__name__}: must be a list of tensors, one for each trainable parameter")
    if step is not None and [s.shape for s in step] != [p.shape for p in parameters]:
        raise InputError(f"the step has {len(step)} tensors that do not match the model's {len(parameters)} parameters")
    with untouched(model):
        origin = [p.detach().clone() for p in parameters]

        def gradient_at(eta: float) -> tuple[Tensor, list[Tensor]]:
            with torch.no_grad():
                for parameter, start, shift in zip(parameters, origin, shifts, strict=True):
                    parameter.copy_(start + eta * shift)
            with torch.enable_grad(), same_randomness():
                value = _loss_at(model, model, loss, images, labels)
            return value.detach(), _derivatives(value, parameters)

        shifts: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        value, gradient = gradient_at(0.0)
        shifts = [-g for g in gradient] if step is None else [s.detach().clone() for s in step]
        return _walk(gradient_at, etas, shifts, value, gradient)


def optimiser_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, loss: Loss, images: Tensor, labels: Tensor
) -> list[Tensor]:
    """The change of the parameters that `optimiser` would make on this batch, momentum and weight decay included.

    One tensor for each parameter that requires gradients. Neither the model nor the optimiser's state is changed. Raises
    InputError for bad arguments, and where the model or the loss fails.
    """
    _check_arguments(model, loss, images, labels)
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise InputError(f"optimiser {type(optimiser).__name__}: must be a torch.optim.Optimizer")
    parameters = _trainable(model)
    held = optimiser.state.items()
    before = {p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()} for p, state in held}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimiser.param_groups]
    with untouched(model):
        origin = [p.detach().clone() for p in parameters]
        with torch.enable_grad(), failures_of("the gradient"):
            value = _loss_at(model, model, loss, images, labels)
            gradient = torch.autograd.grad(value, parameters, allow_unused=True)
        try:
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.grad = g
            optimiser.step()
            return [p.detach() - start for p, start in zip(parameters, origin, strict=True)]
        finally:
            optimiser.state.clear()
            optimiser.state.update(before)
            for group, settings in zip(optimiser.param_groups, groups, strict=True):
                group.update(settings)


def check_batch(images: Tensor, labels: Tensor) -> None:
    """InputError unless images and labels are tensors, as many of both, and at least one."""
    for name, tensor in (("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            kind = "a single number" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name} are {kind}: must be a tensor with a row for each image")
    if len(images) == 0 or len(images) != len(labels):
        raise InputError(f"{len(images)} images and {len(labels)} labels; a batch needs one label for each image")


def _check_arguments(model: object, loss: object, images: Tensor, labels: Tensor) -> None:
    """InputError unless they are a module, a function and a batch."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model {type(model).__name__}: must be a torch.nn.Module")
    for name, p in model.named_parameters():
        if is_lazy(p) or p.is_meta:
            raise InputError(f"parameter {name} has no numbers yet; run a lazy model once, load those of device 'meta'")
    if not callable(loss) or isinstance(loss, type):
        raise InputError(f"loss {loss!r}: must be a function of outputs and labels, for example F.cross_entropy")
    check_batch(images, labels)


def _check_etas(etas: Tensor) -> None:
    """InputError unless the values of eta are a vector of finite numbers other than zero, at least one."""
    real = isinstance(etas, Tensor) and not etas.is_complex() and etas.device.type != "meta"
    if not real or etas.ndim != 1 or len(etas) == 0:
        kind = f"{etas.dtype} {list(etas.shape)} on {etas.device}" if isinstance(etas, Tensor) else type(etas).__name__
        raise InputError(f"etas are {kind}: must be a tensor [K] of real numbers, K >= 1; see equally_spaced")
    values = etas.double().cpu()
    if not bool((values.isfinite() & (values != 0)).all()):
        raise InputError(f"etas {values.tolist()}: must be finite and other than zero")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients. InputError when there is none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(f"{type(model).__name__} has no parameter that requires gradients")
    return parameters


def _loss_at(model: nn.Module, outputs: Callable[[Tensor], Any], loss: Loss, x: Tensor, labels: Tensor) -> Tensor:
    """loss(outputs(x), labels), a scalar. InputError where either fails, and for a loss that is no number or has no gradient."""
    with failures_of(_described(model, x)):
        z = outputs(x)
    with failures_of(f"the loss on labels {list(labels.shape)}"):
        value = loss(z, labels)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise InputError("the loss must return one number that depends on the outputs; use reduction='mean' or 'sum'")
    check_checkpoints(graph_nodes([value]))
    return value


def _derivatives(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Those of a number with respect to its inputs. InputError where a function has none."""
    with failures_of("the gradient"):
        return list(torch.autograd.grad(value, inputs, materialize_grads=True))


def _described(model: nn.Module, x: Tensor) -> str:
    return f"{type(model).__name__} on {x.dtype} {list(x.shape)}"


def _walk(
    gradient_at: Callable[[float], tuple[Tensor, list[Tensor]]],
    etas: Tensor,
    step: list[Tensor],
    value: Tensor,
    gradient: list[Tensor],
) -> LandscapeLine:
    """The line, measured without waiting for the device but once at its end: the numbers stay there until then."""
    wide = widest(value.device)
    points = [value.to(wide), _dot(gradient, gradient), _dot(step, step)]
    for eta in etas.tolist():
        loss, there = gradient_at(eta)
        change = [a - b for a, b in zip(there, gradient, strict=True)]
        points += [loss.to(wide), _dot(change, change), _dot(there, there), _dot(there, gradient)]
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


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of all tensors together, a number on their device, in the longest format that it has."""
    wide = widest(left[0].device)
    zero = torch.zeros((), dtype=wide, device=left[0].device)
    return sum(((a.to(wide) * b.to(wide)).sum() for a, b in zip(left, right, strict=True)), zero)
