"""Test loss and accuracy of a network."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from secondorder.data.own import OwnSplit, check_map_style, checked_batch
from secondorder.errors import InputError, check_flag, check_known, check_whole
from secondorder.training import processes
from secondorder.training.device import DTYPES, autocast


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


def checked_logits(logits: Any, labels: Tensor) -> Tensor:
    """The logits [B, classes] in float32 at least; no waiting for the device.

    Raises:
        InputError: for anything else that a network returns.
    """
    if not isinstance(logits, Tensor):
        raise InputError(f"the network returns {type(logits).__name__}; it must return logits [B, classes], a tensor")
    if logits.ndim != 2 or len(logits) != len(labels) or not logits.is_floating_point():
        shape = f"{logits.dtype} of shape {list(logits.shape)}"
        raise InputError(f"the network returns {shape} for {len(labels)} images; it must return logits [B, classes]")
    return logits.float()


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise InputError for labels [B] outside the classes, when they are on the CPU, where looking costs no waiting."""
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        low, high = int(labels.min()), int(labels.max())
        raise InputError(
            f"labels from {low} to {high} for a network of {classes} classes; they must be 0 to {classes - 1}"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Any, *, batch_size: int = 256, amp: str = "off", channels_last: bool = False
) -> Evaluation:
    """Evaluate in eval mode on a whole data set; every layer's train or eval mode is as before afterwards.

    Several processes share the images; all get the same result.

    Args:
        model: gives logits [B, classes].
        dataset: a split of this package; a map-style data set of (image, label); or a `DataLoader`, which is read as it is (by
            every process).
        batch_size: images at a time; a loader has its own.
        amp: automatic mixed precision: off, float16 or bfloat16.
        channels_last: memory format of the images, that of the model.

    Raises:
        InputError: for a data set without images or of other samples, labels outside the classes, and a network that does not
            return logits.
    """
    check_whole("batch_size", batch_size)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {model!r:.100}; it must be a torch.nn.Module")
    if not isinstance(dataset, DataLoader) and not hasattr(dataset, "batch"):
        check_map_style(dataset)
    check_known("amp", amp, DTYPES)
    check_flag("channels_last", channels_last)
    modes = {layer: layer.training for layer in model.modules()}
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    measured: list[Tensor] = []  # on the device until the end, so that the CPU waits for it once
    seen = 0
    model.eval()
    try:
        for images, labels in _batches(dataset, batch_size):
            images = to_device(images, device, channels_last)
            with autocast(device, amp):
                logits = model(images)
            logits = checked_logits(logits, labels)
            check_labels(labels, logits.shape[1])
            seen += len(labels)
            labels = labels.to(device)
            right1, right5 = correct(logits, labels, 1), correct(logits, labels, 5)
            measured += [F.cross_entropy(logits, labels, reduction="sum"), right1.float(), right5.float()]
    finally:
        for layer, training in modes.items():
            layer.training = training
    numbers = torch.stack(measured).tolist() if measured else []
    loss, first, five, count = processes.summed(*(sum(numbers[i::3], 0.0) for i in range(3)), seen)
    if not count:
        raise InputError(f"the dataset {type(dataset).__name__} has no images; at least 1 is needed")
    return Evaluation(loss / count, first / count, five / count)


def _batches(dataset: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of a loader as it is, or this process's share of a data set."""
    if isinstance(dataset, DataLoader):
        for batch in dataset:
            yield checked_batch(batch, type(dataset.dataset).__name__)
        return
    split = dataset if hasattr(dataset, "batch") else OwnSplit(dataset)
    indices = processes.share(torch.arange(len(split)))
    for start in range(0, len(indices), batch_size):
        yield split.batch(indices[start : start + batch_size])


def to_device(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """The images [B, C, H, W] on the device, in the memory format of the model."""
    memory_format = torch.channels_last if channels_last and images.ndim == 4 else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=memory_format)
