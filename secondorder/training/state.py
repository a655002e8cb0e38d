"""The state of a training in progress, and what a finished one returns."""

from dataclasses import dataclass, field

from torch import nn

from secondorder.training.evaluation import Evaluation
from secondorder.training.observers import Row
from secondorder.training.run import Run


@dataclass
class Progress:
    """How far a training is and what it has recorded; saved in the checkpoint."""

    step: int = 0
    """Steps done. Always saved with the evaluation of the epoch that the step completes."""
    epoch_correct: int = 0
    """Right training predictions in the present epoch."""
    training_seconds: float = 0.0
    seconds: float = 0.0
    step_losses: list[float] = field(default_factory=list)
    history: list[dict[str, float | int]] = field(default_factory=list)
    records: dict[str, list[Row]] = field(default_factory=dict)

    def finish_epoch(
        self, steps: int, batch_size: int, learning_rate: float, test: Evaluation
    ) -> dict[str, float | int]:
        """Add the row of an epoch of so many steps to the history, and return it."""
        row = {
            "epoch": self.step // steps,
            "step": self.step,
            "learning_rate": learning_rate,
            "train_loss": sum(self.step_losses[-steps:]) / steps,
            "train_top1": self.epoch_correct / (steps * batch_size),
            "test_loss": test.loss,
            "test_top1": test.top1,
            "test_top5": test.top5,
            "seconds": self.training_seconds,
        }
        self.history.append(row)
        self.epoch_correct = 0
        return row


@dataclass(frozen=True)
class Trained:
    """What a finished training gives back: the network, its history, losses and measurements, and the time that it took."""

    run: Run
    model: nn.Module
    """The network in eval mode, on the device of the run."""
    history: list[dict[str, float | int]]
    """A row per epoch: epoch (from 1), step (steps done), learning_rate (of its last step), train_loss and train_top1
    (means over its steps, augmented images), test_loss, test_top1, test_top5 (fractions), and seconds, of all training
    steps so far, without evaluation, observers and checkpoints."""
    step_losses: list[float]
    """The training loss of every step."""
    records: dict[str, list[Row]]
    """The rows of each observer."""
    seconds: float
    """Wall-clock time of everything, over all resumed parts."""
