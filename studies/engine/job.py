"""One job of the engine: a network that is trained once and measured, or a measurement without a network.

A job is independent of all others, writes into its own folder of the store alone, and finds there what an earlier attempt did.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from secondorder.training import NonFiniteLossError, on_main, resolve_device, snapshot
from studies.engine.plan import Computed, Measurement, Task
from studies.engine.records import Row
from studies.engine.store import Entry, Store, Subject
from studies.results import device_name, git_commit, versions


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


def jobs_of(tasks: "Iterator[tuple[Task, str, int, Measurement]]") -> dict[str, Job]:
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

    Raises:
        InputError: for what `train` refuses and what is damaged in the store.
        NonFiniteLossError: when training diverges and may not.
    """
    if job.subject is None:
        return Done({key: store.computed(key, _timed(_alone(m), job.device)) for key, (_, m) in job.wanted.items()})
    entry = store.entry(job.subject)
    try:
        training = entry.ensure(job.steps, progress)
    except NonFiniteLossError as error:
        if not job.may_diverge:
            raise
        return _diverged(entry, job, str(error))
    results = {}
    for key, (step, measurement) in job.wanted.items():
        rows = _of(training, measurement) if measurement.of_training else _at(entry, step, measurement)
        measure = _timed(rows, job.subject.run.device)
        results[key] = on_main(lambda key=key, measure=measure: entry.measured(key, measure))  # type: ignore[misc]
    return Done(results, training["seconds"], training["data"])


def _timed(measure: Callable[[], list[dict[str, Any]]], device: str) -> Callable[[], dict[str, Any]]:
    """The rows of a measurement with its seconds and the machine that made it."""

    def timed() -> dict[str, Any]:
        start = time.perf_counter()
        rows = measure()
        return {"rows": rows, "seconds": time.perf_counter() - start, "machine": _machine(device)}

    return timed


def _alone(measurement: Measurement) -> Callable[[], list[dict[str, Any]]]:
    return lambda: _plain(measurement.measure(measurement.settings))


def _at(entry: Entry, step: int, measurement: Measurement) -> Callable[[], list[dict[str, Any]]]:
    """Rows of a measurement of the network after so many steps, with the random numbers of the next."""

    def measure() -> list[dict[str, Any]]:
        subject, file = entry.subject, entry.file(step)
        with snapshot(subject.run, subject.data, file, network=subject.network, initial=subject.initial) as at:
            return _plain(measurement.measure(at, measurement.settings))

    return measure


def _of(training: dict[str, Any], measurement: Measurement) -> Callable[[], list[dict[str, Any]]]:
    """Rows of a measurement of the training, whose head is also that of step 0."""
    head = {"trained_under": training["run"]["pooling"]}
    return lambda: _plain({**head, **row} for row in measurement.measure(training, measurement.settings))


def _diverged(entry: Entry, job: Job, words: str) -> Done:
    """A training that diverged has one record that says so, in place of its epochs, and of its losses."""
    keys = [key for key, (_, measurement) in job.wanted.items() if measurement.of_training]
    rows = [{"quantity": "diverged", "value": 1.0, "error": 0.0, "layer": words[:200]}]
    noted = _timed(lambda: rows, entry.subject.run.device)
    return Done({key: on_main(lambda key=key: entry.measured(key, noted)) for key in keys})  # type: ignore[misc]


def _plain(rows: Any) -> list[dict[str, Any]]:
    """Numbers of numpy and torch as Python's own, which JSON can hold."""
    return [{name: v.item() if hasattr(v, "item") else v for name, v in row.items()} for row in rows]


def _machine(device: str) -> dict[str, Any]:
    """What computes here: code, libraries, processor, threads."""
    return {
        "commit": git_commit(),
        "device": device_name(resolve_device(device)),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
