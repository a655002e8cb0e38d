"""Training that has left the finite numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import InputError


class NonFiniteLossError(InputError):
    """The training loss, or a weight, is not finite: one line with run, epoch, step, loss and learning rate."""


def features_finite(model: nn.Module, images: Tensor) -> bool:
    """Whether what reaches the pooling head is finite, for a network made of stem, features, head and classifier."""
    with torch.no_grad():
        features = model.get_submodule("features")(model.get_submodule("stem")(images))
    return bool(torch.isfinite(features).all())


def all_finite(value: Any) -> bool:
    """Whether every tensor in nested dictionaries, lists and tuples is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(all_finite(item) for item in value.values())
    return all(all_finite(item) for item in value) if isinstance(value, (list, tuple)) else True
