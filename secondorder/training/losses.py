"""The loss of a training step, and the reading of those that are still on the device.

Reading a number waits for the device, so on an accelerator the losses of many steps are read at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.training import processes
from secondorder.training.evaluation import check_labels, checked_logits, correct

READ_EVERY = 100
"""Steps at most whose losses stay on an accelerator before the CPU waits for them, if nothing else asks before."""


def step_loss(
    model: nn.Module, images: Tensor, targets: Tensor, labels: Tensor, own_data: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy (a scalar), the number of right predictions of a batch, and its logits.

    ``targets`` are the ``labels`` on the device; those of ``own_data`` may lie outside the classes. Raises InputError for that,
    and for a network that gives no logits or has nothing to train.
    """
    logits = checked_logits(model(images), labels)
    if not logits.requires_grad:
        raise InputError("the network's logits depend on no trainable parameter; there is nothing to train")
    if own_data:
        check_labels(labels, logits.shape[1])
    return F.cross_entropy(logits, targets), correct(logits, targets, 1), logits


class UnreadLosses:
    """Losses and numbers of right predictions of steps, on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[tuple[int, float, Tensor, Tensor]] = []

    def add(self, step: int, learning_rate: float, loss: Tensor, right: Tensor) -> None:
        """Note the numbers of a step; no waiting."""
        self.steps.append((step, learning_rate, loss.detach(), right))

    def due(self) -> bool:
        """Whether to read them now: after every step on the CPU, where that costs nothing."""
        return self.device.type == "cpu" or len(self.steps) == READ_EVERY

    def read(self) -> list[tuple[int, float, float, int]]:
        """Step, learning rate, loss and right predictions (of all processes) of the steps since the last time, all at once.

        An accelerator is waited for.
        """
        unread, self.steps = self.steps, []
        if not unread:
            return []
        numbers = torch.stack([number.float() for _, _, *pair in unread for number in pair]).tolist()
        summed = processes.summed(*(loss / processes.world_size() for loss in numbers[::2]), *numbers[1::2])
        losses, right = summed[: len(unread)], summed[len(unread) :]
        return [(step, rate, loss, int(n)) for (step, rate, *_), loss, n in zip(unread, losses, right, strict=True)]
