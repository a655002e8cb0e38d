"""The deep autoencoder of Martens & Grosse (2015): how many updates, and how long, to the training loss that tuned SGD ends at.

Pixels in [0, 1], Bernoulli likelihood. What is optimised is the mean cross-entropy over images and pixels; recorded is its sum
over the pixels of an image, as published.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.data import ImageDataset, epoch_order
from secondorder.errors import InputError, NonFiniteError
from secondorder.kfac import KFAC, Damping, Fisher, LevenbergMarquardt
from secondorder.networks.autoencoder import autoencoder
from studies.optimisers.costs import Stepper
from studies.optimisers.settings import AutoencoderSettings
from studies.optimisers.tuning import Lattice, Range, Values, momentum

NETWORK = "autoencoder"
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue


def sgd(model: nn.Module, learning_rate: float, momentum: float) -> torch.optim.Optimizer:
    """SGD with heavy-ball momentum."""
    return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)


def kfac(model: nn.Module, learning_rate: float, momentum: float) -> torch.optim.Optimizer:
    """K-FAC with its default damping, for a Bernoulli likelihood."""
    return KFAC(model, learning_rate, momentum=momentum, fisher=Fisher("mc", likelihood="bce"))


def quadratic(model: nn.Module, damping: float, ema_decay: float) -> torch.optim.Optimizer:
    """K-FAC as published: step size and momentum from the quadratic model, adapted damping; statistics in every update."""
    adapted = Damping(damping, adapt=LevenbergMarquardt())
    fisher = Fisher("mc", likelihood="bce")
    return KFAC(model, 1.0, damping=adapted, ema_decay=ema_decay, fisher=fisher, factor_interval=1, inverse_interval=5)


class QuadraticStepper(Stepper):
    """An update by `KFAC.quadratic_step`, which does forward and backward pass and the products of the quadratic model."""

    def take(self, inputs: Tensor, targets: Tensor) -> None:
        """One update."""
        assert isinstance(self.optimizer, KFAC)
        self.optimizer.quadratic_step(self.loss, inputs, targets)


@dataclass(frozen=True)
class Arm:
    """One optimiser: how it is built, its share of SGD's updates, and what is tuned."""

    build: Callable[..., torch.optim.Optimizer]
    share: float
    lattice: Lattice
    stepper: type[Stepper] = Stepper


ARMS: dict[str, Arm] = {
    "sgd": Arm(sgd, 1.0, momentum(10.0, 0.8)),
    "kfac": Arm(kfac, 0.1, momentum(0.25, 0.6)),
    "kfac_quadratic": Arm(
        quadratic, 0.1, Lattice(Range("damping", 2e-3, 4.0, 1e-8), Range("ema_decay", 0.9)), QuadraticStepper
    ),
}
"""K-FAC is to need at most a tenth of the updates, so that is what it gets, its schedule included."""


def pixels(data: ImageDataset, settings: AutoencoderSettings) -> Tensor:
    """Grey training images, their central part, as vectors `[N, image_size^2]` in [0, 1].

    InputError when they are too small or too few.
    """
    size = settings.image_size
    if data.image_size < size:
        raise InputError(f"--autoencoder.image-size {size}: the images have only {data.image_size} pixels a side")
    if len(data.train) < settings.batch_size:
        raise InputError(f"--autoencoder.batch-size {settings.batch_size}: there are only {len(data.train)} images")
    images, _ = data.train.plain(torch.arange(len(data.train)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    images = images * std + mean
    if images.shape[1] == 3:
        images = (images * torch.tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
    first = (data.image_size - size) // 2
    return images[..., first : first + size, first : first + size].flatten(1).clamp(0, 1)


def reconstruction_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Mean binary cross-entropy over images and pixels."""
    return F.binary_cross_entropy_with_logits(logits, images)


def stepper(images: Tensor, settings: AutoencoderSettings, arm: str, values: Mapping[str, float], seed: int) -> Stepper:
    """The autoencoder of a seed, an arm's optimiser, and the seed's batches: the same for every arm.

    Args:
        images: vectors `[N, pixels]` in [0, 1].
        settings: of the network, the batches and the number of updates.
        arm: a key of ARMS.
        values: its tuned settings.
        seed: determines initial weights and batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = autoencoder(images.shape[1], settings.widths, settings.activation, settings.initialisation)
    epochs = -(-settings.updates // (len(images) // settings.batch_size))
    orders = [epoch_order(len(images), seed, epoch).split(settings.batch_size) for epoch in range(min(epochs, 50))]
    batches = [images[part] for order in orders for part in order if len(part) == settings.batch_size]
    model = model.to(images.device)
    optimizer = ARMS[arm].build(model, **values)
    return ARMS[arm].stepper(model, optimizer, reconstruction_loss, [(batch, batch) for batch in batches])


def fit(images: Tensor, settings: AutoencoderSettings, arm: str, values: Values, seed: int) -> list[dict[str, Any]]:
    """Train an autoencoder (see `stepper`): its training loss after 0 and at equally spaced updates, or one row "diverged"."""
    step = stepper(images, settings, arm, values, seed)
    total = max(1, round(ARMS[arm].share * settings.updates))
    every = max(1, total // settings.evaluations)
    rows = [_row(0, whole_loss(step.model, images))]
    try:
        for update in range(total):
            factor = (1 + math.cos(math.pi * update / total)) / 2
            for group in step.optimizer.param_groups:
                group["lr"] = factor * values.get("learning_rate", 1.0)
            step()
            if (update + 1) % every == 0 or update + 1 == total:
                rows.append(_row(update + 1, whole_loss(step.model, images)))
                if not math.isfinite(rows[-1]["value"]):
                    raise NonFiniteError(f"the training loss is {rows[-1]['value']} after {update + 1} updates")
    except (NonFiniteError, torch.linalg.LinAlgError) as error:
        words = str(error).partition("\n")[0] or type(error).__name__
        return [{"quantity": "diverged", "value": 1.0, "error": 0.0, "layer": words[:200]}]
    return rows


def _row(update: int, loss: float) -> dict[str, Any]:
    return {"step": update, "quantity": "train_loss", "value": loss, "error": 0.0}


@torch.no_grad()
def whole_loss(model: nn.Module, images: Tensor) -> float:
    """Sum over pixels, mean over all images, of the cross-entropy."""
    losses = [
        F.binary_cross_entropy_with_logits(model(part), part, reduction="sum").item() for part in images.split(1000)
    ]
    return sum(losses) / len(images)
