"""Optimisers by name: functions (network, run) -> torch optimiser over the network's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from secondorder.training.run import Run


def sgd(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """SGD with heavy-ball momentum: v <- momentum v + g + weight_decay w, w <- w - learning_rate v."""
    return torch.optim.SGD(
        model.parameters(), lr=run.learning_rate, momentum=run.momentum, weight_decay=run.weight_decay
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, Run], torch.optim.Optimizer]] = {"sgd": sgd}
