"""Trainings of the optimiser study: tuning trials, the runs that are compared, and the damping map; each kept in a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from secondorder.data import ImageDataset
from secondorder.errors import InputError, NonFiniteError
from secondorder.training import OPTIMIZERS, Run, initial_network, train
from secondorder.training.checkpoint import CHECKPOINT
from studies.optimisers.costs import Stepper, cycled, slowed
from studies.optimisers.settings import ARMS, TUNING_SEED, Settings, unit_points
from studies.run_folders import kept, sign
from studies.settings import Common

RUN_FIELDS = ("learning_rate", "momentum", "weight_decay")
POINTS = 60
"""Points kept of a run's loss curve."""
Tuning = dict[str, float]


@dataclass(frozen=True)
class Work:
    """What every training of the study shares."""

    common: Common
    settings: Settings
    data: ImageDataset
    folder: Path

    def say(self, words: str) -> None:
        """A line of progress."""
        if self.common.progress:
            print(f"optimisers: {words}", flush=True)


@dataclass(frozen=True)
class Trainings:
    """What the trainings of an arm on a problem have given: the tuned settings, and a part of some tables."""

    tuning: Tuning
    tables: Mapping[str, pd.DataFrame]


def training_run(
    common: Common, settings: Settings, arm: str, pooling: str, tuning: Tuning, seed: int, epochs: int
) -> Run:
    """The run of an arm with these tuned settings."""
    fields = {"weight_decay": settings.weight_decay} | {n: v for n, v in tuning.items() if n in RUN_FIELDS}
    options = dict(ARMS[arm].options) | {n: v for n, v in tuning.items() if n not in RUN_FIELDS}
    return Run(
        backbone=settings.backbone,
        pooling=pooling,
        dataset=settings.dataset,
        train_limit=settings.train_limit,
        last_stride=2 if settings.backbone.startswith("resnet") else None,  # the same network under every head
        dropout=0.0,
        epochs=epochs,
        batch_size=settings.batch_size,
        schedule=settings.schedule,
        optimizer=ARMS[arm].optimizer,
        optimizer_options=options,  # type: ignore[arg-type]
        channels_last=settings.channels_last,
        seed=seed,
        device=common.device,
        threads=common.threads,
        **fields,  # type: ignore[arg-type]
    )


def trained(work: Work, run: Run) -> dict[str, Any]:
    """History and loss of every step of a run; empty, with the reason under "diverged", for one that diverged."""
    folder = work.folder / run.name

    def compute() -> dict[str, Any]:
        sign(folder)
        try:
            done = train(run, work.data, folder, resume=work.common.resume, progress=False)
        except (NonFiniteError, torch.linalg.LinAlgError) as error:
            return {"history": [], "step_losses": [], "diverged": str(error).partition("\n")[0] or type(error).__name__}
        return {"history": done.history, "step_losses": done.step_losses, "diverged": ""}

    result: dict[str, Any] = kept(folder / "result.json", compute)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return result


def final(result: dict[str, Any]) -> dict[str, float]:
    """Training loss and test accuracy of the last epoch; infinite and zero for a run that diverged."""
    if result["diverged"]:
        return {"train_loss": math.inf, "test_top1": 0.0}
    last = result["history"][-1]
    return {"train_loss": last["train_loss"], "test_top1": last["test_top1"]}


def tune(work: Work, pooling: str, arm: str) -> tuple[Tuning, pd.DataFrame]:
    """The trial with the lowest training loss of its last epoch, and all trials; InputError when every one diverged."""
    rows = []
    for number, u in enumerate(unit_points(work.settings.trials), start=1):
        tuning = ARMS[arm].settings(u)
        run = training_run(work.common, work.settings, arm, pooling, tuning, TUNING_SEED, work.settings.trial_epochs)
        result = trained(work, run)
        rows.append(trial_row(pooling, arm, number, tuning) | final(result) | {"diverged": bool(result["diverged"])})
        loss = rows[-1]["train_loss"]
        work.say(
            f"{pooling}, {arm}, trial {number} of {work.settings.trials}: {in_words(tuning)}, training loss {loss:.4g}"
        )
    return chosen(rows)


def trial_row(problem: str, arm: str, number: int, tuning: Tuning) -> dict[str, Any]:
    """The columns that say which trial it is."""
    row: dict[str, Any] = {"problem": problem, "arm": arm, "trial": number}
    for place, (name, value) in zip(("first", "second"), tuning.items(), strict=True):
        row |= {f"{place}_parameter": name, f"{place}_value": value}
    return row


