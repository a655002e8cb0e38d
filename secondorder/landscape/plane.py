"""The loss on a plane through a network's weights: L(w + x d + y e) of two directions d and e, on a grid of x and y.

H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.

Index letters: K values of x, M values of y, N images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.plain_attention import plain_attention
from secondorder.errors import InputError, check_known
from secondorder.landscape.checks import Loss, check_batch, check_etas, check_loss, check_model, loss_value
from secondorder.landscape.directions import Direction, inner_product, shifts_of
from secondorder.optional import needed_by
from secondorder.untouched import same_randomness, untouched

if TYPE_CHECKING:
    import pandas as pd

BATCH_NORM = {"present": None, "stored": False, "batch": True}
"""Name -> the training mode of batch-norm layers; None: that in which each of them is."""
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class LandscapePlane:
    """The loss `[K, M]` at w + x_k d + y_m e, tensors float64 on the CPU; not finite where the loss is not.

    x `[K]`, y `[M]`; loss_at_origin, L(w); lengths (|d|, |e|) over all parameters; cosine, <d, e> / (|d| |e|), nan if one is
    zero: near 0, or the picture is skewed.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    loss_at_origin: float
    lengths: tuple[float, float]
    cosine: float

    def table(self) -> pd.DataFrame:
        """A row for each point with the columns x, y and loss, as `studies.draw.Contours` draws it."""
        with needed_by("LandscapePlane.table"):
            import pandas as pd
        grid = torch.meshgrid(self.x, self.y, indexing="ij")
        columns = zip(("x", "y", "loss"), (*grid, self.loss), strict=True)
        return pd.DataFrame({name: values.flatten().numpy() for name, values in columns})


def landscape_plane(
    model: nn.Module,
    loss: Loss,
    batches: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    first: Direction,
    second: Direction,
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    batch_norm: str = "present",
    reduction: str = "mean",
) -> LandscapePlane:
    """The loss of some batches on the plane through the weights that two directions span.

    `model` is measured in its present mode, attention by PyTorch's math kernel, every point with the same random draws (dropout)
    and with buffers as they are, and is left bit for bit as it was: parameters, buffers, gradients, modes and random state. Each
    batch is asked for once, and evaluated at all points, so that a loader that shuffles or augments shows one loss, and not many.

    Args:
        model: any network.
        loss: a function of outputs and labels, such as F.cross_entropy.
        batches: a pair (images, labels), or an iterable of such pairs, as a DataLoader; they are moved to the model's device.
        first: d, as `filter_normalised_direction` or `parameter_directions` give it, or a list as from `optimiser_step`.
        second: e.
        x: `[K]` coordinates along d; None: 25 from -1 to 1, a number for which 0 is among them.
        y: `[M]` coordinates along e; None: those of x.
        batch_norm: the statistics that batch-norm layers normalise by. "present": those of their present modes; "stored": the
            stored ones, which are those of w and not of another point (eval mode, as in the paper); "batch": those of each batch
            at each point. The modes of all other layers are as they are.
        reduction: of the loss over images. "mean": batches are averaged, weighted by their numbers of images; "sum": added.

    Raises:
        InputError: for other arguments, directions that do not fit the model, and where the model or the loss fails.
    """
    check_model(model)
    check_loss(loss)
    check_known("batch_norm", batch_norm, BATCH_NORM)
    check_known("reduction", reduction, REDUCTIONS)
    x = torch.linspace(-1, 1, 25, dtype=torch.float64) if x is None else x
    y = x if y is None else y
    for name, etas in (("x", x), ("y", y)):
        check_etas(name, etas, zero=True)
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    own = {name: p for name, p in named.items() if p.requires_grad}
    d, e = (shifts_of(f"{name} direction", given, named, own) for name, given in (("first", first), ("second", second)))
    origin = {name: p.detach().clone() for name, p in named.items() if name in d or name in e}
    with untouched(model), plain_attention():
        _set_batch_norm(model, batch_norm)
        for p in model.parameters():
            p.requires_grad_(False)  # no graph is kept, and a network may still differentiate with respect to its input
        # the origin is the last: it alone leaves random numbers used up, so that the next batch draws others
        points = [*((a, b) for a in x.double().tolist() for b in y.double().tolist()), (0.0, 0.0)]
        values = _losses(model, loss, batches, points, partial(_place, named, origin, (d, e)), reduction)
    losses = values[:-1].view(len(x), len(y))
    return LandscapePlane(x.double().cpu(), y.double().cpu(), losses, float(values[-1]), *_lengths_and_cosine(d, e))


