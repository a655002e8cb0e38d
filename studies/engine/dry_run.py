"""What studies would cost: one step and one measurement of every network on fake data of the right shape, scaled to the whole."""

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secondorder.data import ImageDataset
from secondorder.training import Run, snapshot, train
from secondorder.training.checkpoint import snapshot_name
from studies.engine.fake_data import images_of
from studies.engine.plan import Measurement, Trained
from studies.engine.step_costs import BANDWIDTH, IRRELEVANT, PASSES, RATES, StepCost, small, step_cost
from studies.engine.store import digest
from studies.engine.study import Context, Study

CLUSTER = 64
"""GPUs of the cluster that is asked for."""


@dataclass(frozen=True)
class Cost:
    """Of one training with all its measurements."""

    training: float
    """Seconds on this device."""
    measuring: float
    step: StepCost
    words: str

    @property
    def gpu(self) -> float:
        """Seconds on the stated GPU; measuring takes there as many steps as here."""
        return (self.training + self.measuring) * self.step.gpu_seconds / self.step.seconds


@dataclass
class Totals:
    """Of all networks that are wanted, each trained once, whichever studies want it.

    A network is known by its name and how often a study has wanted it before: where settings are tuned, a dry run has the same
    ones for all trials.
    """

    training: dict[tuple[str, int], float] = field(default_factory=dict)
    """GPU seconds by network."""
    measuring: defaultdict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))
    snapshots: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    state: dict[tuple[str, int], int] = field(default_factory=dict)
    wanted: Counter[str] = field(default_factory=Counter)
    memory: float = 0.0
    """Bytes of the largest step."""
    others: int = 0
    """Measurements without a network."""

    def add(self, task: Trained, cost: Cost) -> None:
        """A training with what is measured of it."""
        step = cost.step
        name = (task.subject.name, self.wanted[task.subject.name])
        self.wanted[task.subject.name] += 1
        self.training[name] = cost.training * step.gpu_seconds / step.seconds
        self.measuring[name] += cost.gpu - self.training[name]
        steps = {at for at, measurement in task.at if not measurement.of_training}
        self.snapshots.setdefault(name, set()).update(steps, [-1])  # the last state is always kept
        self.state[name] = step.state
        self.memory = max(self.memory, step.memory)

    def update(self, other: "Totals") -> None:
        """Add those of another study."""
        self.training |= other.training
        for name, seconds in other.measuring.items():
            self.measuring[name] += seconds
        for name, steps in other.snapshots.items():
            self.snapshots.setdefault(name, set()).update(steps)
        self.state |= other.state
        self.memory = max(self.memory, other.memory)
        self.others += other.others

    def words(self) -> str:
        """Jobs, GPU hours, the longest job, memory and disk."""
        others = f"{self.others} measurements without a training, which are not counted"
        if not self.training:
            return others
        jobs = [self.training[name] + self.measuring[name] for name in self.training]
        store = sum(self.state[name] * len(steps) for name, steps in self.snapshots.items())
        hours, longest = sum(jobs) / 3600, max(jobs) / 3600
        besides = f" and {others}" if self.others else ""
        return (
            f"{len(self.training)} jobs{besides}: {hours:,.1f} GPU hours, the longest job {longest:,.1f} h, steps of up to "
            f"{self.memory / 2**30:,.1f} GiB; store {store / 1e9:,.1f} GB; on {CLUSTER} GPUs "
            f"{max(longest, hours / CLUSTER):,.1f} h"
        )


MIXED, SINGLE = (f"{RATES[amp] / 1e12:.0f}" for amp in ("float16", "off"))
ASSUMED = (
    f"GPU hours are estimated for an A100: counted operations of the forward and backward passes at {MIXED} TFLOP/s (20% of its "
    f"16-bit peak, with mixed precision) or {SINGLE} (15% of TF32), or {PASSES} times the bytes kept between them at "
    f"{BANDWIDTH / 1e12:.3f} TB/s, the longer of the two. What an optimiser computes besides is not counted, nor is reading "
    "data; measuring takes as many steps as on this device. Jobs are independent, one GPU each: n GPUs take max(longest job, "
    "all / n), so more than all / longest make nothing faster. The store keeps every snapshot."
)


