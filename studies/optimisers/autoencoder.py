"""The deep autoencoder of Martens & Grosse (2015): how many updates, and how long, to the training loss that tuned SGD ends at.

Pixels in [0, 1], Bernoulli likelihood. What is optimised is the mean cross-entropy over images and pixels; recorded is its sum
over the pixels of an image, as published.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from secondorder.data import ImageDataset, epoch_order
from secondorder.errors import InputError, NonFiniteError
from secondorder.kfac import KFAC, Damping, Fisher, LevenbergMarquardt
from secondorder.networks.autoencoder import autoencoder
from studies.optimisers.costs import QuadraticStepper, Stepper
from studies.optimisers.settings import AutoencoderSettings
from studies.optimisers.tuning import Values

NETWORK = "autoencoder"
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue
BERNOULLI = Fisher("mc", likelihood="bce")


def _sgd(model: nn.Module, learning_rate: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)


def _kfac(model: nn.Module, learning_rate: float, momentum: float) -> torch.optim.Optimizer:
    return KFAC(model, learning_rate, step_rule="natural", momentum=momentum, fisher=BERNOULLI)


def _quadratic(model: nn.Module, damping: float, ema_decay: float) -> torch.optim.Optimizer:
    """As published: step size and momentum from the quadratic model, adapted damping; statistics in every update."""
    adapted = Damping(damping, adapt=LevenbergMarquardt())
    return KFAC(
        model, 1.0, damping=adapted, ema_decay=ema_decay, fisher=BERNOULLI, factor_interval=1, inverse_interval=5
    )


class Arm(NamedTuple):
    """How an optimiser is built, its share of SGD's updates, and how it takes them."""

    build: Callable[..., torch.optim.Optimizer]
    share: float
    stepper: type[Stepper] = Stepper


ARMS = {"sgd": Arm(_sgd, 1.0), "kfac": Arm(_kfac, 0.1), "kfac_quadratic": Arm(_quadratic, 0.1, QuadraticStepper)}
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


def stepper(images: Tensor, settings: AutoencoderSettings, arm: str, values: Mapping[str, float], seed: int) -> Stepper:
    """The autoencoder of a seed, an arm's optimiser with its tuned settings, and the seed's batches, the same for every arm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = autoencoder(images.shape[1], settings.widths, settings.activation, settings.initialisation)
    epochs = -(-settings.updates // (len(images) // settings.batch_size))
    orders = [epoch_order(len(images), seed, epoch).split(settings.batch_size) for epoch in range(min(epochs, 50))]
    batches = [images[part] for order in orders for part in order if len(part) == settings.batch_size]
    optimizer = ARMS[arm].build(model.to(images.device), **values)
    # its mean is over images and pixels
    return ARMS[arm].stepper(model, optimizer, binary_cross_entropy_with_logits, [(x, x) for x in batches])


def fit(images: Tensor, settings: AutoencoderSettings, arm: str, values: Values, seed: int) -> list[dict[str, Any]]:
    """Train an autoencoder (see `stepper`): its training loss after 0 and at equally spaced updates, or one row "diverged"."""
    step = stepper(images, settings, arm, values, seed)
    total = max(1, round(ARMS[arm].share * settings.updates))
    every = max(1, total // settings.evaluations)
    losses = {0: whole_loss(step.model, images)}
    try:
        for update in range(1, total + 1):
            for group in step.optimizer.param_groups:
                group["lr"] = (1 + math.cos(math.pi * (update - 1) / total)) / 2 * values.get("learning_rate", 1.0)
            step()
            if update % every == 0 or update == total:
                losses[update] = whole_loss(step.model, images)
                if not math.isfinite(losses[update]):
                    raise NonFiniteError(f"the training loss is {losses[update]} after {update} updates")
    except (NonFiniteError, torch.linalg.LinAlgError) as error:
        words = str(error).partition("\n")[0] or type(error).__name__
        return [{"quantity": "diverged", "value": 1.0, "error": 0.0, "layer": words[:200]}]
    return [{"step": s, "quantity": "train_loss", "value": loss, "error": 0.0} for s, loss in losses.items()]


@torch.no_grad()
def whole_loss(model: nn.Module, images: Tensor) -> float:
    """Sum over pixels, mean over all images, of the cross-entropy."""
    parts = images.split(1000)
    return sum(binary_cross_entropy_with_logits(model(x), x, reduction="sum").item() for x in parts) / len(images)
