"""What a study would cost: one step of every run on fake data of the right shape, scaled to the whole."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from secondorder.data import DATASETS, ImageArray, ImageDataset, Row
from secondorder.errors import unknown
from secondorder.training import Moment, Observer, Run, resolve_device, train

# Training images and classes where the table of data sets leaves them open: ILSVRC 2012.
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
CLASSES = {"imagefolder": IMAGENET_CLASSES, "fake": IMAGENET_CLASSES, "cifar100": 100}
# Pixels of a step on a CPU, 8 ImageNet images: a whole batch of them needs more than 10 GiB. Times are scaled.
CPU_PIXELS = 8 * 224**2


@dataclass
class Stopwatch:
    """An observer that also adds up its own seconds."""

    observer: Observer
    seconds: float = 0.0

    @property
    def every(self) -> int:
        """Steps between two measurements."""
        return self.observer.every

    def __call__(self, moment: Moment) -> list[dict[str, Any]]:
        """The observer's rows."""
        start = time.perf_counter()
        rows = self.observer(moment)
        self.seconds += time.perf_counter() - start
        return rows


def row_of(dataset: str) -> Row:
    """The row of a data set; InputError for one that is in no table, a user's own."""
    if dataset not in DATASETS:
        raise unknown("data set", dataset, DATASETS)
    return DATASETS[dataset]


def fake_data(dataset: str, images: int, image_size: int | None = None) -> ImageDataset:
    """Random pixels and labels with the shape, number of classes and normalisation of `dataset`, labelled fake."""
    row = row_of(dataset)
    size, classes = image_size or row.image_size, CLASSES.get(dataset, 10)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(row.maximum + 1, (images, row.in_channels, size, size), generator=generator).to(torch.uint8)
    split = ImageArray(pixels, torch.arange(images) % classes, row.normalisation(), None, size)
    return ImageDataset(
        name=dataset,
        label=f"fake data shaped like {row.label}",
        train=split,
        test=split,
        num_classes=classes,
        in_channels=row.in_channels,
        image_size=size,
        classes=tuple(str(n) for n in range(classes)),
        mean=row.mean,
        std=row.std,
        provenance={"source": "random pixels"},
    )


def cost_of(run: Run, observers: Mapping[str, Observer], measurements: int | None = None) -> tuple[float, str]:
    """Take a step and a measurement of `run`; seconds of the whole run on this device, and a sentence about it.

    `measurements` of each observer in the whole run, when they are not one every so many steps.
    """
    device = resolve_device(run.device)
    size = run.image_size or row_of(run.dataset).image_size
    batch = min(run.batch_size, max(2, CPU_PIXELS // size**2)) if device.type == "cpu" else run.batch_size
    scale = run.batch_size / batch
    expected = row_of(run.dataset).expected
    images = run.train_limit or (expected[0] if expected else IMAGENET_IMAGES)
    amp = "off" if device.type == "cpu" and run.amp == "float16" else run.amp
    one = replace(run, batch_size=batch, epochs=1, train_limit=None, test_limit=None, amp=amp)
    watches = {name: Stopwatch(observer) for name, observer in observers.items()}
    data = fake_data(run.dataset, batch, run.image_size)
    with tempfile.TemporaryDirectory() as folder:
        train(one, data, Path(folder), progress=False)  # the first step of a process is slow
        trained = train(one, data, Path(folder), observers=watches, progress=False)
    step = float(trained.history[-1]["seconds"]) * scale
    steps = images // run.batch_size * run.epochs
    # an observer that is not called every so many steps measures images of its own, not those of the step
    times = {name: measurements or scale * -(-steps // watch.every) for name, watch in watches.items()}
    measuring = {name: watch.seconds * times[name] for name, watch in watches.items()}
    total = step * steps + sum(measuring.values())
    parameters = sum(p.numel() for p in trained.model.parameters()) / 1e6
    return total, (
        f"{run.backbone} + {run.pooling}, {parameters:.2f} M parameters, images {data.in_channels}x{data.image_size}x"
        f"{data.image_size}: one step of {run.batch_size} takes {step:.2f} s on {device}"
        + (f" (scaled from {batch} images)" if scale != 1 else "")
        + f"; {steps:,} steps {step * steps / 3600:,.1f} h, measuring {sum(measuring.values()) / 3600:,.1f} h"
    )