def dry_run(plans: Mapping[str, tuple[Study, Context]]) -> Iterator[str]:
    """Sentences that state the cost of studies: of each kind of network on this device, of each study and of all on GPUs."""
    every = Totals()
    for name, (study, context) in plans.items():
        totals = Totals()
        for line in _dry_run(study, context, totals):
            yield f"{name}: {line}"
        yield f"{name}: {totals.words()}"
        every.update(totals)
    if len(plans) > 1:
        yield f"all: each network once: {every.words()}"
    yield ASSUMED


def _dry_run(study: Study, context: Context, totals: Totals) -> Iterator[str]:
    kinds: dict[str, list[Trained]] = {}
    for task in next(study.plan(context)):
        if not isinstance(task, Trained):
            totals.others += 1
            continue
        fields = {name: value for name, value in task.subject.run.to_dict().items() if name not in IRRELEVANT}
        wanted = [(step, measurement) for step, measurement in task.at if not measurement.of_training]
        measured = [(step, m.described if m.dry is None else (m.name, m.dry[1])) for step, m in wanted]
        kinds.setdefault(digest([fields, measured]), []).append(task)
    amp = getattr(getattr(context.settings, "training", None), "amp", "off")
    total = 0.0
    for tasks in kinds.values():
        cost = cost_of(tasks[0], amp)
        total += (cost.training + cost.measuring) * len(tasks)
        for task in tasks:
            totals.add(task, cost)
        yield f"{len(tasks)} times {cost.words}"
    hours, processes = total / 3600, context.common.processes
    yield (
        f"{len(context.seeds)} seeds of {len(kinds)} networks: about {hours:,.1f} h of one job, {hours / processes:,.1f} h "
        f"with {processes} side by side"
    )


def cost_of(task: Trained, amp: str) -> Cost:
    """The cost of a training with all its measurements, on a GPU in this mixed precision, and a sentence about it."""
    run, data = task.subject.run, task.subject.data
    step, measuring = step_cost(run, amp), _measuring(task)
    steps = images_of(run.dataset, run.train_limit) // run.batch_size * run.epochs
    words = (
        f"{run.backbone} + {run.pooling}, {run.optimizer}, {step.parameters / 1e6:.2f} M parameters, images {data.in_channels}x"
        f"{data.image_size}x{data.image_size}: one step of {run.batch_size} takes {step.seconds:.2f} s on {run.device}"
        + (f" (scaled from {step.images} images)" if step.images != run.batch_size else "")
        + f"; {steps:,} steps {step.seconds * steps / 3600:,.1f} h, "
        + (f"measuring {measuring / 3600:,.1f} h" if measuring else "without measurements")
        + f"; {step.flops / 1e9:,.1f} GFLOP, {step.memory / 2**30:,.1f} GiB and {1e3 * step.gpu_seconds:,.0f} ms of a GPU a step"
    )
    return Cost(step.seconds * steps, measuring, step, words)


def _measuring(task: Trained) -> float:
    """Seconds of all measurements on this device: one of each kind is made."""
    wanted = [measurement for _, measurement in task.at if not measurement.of_training]
    if not wanted:
        return 0.0
    kinds = [(m.name, 1 if m.dry is None else m.dry[1]) for m in wanted]
    first = dict(zip(reversed(kinds), reversed(wanted), strict=True))
    run, fake = small(task.subject.run)
    scale = task.subject.run.batch_size / run.batch_size
    with tempfile.TemporaryDirectory() as folder:
        train(run, fake, folder, snapshots=(0,), until=0, progress=False)
        file = Path(folder) / snapshot_name(0)
        return sum(count * _seconds(first[kind], run, fake, file, scale) for kind, count in Counter(kinds).items())


def _seconds(measurement: Measurement, run: Run, data: ImageDataset, file: Path, scale: float) -> float:
    """Of one measurement of a network after no step, whose batch is so many times as large."""
    with snapshot(run, data, file) as at:
        measure, times = measurement.dry or (measurement.measure, 1.0)
        start = time.perf_counter()
        list(measure(at, measurement.settings))
        return (time.perf_counter() - start) * times * (scale if measurement.of_batch else 1.0)