def chosen(rows: list[dict[str, Any]]) -> tuple[Tuning, pd.DataFrame]:
    """The tuned settings of the best trial, and the table with the mark "chosen"; InputError when all diverged."""
    best = min(rows, key=lambda row: row["train_loss"])
    if math.isinf(best["train_loss"]):
        raise InputError(
            f"all {len(rows)} trials of {best['arm']} on {best['problem']} diverged; leave it out with --arms, or raise --trials"
        )
    table = pd.DataFrame([row | {"chosen": row is best} for row in rows])
    return tuning_of(best), table


def evaluate(work: Work, pooling: str, arm: str, tuning: Tuning, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row for each epoch, and one for each kept point of the loss curve, of a run with the tuned settings."""
    settings = work.settings
    run = training_run(work.common, settings, arm, pooling, tuning, seed, settings.epochs)
    result = trained(work, run)
    labels = {"problem": pooling, "arm": arm, "seed": seed}
    if result["diverged"]:
        steps = len(work.data.train) // settings.batch_size
        lost = {"train_loss": math.inf, "test_loss": math.inf, "test_top1": 0.0, "seconds": 0.0}
        history = [{"epoch": epoch, "step": epoch * steps} | lost for epoch in range(1, settings.epochs + 1)]
        points = [{"step": settings.epochs * steps, "loss": math.inf}]
    else:
        history = result["history"]
        points = curve(result["step_losses"], len(work.data.train) // settings.batch_size)
    found = final(result)
    work.say(f"{pooling}, {arm}, seed {seed}: training loss {found['train_loss']:.4g}, test {found['test_top1']:.1%}")
    columns = ["epoch", "step", "train_loss", "test_loss", "test_top1", "seconds"]
    epochs = pd.DataFrame([labels | {name: row[name] for name in columns} for row in history])
    return epochs, pd.DataFrame([labels | point for point in points])


def curve(losses: list[float], steps_per_epoch: int) -> list[dict[str, float]]:
    """Mean training loss of the last half epoch at POINTS equally spaced steps; the last step is among them."""
    window = max(1, steps_per_epoch // 2)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    steps = np.unique(np.linspace(min(window, len(losses)), len(losses), POINTS).round().astype(int))
    return [{"step": int(s), "loss": float(sums[s] - sums[s - min(window, s)]) / min(window, s)} for s in steps]


def sensitivity(work: Work, pooling: str, arm: str, tuning: Tuning) -> pd.DataFrame:
    """Final training loss of a K-FAC arm on a grid of damping and learning rate, other settings as tuned."""
    rows = []
    for damping in work.settings.dampings:
        for factor in work.settings.damping_rates:
            learning_rate = float(f"{factor * tuning['learning_rate']:.3g}")
            own = tuning | {"learning_rate": learning_rate, "damping": damping}
            run = training_run(work.common, work.settings, arm, pooling, own, TUNING_SEED, work.settings.trial_epochs)
            labels = {"problem": pooling, "arm": arm, "damping": damping, "learning_rate": learning_rate}
            rows.append(labels | final(trained(work, run)))
            work.say(
                f"{pooling}, {arm}, damping {damping:g}, learning rate {learning_rate:g}: {rows[-1]['train_loss']:.4g}"
            )
    return pd.DataFrame(rows)


def steppers(work: Work, pooling: str, tuned: Mapping[str, Tuning]) -> dict[str, Stepper]:
    """A stepper of every arm, from the same weights on the same batches."""
    settings, device = work.settings, work.common.torch_device
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    batches = [
        (images.contiguous(memory_format=layout), labels)
        for images, labels in cycled(work.data.train, settings.batch_size, settings.timing_steps, device)
    ]
    steppers = {}
    for arm, tuning in tuned.items():
        one = training_run(work.common, settings, arm, pooling, slowed(tuning), 0, settings.epochs)
        model = initial_network(one, work.data).to(device, memory_format=layout)  # type: ignore[call-overload]
        steppers[arm] = Stepper(model, OPTIMIZERS[one.optimizer](model, one), F.cross_entropy, batches)
    return steppers


def tuning_of(row: Mapping[str, Any] | pd.Series) -> Tuning:
    """The tuned settings in a row of a table of trials."""
    return {row[f"{place}_parameter"]: row[f"{place}_value"] for place in ("first", "second")}


def in_words(tuning: Tuning) -> str:
    """For a reader."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in tuning.items())
