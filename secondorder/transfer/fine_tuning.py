"""Training of a detector on a COCO-format data set, and its detections."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from secondorder.accelerator import seed_random_numbers
from secondorder.data.sampling import epoch_order
from secondorder.errors import InputError, NonFiniteError, check_number, check_seed, check_whole, short
from secondorder.transfer.dataset import CocoDataset, collate
from secondorder.transfer.evaluated import Prediction
from secondorder.untouched import same_randomness

WARM_UP = 50
"""Steps of linear warm-up, at most half of all."""
LONGEST_GRADIENT = 10.0
"""Norm to which longer gradients are cut."""


def fine_tune(
    model: nn.Module,
    data: CocoDataset,
    *,
    epochs: int,
    batch_size: int = 4,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> list[float]:
    """Train a detector by SGD, with a linear warm-up of 50 steps and a cosine decay to 0; the mean loss of each epoch.

    The gradients of all parameters together are cut to the norm 10. A last batch is as small as it comes. The model is left in
    training mode; the data set is left at the last epoch, and global random numbers are as before.

    Args:
        model: of `detector`, or another of torchvision's.
        data: training images, with masks for a detector of masks.
        epochs: passes over the images.
        batch_size: images a step.
        learning_rate: the highest, after the warm-up.
        momentum: of SGD.
        weight_decay: L2 penalty on all weights that are trained.
        seed: of order, augmentation and what torchvision draws among proposals.

    Raises:
        InputError: for values out of range, a model without parameters to train, and data that are no `CocoDataset`.
        NonFiniteError: for a loss that is not a finite number, naming epoch and step.
    """
    _check_settings(epochs, batch_size, learning_rate, momentum, weight_decay)
    check_seed(seed)
    _check_data(data)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError(f"{type(model).__name__} has no parameter to train; use frozen=False")
    optimizer = torch.optim.SGD(trained, learning_rate, momentum, weight_decay=weight_decay)
    total = -(-len(data) // batch_size) * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, total))
    model.train()
    losses = []
    with same_randomness():
        seed_random_numbers(seed)
        for epoch in range(epochs):
            data.set_epoch(seed, epoch)
            summed = 0.0
            for number, rows in enumerate(epoch_order(len(data), seed, epoch).split(batch_size), start=1):
                loss = _loss(model, [on_unit(data[row], trained[0].device) for row in rows.tolist()])
                if not loss.isfinite():
                    where = f"step {number} of epoch {epoch + 1}"
                    raise NonFiniteError(
                        f"the loss of the detector is {loss.item()} in {where}; use a learning rate below {learning_rate:g}"
                    )
                _step(loss, trained, optimizer)
                schedule.step()
                summed += loss.item() * len(rows)
            losses.append(summed / len(data))
    return losses


def _check_settings(epochs: int, batch_size: int, learning_rate: float, momentum: float, weight_decay: float) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_whole(name, value)
    check_number("learning_rate", learning_rate, 0, math.inf, "()")
    check_number("momentum", momentum, 0, 1, "[)")
    check_number("weight_decay", weight_decay, 0, math.inf)


def _step(loss: Tensor, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """A step along the gradient of the loss, cut to LONGEST_GRADIENT."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
    optimizer.step()


def _loss(model: nn.Module, samples: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
    """The sum of a detector's losses on some samples."""
    images, targets = collate(samples)
    total: Tensor = sum(model(images, targets).values())
    return total


def detections(model: nn.Module, data: CocoDataset) -> Iterator[Prediction]:
    """What a detector finds on each image, in their order, for `detection_metrics`; on the CPU, one image at a time.

    The model is in eval mode until the last one is taken, then in the mode that it had.

    Args:
        model: of `detector`, or another of torchvision's.
        data: the images; their targets are not looked at.

    Raises:
        InputError: for data that are no `CocoDataset`.
    """
    _check_data(data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mode = model.training
    model.eval()
    try:
        for n in range(len(data)):
            image, _ = on_unit(data[n], device)
            with torch.no_grad():
                (found,) = model([image])
            yield {key: value.cpu() for key, value in found.items()}
    finally:
        model.train(mode)


def rate_share(step: int, total: int) -> float:
    """Share of the highest learning rate in a step, counted from 0: linear warm-up times cosine."""
    warm = max(1, min(WARM_UP, total // 2))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + float(np.cos(np.pi * min(step, total) / total)))


def on_unit(sample: tuple[Tensor, dict[str, object]], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """An image uint8 ``[C, H, W]`` as float32 on [0, 1], and the tensors of its target, on a device."""
    image, target = sample
    plain = {key: value.as_subclass(Tensor).to(device) for key, value in target.items() if isinstance(value, Tensor)}
    return image.as_subclass(Tensor).to(device, torch.float32) / 255, plain


def _check_data(data: object) -> None:
    if not isinstance(data, CocoDataset):
        raise InputError(f"data {short(data)}: must be a CocoDataset")
