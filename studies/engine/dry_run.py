"""What a study would cost: one step and one measurement of every network on fake data of the right shape, scaled to the whole."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from secondorder.data import ImageDataset
from secondorder.training import Run, snapshot, train
from secondorder.training.checkpoint import snapshot_name
from studies.engine.fake_data import fake_data, images_of
from studies.engine.plan import Measurement, Trained
from studies.engine.store import digest
from studies.engine.study import Context, Study

# Pixels of a step on a CPU, 8 ImageNet images: a whole batch of them needs more than 10 GiB. Times are scaled.
CPU_PIXELS = 8 * 224**2


VARIED = ("seed", "learning_rate", "momentum", "weight_decay", "optimizer_options")
"""Fields of a run that make no difference to its cost."""


def dry_run(study: Study, context: Context) -> Iterator[str]:
    """Sentences that state the cost of a study on this device: of each kind of network, and of all together."""
    kinds: dict[str, list[Trained]] = {}
    for task in (task for task in next(study.plan(context)) if isinstance(task, Trained)):
        fields = {name: value for name, value in task.subject.run.to_dict().items() if name not in VARIED}
        wanted = [(step, measurement) for step, measurement in task.at if not measurement.of_training]
        measured = [(step, m.described if m.dry is None else (m.name, m.dry[1])) for step, m in wanted]
        kinds.setdefault(digest([fields, measured]), []).append(task)
    total = 0.0
    for tasks in kinds.values():
        seconds, words = cost_of(tasks[0])
        total += seconds * len(tasks)
        yield f"{len(tasks)} times {words}"
    hours, processes = total / 3600, context.common.processes
    yield (
        f"{len(context.seeds)} seeds of {len(kinds)} networks: about {hours:,.1f} h of one job, {hours / processes:,.1f} h "
        f"with {processes} side by side"
    )


def cost_of(task: Trained) -> tuple[float, str]:
    """Seconds of a training with all its measurements on this device, and a sentence about it."""
    run, data = task.subject.run, task.subject.data
    on_cpu = run.device == "cpu"
    batch = min(run.batch_size, max(2, CPU_PIXELS // data.image_size**2)) if on_cpu else run.batch_size
    scale = run.batch_size / batch
    fake = fake_data(run.dataset, batch, run.image_size)
    small = replace(run, batch_size=batch, epochs=1, train_limit=None, test_limit=None)
    with tempfile.TemporaryDirectory() as folder:
        train(small, fake, folder, progress=False)  # the first step of a process is slow
        trained = train(small, fake, folder, snapshots=(0,), progress=False)
        file = Path(folder) / snapshot_name(0)
        wanted = [measurement for _, measurement in task.at if not measurement.of_training]
        kinds = [(m.name, 1 if m.dry is None else m.dry[1]) for m in wanted]
        first = dict(zip(reversed(kinds), reversed(wanted), strict=True))
        measuring = sum(count * _seconds(first[kind], small, fake, file) for kind, count in Counter(kinds).items())
    step = float(trained.history[-1]["seconds"]) * scale
    steps = images_of(run.dataset, run.train_limit) // run.batch_size * run.epochs
    parameters = sum(p.numel() for p in trained.model.parameters()) / 1e6
    return step * steps + measuring, (
        f"{run.backbone} + {run.pooling}, {run.optimizer}, {parameters:.2f} M parameters, images {data.in_channels}x"
        f"{data.image_size}x{data.image_size}: one step of {run.batch_size} takes {step:.2f} s on {run.device}"
        + (f" (scaled from {batch} images)" if scale != 1 else "")
        + f"; {steps:,} steps {step * steps / 3600:,.1f} h, measuring {measuring / 3600:,.1f} h"
    )


def _seconds(measurement: Measurement, run: Run, data: ImageDataset, file: Path) -> float:
    """Of one measurement of a network after no step."""
    with snapshot(run, data, file) as at:
        measure, times = measurement.dry or (measurement.measure, 1.0)
        start = time.perf_counter()
        list(measure(at, measurement.settings))
        return (time.perf_counter() - start) * times
