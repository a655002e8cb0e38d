"""Curvature study: are the curvature blocks of a GCP network better conditioned than those of a GAP network?

Trains the same backbone with each pooling head, from the same initial backbone weights and on the same batches for each
seed, and measures the blocks of the Gauss-Newton matrix and of the Hessian at equally spaced moments (the first is the
same backbone weights for all heads), at the end, and on shared trained backbones: the backbone trained under one head, with
every head put on it and its classifier fitted anew. What is measured of a network is in `studies.curvature.measures`.

Results: ``curvature.csv`` (one row for each network, moment, block and measure), ``curvature_spectra.csv`` (eigenvalues)
and ``curvature_training.csv`` (one row for each epoch).
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from secondorder.accelerator import check_float64
from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.training import Moment, Run, Trained, check_run, is_main_process, on_main, train
from studies.curvature.measures import Row, measure
from studies.curvature.settings import Scale, Settings
from studies.dry_run import cost_of, fake_data
from studies.frozen_statistics import frozen_at
from studies.measured_runs import so_far
from studies.moments import steps_between
from studies.parallel import shared
from studies.results import provenance, write_table
from studies.run_folders import commit_of, kept, open_runs, sign
from studies.settings import Common
from studies.shared_backbone import SharedBackbone, check_sharing, evenly_spaced, published_stride

NAME = "curvature"
SPECTRA, TRAINING = "curvature_spectra", "curvature_training"
KEYS = ("backbone", "pooling", "seed", "phase", "step")


def runs(common: Common, settings: Settings) -> list[Run]:
    """The training runs: for each backbone all heads of one seed before the next seed; InputError for a bad name or value."""
    return [
        _run(common, settings, backbone, pooling, seed)
        for backbone in settings.backbones
        for seed in range(common.seeds)
        for pooling in settings.poolings
    ]


def _run(common: Common, settings: Settings, backbone: str, pooling: str, seed: int) -> Run:
    """All heads of a backbone get the published GCP network's last stride, so that it differs in nothing but the head."""
    scale = settings.scale(backbone)
    return Run(
        backbone=backbone,
        pooling=pooling,
        dataset=settings.dataset,
        image_size=scale.image_size,
        train_limit=scale.train_limit,
        reduced_channels=scale.reduced_channels,
        last_stride=published_stride(backbone),
        dropout=0.0,
        epochs=scale.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        seed=seed,
        device=common.device,
        threads=common.threads,
    )


@dataclass(frozen=True)
class CurvatureObserver:
    """Measures the network that training has at equally spaced steps, on images of its own."""

    settings: Settings
    scale: Scale
    images: Tensor
    labels: Tensor
    every: int
    """Steps between two measurements."""

    def __call__(self, moment: Moment) -> list[Row]:
        """Rows for the moment, of the Hessian only at the start; the model is copied, not touched."""
        phase = "training" if moment.step else "initial"
        rows = self.rows(moment.model, moment.run.seed, hessian=moment.step == 0)
        return [{"phase": phase, "step": moment.step, **row} for row in rows]

    def rows(self, model: nn.Module, seed: int, hessian: bool = True) -> list[Row]:
        """What is measured of a model."""
        limits, precision = self.settings.limits, self.scale.precision
        device = next(model.parameters()).device
        images, labels = self.images.to(device), self.labels.to(device)
        return measure(model, images, labels, limits, precision=precision, seed=seed, hessian=hessian)


def observer(run: Run, settings: Settings, data: ImageDataset) -> CurvatureObserver:
    """The observer of a run, with training images as they are, not augmented."""
    scale = settings.scale(run.backbone)
    images, labels = some_images(data, scale.images)
    return CurvatureObserver(settings, scale, images, labels, every=steps_between(run, data, scale.measurements))


def some_images(data: ImageDataset, count: int) -> tuple[Tensor, Tensor]:
    """Training images and their labels, not augmented; InputError when there are fewer."""
    if len(data.train) < count:
        raise InputError(f"images {count}: there are only {len(data.train)} training images; measure fewer")
    return data.train.plain(evenly_spaced(len(data.train), count))


def check(common: Common, settings: Settings) -> dict[str, ImageDataset]:
    """Find bad names, sizes and data before any training; returns the loaded data of each backbone."""
    check_float64(common.torch_device, "the curvature study")
    todo = runs(common, settings)
    loaded: dict[Scale, ImageDataset] = {}
    data: dict[str, ImageDataset] = {}
    for one in todo:
        scale = settings.scale(one.backbone)
        if scale not in loaded:
            loaded[scale] = load_dataset(
                settings.dataset,
                common.data_root,
                download=common.download,
                limit=scale.train_limit,
                image_size=scale.image_size,
            )
        if one.seed == 0:
            check_run(one, loaded[scale])
            some_images(loaded[scale], scale.images)
            if scale.share:
                check_sharing(loaded[scale], settings.weight_decay)
        data[one.backbone] = loaded[scale]
    return data


@dataclass(frozen=True)
class Measured:
    """A network that was trained and measured."""

    run: Run
    history: list[dict[str, float | int]]
    seconds: float
    table: pd.DataFrame


