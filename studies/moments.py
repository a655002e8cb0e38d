"""When a training is measured."""

from secondorder.data import ImageDataset
from secondorder.training import Run


def steps_between(run: Run, data: ImageDataset, measurements: int) -> int:
    """Steps between equally spaced measurements, of which the first is before the first step and the last after training."""
    total = len(data.train) // run.batch_size * run.epochs
    return max(1, -(-total // (measurements - 1)))
