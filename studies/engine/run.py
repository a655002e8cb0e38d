"""What the studies of one command want, done: each network trained once, each measurement made once, tables written.

Studies go forward together, a stage at a time (a tuned training is wanted only when its trials are known), so that a network that
several of them want is trained once, with the snapshots of all.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from secondorder.errors import InputError
from secondorder.training import Run, check_run, is_main_process, on_main
from studies.engine.job import Done, Job, do, jobs_of
from studies.engine.plan import Task, Trained, superseded
from studies.engine.records import Origins, frame, has_records, read_records, write_records
from studies.engine.store import Store
from studies.jobs import Map

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
        table = cls.read(folder, study)
        there = table.origins.settings
        for name in (n for n in settings if n not in may_grow and settings[n] != there.get(n)):
            raise InputError(
                f"{folder / study}.csv has {name} = {there.get(name)!r}, not {settings[name]!r}; repeat the flags "
                "that it was made with, choose another --out, or replace it with --fresh"
            )
        table.origins.settings = settings
        return table

    @classmethod
    def read(cls, folder: Path, study: str) -> "Table":
        """The table of a folder as it is; InputError when it cannot be used."""
        records, origins = read_records(folder, study)
        return cls(folder, study, origins, {str(key): part for key, part in records.groupby("key", sort=False)})

    def records(self, keys: Iterable[str]) -> pd.DataFrame:
        """The records of some measurements, in their order."""
        parts = [self.parts[key] for key in keys if key in self.parts and len(self.parts[key])]
        return pd.concat(parts, ignore_index=True) if parts else frame(self.study, [], {}, "")

    def adopt(self, task: Task, key: str, others: Iterable["Table"]) -> None:
        """Take over the records of a measurement, and where they are from, from the first of other tables that has them.

        Measured again, of a network that is trained again on another machine perhaps, it would have other last digits.
        """
        source = next((table for table in others if key in table.parts), None)
        if source is None:
            return
        self.parts[key] = source.parts[key].assign(study=self.study)
        seconds, number = source.origins.measurements[key]
        self.origins.add(key, seconds, source.origins.machines[number])
        if isinstance(task, Trained):
            self.origins.trainings[task.subject.name] = source.origins.trainings[task.subject.name]
            self.origins.data |= source.origins.data
        self.changed = True

    def drop(self, keys: Iterable[str]) -> None:
        """Forget the records of some measurements, if there are any."""
        for key in (key for key in keys if self.parts.pop(key, None) is not None):
            self.origins.measurements.pop(key, None)
            self.changed = True

    def take(self, job: Job, done: Done, wanted: Iterable[str]) -> None:
        """The records of a job, of those measurements that are wanted here."""
        for key in (key for key in wanted if key in done.results):
            result = done.results[key]
            labels = job.labels_at(job.wanted[key][0])
            if not result["rows"]:
                raise ValueError(f"a measurement of {self.study} gave no records")
            self.parts[key] = frame(self.study, result["rows"], labels, key)
            self.origins.add(key, result["seconds"], result["machine"])
            if job.subject is not None:
                self.origins.trainings[job.name] = round(done.seconds, 3)
                self.origins.data |= done.data
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
    executor: Map,
    *,
    others: Callable[[], Collection[Table]] = tuple,
    fresh: bool = False,
    progress: bool = False,
    bars: bool = False,
) -> None:
    """Do what all plans want, stage by stage; what is finished is in the tables, also when this is interrupted.

    Args:
        plans: of each study, by its name.
        tables: of each study; measurements whose records are there are not made again.
        store: keeps trained networks and measurements.
        executor: who does the jobs, see `executors`; those that must run alone are done here.
        others: reads the tables of other studies, called when something is missing; what they have is not measured again, nor
            what one of `tables` has, unless `fresh`.
        fresh: forget what the store has of what is wanted.
        progress: print a line for each job that is done.
        bars: show the progress of trainings.

    Raises:
        InputError: for what a job refuses, naming it.
        NonFiniteLossError: when a training diverges that may not.
    """
    forgotten: set[str] = set()
    stages: dict[str, Sequence[Task] | None] = {name: next(plan, None) for name, plan in plans.items()}
    try:
        while wanted := {
            name: [(task, *each) for task in tasks for each in task.wanted()]
            for name, tasks in stages.items()
            if tasks is not None
        }:
            for name, (task, key, *_) in ((name, each) for name, many in wanted.items() for each in many):
                if not fresh and key not in tables[name].parts:
                    tables[name].adopt(task, key, (*tables.values(), *others()))
            jobs = jobs_of(each for name, many in wanted.items() for each in many if each[1] not in tables[name].parts)
            _check(jobs.values())
            for name in (jobs.keys() - forgotten) if fresh else ():
                on_main(lambda name=name: store.forget(name))  # type: ignore[misc]
                forgotten.add(name)
            keys = {name: [key for _, key, _, _ in many] for name, many in wanted.items()}
            tasks = [(job, store, bars) for job in jobs.values() if not job.alone]
            alone = [job for job in jobs.values() if job.alone]
            results = chain(executor(do, tasks), (do(job, store, bars) for job in alone))
            for number, (job, done) in enumerate(zip([*(job for job, *_ in tasks), *alone], results, strict=True), 1):
                for name in wanted:
                    tables[name].take(job, done, keys[name])
                if progress and is_main_process():
                    print(f"{number} of {len(jobs)}: {job.name}", flush=True)
            for name, many in wanted.items():
                tables[name].drop(old for task, _, step, what in many for old in superseded(task, step, what))
            stages = {name: _next(plans[name], tables[name].records(keys[name])) for name in wanted}
    finally:
        if is_main_process():
            for table in tables.values():
                table.write()


NO_MATTER: dict[str, Any] = {
    "seed": 0,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "optimizer": "sgd",
    "optimizer_options": (),
}
"""Settings of a run that do not decide whether it can begin, each with a value."""


def _check(jobs: Iterable[Job]) -> None:
    """InputError for whatever would stop a training at its first step, before any begins: one seed of each network is tried."""
    tried: set[Run] = set()
    for job in jobs:
        if job.subject is not None and job.subject.network is None:
            run = replace(job.subject.run, **NO_MATTER)
            if run not in tried:
                tried.add(run)
                check_run(run, job.subject.data)


def _next(plan: Plan, records: pd.DataFrame) -> Sequence[Task] | None:
    """The next stage of a plan, which is sent the records of the present one; None at its end."""
    try:
        return plan.send(records)
    except StopIteration:
        return None
