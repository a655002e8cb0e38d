"""What the robustness study measures of a trained network: errors on corrupted test images, stability along perturbations.

The same test images, evenly spaced over the split, and the same random draws serve every network. White is 255, as for the
published sets, whatever the white of the data set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from secondorder.robustness import corruption_error_rates, error_rate, sequence_stability, split_batches
from secondorder.training import Snapshot
from studies.backbones import evenly_spaced
from studies.engine.plan import Measurement
from studies.engine.records import Row

CLEAN, CORRUPTED = "clean error", "corrupted error"
"""Top-1 errors; `layer` is the corruption, index and setting are the severity."""
FLIPS, TOP5 = "flip probability", "top-5 distance"
"""Of a perturbation sequence, whose name is `layer`."""

DRY_IMAGES = 2
"""Test images of a dry run, which has a few."""


@dataclass(frozen=True)
class Chosen:
    """A corruption or a sequence ("": clean images), and how many test images."""

    name: str
    images: int


def measure_clean(at: Snapshot, of: Chosen) -> Iterator[Row]:
    """The error on the images without corruption."""
    yield _row("", CLEAN, error_rate(at.model, **_images(at, of.images)))


def measure_corruption(at: Snapshot, of: Chosen) -> Iterator[Row]:
    """The error at each severity of a corruption."""
    indices = evenly_spaced(len(at.data.test), of.images).tolist()
    errors = corruption_error_rates(at.model, corruption=of.name, indices=indices, **_images(at, of.images))
    for severity, error in enumerate(errors, start=1):
        yield _row(of.name, CORRUPTED, error, index=severity, setting=float(severity))


def measure_sequence(at: Snapshot, of: Chosen) -> Iterator[Row]:
    """Flip probability and, with more than five classes, top-5 distance along the frames of a perturbation."""
    indices = evenly_spaced(len(at.data.test), of.images).tolist()
    found = sequence_stability(at.model, name=of.name, indices=indices, **_images(at, of.images))
    yield _row(of.name, FLIPS, found.flip_probability)
    if found.top5_distance is not None:
        yield _row(of.name, TOP5, found.top5_distance)


def measurements(
    corruptions: tuple[str, ...], sequences: tuple[str, ...], images: int, sequence_images: int
) -> list[Measurement]:
    """One of clean images, one of each corruption and sequence: a study can stop, and go on, between any two of them."""

    def of(name: str, measure: Callable[[Snapshot, Chosen], Iterator[Row]], chosen: Chosen) -> Measurement:
        few = partial(_of_few, measure=measure)
        return Measurement(name, measure, chosen, dry=(few, chosen.images / DRY_IMAGES))

    return [
        of("clean images", measure_clean, Chosen("", images)),
        *(of("corruption", measure_corruption, Chosen(name, images)) for name in corruptions),
        *(of("perturbation", measure_sequence, Chosen(name, sequence_images)) for name in sequences),
    ]


def _of_few(at: Snapshot, of: Chosen, measure: Callable[[Snapshot, Chosen], Iterator[Row]]) -> Iterator[Row]:
    """The measurement on the images of a dry run."""
    return measure(at, replace(of, images=DRY_IMAGES))


def _images(at: Snapshot, count: int) -> dict[str, Any]:
    """The test images, a batch at a time, and how the network sees them."""
    test: Any = at.data.test  # that it is in memory or in files, `split_batches` checks
    return {
        "batches": split_batches(test, indices=evenly_spaced(len(test), count)),
        "normalisation": test.normalisation,
    }


def _row(layer: str, quantity: str, value: float, **more: Any) -> Row:
    return {"layer": layer, "quantity": quantity, "value": value, "error": 0.0, **more}
