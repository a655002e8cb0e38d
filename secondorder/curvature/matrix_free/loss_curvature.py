"""The curvature of a loss at given labels: in closed form where the loss is known, else by automatic differentiation.

Index letters: N samples, K outputs (classes) of a sample.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.matrix_free.class_labels import class_labels
from secondorder.curvature.matrix_free.linear_losses import check_curved
from secondorder.curvature.matrix_free.samples import Samples, SampleTree, described
from secondorder.curvature.matrix_free.separable_losses import (
    CrossEntropy,
    LossCurvature,
    SquaredError,
    Totals,
)
from secondorder.curvature.matrix_free.several_labels import BinaryCrossEntropy, CrossEntropyAtPositions
from secondorder.curvature.matrix_free.trial import has_numbers
from secondorder.errors import InputError, failures_of, short

Loss = Callable[[Any, Any], Tensor]
KNOWN = "cross-entropy, binary cross-entropy with logits or squared error"
"""Losses with closed forms."""


@dataclass(frozen=True)
class SumOverSamples:
    """A loss of your own, declared to be a sum over samples: L(z, y) = sum_n L(z_n, y_n), outputs and labels `[N, ...]`.

    It is called with the outputs and labels of some samples, any number of them, and gives their sum, a scalar. Then quantities
    of it can be evaluated a part of the batch at a time; that it is such a sum is tried on the first part. A mean is none, as
    its divisor is that of the batch: give the sum, divided by a number of your own.
    """

    loss: Loss

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of these samples."""
        return self.loss(outputs, labels)


