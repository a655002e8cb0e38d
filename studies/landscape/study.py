"""Landscape study: is the loss of a GCP network smoother along its gradient than that of a GAP network?

Trains the same backbone with each pooling head, from the same initial backbone weights and on the same batches for each
seed, and measures every `measure_every` steps the lines of `secondorder.landscape`: in feature space along +g (as
published, Wang et al. 2020) and along -g (where training goes), and in weight space along the optimiser's own step.

Results: ``landscape.csv`` (one row for each run, step, line and eta) and ``landscape_training.csv`` (one for each epoch).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch.nn import functional as F

from secondorder.data import ImageDataset, load_dataset
from secondorder.landscape import (
    LandscapeLine,
    equally_spaced,
    feature_landscape,
    optimiser_step,
    weight_landscape,
)
from secondorder.training import Moment, Run, check_run, is_main_process, on_main, train
from studies.checks import check_count, check_names
from studies.dry_run import cost_of
from studies.measured_runs import so_far
from studies.parallel import shared
from studies.results import provenance, write_table
from studies.run_folders import commit_of, open_runs, sign
from studies.settings import Common

NAME = "landscape"
Precision = Literal["off", "float16", "bfloat16"]
TRAINING = "landscape_training"


@dataclass(frozen=True)
class Settings:
    """Settings of the landscape study."""

    poolings: tuple[str, ...] = ("gap", "covariance", "gcp")
    """Pooling heads to compare; gap is the reference of every comparison."""
    backbone: str = "digits_net"
    """Network below the head."""
    dataset: str = "digits"
    """Images to train on."""
    image_size: int | None = None
    """Resize images to this height and width in pixels; the data set's own when not given."""
    train_limit: int | None = None
    """Use only this many training images; all when not given."""
    reduced_channels: int | None = None
    """Channels after the 1x1 reduction before the covariance; the backbone's default when not given."""
    last_stride: int | None = None
    """Stride of a ResNet's last stage for every head; as published (GAP 2, others 1) when not given."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 0.1
    """Initial learning rate of SGD."""
    schedule: str = "resnet_norm"
    """Learning-rate schedule, stretched to the number of epochs."""
    weight_decay: float = 1e-4
    """L2 penalty on the weights."""
    momentum: float = 0.9
    """Momentum of SGD."""
    dropout: float | None = None
    """Dropout before the classifier; as published (0.2 for MobileNetV2, else 0) when not given."""
    amp: Precision = "off"
    """Mixed precision in training: off, float16 or bfloat16; measurements are always in float32."""
    channels_last: bool = False
    """Memory layout of the convolutions; faster on most devices."""
    measure_every: int = 20
    """Training steps between two measurements."""
    eta_points: int = 10
    """Equally spaced points on each measured line."""
    eta_low: float = 0.1
    """Smallest eta in feature space (X + eta g)."""
    eta_high: float = 75.0
    """Largest eta in feature space; 75 is published for ResNets, 1.5 (from 0.045) for MobileNetV2."""
    step_low: float = 0.5
    """Shortest walk in weight space, in steps of the optimiser."""
    step_high: float = 4.0
    """Longest walk in weight space, in steps of the optimiser."""
    processes: int = 1
    """Networks that are trained and measured side by side; they share the threads."""

    def __post_init__(self) -> None:
        check_names("poolings", self.poolings)
        for name in ("measure_every", "processes"):
            check_count(name, getattr(self, name))
        check_count("eta_points", self.eta_points, most=10_000)
        equally_spaced(self.eta_low, self.eta_high, self.eta_points)
        equally_spaced(self.step_low, self.step_high, self.eta_points)


PRESETS = {
    "smoke": Settings(epochs=1, train_limit=192, measure_every=2, eta_points=3),
    "quick": Settings(processes=2),
    "cifar10": Settings(
        backbone="cifar_resnet8",
        dataset="cifar10",
        epochs=6,
        batch_size=128,
        measure_every=130,
        eta_points=8,
        channels_last=True,
    ),
    "paper": Settings(
        poolings=("gap", "gcp"),
        backbone="resnet18",
        dataset="imagefolder",
        epochs=100,
        batch_size=256,
        measure_every=500,
        eta_points=50,
        channels_last=True,
        amp="float16",
    ),
}


@dataclass(frozen=True)
class LandscapeObserver:
    """Measures the lines of the study on the batch that training is about to use; one row for each line and eta."""

    settings: Settings

    @property
    def every(self) -> int:
        """Steps between two measurements."""
        return self.settings.measure_every

    def __call__(self, moment: Moment) -> list[dict[str, Any]]:
        """Rows for the moment; the model, the optimiser and the random state are left as they were."""
        s, model, batch = self.settings, moment.model, (moment.images, moment.labels)
        etas = equally_spaced(s.eta_low, s.eta_high, s.eta_points)
        steps = equally_spaced(s.step_low, s.step_high, s.eta_points)
        step = optimiser_step(model, moment.optimizer, F.cross_entropy, *batch)
        lines = {
            ("feature", "ascent"): feature_landscape(model, F.cross_entropy, *batch, etas, "ascent"),
            ("feature", "descent"): feature_landscape(model, F.cross_entropy, *batch, etas, "descent"),
            ("weight", "step"): weight_landscape(model, F.cross_entropy, *batch, steps, step),
        }
        return [row for (space, direction), line in lines.items() for row in _rows(moment, space, direction, line)]


def _rows(moment: Moment, space: str, direction: str, line: LandscapeLine) -> Iterator[dict[str, Any]]:
    columns = (line.etas, line.loss, line.gradient_distance, line.cosine, line.betas)
    for eta, loss, distance, cosine, beta in zip(*(c.tolist() for c in columns), strict=True):
        yield {
            "step": moment.step,
            "epoch": moment.epoch,
            "learning_rate": moment.learning_rate,
            "space": space,
            "direction": direction,
            "eta": eta,
            "loss": loss,
            "gradient_distance": distance,
            "cosine": cosine,
            "beta": beta,
            "loss_at_origin": line.loss_at_origin,
            "gradient_norm": line.gradient_norm,
        }


@dataclass(frozen=True)
class Measured:
    """A network that was trained and measured."""

    run: Run
    history: list[dict[str, float | int]]
    seconds: float
    lines: list[dict[str, Any]]


def runs(common: Common, settings: Settings) -> list[Run]:
    """The training runs of the study, all heads of one seed before the next seed; InputError for a bad name or value."""
    amp: Precision = settings.amp if settings.amp != "float16" or common.torch_device.type != "cpu" else "off"
    return [
        Run(
            backbone=settings.backbone,
            pooling=pooling,
            dataset=settings.dataset,
            image_size=settings.image_size,
            train_limit=settings.train_limit,
            reduced_channels=settings.reduced_channels,
            last_stride=settings.last_stride,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            schedule=settings.schedule,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            dropout=settings.dropout,
            amp=amp,
            channels_last=settings.channels_last,
            seed=seed,
            device=common.device,
            threads=common.threads,
        )
        for seed in range(common.seeds)
        for pooling in settings.poolings
    ]


def check(common: Common, settings: Settings) -> ImageDataset:
    """Find bad names, sizes and data before any training; returns the loaded data."""
    todo = runs(common, settings)
    data = load_dataset(
        settings.dataset,
        common.data_root,
        download=common.download,
        limit=settings.train_limit,
        image_size=settings.image_size,
    )
    for one in todo[: len(settings.poolings)]:
        check_run(one, data)
    return data


def run(common: Common, settings: Settings, data: ImageDataset) -> None:
    """Train and measure every run; ``<name>.partial.csv`` grows with every finished one and becomes the tables at the end.

    A fresh start forgets the runs of the folder, so that nothing old can be taken for new; resuming takes those that are
    there, and refuses when they are of other settings.
    """
    folder, start = common.folder / "runs" / NAME, time.perf_counter()
    on_main(lambda: open_runs(folder, settings, common.resume, may_grow=("poolings", "processes")))
    each, processes = shared(common, settings.processes, len(runs(common, settings)))
    todo = [(one, each, settings, data, folder) for one in runs(each, settings)]
    for done in so_far(NAME, trained_and_measured, todo, processes, common.progress):
        if is_main_process():
            _write(common, settings, data, done, folder, start, partial=len(done) < len(todo))


def trained_and_measured(one: Run, common: Common, settings: Settings, data: ImageDataset, folder: Path) -> Measured:
    """Train a network, measuring it on the way."""
    on_main(lambda: sign(folder / one.name))
    own = {NAME: LandscapeObserver(settings)}
    trained = train(one, data, folder / one.name, observers=own, resume=common.resume, progress=common.progress)
    return Measured(one, trained.history, trained.seconds, trained.records[NAME])


def dry_run(common: Common, settings: Settings) -> list[str]:
    """One step and one measurement of every head on fake data; sentences that state the cost of the whole study."""
    costs = [
        cost_of(one, {NAME: LandscapeObserver(settings)}) for one in runs(common, settings)[: len(settings.poolings)]
    ]
    hours = common.seeds * sum(seconds for seconds, _ in costs) / 3600
    return [*(words for _, words in costs), f"{common.seeds} seeds of {len(costs)} heads: about {hours:,.1f} h"]


def _write(
    common: Common,
    settings: Settings,
    data: ImageDataset,
    done: list[Measured],
    folder: Path,
    start: float,
    partial: bool,
) -> None:
    lines = pd.concat([_labelled(measured.run, measured.lines) for measured in done])
    if partial:
        write_table(common.folder, f"{NAME}.partial", lines)
        return
    origin = provenance(
        NAME,
        asdict(settings) | {"preset": common.preset, "amp": done[0].run.amp},
        sorted({measured.run.seed for measured in done}),
        {"label": data.label, **data.provenance},
        common.torch_device,
        sum(measured.seconds for measured in done) if common.resume else time.perf_counter() - start,
        [commit_of(folder / measured.run.name) for measured in done],
    )
    write_table(common.folder, TRAINING, pd.concat([_labelled(measured.run, measured.history) for measured in done]))
    write_table(common.folder, NAME, lines, origin)
    (common.folder / f"{NAME}.partial.csv").unlink(missing_ok=True)


def _labelled(one: Run, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    table.insert(0, "pooling", one.pooling)
    table.insert(1, "seed", one.seed)
    return table
