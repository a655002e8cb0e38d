"""Preconditioning study: is GCP a second-order method in disguise?

Five parts (theory T1 to T6). A to D measure one backbone under several heads, untrained, during training and trained under GAP
and under GCP; E trains every pooling with every optimiser.

    A  head conditioning    singular values of the pooling head's Jacobian on real features        `heads`
    B  backward forms       the published approximation of GCP's backward pass, against the exact  `forms`
    C  two heads            gradients of one backbone under two heads, with and without K-FAC      `directions`
    D  block conditioning   GGN and Hessian blocks before and after K-FAC, and K-FAC's fidelity    `blocks`
    E  factorial training   {GAP, covariance, GCP} x {SGD, K-FAC, Gauss-Newton}                    `factorial`

Results: ``preconditioning.csv`` (one row for each number of A, B and D), ``preconditioning_gradients.csv.gz`` (of C),
``preconditioning_training.csv`` (epochs of the backbones' training), and the tables of E (`factorial.training`).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from secondorder.accelerator import check_float64
from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.training import Moment, Run, check_run, train
from secondorder.training.checkpoint import CHECKPOINT
from secondorder.training.processes import world_size
from studies.dry_run import cost_of
from studies.jobs import map_jobs
from studies.moments import steps_between
from studies.parallel import shared
from studies.preconditioning.blocks.measure import measure as blocks
from studies.preconditioning.directions.measure import measure as directions
from studies.preconditioning.factorial import training as factorial
from studies.preconditioning.forms.measure import measure as forms
from studies.preconditioning.heads.measure import measure as heads
from studies.preconditioning.settings import Settings
from studies.preconditioning.situation import HEADS, UNTRAINED, Row, Situation
from studies.results import provenance, write_table
from studies.run_folders import commits_below, kept, open_runs, sign
from studies.settings import Common
from studies.shared_backbone import check_sharing, published_stride

NAME = "preconditioning"
TRAINING, GRADIENTS = "preconditioning_training", "preconditioning_gradients"
KEYS = ("backbone", "seed", "step", "moment")
Measure = Callable[[Situation], list[Row]]

OFTEN: dict[str, Measure] = {"heads": heads, "forms": forms, "blocks": blocks}
"""Parts that are measured at every moment."""
ENDS: dict[str, Measure] = {"directions": directions}
"""Parts that are measured of the untrained and of the trained backbones only."""


def backbone_run(common: Common, settings: Settings, pooling: str, seed: int) -> Run:
    """The training of a backbone; every ResNet has the published GCP network's last stride, whatever its head."""
    return Run(
        backbone=settings.backbone,
        pooling=pooling,
        dataset=settings.dataset,
        train_limit=settings.train_limit,
        last_stride=published_stride(settings.backbone),
        reduced_channels=settings.reduced_channels,
        dropout=0.0,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        seed=seed,
        device=common.device,
        threads=common.threads,
    )


def measure(
    model: nn.Module, data: ImageDataset, settings: Settings, seed: int, parts: Mapping[str, Measure]
) -> list[Row]:
    """The rows of some parts for one backbone, which is copied."""
    situation = Situation(model, data, settings, seed)
    return [row for part in parts.values() for row in part(situation)]


@dataclass(frozen=True)
class BackboneObserver:
    """Measures the backbone that training has at equally spaced steps."""

    data: ImageDataset
    settings: Settings
    every: int
    """Steps between two measurements."""

    def __call__(self, moment: Moment) -> list[Row]:
        """Rows for the moment; the untrained backbone, the same under every head, only where it is the first head's."""
        if moment.step == 0 and moment.run.pooling != self.settings.trained[0]:
            return []
        parts = OFTEN if moment.step else OFTEN | ENDS
        rows = measure(moment.model, self.data, self.settings, moment.run.seed, parts)
        return [{"backbone": moment.run.pooling if moment.step else UNTRAINED, "step": moment.step, **r} for r in rows]


