"""Optimiser study: do second-order steps become superfluous under GCP, and what do they bring and cost?

A factorial of pooling heads and optimisers, {GAP, GCP, controls} x {SGD, K-FAC}, with many seeds; the other optimisers beside
them with few, under GAP and GCP; and the deep autoencoder of Martens & Grosse (2015). Every optimiser is tuned on every problem
in the same way (`tuning`), on seeds that are not reported; within a seed all optimisers start from the same weights and see the
same batches. Steps are counted to training losses that were fixed beforehand, and as a curve to all losses.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from studies.engine.plan import Computed, Measurement, Task
from studies.engine.records import Row
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.optimisers.claims import CLAIMS, TARGET
from studies.optimisers.folds import folds
from studies.optimisers.problems import PRIMARY, Cell, cells, costs, final_loss, labels_of_all
from studies.optimisers.settings import PRESETS, SEEDS, Settings
from studies.optimisers.tuning import STARTS, Search


def plan(context: Context) -> Plan:
    """Trials until every search is at its end, the reported seeds with the tuned settings, and then their timing."""
    settings = context.settings
    if context.common.dry_run:
        yield [
            cell.task(cell.lattice.values((0, 0)) or {}, seed, trial)
            for cell in cells(context)
            for trial, seeds in ((True, [*cell.tuning_seeds] * len(STARTS[settings.start])), (False, cell.seeds))
            for seed in seeds
            if cell.head
        ]
        return
    searches = yield from _tuning(cells(context), settings)
    tuned = {cell: search.chosen(cell.name, settings.extensions) for cell, search in searches.items()}
    yield [
        *(cell.task(values, seed, trial=False) for cell, values in tuned.items() for seed in cell.seeds),
        *(Computed(Measurement("tuning", tuning_rows, s.summary), cell.labels) for cell, s in searches.items()),
        Computed(Measurement("targets", target_rows, list(settings.targets)), labels_of_all(context)),
    ]
    sgd = {cell.head: values for cell, values in tuned.items() if cell.optimizer == "sgd"}
    yield [costs(cell, values, sgd[cell.head]) for cell, values in tuned.items() if cell.head in (*PRIMARY, "")]


def _tuning(problems: Sequence[Cell], settings: Settings) -> Generator[list[Task], pd.DataFrame, dict[Cell, Search]]:
    """Stages of trials: where a search goes on depends on their geometric mean loss over the tuning seeds."""
    searches = {cell: Search(cell.lattice, settings.start) for cell in problems}
    for _ in range(settings.extensions + 1):
        trials = {
            (cell, place): [cell.task(cell.lattice.values(place) or {}, seed, trial=True) for seed in cell.tuning_seeds]
            for cell, search in searches.items()
            for place in search.untried
        }
        if not trials:
            break
        records = yield [task for tasks in trials.values() for task in tasks]
        by_key = dict(iter(records.groupby("key")))
        for (cell, place), tasks in trials.items():
            losses = [final_loss(by_key[next(task.wanted())[0]]) for task in tasks]
            searches[cell].losses[place] = float(np.exp(np.mean(np.log(losses))))
    return searches


def tuning_rows(settings: Mapping[str, Any]) -> Iterator[Row]:
    """For each trial, the best first, its loss and settings; and whether the best lies at the edge of what was tried."""
    for index, trial in enumerate(settings["trials"]):
        for name, value in zip((*settings["names"], "loss"), trial, strict=True):
            yield {"layer": "trial", "quantity": name, "index": index, "value": value, "error": 0.0}
    yield {"layer": "trial", "quantity": "edge", "value": float(settings["edge"]), "error": 0.0}


def target_rows(targets: Sequence[float]) -> Iterator[Row]:
    """The targets, which claims are judged at."""
    for index, target in enumerate(targets):
        yield {"quantity": TARGET, "index": index, "value": target, "error": 0.0}


STUDY = Study(
    name="optimisers",
    title="does GCP make second-order steps superfluous, and how do K-FAC and other optimisers do against tuned SGD",
    presets=PRESETS,
    seeds=SEEDS,
    plan=plan,
    claims=CLAIMS,
    folds=folds,
    may_grow=("heads", "optimizers", "others", "control_seeds", "other_seeds", "autoencoder"),
)
