"""Part E: every pooling trained with every optimiser, each cell tuned with the same number of trials.

The trials have a seed of their own; then each cell trains on the reported seeds, from the same initial weights on the same
batches for every optimiser. Trainings run side by side, steps are timed afterwards, alone and interleaved, so that ratios of
seconds can be trusted on a shared machine.

Tables: ``preconditioning_factorial`` (a row for each run and epoch), ``.._curves`` (losses over steps), ``.._trials`` (every
trial, the chosen ones marked) and ``.._costs`` (every timed step).
"""

from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import torch

from secondorder.data import ImageDataset, load_dataset
from secondorder.training import OPTIMIZERS, Run, check_run, initial_network
from secondorder.untouched import same_randomness
from studies.dry_run import cost_of
from studies.jobs import map_jobs
from studies.optimisers import settings as optimisers
from studies.optimisers.runs import Tuning, Work, evaluate, steppers, trained, training_run, tune
from studies.optimisers.settings import ARMS, TUNING_SEED, unit_points
from studies.parallel import shared
from studies.preconditioning.settings import Settings
from studies.settings import Common
from studies.timing import interleaved

NAME = "preconditioning_factorial"
FOLDER = "factorial"
"""Of its runs, in the folder of the study's runs."""
CURVES, TRIALS, COSTS = (f"{NAME}_{what}" for what in ("curves", "trials", "costs"))
COLUMNS = {"problem": "pooling", "arm": "optimiser"}
"""Names of the optimiser study's columns in the tables of this one."""


@dataclass(frozen=True)
class FactorialWork(Work):
    """What every training of the factorial shares."""

    def say(self, words: str) -> None:
        """A line of progress."""
        if self.common.progress:
            print(f"preconditioning, factorial: {words}", flush=True)


def optimiser_settings(settings: Settings) -> optimisers.Settings:
    """The factorial as the optimiser study's settings: poolings are its problems, optimisers its arms."""
    own = settings.factorial
    common = {field.name: getattr(own, field.name) for field in fields(optimisers.TunedTraining)}
    return optimisers.Settings(arms=own.optimisers, poolings=own.poolings, dataset=settings.dataset, **common)


def check(common: Common, settings: Settings, data: ImageDataset) -> None:
    """InputError for whatever would stop a cell at its first step."""
    data = own_data(common, settings, data)
    for pooling, arm in cells(settings):
        run = first_run(common, settings, pooling, arm)
        check_run(run, data)
        with torch.random.fork_rng(devices=[]):
            OPTIMIZERS[run.optimizer](initial_network(run, data), run)


def own_data(common: Common, settings: Settings, data: ImageDataset) -> ImageDataset:
    """The study's data, with as many training images as the factorial has."""
    limit = settings.factorial.train_limit
    if limit == settings.train_limit:
        return data
    return load_dataset(settings.dataset, common.data_root, download=common.download, limit=limit)


def cells(settings: Settings) -> list[tuple[str, str]]:
    """All pairs of a pooling and an optimiser."""
    own = settings.factorial
    return [(pooling, arm) for pooling in own.poolings for arm in own.optimisers]


def first_run(common: Common, settings: Settings, pooling: str, arm: str) -> Run:
    """A run of a cell, in the middle of what is tuned."""
    own = optimiser_settings(settings)
    return training_run(common, own, arm, pooling, ARMS[arm].settings((0.5, 0.5)), TUNING_SEED, own.epochs)


def run(common: Common, settings: Settings, data: ImageDataset, folder: Path) -> dict[str, pd.DataFrame]:
    """Tune, train and time all cells: the tables by name. Each finished training is kept in `folder`."""
    own, todo, seeds = optimiser_settings(settings), cells(settings), range(settings.factorial.seeds)
    each, processes = shared(common, settings.processes, len(todo) * len(seeds))
    work = FactorialWork(each, own, own_data(common, settings, data), folder / FOLDER)
    with same_randomness():
        points = unit_points(own.trials)
        trials = [(work, pooling, arm, ARMS[arm].settings(u), TUNING_SEED) for pooling, arm in todo for u in points]
        list(map_jobs(one_run, [(*trial, own.trial_epochs) for trial in trials], processes))
        tuned = {cell: tune(work, *cell) for cell in todo}  # reads what the trials have left
        runs = [(work, *cell, tuned[cell][0], seed) for cell in todo for seed in seeds]
        list(map_jobs(one_run, [(*one, own.epochs) for one in runs], processes))
        done = [evaluate(*one) for one in runs]
        costs = [timed(work, pooling, {arm: tuned[pooling, arm][0] for arm in own.arms}) for pooling in own.poolings]
    tables = {
        NAME: [epochs for epochs, _ in done],
        CURVES: [curve for _, curve in done],
        TRIALS: [table for _, table in tuned.values()],
        COSTS: costs,
    }
    return {name: pd.concat(parts, ignore_index=True).rename(columns=COLUMNS) for name, parts in tables.items()}


def one_run(work: Work, pooling: str, arm: str, tuning: Tuning, seed: int, epochs: int) -> None:
    """Train, and leave the result in a file."""
    trained(work, training_run(work.common, work.settings, arm, pooling, tuning, seed, epochs))


def timed(work: Work, pooling: str, tuned: dict[str, Tuning]) -> pd.DataFrame:
    """Every timed step of each optimiser under a pooling, interleaved."""
    work.say(f"{pooling}: timing {work.settings.timing_steps} steps of {len(tuned)} optimisers")
    times = interleaved(steppers(work, pooling, tuned), work.settings.timing_steps, work.common.torch_device)
    rows = [{"problem": pooling, "arm": arm, "step": step, "milliseconds": t} for arm, step, t in times]
    return pd.DataFrame(rows)


def dry_run(common: Common, settings: Settings) -> tuple[list[str], float]:
    """One step of every cell on fake data: sentences, and the seconds of all trials and runs one after the other."""
    own, lines, total = settings.factorial, [], 0.0
    runs_each = own.trials * own.trial_epochs / own.epochs + own.seeds
    for pooling, arm in cells(settings):
        seconds, words = cost_of(first_run(common, settings, pooling, arm), {})
        lines.append(f"factorial, {ARMS[arm].label}: {words}")
        total += seconds * runs_each
    return lines, total
