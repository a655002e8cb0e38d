"""One job of the engine: a network that is trained once and measured, or a measurement without a network.

A job is independent of all others, writes into its own folder of the store alone, and finds there what an earlier attempt did.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from secondorder.training import NonFiniteLossError, on_main, resolve_device, snapshot
from studies.engine.plan import Computed, Measurement, Task
from studies.engine.records import Row
from studies.engine.store import Entry, Store, Subject
from studies.machine import machine


@dataclass(frozen=True)
class Done:
    """What a job gives back: results by key, and where the network comes from."""

    results: dict[str, dict[str, Any]]
    """Key -> rows, seconds and machine; without those that a diverged training leaves unmeasured."""
    seconds: float = 0.0
    """Of the training, whenever it was."""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """All that is wanted of one network, or of one measurement without a network."""

    name: str
    subject: Subject | None
    labels: dict[str, Any]
    wanted: dict[str, tuple[int, Measurement]] = field(default_factory=dict)
    may_diverge: bool = True
    alone: bool = False
    device: str = "cpu"
    """Of a measurement without a network."""

    @property
    def steps(self) -> list[int]:
        """The snapshots that are needed."""
        return sorted({step for step, measurement in self.wanted.values() if not measurement.of_training})

    def labels_at(self, step: int) -> Row:
        """Labels of the records after so many steps; initial weights are trained under no head."""
        return self.labels | {"step": step} | ({"trained_under": ""} if self.subject is not None and step == 0 else {})


def jobs_of(tasks: Iterable[tuple[Task, str, int, Measurement]]) -> dict[str, Job]:
    """Jobs by name for what is wanted: all of one network is one job, whichever studies want it."""
    jobs: dict[str, Job] = {}
    for task, key, step, measurement in tasks:
        if isinstance(task, Computed):
            job = Job(key, None, dict(task.labels), alone=task.alone, device=task.device)
            jobs.setdefault(key, job).wanted[key] = (step, measurement)
            continue
        job = jobs.setdefault(task.subject.name, Job(task.subject.name, task.subject, task.subject.labels))
        job.wanted[key] = (step, measurement)
        job.may_diverge &= task.may_diverge
    return jobs


def do(job: Job, store: Store, progress: bool) -> Done:
    """Train the network of a job, unless it is trained, and measure what has not been measured.

    A training that diverged, where it may, has one record that says so in place of its epochs and of its losses.

    Raises:
        InputError: for what `train` refuses and what is damaged in the store.
        NonFiniteLossError: when training diverges and may not.
    """
    if job.subject is None:
        alone = {key: partial(_timed, job.device, partial(m.measure, m.settings)) for key, (_, m) in job.wanted.items()}
        return Done({key: store.computed(key, timed) for key, timed in alone.items()})
    entry = store.entry(job.subject)
    rows: dict[str, Callable[[], Iterable[Row]]]
    try:
        training = entry.ensure(job.steps, progress)
        rows = {key: partial(_rows, entry, training, step, m) for key, (step, m) in job.wanted.items()}
    except NonFiniteLossError as error:
        if not job.may_diverge:
            raise
        training = {"seconds": 0.0, "data": {}}
        diverged = [{"quantity": "diverged", "value": 1.0, "error": 0.0, "layer": str(error)[:200]}]
        rows = {key: partial(list, diverged) for key, (_, m) in job.wanted.items() if m.of_training}
    results = {}
    for key, of in rows.items():
        timed = partial(_timed, job.subject.run.device, of)
        results[key] = on_main(partial(entry.measured, key, timed))
    return Done(results, training["seconds"], training["data"])


def _rows(entry: Entry, training: dict[str, Any], step: int, measurement: Measurement) -> list[Row]:
    """Rows of a measurement: of the training, whose head is also that of step 0, or of the network after so many steps, with the
    random numbers of the next."""
    if measurement.of_training:
        head = {"trained_under": training["run"]["pooling"]}
        return [{**head, **row} for row in measurement.measure(training, measurement.settings)]
    subject, file = entry.subject, entry.file(step)
    with snapshot(subject.run, subject.data, file, network=subject.network, initial=subject.initial) as at:
        return list(measurement.measure(at, measurement.settings))


def _timed(device: str, rows: Callable[[], Iterable[Row]]) -> dict[str, Any]:
    """Rows with Python's own numbers, which JSON can hold, the seconds that they took and the machine that made them."""
    start = time.perf_counter()
    plain = [{name: v.item() if hasattr(v, "item") else v for name, v in row.items()} for row in rows()]
    return {"rows": plain, "seconds": time.perf_counter() - start, "machine": machine(resolve_device(device))}
