"""What lines and planes ask of a model, a loss and a batch, and the loss's value with one-line errors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secondorder.curvature.matrix_free.graph import check_checkpoints, graph_nodes
from secondorder.errors import InputError, failures_of

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and labels to one number."""
MOST = 10**6
"""Values of eta on a line, and of a coordinate of a plane."""


def check_batch(images: Tensor, labels: Tensor) -> None:
    """InputError unless images and labels are tensors, as many of both, and at least one."""
    for name, tensor in (("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or tensor.is_meta:
            kind = type(tensor).__name__
            if isinstance(tensor, Tensor):
                kind = "on the device 'meta'" if tensor.is_meta else "a single number"
            raise InputError(f"{name} are {kind}: must be a tensor with a row for each image")
    if len(images) == 0 or len(images) != len(labels):
        raise InputError(f"{len(images)} images and {len(labels)} labels; a batch needs one label for each image")


def check_arguments(model: object, loss: object, images: Tensor, labels: Tensor) -> None:
    """Raises InputError unless they are a module whose parameters have numbers, a function and a batch."""
    check_model(model)
    check_loss(loss)
    check_batch(images, labels)


def check_model(model: object) -> None:
    """Raises InputError unless the model is a module whose parameters have numbers."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model {type(model).__name__}: must be a torch.nn.Module")
    for name, p in model.named_parameters():
        if is_lazy(p) or p.is_meta:
            raise InputError(f"parameter {name} has no numbers yet; run a lazy model once, load those of device 'meta'")


def check_loss(loss: object) -> None:
    """Raises InputError unless the loss is a function (and no class)."""
    if not callable(loss) or isinstance(loss, type):
        raise InputError(f"loss {loss!r}: must be a function of outputs and labels, for example F.cross_entropy")


def check_etas(name: str, etas: Tensor, zero: bool = False) -> None:
    """InputError unless they are a vector of finite numbers, at least one, and other than zero if `zero` is not allowed."""
    real = isinstance(etas, Tensor) and not etas.is_complex() and etas.device.type != "meta"
    if not real or etas.ndim != 1 or not 0 < len(etas) <= MOST:
        kind = f"{etas.dtype} {list(etas.shape)} on {etas.device}" if isinstance(etas, Tensor) else type(etas).__name__
        source = "torch.linspace" if zero else "equally_spaced"
        raise InputError(f"{name} are {kind}: must be a tensor [K] of real numbers, K >= 1; see {source}")
    values = etas.double().cpu()
    if not bool((values.isfinite() & (zero | (values != 0))).all()):
        raise InputError(f"{name} {values.tolist()}: must be finite{'' if zero else ' and other than zero'}")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by their names. InputError when there is none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError(f"{type(model).__name__} has no parameter that requires gradients")
    return parameters


def loss_value(model: nn.Module, outputs: Callable[[Tensor], Any], loss: Loss, x: Tensor, labels: Tensor) -> Tensor:
    """loss(outputs(x), labels), a scalar. InputError where either fails, and for a loss that is no number."""
    with failures_of(described(model, x)):
        z = outputs(x)
    with failures_of(f"the loss on labels {list(labels.shape)}"):
        value = loss(z, labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise _no_number()
    return value


def loss_at(model: nn.Module, outputs: Callable[[Tensor], Any], loss: Loss, x: Tensor, labels: Tensor) -> Tensor:
    """loss(outputs(x), labels), a scalar with a gradient. InputError where either fails, and for a loss that has none."""
    value = loss_value(model, outputs, loss, x, labels)
    if not value.requires_grad:
        raise _no_number()
    check_checkpoints(graph_nodes([value]))
    return value


def described(model: nn.Module, x: Tensor) -> str:
    """A model and its input for a message."""
    return f"{type(model).__name__} on {x.dtype} {list(x.shape)}"


def _no_number() -> InputError:
    return InputError("the loss must return one number that depends on the outputs; use reduction='mean' or 'sum'")
