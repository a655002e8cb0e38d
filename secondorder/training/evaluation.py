"""Test loss and accuracy of a network."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.training import processes
from secondorder.training.device import autocast


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and the fractions of images with the right class first, or among the first five."""

    loss: float
    top1: float
    top5: float


def correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many of the labels [N] are among the k largest logits [N, classes] (all classes when there are fewer), a number."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).sum()


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Any, *, batch_size: int = 256, amp: str = "off", channels_last: bool = False
) -> Evaluation:
    """Evaluate in eval mode on a whole data set; every layer's train or eval mode is as before afterwards.

    Several processes share the images; all get the same result. ``dataset.batch(indices)`` gives images
    [B, C, H, W] and labels [B].
    """
    modes = {layer: layer.training for layer in model.modules()}
    device = next(model.parameters()).device
    indices = processes.share(torch.arange(len(dataset)))
    measured: list[Tensor] = []  # on the device until the end, so that the CPU waits for it once
    model.eval()
    try:
        for start in range(0, len(indices), batch_size):
            images, labels = dataset.batch(indices[start : start + batch_size])
            images, labels = to_device(images, device, channels_last), labels.to(device)
            with autocast(device, amp):
                logits = model(images)
            logits = logits.float()
            right1, right5 = correct(logits, labels, 1), correct(logits, labels, 5)
            measured += [F.cross_entropy(logits, labels, reduction="sum"), right1.float(), right5.float()]
    finally:
        for layer, training in modes.items():
            layer.training = training
    numbers = torch.stack(measured).tolist() if measured else []
    loss, first, five, count = processes.summed(*(sum(numbers[i::3], 0.0) for i in range(3)), len(indices))
    return Evaluation(loss / count, first / count, five / count)


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """The images [B, C, H, W] on the device, in the memory format of the model."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=memory_format)