def check(common: Common, settings: Settings) -> ImageDataset:
    """Find bad names, sizes and data before any training; returns the loaded data."""
    if world_size() > 1:
        raise InputError("the preconditioning study is started without torchrun; --processes trains several at once")
    check_float64(common.torch_device, "the preconditioning study")
    runs = [backbone_run(common, settings, pooling, 0) for pooling in (*settings.trained, *HEADS)]
    data = load_dataset(settings.dataset, common.data_root, download=common.download, limit=settings.train_limit)
    for run in runs:
        check_run(run, data)
    if settings.gradient_batch_size >= len(data.train):
        raise InputError(
            f"--gradient-batch-size {settings.gradient_batch_size}: there are only {len(data.train)} training images, so that "
            "all mini-batches would be the same"
        )
    check_sharing(data, settings.weight_decay)
    factorial.check(common, settings, data)
    return data


def run(common: Common, settings: Settings, data: ImageDataset) -> None:
    """Train and measure the backbones, then the factorial; each finished training is kept, tables are written at the end."""
    start, folder = time.perf_counter(), common.folder / "runs" / NAME
    open_runs(folder, settings, common.resume, may_grow=("processes",))
    each, processes = shared(common, settings.processes, common.seeds * len(settings.trained))
    todo = [
        (each, settings, data, folder, pooling, seed) for seed in range(common.seeds) for pooling in settings.trained
    ]
    done = list(map_jobs(backbone_rows, todo, processes))
    tables = factorial.run(common, settings, data, folder)
    rows = pd.concat([pd.DataFrame(one["rows"]) for one in done])
    others = [name for name in rows.columns if name not in KEYS]
    epochs = pd.concat([pd.DataFrame(one["epochs"]) for one in done])
    origin = provenance(
        NAME,
        asdict(settings) | {"preset": common.preset},
        list(range(common.seeds)),
        {"label": data.label, **data.provenance},
        common.torch_device,
        time.perf_counter() - start + sum(one["seconds"] for one in done if not one["fresh"]),
        [*commits_below(folder), *commits_below(folder / factorial.FOLDER)],
    )
    write_table(common.folder, TRAINING, epochs)
    for name, table in tables.items():
        write_table(common.folder, name, table)
    rows = rows[[*KEYS, *others]]
    ends = rows.part.isin(ENDS)
    write_table(common.folder, GRADIENTS, rows[ends], compressed=True)
    write_table(common.folder, NAME, rows[~ends], origin)


def backbone_rows(
    common: Common, settings: Settings, data: ImageDataset, folder: Path, pooling: str, seed: int
) -> dict[str, Any]:
    """Train one backbone and measure it: rows, epochs and seconds, kept in a file, and whether they are of this run."""
    one = backbone_run(common, settings, pooling, seed)
    own, began = folder / one.name, time.perf_counter()
    fresh = not (own / "rows.json").exists()

    def compute() -> dict[str, Any]:
        sign(own)
        watching = BackboneObserver(data, settings, steps_between(one, data, settings.measurements))
        trained = train(one, data, own, observers={NAME: watching}, resume=common.resume, progress=common.progress)
        last = int(trained.history[-1]["step"])
        rows = measure(trained.model, data, settings, seed, OFTEN | ENDS)
        rows = [*trained.records[NAME], *({"backbone": pooling, "step": last, **r} for r in rows)]
        return {
            "rows": [{"seed": seed, "moment": float(r["step"]) / last, **r} for r in rows],
            "epochs": [{"backbone": pooling, "seed": seed, **epoch} for epoch in trained.history],
            "seconds": time.perf_counter() - began,
        }

    result: dict[str, Any] = kept(own / "rows.json", compute)
    (own / CHECKPOINT).unlink(missing_ok=True)
    if common.progress:
        print(f"{NAME}: backbone trained under {pooling}, seed {seed}: measured", flush=True)
    return result | {"fresh": fresh}


def dry_run(common: Common, settings: Settings) -> list[str]:
    """One training step of every backbone and cell on fake data; sentences that state what the training alone would cost."""
    lines, total = [], 0.0
    for pooling in settings.trained:
        seconds, words = cost_of(backbone_run(common, settings, pooling, 0), {})
        lines.append(f"backbone: {words}")
        total += common.seeds * seconds
    own, seconds = factorial.dry_run(common, settings)
    hours = (total + seconds) / settings.processes / 3600
    scope = f"{common.seeds} seeds and the factorial, {settings.processes} process(es), without measuring"
    return [*lines, *own, f"{scope}: about {hours:,.1f} h"]
