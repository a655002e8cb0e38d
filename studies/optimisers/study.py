"""Optimiser study: does K-FAC, as it comes, train faster than tuned SGD, and how do other optimisers do?

Every arm of `studies.optimisers.settings.ARMS` is tuned with the same number of trials on a seed of its own, then trained from
the same initial weights on the same batches for each of the reported seeds, on a GAP and a GCP network. Steps of all arms are
timed interleaved in one process, so that seconds can be compared on a shared machine. K-FAC's damping has a map, and the deep
autoencoder of Martens & Grosse (2015) is the second problem.

Results: ``optimisers.csv`` (a row for each run and epoch), ``optimisers_curves.csv`` (losses over steps),
``optimisers_trials.csv`` (every trial), ``optimisers_sensitivity.csv``, ``optimisers_costs.csv`` (every timed step) and
``optimisers_breakdown.csv`` (where a step's time goes).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.training import OPTIMIZERS, Run, check_run, initial_network
from secondorder.training.processes import world_size
from secondorder.untouched import same_randomness
from studies.dry_run import cost_of
from studies.jobs import map_jobs
from studies.optimisers import autoencoder as deep
from studies.optimisers.costs import Stepper, measure
from studies.optimisers.runs import Trainings, Tuning, Work, evaluate, sensitivity, steppers, training_run, tune
from studies.optimisers.settings import ARMS, TUNING_SEED, Settings
from studies.parallel import shared
from studies.results import provenance, write_table
from studies.run_folders import commits_below, open_runs
from studies.settings import Common

NAME = "optimisers"
MAPPED = "kfac"
"""The arm whose damping has a map."""
Tables = dict[str, list[pd.DataFrame]]
"""What there is of each table so far."""


@dataclass(frozen=True)
class Ready:
    """Data that `check` has loaded."""

    data: ImageDataset
    deep_data: ImageDataset
    deep_images: Tensor


def check(common: Common, settings: Settings) -> Ready:
    """Find bad names, sizes and data before any training; returns the loaded data."""
    if world_size() > 1:
        raise InputError("the optimisers study times its arms in one process; start it without torchrun")
    runs = [_first_run(common, settings, arm, pooling) for pooling in settings.poolings for arm in settings.arms]
    data = load_dataset(settings.dataset, common.data_root, download=common.download, limit=settings.train_limit)
    for run in runs:
        check_run(run, data)
        with torch.random.fork_rng(devices=[]):
            OPTIMIZERS[run.optimizer](initial_network(run, data), run)
    own = settings.autoencoder
    deep_data = load_dataset(own.dataset, common.data_root, download=common.download, limit=own.images)
    images = deep.pixels(deep_data, own)
    for arm in _deep_arms(settings):
        deep.build(images, own, arm, deep.settings_at(arm, (0.5, 0.5)), 0)
    return Ready(data, deep_data, images)


def _first_run(common: Common, settings: Settings, arm: str, pooling: str) -> Run:
    return training_run(common, settings, arm, pooling, ARMS[arm].settings((0.5, 0.5)), TUNING_SEED, settings.epochs)


def _deep_arms(settings: Settings) -> list[str]:
    return [arm for arm in deep.ARMS if arm.partition("_")[0] in settings.arms]


def run(common: Common, settings: Settings, ready: Ready) -> None:
    """Tune, train, map, time; every finished training is kept, the tables are written at the end."""
    start, folder = time.perf_counter(), common.folder / "runs" / NAME
    open_runs(folder, settings, common.resume, may_grow=("arms", "poolings", "processes"))
    work = Work(common, settings, ready.data, folder)
    tables: Tables = {name: [] for name in ("trials", "epochs", "curves", "map", "costs", "parts")}
    with same_randomness():
        tuned, deep_tuned = _train(work, ready.deep_images, tables)
        for pooling, some in tuned.items():
            work.say(f"{pooling}: timing {settings.timing_steps} steps of {len(settings.arms)} arms")
            _time(common, pooling, steppers(work, pooling, some), settings.timing_steps, tables)
        images = ready.deep_images.to(common.torch_device)
        deep_steppers = deep.steppers(images, settings.autoencoder, deep_tuned)
        _time(common, deep.PROBLEM, deep_steppers, settings.autoencoder.timing_steps, tables)
    _write(common, settings, ready, tables, time.perf_counter() - start, commits_below(folder))


def _train(work: Work, images: Tensor, tables: Tables) -> tuple[dict[str, dict[str, Tuning]], dict[str, Tuning]]:
    """All trainings; the tuned settings of each pooling and arm, and of each arm on the autoencoder."""
    arms = _deep_arms(work.settings)
    cells = [(pooling, arm) for pooling in work.settings.poolings for arm in work.settings.arms]
    each, processes = shared(work.common, work.settings.processes, len(cells) + len(arms))
    own = replace(work, common=each)
    todo: list[tuple[Any, ...]] = [(network_trainings, own, *cell) for cell in cells]
    todo += [(deep.tune_and_fit, own, images, arm) for arm in arms]
    found = list(map_jobs(_call, todo, processes))
    for some in found:
        for name, table in some.tables.items():
            tables[name].append(table)
    tuned: dict[str, dict[str, Tuning]] = {pooling: {} for pooling, _ in cells}
    for (pooling, arm), some in zip(cells, found, strict=False):
        tuned[pooling][arm] = some.tuning
    return tuned, {arm: some.tuning for arm, some in zip(arms, found[len(cells) :], strict=True)}


def _call(function: Callable[..., Trainings], *arguments: Any) -> Trainings:
    return function(*arguments)


def network_trainings(work: Work, pooling: str, arm: str) -> Trainings:
    """Tuning, the runs of all seeds and, of the arm that has one, the damping map."""
    tuning, trials = tune(work, pooling, arm)
    runs = [evaluate(work, pooling, arm, tuning, seed) for seed in range(work.common.seeds)]
    tables = {"trials": trials, "epochs": pd.concat([e for e, _ in runs]), "curves": pd.concat([c for _, c in runs])}
    if arm == MAPPED:
        tables["map"] = sensitivity(work, pooling, arm, tuning)
    return Trainings(tuning, tables)


def _time(common: Common, problem: str, some: dict[str, Stepper], steps: int, tables: Tables) -> None:
    """Time the arms interleaved, alone on the machine."""
    costs, parts = measure(problem, some, steps, common.torch_device)
    tables["costs"].append(costs)
    tables["parts"].append(parts)


def _write(
    common: Common,
    settings: Settings,
    ready: Ready,
    tables: Tables,
    seconds: float,
    commits: list[str],
) -> None:
    labels = f"{ready.data.label}; autoencoder: {ready.deep_data.label}, grey"
    origin = provenance(
        NAME,
        asdict(settings) | {"preset": common.preset, "tuning_seed": TUNING_SEED},
        list(range(common.seeds)),
        {"label": ready.data.label, "labels": labels, **ready.data.provenance},
        common.torch_device,
        seconds,
        commits,
    )
    names = {"trials": "trials", "curves": "curves", "map": "sensitivity", "costs": "costs", "parts": "breakdown"}
    for key, name in names.items():
        if tables[key]:
            write_table(common.folder, f"{NAME}_{name}", pd.concat(tables[key]))
    write_table(common.folder, NAME, pd.concat(tables["epochs"]), origin)


def dry_run(common: Common, settings: Settings) -> list[str]:
    """One step of every arm and head on fake data; sentences that state the cost of their trials and runs."""
    lines, total = [], 0.0
    runs_each = settings.trials * settings.trial_epochs / settings.epochs + common.seeds
    for pooling in settings.poolings:
        for arm in settings.arms:
            seconds, words = cost_of(_first_run(common, settings, arm, pooling), {})
            lines.append(f"{ARMS[arm].label}: {words}")
            total += seconds * runs_each
    scope = f"{settings.trials} trials and {common.seeds} seeds of {len(lines)} arms and heads"
    return [*lines, f"{scope}, without the damping map and the autoencoder: about {total / 3600:,.1f} h"]
