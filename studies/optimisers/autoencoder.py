"""The deep autoencoder of Martens & Grosse (2015): how many updates, and how long, to the training loss that tuned SGD ends at.

Pixels in [0, 1], Bernoulli likelihood. What is optimised is the mean cross-entropy over images and pixels; reported is its sum
over the pixels of an image, as published.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.data import ImageDataset, epoch_order
from secondorder.errors import InputError, NonFiniteError
from secondorder.kfac import KFAC, Damping, Fisher, LevenbergMarquardt
from secondorder.networks.autoencoder import autoencoder
from studies.optimisers.costs import Stepper, slowed
from studies.optimisers.runs import Trainings, Tuning, Work, chosen, in_words, trial_row
from studies.optimisers.settings import TUNING_SEED, AutoencoderSettings, Tuned, rate, unit_points
from studies.run_folders import kept

PROBLEM = "autoencoder"
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue


def sgd(model: nn.Module, learning_rate: float, momentum: float) -> torch.optim.Optimizer:
    """SGD with heavy-ball momentum."""
    return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)


def kfac(model: nn.Module, learning_rate: float, momentum: float) -> torch.optim.Optimizer:
    """K-FAC with its default damping, for a Bernoulli likelihood."""
    return KFAC(model, learning_rate, momentum=momentum, fisher=Fisher("mc", likelihood="bce"))


def ekfac(model: nn.Module, learning_rate: float, momentum: float) -> torch.optim.Optimizer:
    """EKFAC with its default damping, for a Bernoulli likelihood."""
    return KFAC(model, learning_rate, momentum=momentum, fisher=Fisher("mc", likelihood="bce"), approximation="ekfac")


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
        start = self._now(inputs.device)
        self.optimizer.quadratic_step(self.loss, inputs, targets)
        self.seconds["all"] += self._now(inputs.device) - start  # type: ignore[assignment]

    def parts(self) -> dict[str, float]:
        """Mean milliseconds an update by part; what the report does not name are passes through the network."""
        assert isinstance(self.optimizer, KFAC)
        own = dict(self.optimizer.report().seconds)
        seconds = {"forward and backward": max(0.0, self.seconds["all"] - sum(own.values())), **own}
        return {part: 1e3 * value / max(1, self.steps) for part, value in seconds.items()}


@dataclass(frozen=True)
class AutoencoderArm:
    """One optimiser: how it is built, its share of SGD's updates, and what is tuned."""

    label: str
    build: Callable[..., torch.optim.Optimizer]
    share: float
    first: Tuned
    second: Tuned
    stepper: type[Stepper] = Stepper


ARMS: dict[str, AutoencoderArm] = {
    "sgd": AutoencoderArm("SGD with momentum", sgd, 1.0, rate(0.3, 10.0), Tuned("momentum", 0.8, 0.98)),
    "kfac": AutoencoderArm("K-FAC", kfac, 0.1, rate(0.01, 0.3), Tuned("momentum", 0.5, 0.95)),
    "ekfac": AutoencoderArm("EKFAC", ekfac, 0.1, rate(0.01, 0.3), Tuned("momentum", 0.5, 0.95)),
    "kfac_quadratic": AutoencoderArm(
        "K-FAC, quadratic model",
        quadratic,
        0.1,
        Tuned("damping", 1e-3, 1.0),
        Tuned("ema_decay", 0.8, 0.99),
        QuadraticStepper,
    ),
}
"""The bar is a tenth of the updates, so that is what K-FAC gets, its schedule included."""


def pixels(data: ImageDataset, settings: AutoencoderSettings) -> Tensor:
    """Grey training images, their central part, as vectors `[N, image_size^2]` in [0, 1]; InputError if they are smaller."""
    size = settings.image_size
    if data.image_size < size:
        raise InputError(f"--autoencoder.image-size {size}: the images have only {data.image_size} pixels a side")
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