def _losses(
    model: nn.Module,
    loss: Loss,
    batches: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    points: Sequence[tuple[float, float]],
    place: Callable[[tuple[float, float]], None],
    reduction: str,
) -> Tensor:
    """The loss of all batches at each point, float64 on the CPU; `place` puts the parameters there. InputError for no batch."""
    device = next(model.parameters()).device
    wide = widest(device)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    total, images_seen = torch.zeros(len(points), dtype=wide, device=device), 0
    for images, labels in _pairs(batches, device):
        losses = []
        for number, point in enumerate(points, 1):
            place(point)
            for buffer, before in buffers:
                buffer.copy_(before)
            with torch.enable_grad(), same_randomness() if number < len(points) else nullcontext():
                value = loss_value(model, model, loss, images.clone(), labels).detach()
            losses.append(value.to(device, wide).reshape(()))
        total += torch.stack(losses) * (len(images) if reduction == "mean" else 1)
        images_seen += len(images)
    if images_seen == 0:
        raise InputError("there is no batch; give a pair (images, labels), or a list or loader of such pairs")
    return (total / images_seen if reduction == "mean" else total).cpu().double()


def _pairs(
    batches: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches on the device. InputError for one that is no pair of as many images and labels."""
    single = isinstance(batches, tuple | list) and len(batches) == 2 and all(isinstance(t, Tensor) for t in batches)
    every: Any = [batches] if single else batches
    if not isinstance(every, Iterable) or isinstance(every, Tensor | str):
        raise InputError(
            f"batches {type(batches).__name__}: must be a pair (images, labels), or an iterable of such pairs"
        )
    for batch in every:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"a batch is a pair (images, labels) of tensors, got {type(batch).__name__}")
        images, labels = batch
        check_batch(images, labels)
        yield images.to(device), labels.to(device)


@torch.no_grad()
def _place(
    named: Mapping[str, nn.Parameter],
    origin: Mapping[str, Tensor],
    directions: tuple[Mapping[str, Tensor], ...],
    point: tuple[float, ...],
) -> None:
    """Put the parameters at w + x d + y e; at the origin bit for bit at w."""
    for name, start in origin.items():
        named[name].copy_(start)
        for coordinate, direction in zip(point, directions, strict=True):
            if coordinate != 0 and name in direction:
                named[name].add_(direction[name], alpha=coordinate)


def _set_batch_norm(model: nn.Module, batch_norm: str) -> None:
    """Put batch-norm layers into the mode of BATCH_NORM. InputError for one that has no statistics where these are asked for."""
    mode = BATCH_NORM[batch_norm]
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and mode is not None:
            if mode is False and layer.running_mean is None:
                raise InputError(
                    f"{name or 'the model'} ({type(layer).__name__}) stores no statistics; use batch_norm='batch'"
                )
            layer.training = mode


def _lengths_and_cosine(d: Mapping[str, Tensor], e: Mapping[str, Tensor]) -> tuple[tuple[float, float], float]:
    """|d|, |e| and <d, e> / (|d| |e|)."""
    both = [name for name in d if name in e]
    product = float(inner_product([d[name] for name in both], [e[name] for name in both])) if both else 0.0
    lengths = tuple(float(inner_product([*v.values()], [*v.values()])) ** 0.5 for v in (d, e))
    area = lengths[0] * lengths[1]
    return (lengths[0], lengths[1]), max(-1.0, min(1.0, product / area)) if area > 0 else math.nan
