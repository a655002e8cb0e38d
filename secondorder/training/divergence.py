"""Training that has left the finite numbers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secondorder.data.files import shown
from secondorder.errors import NonFiniteError
from secondorder.training.run import Run


class NonFiniteLossError(NonFiniteError):
    """The training or test loss, or a weight, is not finite: one line with run, epoch, step, loss and learning rate."""


def divergence(
    what: str, run: Run, folder: Path, done: int, steps_per_epoch: int, learning_rate: float, under_way: bool
) -> NonFiniteLossError:
    """The error of a training that has diverged.

    Args:
        what: is not finite: "the test loss is nan".
        run: that diverged.
        folder: of its checkpoint.
        done: steps before it.
        steps_per_epoch: of the training.
        learning_rate: of the step.
        under_way: whether it happened in the step after those done, else in the last of them.
    """
    epoch = (done if under_way else done - 1) // steps_per_epoch + 1
    return NonFiniteLossError(
        f"run {run.name}: {what} at epoch {epoch}, after {done} of {steps_per_epoch * run.epochs} steps, learning rate "
        f"{learning_rate:g}; lower learning_rate ({run.learning_rate:g}); the last good checkpoint, if one was due, "
        f"stays in {shown(folder)!r}"
    )


def left_range(error: RuntimeError) -> bool:
    """Whether an optimiser's error says that its numbers have left the range of their format: no decomposition, an overflow."""
    return isinstance(error, torch.linalg.LinAlgError) or "without overflow" in str(error)


def all_finite(value: Any) -> bool:
    """Whether every tensor in nested dictionaries, lists and tuples is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(all_finite(item) for item in value.values())
    return all(all_finite(item) for item in value) if isinstance(value, (list, tuple)) else True
