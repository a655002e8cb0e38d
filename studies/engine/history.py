"""Measurements of a training itself, not of a network: its epochs, and its loss step by step."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from studies.engine.records import Row

EPOCH = ("learning_rate", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "seconds")
"""Quantities of the records of an epoch."""
SMOOTHED = "smoothed loss"


def epochs(training: dict[str, Any], settings: None = None) -> Iterator[Row]:
    """One record for each epoch and quantity; its index is the epoch."""
    for epoch in training["history"]:
        for quantity in EPOCH:
            yield {
                "step": epoch["step"],
                "quantity": quantity,
                "index": epoch["epoch"],
                "value": epoch[quantity],
                "error": 0.0,
            }


def smoothed(training: dict[str, Any], points: int) -> Iterator[Row]:
    """The training loss after s steps, the mean over the last half epoch (or all steps before), at equally spaced s from 1 on."""
    losses = training["step_losses"]
    window = max(1, training["history"][0]["step"] // 2)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    for step in np.unique(np.linspace(1, len(losses), points).round().astype(int)).tolist():
        before = min(window, step)
        yield {"step": step, "quantity": SMOOTHED, "value": float(sums[step] - sums[step - before]) / before}
