"""Training that has left the finite numbers."""

from typing import Any

import torch
from torch import Tensor

from secondorder.errors import NonFiniteError


class NonFiniteLossError(NonFiniteError):
    """The training or test loss, or a weight, is not finite: one line with run, epoch, step, loss and learning rate."""


def all_finite(value: Any) -> bool:
    """Whether every tensor in nested dictionaries, lists and tuples is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(all_finite(item) for item in value.values())
    return all(all_finite(item) for item in value) if isinstance(value, (list, tuple)) else True
