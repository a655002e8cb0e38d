"""Measurements during training: what an observer is told, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, check_whole
from secondorder.training.run import Run

Row = dict[str, float | int | str]


@dataclass(frozen=True)
class Moment:
    """Training, just before the forward pass of a step, with the batch [B, C, H, W], [B] that the step will use."""

    model: nn.Module
    """The network itself (never wrapped for several processes), in training mode."""
    optimizer: torch.optim.Optimizer
    """With the step's learning rate set and its gradients cleared."""
    images: Tensor
    """The whole batch, of all processes, on the device of the run."""
    labels: Tensor
    step: int
    """Steps done so far: 0 before the first one."""
    epoch: int
    """The epoch that the step belongs to, 1 for the first one."""
    learning_rate: float
    run: Run


class Observer(Protocol):
    """A measurement every ``every`` steps that leaves training as it was; its rows are kept with the checkpoint.

    Random draws start where those of the step will start (the same dropout masks, for one process). Random numbers and
    ``.grad`` need no care: the step seeds and clears them afterwards. Weights, batch-norm statistics
    and the optimiser's state must be left as they were.
    """

    @property
    def every(self) -> int:
        """The number of steps from one measurement to the next; a plain attribute will do."""

    def __call__(self, moment: Moment) -> list[Row]:
        """Rows of plain values, in one process only: no collective communication in here."""


def intervals(observers: Mapping[str, Observer]) -> dict[str, int]:
    """Each observer's ``every``; raises InputError unless they are functions by name, ``every`` a whole number, at least 1."""
    if not isinstance(observers, Mapping):
        raise InputError(f"observers are {observers!r:.100}; they must map names to observers")
    for name, observer in observers.items():
        if not isinstance(name, str) or not callable(observer) or not hasattr(observer, "every"):
            raise InputError(f"observers: {name!r:.80} is {observer!r:.80}, no function with an attribute every")
        check_whole(f"observer {name!r:.80}: every", observer.every)
    return {name: observer.every for name, observer in observers.items()}


def observe(observers: Mapping[str, Observer], moment: Moment) -> dict[str, list[Row]]:
    """The rows of every observer that is due at this moment."""
    due = {name: observer for name, observer in observers.items() if moment.step % observer.every == 0}
    return {name: [_plain(row) for row in observer(moment)] for name, observer in due.items()}


def _plain(row: Mapping[str, Any]) -> Row:
    """Numbers of numpy and torch as Python's own, the only ones that ``torch.load(weights_only=True)`` reads."""

    def plain(name: str, value: Any) -> float | int | str:
        value = value.item() if hasattr(value, "item") else value
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return kind(value)
        raise TypeError(f"an observer returned {name} = {value!r}; a row holds numbers and words")

    return {str(name): plain(name, value) for name, value in row.items()}