def fit(images: Tensor, settings: AutoencoderSettings, arm: str, tuning: Tuning, seed: int) -> dict[str, Any]:
    """The points (updates done, training loss of an image) of a run; "diverged" says why there are none."""
    stepper = build(images, settings, arm, tuning, seed)
    total = updates_of(arm, settings)
    every = max(1, total // settings.evaluations)
    points = [{"step": 0, "loss": whole_loss(stepper.model, images)}]
    try:
        for update in range(total):
            factor = (1 + math.cos(math.pi * update / total)) / 2
            for group in stepper.optimizer.param_groups:
                group["lr"] = factor * tuning.get("learning_rate", 1.0)
            stepper()
            if (update + 1) % every == 0 or update + 1 == total:
                points.append({"step": update + 1, "loss": whole_loss(stepper.model, images)})
                if not math.isfinite(points[-1]["loss"]):
                    raise NonFiniteError(f"the training loss is {points[-1]['loss']} after {update + 1} updates")
    except (NonFiniteError, torch.linalg.LinAlgError) as error:
        return {"points": [], "diverged": str(error).partition("\n")[0] or type(error).__name__}
    return {"points": points, "diverged": ""}


def build(images: Tensor, settings: AutoencoderSettings, arm: str, tuning: Tuning, seed: int) -> Stepper:
    """The autoencoder of a seed, the arm's optimiser and the seed's batches: the same for every arm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = autoencoder(images.shape[1], settings.widths, settings.activation, settings.initialisation).to(
            images.device
        )
    if len(images) < settings.batch_size:
        raise InputError(f"--autoencoder.batch-size {settings.batch_size}: there are only {len(images)} images")
    epochs = -(-settings.updates // (len(images) // settings.batch_size))
    orders = [epoch_order(len(images), seed, epoch).split(settings.batch_size) for epoch in range(min(epochs, 50))]
    batches = [images[part] for order in orders for part in order if len(part) == settings.batch_size]
    optimizer = ARMS[arm].build(model, **tuning)
    return ARMS[arm].stepper(model, optimizer, reconstruction_loss, [(batch, batch) for batch in batches])


def updates_of(arm: str, settings: AutoencoderSettings) -> int:
    """The updates that an arm may take."""
    return max(1, round(ARMS[arm].share * settings.updates))


@torch.no_grad()
def whole_loss(model: nn.Module, images: Tensor) -> float:
    """Sum over pixels, mean over all images, of the cross-entropy."""
    losses = [
        F.binary_cross_entropy_with_logits(model(part), part, reduction="sum").item() for part in images.split(1000)
    ]
    return sum(losses) / len(images)


def settings_at(arm: str, u: tuple[float, float]) -> Tuning:
    """The tuned settings at a point of the unit square."""
    return {one.name: one.at(x) for one, x in zip((ARMS[arm].first, ARMS[arm].second), u, strict=True)}


def tune_and_fit(work: Work, images: Tensor, arm: str) -> Trainings:
    """All trials of an arm, the loss curves of all seeds with the tuned settings, and those settings."""
    settings, images = work.settings.autoencoder, images.to(work.common.torch_device)
    rows = []
    for number, u in enumerate(unit_points(settings.trials), start=1):
        tuning = settings_at(arm, u)
        result = _kept_fit(work, images, arm, tuning, TUNING_SEED)
        loss = result["points"][-1]["loss"] if result["points"] else math.inf
        rows.append(
            trial_row(PROBLEM, arm, number, tuning) | {"train_loss": loss, "diverged": bool(result["diverged"])}
        )
        work.say(f"{PROBLEM}, {arm}, trial {number} of {settings.trials}: {in_words(tuning)}, training loss {loss:.4g}")
    tuned, trials = chosen(rows)
    curves = []
    for seed in range(work.common.seeds):
        result = _kept_fit(work, images, arm, tuned, seed)
        points = result["points"] or [{"step": updates_of(arm, settings), "loss": math.inf}]
        curves += [{"problem": PROBLEM, "arm": arm, "seed": seed} | point for point in points]
        work.say(
            f"{PROBLEM}, {arm}, seed {seed}: training loss {points[-1]['loss']:.4g} after {points[-1]['step']} updates"
        )
    return Trainings(tuned, {"trials": trials, "curves": pd.DataFrame(curves)})


def _kept_fit(work: Work, images: Tensor, arm: str, tuning: Tuning, seed: int) -> dict[str, Any]:
    name = "-".join([arm, *(f"{value:g}" for value in tuning.values()), f"s{seed}"])
    return kept(
        work.folder / PROBLEM / f"{name}.json", lambda: fit(images, work.settings.autoencoder, arm, tuning, seed)
    )


def steppers(images: Tensor, settings: AutoencoderSettings, tuned: Mapping[str, Tuning]) -> dict[str, Stepper]:
    """A stepper of every arm, to be timed."""
    return {arm: build(images, settings, arm, slowed(tuning), seed=0) for arm, tuning in tuned.items()}
