"""What optimisers are tuned on: networks under a head, and the autoencoder. Each gives its trainings as tasks of the engine."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from secondorder.data import load_dataset
from secondorder.training import OPTIMIZERS, initial_network
from studies.engine.plan import Computed, Measurement, Task, Trained, loss_curve
from studies.engine.records import Row
from studies.engine.study import Context
from studies.optimisers import autoencoder as deep
from studies.optimisers.costs import Stepper, cycled, measure, slowed
from studies.optimisers.settings import TUNING_SEED
from studies.optimisers.tuning import LATTICES, Lattice, Values

RUN_FIELDS = ("learning_rate", "momentum", "weight_decay")
"""Settings that are fields of `Run`; the others are options of the optimiser."""
PRIMARY = ("gap", "gcp")
POINTS = 60
"""Points of a loss curve."""


@dataclass(frozen=True)
class Cell:
    """An optimiser on a problem: networks under a head."""

    context: Context
    head: str
    optimizer: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.optimizer}, {self.head or deep.NETWORK}"

    @property
    def labels(self) -> dict[str, Any]:
        """Of records that are of no single training."""
        training = self.context.settings.training
        network, schedule = (training.network, training.schedule) if self.head else (deep.NETWORK, "cosine")
        labels = {"network": network, "dataset": training.dataset, "schedule": schedule, "seed": TUNING_SEED}
        return labels | {"head": self.head, "optimizer": self.optimizer}

    @property
    def lattice(self) -> Lattice:
        """What is tuned."""
        return LATTICES[self.optimizer]

    @property
    def seeds(self) -> range:
        """The reported seeds: all under GAP and GCP, fewer of controls, fewest of what is only compared."""
        settings, seeds = self.context.settings, len(self.context.seeds)
        if not self.head or self.optimizer in settings.others:
            return range(min(seeds, settings.other_seeds))
        return range(seeds if self.head in PRIMARY else min(seeds, settings.control_seeds))

    @property
    def tuning_seeds(self) -> range:
        """The seeds of a trial."""
        settings = self.context.settings
        return range(TUNING_SEED, TUNING_SEED + (settings if self.head else settings.autoencoder).tuning_seeds)

    def changes(self, values: Values) -> dict[str, Any]:
        """Fields of `Run` that have these tuned settings."""
        options = {name: value for name, value in values.items() if name not in RUN_FIELDS}
        fields = {name: value for name, value in values.items() if name in RUN_FIELDS}
        return fields | {"optimizer": self.optimizer, "optimizer_options": options}

    def task(self, values: Values, seed: int, trial: bool) -> Task:
        """A training with these settings; a trial has no curve, and perhaps fewer epochs."""
        settings = self.context.settings
        epochs = settings.trial_epochs if trial and settings.trial_epochs else settings.training.epochs
        subject = settings.training.subject(self.context.common, self.head, seed, **self.changes(values), epochs=epochs)
        return Trained(subject, () if trial else ((0, loss_curve(POINTS)),), may_diverge=True)

    def stepper(self, values: Values) -> Stepper:
        """Its training steps, to be timed; the same initial weights and batches for every optimiser."""
        settings, common = self.context.settings, self.context.common
        training, device = settings.training, common.torch_device
        run, data = training.run(common, self.head, 0, **self.changes(slowed(values))), training.data(common)
        layout = torch.channels_last if training.channels_last else torch.contiguous_format
        batches = [
            (images.contiguous(memory_format=layout), labels)
            for images, labels in cycled(data.train, run.batch_size, settings.timing_steps, device)
        ]
        model = initial_network(run, data).to(device, memory_format=layout)  # type: ignore[call-overload]
        return Stepper(model, OPTIMIZERS[run.optimizer](model, run), F.cross_entropy, batches)


@dataclass(frozen=True)
class DeepCell(Cell):
    """An optimiser on the autoencoder, under no head."""

    @property
    def lattice(self) -> Lattice:
        """What is tuned."""
        return deep.ARMS[self.optimizer].lattice

    @property
    def images(self) -> torch.Tensor:
        """Pixels `[N, image_size^2]`, read once."""
        settings, common = self.context.settings.autoencoder, self.context.common
        key = (settings.dataset, settings.images, settings.image_size)
        if key not in _pixels:
            data = load_dataset(settings.dataset, common.data_root, download=common.download, limit=settings.images)
            _pixels[key] = deep.pixels(data, settings)
        return _pixels[key].to(common.torch_device)

    def task(self, values: Values, seed: int, trial: bool) -> Task:
        """A training with these settings; the settings of the measurement tell it from others."""
        settings = self.context.settings.autoencoder
        described = asdict(replace(settings, arms=(), tuning_seeds=1)) | {
            "arm": self.optimizer,
            "values": values,
            "seed": seed,
        }
        fit = partial(_fit, self.images, settings, self.optimizer, values, seed)
        device = str(self.context.common.torch_device)
        return Computed(Measurement("autoencoder", fit, described), self.labels | {"seed": seed}, device=device)

    def stepper(self, values: Values) -> Stepper:
        """Its updates, to be timed."""
        return deep.stepper(self.images, self.context.settings.autoencoder, self.optimizer, slowed(values), 0)


_pixels: dict[tuple[Any, ...], torch.Tensor] = {}


def _fit(*arguments: Any) -> list[dict[str, Any]]:
    """`autoencoder.fit` without the measurement's settings, which come last."""
    return deep.fit(*arguments[:-1])


def cells(context: Context) -> list[Cell]:
    """All optimisers on all problems."""
    settings = context.settings
    factorial = [Cell(context, head, optimizer) for head in settings.heads for optimizer in settings.optimizers]
    others = [Cell(context, head, optimizer) for head in PRIMARY for optimizer in settings.others]
    return [*factorial, *others, *(DeepCell(context, "", arm) for arm in settings.autoencoder.arms)]


def final_loss(records: pd.DataFrame) -> float:
    """The training loss of a training's last epoch (or evaluation), with the 10 digits of a table; infinite where it diverged."""
    losses = records[records.quantity == "train_loss"]
    # a table that is read again has no more digits, and what was chosen by it must not change
    return math.inf if losses.empty else float(f"{losses.sort_values('step').value.iloc[-1]:.10g}")


def costs(tuned: Mapping[Cell, Values]) -> Computed:
    """The timing of all tuned optimisers, one problem after the other."""
    first = next(iter(tuned))
    settings = asdict(first.context.settings)
    described = {name: settings[name] for name in ("training", "autoencoder", "timing_steps")}
    described["tuned"] = [[cell.name, values] for cell, values in tuned.items()]
    measurement = Measurement("costs", partial(_costs, tuned), described)
    return Computed(measurement, first.labels, alone=True, device=str(first.context.common.torch_device))


def _costs(tuned: Mapping[Cell, Values], settings: Mapping[str, Any]) -> Iterator[Row]:
    for head in dict.fromkeys(cell.head for cell in tuned):
        problem = [cell for cell in tuned if cell.head == head]
        steppers = {cell.optimizer: cell.stepper(tuned[cell]) for cell in problem}
        labels = {"network": problem[0].labels["network"], "head": head}
        for row in measure(steppers, settings["timing_steps"], problem[0].context.common.torch_device):
            yield {**labels, **row}
