"""Training as it was at a step: network, optimiser, batch and random numbers, from a checkpoint or snapshot of it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from secondorder.data import ImageDataset
from secondorder.data.files import expanded, shown
from secondorder.errors import InputError
from secondorder.training import checkpoint
from secondorder.training.device import isolated, resolve_device, seed_step
from secondorder.training.evaluation import to_device
from secondorder.training.parts import set_learning_rate, train_mode
from secondorder.training.run import Run
from secondorder.training.schedules import SCHEDULES
from secondorder.training.setup import Data, check_fit, check_given, check_is_run, dataset_of, first_state
from secondorder.training.weights import Initial, OwnNetwork


@dataclass(frozen=True)
class Snapshot:
    """Training after `step` steps, as a `Moment` that an observer is given: the next step's batch, masks and learning rate."""

    run: Run
    data: ImageDataset
    step: int
    model: nn.Module
    """The network in training mode (frozen parts in eval mode), on the device of the run."""
    optimizer: torch.optim.Optimizer
    """With its state, and the learning rate of the next step."""
    learning_rate: float
    """Of the next step; after the last one, of that."""
    history: list[dict[str, float | int]]
    """The rows of the epochs done, as of `Trained`."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last partial batch is dropped."""
        return len(self.data.train) // self.run.batch_size

    @property
    def total(self) -> int:
        """The number of steps of the whole run, over all epochs."""
        return self.steps_per_epoch * self.run.epochs

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, 1 for the first one."""
        return self.step // self.steps_per_epoch + 1

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W], augmented, and labels [B] of the next step, on the model's device.

        InputError after the last one.
        """
        if self.step >= self.total:
            raise InputError(f"step {self.step}: training is at its end, there is no next batch; take an earlier step")
        train, (epoch, first) = self.data.train, divmod(self.step, self.steps_per_epoch)
        train.set_epoch(self.run.seed, epoch)
        start = first * self.run.batch_size
        indices = train.order(self.run.seed, epoch)[start : start + self.run.batch_size]
        images, labels = train.batch(indices)
        device = next(self.model.parameters()).device
        return to_device(images, device, self.run.channels_last), labels.to(device)

    @property
    def images(self) -> Tensor:
        """Images [B, C, H, W] of the next step, augmented, on the model's device; InputError after the last one."""
        return self.batch[0]

    @property
    def labels(self) -> Tensor:
        """Labels [B] of the next step, on the model's device; InputError after the last one."""
        return self.batch[1]


@contextlib.contextmanager
def snapshot(
    run: Run,
    data: Data,
    file: str | Path,
    *,
    network: OwnNetwork | None = None,
    initial: Initial | None = None,
) -> Iterator[Snapshot]:
    """Training as it was at a checkpoint; what is measured inside is what an observer of `train` would measure there.

    Inside, the number of threads is the run's, and random numbers (dropout masks) begin as those of the next step; outside, the
    caller's are as they were.

        with snapshot(run, data, "runs/a/step-100.pt") as at:
            line = feature_landscape(at.model, F.cross_entropy, at.images, at.labels, etas)

    Args:
        run: the settings of the training.
        data: its data, as for `train`.
        file: a snapshot or checkpoint that `train` wrote, or the folder of the latter.
        network: the user's own network, as given to `train`.
        initial: the initial weights, as given to `train`.

    Raises:
        InputError: when there is no such file, it is damaged, or of another run.
    """
    check_is_run(run)
    device = resolve_device(run.device)
    with isolated(device, run.threads):
        check_given(run, network, initial)
        dataset = dataset_of(run, data)
        check_fit(run, dataset)
        path = checkpoint.file_of(expanded(file, "snapshot"))
        state = checkpoint.load(path)
        if state is None:
            raise InputError(f"there is no snapshot {shown(path)!r}; train with snapshots= at the step that is wanted")
        model, optimizer, origin = first_state(run, dataset, device, network, initial)
        expected = checkpoint.identity(run, dataset, state["observers"], origin)
        checkpoint.check_same(state, expected, path.parent)
        checkpoint.restore(state, {"model": model, "optimizer": optimizer}, path.parent)
        train_mode(model, run.frozen)
        step, steps_per_epoch = int(state["progress"]["step"]), len(dataset.train) // run.batch_size
        last = min(step, steps_per_epoch * run.epochs - 1)
        rate = run.learning_rate * SCHEDULES[run.schedule].factor_at(last, steps_per_epoch, run.epochs)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        seed_step(run.seed, step, 0)
        yield Snapshot(run, dataset, step, model, optimizer, rate, state["progress"]["history"])
