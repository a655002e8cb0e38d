"""What a study wants: networks, after which numbers of steps, and what is measured there."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import numpy as np

from secondorder.errors import InputError
from studies.engine.records import Row
from studies.engine.store import Subject, digest

Dry = tuple[Callable[..., Iterable[Row]], float]
"""A small part of a measurement, and how many such parts it has."""


@dataclass(frozen=True)
class Measurement:
    """A pure function of a snapshot and of settings: it trains nothing, and leaves the network as it was.

    ``measure(snapshot, settings)`` gives rows; without a network ``measure(settings)``, and ``measure(training, settings)`` where
    it is `of_training`. When what it computes changes, so does its `version`: then nothing that an older one measured is taken
    for its result.
    """

    name: str
    measure: Callable[..., Iterable[Row]]
    settings: Any = None
    """Plain values, or a dataclass of them: part of the measurement's key."""
    version: int = 1
    of_training: bool = False
    """Whether it is of the training (what ``trained.json`` holds of it), not of a snapshot."""
    dry: Dry | None = None
    """What a dry run measures instead, without its data; None: the measurement."""
    of_batch: bool = False
    """Whether it is made on the next step's batch, so that its cost is in proportion to that."""

    @property
    def described(self) -> dict[str, Any]:
        """Name, version and settings, which tell measurements apart."""
        plain = is_dataclass(self.settings) and not isinstance(self.settings, type)
        settings = asdict(self.settings) if plain else self.settings
        return {"measurement": self.name, "version": self.version, "settings": settings}


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


HISTORY = Measurement("training", epochs, of_training=True)
"""The epochs of a training: quantities train_loss, test_top1 and so on, with the epoch as index."""


def loss_curve(points: int) -> Measurement:
    """The loss of a training at so many steps, equally spaced; see `smoothed`. In `Trained.at` it stands at step 0."""
    return Measurement("loss curve", smoothed, points, of_training=True)


@dataclass(frozen=True)
class Trained:
    """A network, trained once for all studies, its epochs, and what is measured of it after which numbers of steps."""

    subject: Subject
    at: tuple[tuple[int, Measurement], ...] = ()
    may_diverge: bool = False
    """Whether divergence is a result, a record "diverged" in place of the epochs (of a trial, say), and no error."""
    history: Measurement = HISTORY
    """Of the epochs; another one may give their records other labels than those of the run."""

    def wanted(self) -> Iterator[tuple[str, int, Measurement]]:
        """(key, step, measurement) of each."""
        for step, measurement in ((0, self.history), *self.at):
            yield self.key(step, measurement), step, measurement

    def key(self, step: int, measurement: Measurement) -> str:
        """What tells the records of a measurement after so many steps from all others."""
        return digest({"entry": self.subject.name, "step": step} | measurement.described)


@dataclass(frozen=True)
class Computed:
    """A measurement without a trained network."""

    measurement: Measurement
    labels: Row
    alone: bool = False
    """Whether nothing else may run beside it: what is timed."""
    device: str = "cpu"
    """Where it computes; part of the key."""

    def wanted(self) -> Iterator[tuple[str, int, Measurement]]:
        """(key, step, measurement) of the one."""
        yield self.key(0, self.measurement), 0, self.measurement

    def key(self, step: int, measurement: Measurement) -> str:
        """What tells the records of a measurement from all others."""
        where = {} if self.device == "cpu" else {"device": self.device}
        return digest({"labels": dict(self.labels)} | where | measurement.described)


Task = Trained | Computed


def superseded(task: Task, step: int, measurement: Measurement) -> list[str]:
    """The keys under which older versions of a measurement have left records."""
    return [task.key(step, replace(measurement, version=version)) for version in range(1, measurement.version)]


def every(interval: int, total: int) -> list[int]:
    """Steps 0, interval, 2 interval, ... before the last of `total`."""
    return list(range(0, total, interval))


def spaced(count: int, total: int) -> list[int]:
    """`count` (or a few less) equally spaced steps, of which the first is 0 and the last `total`."""
    if count < 2:
        raise InputError(f"{count} moments of training: at least 2, the first and the last step")
    return [*range(0, total, max(1, -(-total // (count - 1)))), total]