@dataclass(frozen=True)
class AnyLoss(LossCurvature):
    """A loss that is known by its values only; `shape` is that of the outputs, which the loss expects."""

    loss: Loss
    labels: Samples
    shape: torch.Size

    @property
    def separable(self) -> bool:  # type: ignore[override]
        """Whether it is declared to be a sum over samples."""
        return isinstance(self.loss, SumOverSamples)

    def value(self, z: Tensor) -> Tensor:
        """The loss L(z) of outputs z `[N, K]`, a differentiable scalar.

        Raises InputError when the function returns no scalar, or one that does not depend on z.
        """
        labels = self.labels.structure if isinstance(self.labels, SampleTree) else self.labels
        value = self.loss(z.view(self.shape), labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InputError(f"{loss_name(self.loss)} returns no scalar; use reduction='mean' or 'sum'")
        if z.requires_grad and not value.requires_grad:
            raise InputError(
                f"{loss_name(self.loss)} does not depend on the outputs, or detaches them; it has no curvature"
            )
        return value.reshape(())

    def product(self, z: Tensor, U: Tensor) -> Tensor:
        """M U `[N, K]` for U `[N, K]`, by differentiating the gradient dL/dz along U.

        Raises InputError for a loss that has no M (`linear_losses`).
        """
        MU = self._derivative_along(z, U)
        if has_numbers(MU) and not bool(MU.any()) and bool(U.any()):
            check_curved(loss_name(self.loss), self.gradient, self._derivative_along, z, self._outputs_as_labels)
        return MU

    def gradient(self, z: Tensor) -> Tensor:
        """dL/dz `[N, K]` at outputs z `[N, K]`, by autograd."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self.value(z), z)[0]

    @property
    def _outputs_as_labels(self) -> Tensor | None:
        """The labels as outputs where they may be some."""
        y = self.labels
        if isinstance(y, SampleTree) or y.shape != self.shape or not y.is_floating_point():
            return None
        return y.reshape(len(y), -1)

    def _derivative_along(self, z: Tensor, U: Tensor) -> Tensor:
        with torch.enable_grad(), failures_of(f"a second derivative of {loss_name(self.loss)}"):
            z = z.detach().requires_grad_()
            gradient = torch.autograd.grad(self.value(z), z, create_graph=True)[0]
            if not gradient.requires_grad:  # a loss that is linear in z
                return torch.zeros_like(U)
            return torch.autograd.grad(gradient, z, U, materialize_grads=True)[0]

    def part(self, rows: slice) -> "AnyLoss":
        """The loss of some samples where it is declared to be a sum over them; otherwise the whole loss."""
        if not self.separable:
            return self
        labels = self.labels[rows]
        return replace(self, labels=labels, shape=torch.Size([len(labels), *self.shape[1:]]))


def loss_curvature(
    loss: Loss, shape: torch.Size, labels: Samples, dtype: torch.dtype, totals: Totals | None = None
) -> LossCurvature:
    """The loss at these labels for outputs of this shape, in closed form for those of KNOWN.

    Args:
        totals: of the data set that the labels are a batch of; None: they are all there are.

    Raises InputError for labels that do not fit, and for losses that are no functions or not reduced to a scalar.
    """
    if not callable(loss) or isinstance(loss, type):
        raise InputError(f"loss {loss!r}: must be a function of outputs and labels, for example nn.CrossEntropyLoss()")
    options = _options(loss)
    if options is None or (len(shape) < 2 and options["kind"] == "cross-entropy"):
        return AnyLoss(loss, labels, shape)
    if options["reduction"] not in ("mean", "sum"):
        raise InputError(f"{loss_name(loss)} has reduction {options['reduction']!r}; use 'mean' or 'sum'")
    if isinstance(labels, SampleTree):
        raise InputError(f"labels {described(labels)}: {loss_name(loss)} needs one tensor")
    if options["kind"] == "squared error":
        return _squared_error(options, shape, labels, dtype, totals)
    if options["kind"] == "binary cross-entropy":
        return _binary_cross_entropy(options, shape, labels, dtype, totals) or AnyLoss(loss, labels, shape)
    divisor = None if totals is None else totals.divisor
    if len(shape) > 2:
        return _at_positions(options, shape, labels, dtype, divisor) or AnyLoss(loss, labels, shape)
    made = class_labels(options, shape, labels, dtype, divisor)
    return CrossEntropy(made.total, made) if made.of_likelihood else AnyLoss(loss, labels, shape)


def known(loss: Loss) -> bool:
    """Whether a loss is one of KNOWN, with closed forms."""
    return callable(loss) and _options(loss) is not None


def as_it_is(loss: Loss) -> Loss:
    """A copy of a loss of KNOWN, whose weights and options may change later; any other function itself."""
    if not isinstance(loss, nn.Module) or not known(loss):
        return loss
    made = copy(loss)
    made._buffers = {name: None if b is None else b.detach().clone() for name, b in loss._buffers.items()}
    return made


def loss_name(loss: Loss) -> str:
    """How messages call a loss: the class of a module, the name of a function."""
    return type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", type(loss).__name__)


def _options(loss: Loss) -> dict[str, Any] | None:
    """Kind and options of a loss with closed forms; None for any other, and for one with a forward or hooks of its own."""
    if isinstance(loss, nn.Module) and _changed(loss):
        return None
    if loss is F.cross_entropy:
        loss = nn.CrossEntropyLoss()
    if loss is F.mse_loss:
        loss = nn.MSELoss()
    if loss is F.binary_cross_entropy_with_logits:
        loss = nn.BCEWithLogitsLoss()
    if isinstance(loss, nn.MSELoss) and type(loss).forward is nn.MSELoss.forward:
        return {"kind": "squared error", "reduction": loss.reduction}
    if isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward:
        names = ("reduction", "weight", "ignore_index", "label_smoothing")
        if loss.weight is not None and loss.weight.requires_grad:
            return None  # made from parameters
        return {"kind": "cross-entropy"} | {name: getattr(loss, name) for name in names}
    if isinstance(loss, nn.BCEWithLogitsLoss) and type(loss).forward is nn.BCEWithLogitsLoss.forward:
        weights = {name: getattr(loss, name) for name in ("weight", "pos_weight")}
        if any(weight is not None and weight.requires_grad for weight in weights.values()):
            return None
        return {"kind": "binary cross-entropy", "reduction": loss.reduction} | weights
    return None


def _changed(loss: nn.Module) -> bool:
    """Whether a module does something else than its type; BackPACK's hooks only look."""
    hooks = (*loss._forward_hooks.values(), *loss._forward_pre_hooks.values())
    if "forward" in vars(loss) or type(loss).__call__ is not nn.Module.__call__:
        return True
    return any(not getattr(hook, "__module__", "").startswith("backpack") for hook in hooks)


def _squared_error(
    options: Mapping[str, Any], shape: torch.Size, y: Tensor, dtype: torch.dtype, totals: Totals | None
) -> SquaredError:
    if y.shape != shape or not y.is_floating_point():
        raise InputError(
            f"targets of shape {list(y.shape)} ({y.dtype}) for outputs {list(shape)}; squared error needs equal shapes and "
            "floating-point targets"
        )
    if not all(bool(torch.isfinite(end)) for end in y.aminmax()):  # nothing as large as the targets is made
        raise InputError("the targets contain NaN or infinity")
    y = y.to(dtype).reshape(len(y), -1)
    if options["reduction"] == "sum":
        return SquaredError(y, 1)
    totals = totals or Totals(len(y), y.numel())
    return SquaredError(y, totals.divisor, 1 / totals.samples)


def _at_positions(
    options: Mapping[str, Any], shape: torch.Size, labels: Tensor, dtype: torch.dtype, divisor: float | None
) -> CrossEntropyAtPositions | None:
    """The cross-entropy of outputs `[N, C, ...]` with class indices `[N, ...]` or probabilities like the outputs.

    None where it is not convex in them.
    """
    N, C, *places = shape
    positions = torch.Size(places).numel()
    expected = [*shape] if labels.is_floating_point() else [N, *places]
    if list(labels.shape) != expected or not (labels.is_floating_point() or labels.dtype == torch.int64):
        raise InputError(
            f"labels of shape {list(labels.shape)} ({labels.dtype}) for outputs {list(shape)}; cross-entropy needs class indices "
            f"{[N, *places]} (torch.int64) or class probabilities {list(shape)}"
        )
    flat = labels.flatten(2).transpose(1, 2).flatten(0, 1) if labels.is_floating_point() else labels.flatten()
    made = class_labels(options, torch.Size([N * positions, C]), flat, dtype, divisor)
    return CrossEntropyAtPositions(CrossEntropy(made.total, made), positions) if made.of_likelihood else None


def _binary_cross_entropy(
    options: Mapping[str, Any], shape: torch.Size, y: Tensor, dtype: torch.dtype, totals: Totals | None
) -> BinaryCrossEntropy | None:
    """The binary cross-entropy of outputs `[N, ...]` with targets like them; None where it is not convex in them."""
    if y.shape != shape or not y.is_floating_point():
        raise InputError(
            f"targets of shape {list(y.shape)} ({y.dtype}) for outputs {list(shape)}; binary cross-entropy needs equal shapes "
            "and floating-point targets"
        )
    weights = []
    for name in ("weight", "pos_weight"):
        given = options[name]
        weight = torch.ones((), dtype=dtype, device=y.device) if given is None else given.detach().to(y.device, dtype)
        if totals is not None and weight.ndim == len(shape) and len(weight) > 1:
            raise InputError(
                f"{name} of shape {list(weight.shape)} is that of single samples; give one batch of all data"
            )
        try:
            weights.append(weight.broadcast_to(shape))
        except RuntimeError:
            raise InputError(f"{name} of shape {list(weight.shape)}: cannot be that of outputs {list(shape)}") from None
    divisor = (totals.divisor if totals else y.numel()) if options["reduction"] == "mean" else 1
    w, positive = weights
    a, b = ((w * part / divisor).reshape(len(y), -1) for part in (positive * y.to(dtype), 1 - y.to(dtype)))
    if not all(bool(part.isfinite().all()) for part in (a, b)):
        raise InputError(f"targets or weights of {short(options['kind'])} contain NaN or infinity")
    return BinaryCrossEntropy(a, b) if bool((a >= 0).all()) and bool((b >= 0).all()) else None
