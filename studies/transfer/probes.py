"""Probes of the frozen features of a network: of their last stage, with batch-norm statistics of the new images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secondorder.training import Snapshot
from secondorder.transfer import (
    POOLED,
    FeaturePyramid,
    dense_probe,
    few_shot,
    linear_probe,
    pooled_features,
)
from studies.backbones import BATCH, evenly_spaced
from studies.engine.records import Row
from studies.transfer.targets import labelled, normalised, pixels_with_foreground, scenes

PROBE = dict(zip(POOLED, ("probe accuracy", "probe accuracy, with covariance"), strict=True))
"""Quantities of a linear probe by the kind of pooled features; `layer` is the data set, setting the shots of a class."""
FOREGROUND = "foreground IoU"
"""Of a dense probe; setting is the number of training images."""
RECALIBRATED = 512
"""Images at most that batch-norm statistics are renewed on."""


@dataclass(frozen=True)
class Linear:
    """A data set, with the digest of its annotations, and how often a probe is fitted to how many samples of a class."""

    data: str
    digest: str
    shots: tuple[int, ...]
    draws: int


@dataclass(frozen=True)
class Dense:
    """A data set with masks, and of how many images a probe learns its foreground."""

    data: str
    digest: str
    images: int
    test_images: int


def measure_linear(at: Snapshot, of: Linear, root: Path | None) -> Iterator[Row]:
    """Mean test accuracy over draws of the shots, by kind of features and number of shots; the error is that of the mean."""
    task = labelled(of.data, root, at.data)
    maps = Maps(at, task.images)
    pooled = [_pooled(maps, images) for images in (task.images, task.test_images)]
    for kind, quantity in PROBE.items():
        train, test = (features[kind] for features in pooled)
        for shots in of.shots:
            found = []
            for draw in range(of.draws):
                rows = few_shot(task.labels, shots, at.run.seed * of.draws + draw)
                found.append(linear_probe(train[rows], task.labels[rows], test, task.test_labels))
            error = float(np.std(found, ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else math.nan
            yield _row(of.data, quantity, shots, float(np.mean(found)), error)


def measure_dense(at: Snapshot, of: Dense, root: Path | None) -> Iterator[Row]:
    """The intersection over union of pixels that belong to objects, learned from a few images that the seed draws."""
    data = scenes(of.data, root, of.images, of.test_images, at.run.seed, augmented=False)
    parts = [pixels_with_foreground(part) for part in data]
    pictures = [normalised(images, at.data) for images, _ in parts]
    maps = Maps(at, pictures[0])
    seen = [torch.cat([maps(one[None]) for one in images]) for images in pictures]
    score = dense_probe(seen[0], parts[0][1], seen[1], parts[1][1], seed=at.run.seed)
    yield _row(of.data, FOREGROUND, of.images, score.intersection_over_union[1], math.nan)


class Maps:
    """The last stage's maps of a network, on the CPU, with batch-norm statistics of images [n, C, H, W]; it is left as it is."""

    def __init__(self, at: Snapshot, images: Tensor) -> None:
        self.pyramid = FeaturePyramid(at.model, width=1, frozen=True)
        self.device = next(at.model.parameters()).device
        chosen = images[evenly_spaced(len(images), RECALIBRATED)].to(self.device)
        self.pyramid.recalibrate(chosen, batch_size=max(2, min(BATCH, len(chosen))))

    def __call__(self, images: Tensor) -> Tensor:
        """Maps [n, C, h, w] of images [n, C, H, W]."""
        with torch.no_grad():
            return self.pyramid.maps(images.to(self.device))[self.pyramid.names[-1]].contiguous().cpu()


def _pooled(maps: Maps, images: Tensor) -> dict[str, Tensor]:
    """The features of images by their kind."""
    parts = [{kind: pooled_features(seen, kind) for kind in POOLED} for seen in map(maps, images.split(BATCH))]
    return {kind: torch.cat([part[kind] for part in parts]) for kind in POOLED}


def _row(data: str, quantity: str, setting: float, value: float, error: float) -> Row:
    return {"layer": data, "quantity": quantity, "setting": float(setting), "value": value, "error": error}
