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
    found = [directions[parameter] for parameter in parameters]
    if kind == "adam" and found:
        found = list(torch._foreach_div(found, adam_scales(parameters, found, state)))
    if relative_lr != 1 and found:
        found = list(torch._foreach_mul(found, relative_lr))
    directions.update(zip(parameters, found, strict=True))


def adam_scales(
    parameters: Sequence[nn.Parameter],
    gradients: list[Tensor],
    state: State,
    beta: float = 0.999,
    eps: float = 1e-8,
) -> list[Tensor]:
    """sqrt(v) + eps of parameters without factors, v the bias-corrected running means of g^2, which take these gradients in."""
    for parameter in parameters:
        state[parameter]["squares"] = state[parameter].get("squares", 0) + 1
    buffers = [state[p].setdefault("square", torch.zeros_like(p)) for p in parameters]
    scales = root_mean_squares(buffers, gradients, beta, [state[p]["squares"] for p in parameters])
    torch._foreach_add_(scales, eps)
    return scales


def root_mean_squares(
    buffers: Sequence[Tensor], gradients: list[Tensor], decay: float, counts: Sequence[int]
) -> list[Tensor]:
    """sqrt(v / (1 - decay^count)) of each buffer v <- decay v + (1 - decay) g^2, count the number of gradients in it."""
    new = torch._foreach_mul(gradients, gradients)
    torch._foreach_mul_(new, 1 - decay)
    v = accumulated(buffers, new, [decay] * len(buffers))
    roots = torch._foreach_div(v, [1 - decay**count for count in counts])
    torch._foreach_sqrt_(roots)
    return list(roots)


def accumulated(
    buffers: Sequence[Tensor], new: list[Tensor] | tuple[Tensor, ...], decays: Sequence[float]
) -> list[Tensor]:
    """b <- decay b + new, returned in the number format of `new`, which that of the buffers may be coarser than."""
    sums = [buffer.to(one.dtype) for buffer, one in zip(buffers, new, strict=True)]
    torch._foreach_mul_(sums, list(decays))
    torch._foreach_add_(sums, new)
    for buffer, total in zip(buffers, sums, strict=True):
        if buffer is not total:
            buffer.copy_(total)
    return sums


class Lengths:
    """How often and how strongly a trust region has acted, and how many steps exploded: counted on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, factor: Tensor | None, exploded: Tensor) -> None:
        """Count a step that was shortened by this factor (None, 1: not at all), and whether it exploded."""
        factor = torch.ones_like(exploded) if factor is None else factor.to(exploded)
        new = torch.stack([(factor < 1).to(exploded), factor.log(), exploded])
        self._sums = new if self._sums is None else self._sums.to(new) + new

    def read(self) -> tuple[tuple[int, float], int]:
        """The number of shortened steps and the geometric mean of their factors; the number of steps that exploded."""
        count, logs, exploded = (0.0, 0.0, 0.0) if self._sums is None else self._sums.tolist()
        return (int(count), math.exp(logs / max(count, 1.0))), int(exploded)


def shorten(directions: Directions, groups: Groups, most: float, scale: float, decoupled: bool) -> Tensor:
    """Scale all directions d by one number so that the velocity's length in the metric F + lambda I stays <= most; returns it.

    |d| <= (1 - momentum) most, and so every |v|, v <- momentum v + d. The learning rate does not count, but for that of a group
    relative to the largest. For d = P grad, |d|^2 is d . grad, without a product; the metric of a parameter without factors is
    the identity for "sgd", and Adam's for "adam". `scale` makes the gradients those of the mean loss.
    """
    total = torch.zeros((), device=next(iter(directions.values())).device)
    members = [(group, [p for p in group["params"] if p in directions]) for group in groups]
    largest = max(float(group["lr"]) for group, own in members if own)
    for group, own in members:
        if not own:
            continue
        slope = scale * _dot([directions[p] for p in own], [dense(p.grad) for p in own])
        if not decoupled and group["weight_decay"]:
            slope = slope + float(group["weight_decay"]) * _dot([directions[p] for p in own], own)
        share = float(group["lr"]) / largest if largest else 1.0
        total = total + (share / (1 - float(group["momentum"]))) ** 2 * slope
    shorter = (most / total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()).clamp_max(1)
    directions.update(zip(directions, torch._foreach_mul(list(directions.values()), shorter), strict=True))
    return shorter


def weights_length(groups: Groups) -> Tensor:
    """The Euclidean length of all weights that are trained together."""
    return torch.stack(torch._foreach_norm([p for group in groups for p in group["params"] if p.requires_grad])).norm()


def step_length(directions: Directions, groups: Groups, state: State) -> Tensor:
    """The Euclidean length of the step lr v that `move` has taken; v is the velocity, or d without momentum."""
    lengths = []
    for group in groups:
        own = [p for p in group["params"] if p in directions]
        steps = [state[p].get("momentum_buffer", directions[p]) for p in own]
        if own:
            lengths.append(float(group["lr"]) * torch.stack(torch._foreach_norm(steps)).norm())
    return torch.stack(lengths).norm()


def move_within(
    directions: Directions,
    groups: Groups,
    state: State,
    decoupled: bool,
    most: float | None,
    scale: float,
    lengths: Lengths,
) -> None:
    """`move` by directions that `shorten` has shortened, unless `most` is None; `lengths` counts the step."""
    factor = None if most is None else shorten(directions, groups, most, scale, decoupled)
    before = weights_length(groups)
    move(directions, groups, state, decoupled)
    lengths.add(factor, (step_length(directions, groups, state) > before).to(before))


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
