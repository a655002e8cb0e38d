"""Training followed by TensorBoard: losses, epochs and hyper-parameters as event files."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from secondorder.data.files import expanded
from secondorder.errors import InputError
from secondorder.optional import needed_by
from secondorder.training.run import Run

Epochs = Sequence[Mapping[str, float | int]]
FINAL = ("train_loss", "test_loss", "test_top1")
"""Columns of the last epoch that hyper-parameters are shown with."""


class Tracker(Protocol):
    """What `train` tells how training goes, in its main process; it changes nothing of it and is no part of a checkpoint."""

    def begin(self, run: Run) -> None:
        """Training of `run` begins, or goes on from a checkpoint."""

    def update(self, history: Epochs, step_losses: Sequence[float]) -> None:
        """All rows of epochs and losses of steps so far, from the first on; called at the beginning and after each epoch."""

    def end(self, finished: bool) -> None:
        """Training is at its end, or was stopped: by ``until``, an error or an interruption."""


class TensorBoard:
    """Event files of a training for TensorBoard: ``train(..., tracker=TensorBoard("events"))``, ``tensorboard --logdir events``.

    Each training has a folder with one event file: the loss of every step ("loss"), the columns of every epoch after as many
    steps as are done ("epoch/test_top1" and so on), and at its end the fields of the run as hyper-parameters with the last
    epoch's losses and accuracy. Training that goes on writes the file anew from what its checkpoint knows, so that no step is
    there twice or missing.

    Args:
        folder: holds a folder for each training.
        name: of the training's folder; the run's name (network, head, data and seed) when not given.

    Raises:
        MissingLibraryError: without TensorBoard, with the command that installs it.
        InputError: for a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        with needed_by("TensorBoard"):
            import torch.utils.tensorboard  # noqa: F401
        self.folder, self.name = expanded(folder, "folder"), name
        self.run: Run | None = None

    def begin(self, run: Run) -> None:
        """Begin the event file anew."""
        self.run, self.writer = run, fresh_writer(self.folder / (self.name or run.name))
        self.steps = self.epochs = 0
        self.last: Mapping[str, float | int] = {}

    def update(self, history: Epochs, step_losses: Sequence[float]) -> None:
        """Write what is new, and bring it to the disk."""
        for step in range(self.steps, len(step_losses)):
            self.writer.add_scalar("loss", step_losses[step], step + 1)
        for row in history[self.epochs :]:
            for name in (name for name in row if name not in ("epoch", "step")):
                self.writer.add_scalar(f"epoch/{name}", row[name], row["step"])
        self.steps, self.epochs = len(step_losses), len(history)
        self.last = history[-1] if history else {}
        self.writer.flush()

    def end(self, finished: bool) -> None:
        """Close the event file, of a finished training with its hyper-parameters."""
        if finished and self.run is not None and self.last:
            from torch.utils.tensorboard.summary import hparams

            metrics = {f"final/{name}": float(self.last[name]) for name in FINAL}
            for summary in hparams(hyper_parameters(self.run), metrics):
                self.writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.last["step"])
        self.writer.close()


def hyper_parameters(run: Run) -> dict[str, bool | float | int | str]:
    """The fields of a run as TensorBoard takes them: numbers and words, options of the optimiser by their names."""
    fields = run.to_dict()
    fields |= {f"optimizer_options/{name}": value for name, value in dict(fields.pop("optimizer_options")).items()}
    return {name: value if isinstance(value, bool | float | int) else str(value) for name, value in fields.items()}


def fresh_writer(folder: Path) -> Any:
    """A writer of a new event file in a folder, whose older ones are removed; InputError when it cannot be written."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        for file in folder.glob("events.out.tfevents.*"):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
        return SummaryWriter(str(folder))
    except OSError as error:
        raise InputError(f"cannot write events for TensorBoard into {folder}: {error.strerror or error}") from None
