"""What optimisers are tuned on: networks under a head, and the autoencoder. Each gives its trainings as tasks of the engine."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from secondorder.training.evaluation import to_device
from secondorder.training.setup import first_state
from studies.engine.plan import Computed, Measurement, Task, Trained, loss_curve
from studies.engine.records import Row
from studies.engine.study import Context
from studies.optimisers import autoencoder as deep
from studies.optimisers.claims import OF_SGD
from studies.optimisers.costs import Stepper, memory, next_to
from studies.optimisers.settings import TUNING_SEED, AutoencoderSettings
from studies.optimisers.tuning import DEEP_LATTICES, LATTICES, Lattice, Values
from studies.settings import Common
from studies.training import Training

RUN_FIELDS = ("learning_rate", "momentum", "weight_decay")
"""Settings that are fields of `Run`; the others are options of the optimiser."""
PRIMARY = ("gap", "gcp")
POINTS = 60
"""Points of a loss curve."""
MILLISECONDS = "milliseconds of a step"
PEAK, STATE = "peak memory of a step [MiB]", "state [MiB]"


@dataclass(frozen=True)
class Cell:
    """An optimiser on a problem: networks under a head, or under no head the autoencoder."""

    context: Context
    head: str
    optimizer: str
    seeds: range
    """The reported ones."""

    @property
    def name(self) -> str:
        """Optimiser and head, by which messages name the problem."""
        return f"{self.optimizer}, {self.head or deep.NETWORK}"

    @property
    def labels(self) -> dict[str, Any]:
        """Of records that are of no single training."""
        training = self.context.settings.training
        network, schedule = (training.network, training.schedule) if self.head else (deep.NETWORK, "cosine")
        labels = labels_of_all(self.context) | {"network": network, "schedule": schedule}
        return labels | {"head": self.head, "optimizer": self.optimizer}

    @property
    def problem(self) -> dict[str, Any]:
        """The settings of what is trained; of the autoencoder without those that are of no single training."""
        settings = self.context.settings
        return asdict(settings.training if self.head else replace(settings.autoencoder, arms=(), tuning_seeds=1))

    @property
    def lattice(self) -> Lattice:
        """The settings that are tried, of this optimiser and kind of network."""
        return (LATTICES if self.head else DEEP_LATTICES)[self.optimizer]

    @property
    def tuning_seeds(self) -> range:
        """The seeds of a trial."""
        settings = self.context.settings
        return range(TUNING_SEED, TUNING_SEED + (settings if self.head else settings.autoencoder).tuning_seeds)

    def task(self, values: Values, seed: int, trial: bool) -> Task:
        """A training with these settings; a trial has no curve, and perhaps fewer epochs."""
        settings, common = self.context.settings, self.context.common
        if not self.head:
            return self._deep_task(values, seed)
        epochs = settings.trial_epochs if trial and settings.trial_epochs else settings.training.epochs
        subject = settings.training.subject(common, self.head, seed, **self._changes(values), epochs=epochs)
        return Trained(subject, () if trial else ((0, loss_curve(POINTS)),), may_diverge=True)

    def _changes(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Fields of `Run` that have these tuned settings."""
        options = {name: value for name, value in values.items() if name not in RUN_FIELDS}
        fields = {name: value for name, value in values.items() if name in RUN_FIELDS}
        return fields | {"optimizer": self.optimizer, "optimizer_options": options}

    def _deep_task(self, values: Values, seed: int) -> Task:
        """A training of the autoencoder; the settings of the measurement tell it from others."""
        common, settings = self.context.common, self.context.settings.autoencoder
        fit = partial(deep.fit, _pixels(common, settings), settings, self.optimizer, values, seed)
        described = self.problem | {"arm": self.optimizer, "values": values, "seed": seed}
        measurement = Measurement("autoencoder", lambda _: fit(), described)
        return Computed(measurement, self.labels | {"seed": seed}, device=str(common.torch_device))

    def stepper(self, values: Values) -> Stepper:
        """Its training steps, to be timed; the same initial weights and batches for every optimiser.

        The learning rate is a thousandth: a step takes as long, and none diverges while it is timed.
        """
        slow = {name: value / 1000 if name == "learning_rate" else value for name, value in values.items()}
        settings, common = self.context.settings, self.context.common
        if not self.head:
            return deep.stepper(_pixels(common, settings.autoencoder), settings.autoencoder, self.optimizer, slow, 0)
        training, device = settings.training, common.torch_device
        run, data = training.run(common, self.head, 0, **self._changes(slow)), training.data(common)
        whole = torch.arange(len(data.train) // run.batch_size * run.batch_size).split(run.batch_size)
        batches = [
            (to_device(images, device, run.channels_last), labels.to(device))
            for images, labels in map(data.train.batch, whole[: settings.timing_steps])
        ]
        model, optimizer, _ = first_state(run, data, device, None, None)
        return Stepper(model, optimizer, F.cross_entropy, batches)


@lru_cache(maxsize=1)
def _pixels(common: Common, settings: AutoencoderSettings) -> torch.Tensor:
    images = Training(dataset=settings.dataset, train_limit=settings.images).data(common)
    return deep.pixels(images, settings).to(common.torch_device)


def labels_of_all(context: Context) -> dict[str, Any]:
    """Of records that are of all trainings; the data set by the name that those of a training have."""
    training = context.settings.training
    return {"network": training.network, "dataset": training.data(context.common).name, "seed": TUNING_SEED}


def cells(context: Context) -> list[Cell]:
    """All optimisers on all problems: all seeds under GAP and GCP, fewer of controls, fewest of what is only compared."""
    s = context.settings
    most = {(h, o): s.control_seeds for h in s.heads for o in s.optimizers}
    most |= {(h, o): len(context.seeds) for h in PRIMARY for o in s.optimizers}
    most |= {(h, o): s.other_seeds for h in PRIMARY for o in s.others}
    most |= {("", arm): s.other_seeds for arm in s.autoencoder.arms}
    return [Cell(context, h, o, range(min(seeds, len(context.seeds)))) for (h, o), seeds in most.items()]


def final_loss(records: pd.DataFrame) -> float:
    """The training loss of a training's last epoch (or evaluation), with the 10 digits of a table; infinite where it diverged."""
    losses = records[records.quantity == "train_loss"]
    # a table that is read again has no more digits, and what was chosen by it must not change
    return math.inf if losses.empty else float(f"{losses.sort_values('step').value.iloc[-1]:.10g}")


def costs(cell: Cell, values: Values, of_sgd: Values) -> Computed:
    """The timing of an optimiser with its tuned settings, next to SGD with its own, and its memory."""
    sgd, device = replace(cell, optimizer="sgd"), cell.context.common.torch_device
    described = {"problem": cell.problem, "steps": cell.context.settings.timing_steps, "values": values, "sgd": of_sgd}

    def measure(case: Mapping[str, Any]) -> Iterator[Row]:
        return _costs(cell.stepper(values), sgd.stepper(of_sgd), case["steps"], device)

    return Computed(Measurement("costs of steps", measure, described), cell.labels, alone=True, device=str(device))


def _costs(stepper: Stepper, sgd: Stepper, steps: int, device: torch.device) -> Iterator[Row]:
    """Milliseconds of each of the first steps, also divided by those of the SGD step before it, and memory."""
    for index in range(steps):
        of_sgd, own = next_to(sgd, stepper, device)
        yield {"quantity": MILLISECONDS, "index": index, "value": own}
        yield {"quantity": OF_SGD, "index": index, "value": own / of_sgd}
    peak, state = memory(stepper, device)
    yield {"quantity": PEAK, "value": peak}
    yield {"quantity": STATE, "value": state, "error": 0.0}