def run(common: Common, settings: Settings, data: dict[str, ImageDataset]) -> None:
    """Train and measure every run; ``<name>.partial.csv`` grows with every finished one and becomes the tables at the end."""
    folder, start = common.folder / "runs" / NAME, time.perf_counter()
    on_main(lambda: open_runs(folder, settings, common.resume, may_grow=("poolings", "backbones", "processes")))
    each, processes = shared(common, settings.processes, len(runs(common, settings)))
    todo = [(one, each, settings, data[one.backbone], folder) for one in runs(each, settings)]
    for done in so_far(NAME, trained_and_measured, todo, processes, common.progress):
        if is_main_process():
            _write(common, settings, data, done, folder, start, partial=len(done) < len(todo))


def trained_and_measured(one: Run, common: Common, settings: Settings, data: ImageDataset, folder: Path) -> Measured:
    """Train a network and measure it; only the main process of several measures, the others return an empty table."""
    on_main(lambda: sign(folder / one.name))
    own = observer(one, settings, data)
    trained = train(one, data, folder / one.name, observers={NAME: own}, resume=common.resume, progress=common.progress)
    rows: list[Row] = []
    if is_main_process():
        rows = trained.records[NAME] + list(_after_training(one, trained, own, data, settings, folder / one.name))
    return Measured(one, trained.history, trained.seconds, _labelled(one, rows) if rows else pd.DataFrame())


def _after_training(
    one: Run, trained: Trained, own: CurvatureObserver, data: ImageDataset, settings: Settings, folder: Path
) -> Iterator[Row]:
    """Rows of the trained network, and of its backbone under every head; kept in the folder of the run."""
    last = trained.history[-1]["step"]

    def labelled(phase: str, pooling: str, model: nn.Module) -> list[Row]:
        rows = own.rows(model, one.seed, hessian=phase == "trained")
        return [{"phase": phase, "step": int(last), "pooling": pooling, **row} for row in rows]

    yield from kept(folder / "trained.json", lambda: labelled("trained", one.pooling, trained.model))
    if one.pooling not in settings.scale(one.backbone).share:
        return
    images = own.images.to(next(trained.model.parameters()).device)
    backbone = cache(lambda: SharedBackbone(frozen_at(trained.model, images, torch.float32), data, one.weight_decay))
    for pooling in settings.poolings:

        def under_head(pooling: str = pooling) -> list[Row]:
            return labelled(f"shared: {one.pooling}", pooling, backbone().with_head(pooling))

        yield from kept(folder / f"shared-{pooling}.json", under_head)


def _labelled(one: Run, rows: list[Row]) -> pd.DataFrame:
    """A table with the columns of KEYS first; a row may name another head than that of its run."""
    named = [{"backbone": one.backbone, "pooling": one.pooling, "seed": one.seed, **row} for row in rows]
    table = pd.DataFrame(named)
    return table[[*KEYS, *(column for column in table.columns if column not in KEYS)]]


def _write(
    common: Common,
    settings: Settings,
    data: dict[str, ImageDataset],
    done: list[Measured],
    folder: Path,
    start: float,
    partial: bool,
) -> None:
    table = pd.concat([measured.table for measured in done])
    measures = table[table.measure != "eigenvalue"].drop(columns="rank")
    if partial:
        write_table(common.folder, f"{NAME}.partial", measures)
        return
    label = next(iter(data.values()))
    origin = provenance(
        NAME,
        asdict(settings) | {"preset": common.preset},
        sorted({measured.run.seed for measured in done}),
        {"label": label.label, **label.provenance},
        common.torch_device,
        sum(measured.seconds for measured in done) if common.resume else time.perf_counter() - start,
        [commit_of(folder / measured.run.name) for measured in done],
    )
    epochs = [_labelled(m.run, [{"phase": "training", **row} for row in m.history]) for m in done]
    write_table(common.folder, TRAINING, pd.concat(epochs).drop(columns="phase"))
    write_table(common.folder, SPECTRA, table[table.measure == "eigenvalue"].drop(columns=["measure", "error"]))
    write_table(common.folder, NAME, measures, origin)
    (common.folder / f"{NAME}.partial.csv").unlink(missing_ok=True)


def dry_run(common: Common, settings: Settings) -> list[str]:
    """One step and one measurement of every backbone and head on fake data; sentences that state the cost of the study."""
    costs = []
    for one in runs(common, settings):
        if one.seed == 0:
            scale = settings.scale(one.backbone)
            data = fake_data(one.dataset, scale.images, one.image_size)
            watched = CurvatureObserver(settings, scale, *some_images(data, scale.images), every=10**9)
            shared = len(settings.poolings) if one.pooling in scale.share else 0
            costs.append(cost_of(one, {NAME: watched}, scale.measurements + shared))
    hours = common.seeds * sum(seconds for seconds, _ in costs) / 3600
    return [*(words for _, words in costs), f"{common.seeds} seeds of {len(costs)} networks: about {hours:,.1f} h"]
