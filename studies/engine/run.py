"""What the studies of one command want, done: each network trained once, each measurement made once, tables written.

Studies go forward together, a stage at a time (a tuned training is wanted only when its trials are known), so that a network that
several of them want is trained once, with the snapshots of all.
"""

import shutil
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from secondorder.errors import InputError
from secondorder.training import Run, check_run, is_main_process, on_main
from studies.engine.executors import Executor
from studies.engine.job import Job, do, jobs_of
from studies.engine.plan import Task
from studies.engine.records import Origins, frame, has_records, read_records, write_records
from studies.engine.store import Store
from studies.jobs import map_jobs

ORDER = ["network", "dataset", "optimizer", "schedule", "seed", "head", "trained_under", "step", "quantity"]
Plan = Generator[Sequence[Task], pd.DataFrame, None]
"""Stages of tasks; each is sent the records of those of the stage before."""


@dataclass
class Table:
    """The records of one study in one folder: those that are there, and those that this command adds."""

    folder: Path
    study: str
    origins: Origins
    parts: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Key of a measurement -> its records."""
    changed: bool = False

    @classmethod
    def opened(
        cls, folder: Path, study: str, settings: dict[str, Any], may_grow: Collection[str], fresh: bool
    ) -> "Table":
        """The table of a folder; empty where there is none, or when it is to be made afresh.

        Raises InputError when it cannot be used, and when it is of other settings, but for those that `may_grow`.
        """
        if fresh or not has_records(folder, study):
            return cls(folder, study, Origins(study, settings))
        records, origins = read_records(folder, study)
        for name in (n for n in settings if n not in may_grow and settings[n] != origins.settings.get(n)):
            raise InputError(
                f"{folder / study}.csv has {name} = {origins.settings.get(name)!r}, not {settings[name]!r}; repeat the flags "
                "that it was made with, choose another --out, or replace it with --fresh"
            )
        origins.settings = settings
        return cls(folder, study, origins, {str(key): part for key, part in records.groupby("key", sort=False)})

    def records(self, keys: Iterable[str]) -> pd.DataFrame:
        """The records of some measurements, in their order."""
        parts = [self.parts[key] for key in keys if key in self.parts and len(self.parts[key])]
        return pd.concat(parts, ignore_index=True) if parts else frame(self.study, [], {}, "")

    def add(self, key: str, records: pd.DataFrame, seconds: float, machine: Mapping[str, Any]) -> None:
        """Take the records of one measurement."""
        if len(records) == 0:
            raise ValueError(f"a measurement of {self.study} gave no records")
        self.parts[key] = records
        self.origins.add(key, seconds, machine)
        self.changed = True

    def write(self) -> None:
        """Bring what was added to the disk, in an order that does not depend on the order of the work."""
        if self.changed:
            order = sorted(self.parts, key=lambda key: (*self.parts[key].iloc[0][ORDER].map(str), key))
            write_records(self.folder, self.study, self.records(order), self.origins)
            self.changed = False


def carry_out(
    plans: Mapping[str, Plan],
    tables: Mapping[str, Table],
    store: Store,
    processes: int,
    fresh: bool,
    progress: bool,
    executor: Executor = map_jobs,
) -> None:
    """Do what all plans want, stage by stage; what is finished is in the tables, also when this is interrupted.

    Args:
        plans: of each study, by its name.
        tables: of each study; measurements whose records are there are not made again.
        store: keeps trained networks and measurements.
        processes: jobs side by side.
        fresh: forget what the store has of the networks that are wanted.
        progress: print a line for each job that is done.
        executor: who does the jobs, see `executors`.

    Raises:
        InputError: for what a job refuses, naming it.
        NonFiniteLossError: when a training diverges that may not.
    """
    forgotten: set[str] = set()
    stages: dict[str, Sequence[Task] | None] = {name: next(plan, None) for name, plan in plans.items()}
    try:
        while stage := {name: tasks for name, tasks in stages.items() if tasks is not None}:
            jobs = jobs_of(
                (task, *wanted)
                for name, tasks in stage.items()
                for task in tasks
                for wanted in task.wanted()
                if wanted[0] not in tables[name].parts
            )
            _check(jobs.values())
            for name in (jobs.keys() - forgotten) if fresh else ():
                on_main(lambda name=name: shutil.rmtree(store.folder / name, ignore_errors=True))  # type: ignore[misc]
                forgotten.add(name)
            _do_jobs(jobs, stage, tables, store, processes, progress, executor)
            stages = {name: _next(plans[name], tasks, tables[name]) for name, tasks in stage.items()}
    finally:
        if is_main_process():
            for table in tables.values():
                table.write()


def _check(jobs: Iterable[Job]) -> None:
    """InputError for whatever would stop a training at its first step, before any begins: one seed of each network is tried."""
    tried: set[Run] = set()
    for job in jobs:
        if job.subject is not None and job.subject.network is None:
            run = replace(job.subject.run, seed=0, optimizer_options=())
            if run not in tried:
                tried.add(run)
                check_run(run, job.subject.data)


def _do_jobs(
    jobs: Mapping[str, Job],
    stage: Mapping[str, Sequence[Task]],
    tables: Mapping[str, Table],
    store: Store,
    processes: int,
    progress: bool,
    executor: Executor,
) -> None:
    """Do jobs and give each study the records that it wants of them."""
    keys = {name: {wanted[0] for task in tasks for wanted in task.wanted()} for name, tasks in stage.items()}
    together, alone = ([job for job in jobs.values() if job.alone == lonely] for lonely in (False, True))
    results = chain(
        executor(do, [(job, store, progress and processes == 1) for job in together], processes),
        map_jobs(do, [(job, store, progress) for job in alone], 1),
    )
    for number, (job, done) in enumerate(zip([*together, *alone], results, strict=True), start=1):
        for study, table in tables.items():
            for key in (k for k in job.wanted if k in done.results and k in keys.get(study, ())):
                result, step = done.results[key], job.wanted[key][0]
                table.add(
                    key, frame(study, result["rows"], job.labels_at(step), key), result["seconds"], result["machine"]
                )
                if job.subject is not None:
                    table.origins.trainings[job.name] = round(done.seconds, 3)
                    table.origins.data |= done.data
        if progress and is_main_process():
            print(f"{number} of {len(jobs)}: {job.name}", flush=True)


def _next(plan: Plan, tasks: Sequence[Task], table: Table) -> Sequence[Task] | None:
    """The next stage of a plan, which is sent the records of the present one; None at its end."""
    try:
        return plan.send(table.records(wanted[0] for task in tasks for wanted in task.wanted()))
    except StopIteration:
        return None
