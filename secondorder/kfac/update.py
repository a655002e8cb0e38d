"""From the directions P grad to new weights: fallback of parameters without factors, trust region, momentum, weight decay.

`groups` are torch's parameter groups, `state` is the optimiser's state of each parameter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.kfac.blocks import Directions
from secondorder.kfac.preconditioner import dense

Groups = Sequence[Mapping[str, Any]]
State = Mapping[Any, dict[str, Any]]


def fall_back(
    directions: Directions, parameters: Sequence[nn.Parameter], state: State, kind: str, relative_lr: float
) -> None:
    """Directions of parameters without factors, in place: lr times them is their update; kind "sgd" or "adam"."""
    for parameter in parameters:
        if kind == "adam":
            directions[parameter] = directions[parameter] / adam_scale(state[parameter], directions[parameter])
        if relative_lr != 1:
            directions[parameter] = directions[parameter] * relative_lr


def adam_scale(state: dict[str, Any], gradient: Tensor, beta: float = 0.999, eps: float = 1e-8) -> Tensor:
    """sqrt(v) + eps of a parameter without factors, v the bias-corrected running mean of g^2, which takes this gradient in."""
    state["square"] = state["square"] if "square" in state else torch.zeros_like(gradient)
    state["squares"] = state.get("squares", 0) + 1
    state["square"].mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
    return (state["square"] / (1 - beta ** state["squares"])).sqrt() + eps


class Shortened:
    """How often and how strongly a trust region has acted: counted on the device, read when a report asks."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, factor: Tensor) -> None:
        """Count a step that was shortened by this factor, 1 where it was not."""
        new = torch.stack([(factor < 1).to(factor.dtype), factor.log()])
        self._sums = new if self._sums is None else self._sums + new

    def read(self) -> tuple[int, float]:
        """The number of shortened steps, and the geometric mean of their factors."""
        count, logs = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        return int(count), math.exp(logs / max(count, 1.0))


def shorten(directions: Directions, groups: Groups, most: float, scale: float, decoupled: bool) -> Tensor:
    """Scale all directions d by one number so that lr^2 d^T (F + lambda I) d <= most; returns the number.

    For d = P grad that is lr^2 d . grad, without a product; the metric of a parameter without factors is the identity for
    "sgd", and Adam's for "adam". `scale` makes the gradients those of the mean loss.
    """
    total = torch.zeros((), device=next(iter(directions.values())).device)
    for group in groups:
        own = [p for p in group["params"] if p in directions]
        if not own:
            continue
        slope = scale * _dot([directions[p] for p in own], [dense(p.grad) for p in own])
        if not decoupled and group["weight_decay"]:
            slope = slope + float(group["weight_decay"]) * _dot([directions[p] for p in own], own)
        total = total + float(group["lr"]) ** 2 * slope
    shorter = (most / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt().clamp_max(1)  # lr = 0: one
    directions.update(zip(directions, torch._foreach_mul(list(directions.values()), shorter), strict=True))
    return shorter


def move(directions: Directions, groups: Groups, state: State, decoupled: bool, momentum: bool = True) -> None:
    """v <- momentum v + d,  w <- (1 - lr weight_decay) w - lr v; without momentum v is d."""
    for group in groups:
        parameters = [p for p in group["params"] if p in directions]
        if not parameters:
            continue
        steps = [directions[p] for p in parameters]
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        if momentum and group["momentum"]:
            steps = _with_momentum(state, parameters, steps, float(group["momentum"]))
        if decoupled and weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, steps, alpha=-lr)


def _with_momentum(
    state: State, parameters: Sequence[nn.Parameter], steps: Sequence[Tensor], momentum: float
) -> list[Tensor]:
    """v <- momentum v + d; the first v is d."""
    velocities = []
    old: list[Tensor] = []
    new: list[Tensor] = []
    for parameter, step in zip(parameters, steps, strict=True):
        own = state[parameter]
        if "momentum_buffer" in own:
            old.append(own["momentum_buffer"])
            new.append(step)
        else:
            own["momentum_buffer"] = step.clone()
        velocities.append(own["momentum_buffer"])
    if old:
        torch._foreach_mul_(old, momentum)
        torch._foreach_add_(old, new)
    return velocities


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors."""
    return torch.stack([torch.dot(x.flatten(), y.flatten().to(x.dtype)) for x, y in zip(a, b, strict=True)]).sum()
