"""Landscape study: is the loss of a GCP network smoother along its gradient, and is its gradient more predictive?

Networks that differ in the head alone (same initial weights below it, same batches for each seed) are looked at along three lines
at the same steps of training, on the batch that the next step takes, in training mode. With X the activation after the stem and
g = dL/dX:

    features, -g                from X along -g, to equal predicted improvements eta |g|^2 = rho L
    features, +g (published)    from X along +g at fixed eta, as in Wang et al. (2020)
    weights, optimiser's step   from the weights along the step that SGD is about to take

At a fixed eta the walk is as long as g, which the head itself changes: the published loss variation is then 75 |g|^2 and says
nothing but |g|. At an equal predicted improvement the two questions are free of that scale:

    first-order error           |L(X - eta g) - L + eta |g|^2| / (eta |g|^2)
    gradient change             |g(X - eta g) - g| / |g|
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch.nn import functional as F

from secondorder.landscape import LandscapeLine, equally_spaced, feature_landscape, optimiser_step, weight_landscape
from secondorder.training import Snapshot
from studies.checks import check_count, check_names
from studies.draw import Curves, Scatter
from studies.engine.plan import Measurement, Trained, every
from studies.engine.run import Plan
from studies.engine.study import Context, Results, Study
from studies.judge import Claim, contrast, primary
from studies.page import Fold, Picture
from studies.training import Training, TrainingFlags

DESCENT, PUBLISHED, STEP = "features, -g", "features, +g (published)", "weights, optimiser's step"
FIRST_ORDER, CHANGE = "first-order error", "gradient change"


@dataclass(frozen=True)
class Lines:
    """The points of the lines at fixed lengths."""

    eta_points: int = 4
    """Equally spaced points on each line."""
    eta_low: float = 0.1
    """Smallest eta of the published line."""
    eta_high: float = 75.0
    """Largest eta of the published line; 75 is published for ResNets, 1.5 (from 0.045) for MobileNetV2."""
    step_low: float = 0.5
    """Shortest walk in weight space, in steps of the optimiser."""
    step_high: float = 4.0
    """Longest walk in weight space, in steps of the optimiser."""

    def __post_init__(self) -> None:
        check_count("eta_points", self.eta_points, most=10_000)
        for low, high in ((self.eta_low, self.eta_high), (self.step_low, self.step_high)):
            equally_spaced(low, high, self.eta_points)


@dataclass(frozen=True)
class Settings:
    """Settings of the landscape study."""

    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp", "gcp_exact")
    """Pooling heads to compare."""
    training: TrainingFlags = field(default_factory=Training)
    """How they are trained."""
    measure_every: int = 40
    """Training steps between two measurements."""
    rho: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Predicted improvements of the loss along -g, as shares of it."""
    lines: Annotated[Lines, tyro.conf.arg(name="")] = field(default_factory=Lines)
    """The lines at fixed lengths."""

    def __post_init__(self) -> None:
        check_names("heads", self.heads)
        check_names("rho", [str(share) for share in self.rho])
        equally_spaced(min(self.rho), max(self.rho), 1)
        check_count("measure_every", self.measure_every)


def measure_published(at: Snapshot, lines: Lines) -> Iterator[Mapping[str, Any]]:
    """The lines at fixed eta and along the optimiser's step, on the next step's batch; the network is left as it was."""
    batch = (at.images, at.labels)
    etas = equally_spaced(lines.eta_low, lines.eta_high, lines.eta_points)
    yield from _rows(PUBLISHED, etas, feature_landscape(at.model, F.cross_entropy, *batch, etas, "ascent"))
    step = optimiser_step(at.model, at.optimizer, F.cross_entropy, *batch)
    steps = equally_spaced(lines.step_low, lines.step_high, lines.eta_points)
    yield from _rows(STEP, steps, weight_landscape(at.model, F.cross_entropy, *batch, steps, step))


def measure_descent(at: Snapshot, rho: tuple[float, ...]) -> Iterator[Mapping[str, Any]]:
    """The line along -g at equal predicted improvements, on the next step's batch; the network is left as it was."""
    batch = (at.images, at.labels)
    origin = feature_landscape(at.model, F.cross_entropy, *batch, equally_spaced(1.0, 1.0, 1), "descent")
    improvements = origin.loss_at_origin * np.array(rho)  # rho L = eta |g|^2
    walks = torch.as_tensor(improvements / origin.gradient_norm**2)
    line = feature_landscape(at.model, F.cross_entropy, *batch, walks, "descent")
    error = np.abs(line.loss.numpy() - line.loss_at_origin + improvements) / improvements
    change = line.gradient_distance.numpy() / line.gradient_norm
    for quantity, values in ((FIRST_ORDER, error), (CHANGE, change)):
        for index, (share, value) in enumerate(zip(rho, values, strict=True)):
            yield {"layer": DESCENT, "quantity": quantity, "index": index, "setting": share, "value": value}


def _rows(layer: str, etas: Any, line: LandscapeLine) -> Iterator[Mapping[str, Any]]:
    yield {"layer": layer, "quantity": "loss at origin", "value": line.loss_at_origin}
    yield {"layer": layer, "quantity": "gradient norm", "value": line.gradient_norm}
    columns = {
        "loss": line.loss,
        "gradient distance": line.gradient_distance,
        "cosine": line.cosine,
        "beta": line.betas,
    }
    for quantity, values in columns.items():
        for index, (eta, value) in enumerate(zip(etas.tolist(), values.tolist(), strict=True)):
            yield {"layer": layer, "quantity": quantity, "index": index, "setting": eta, "value": value}


def plan(context: Context) -> Plan:
    """Every head with every seed, all heads of a seed before the next seed."""
    settings, common = context.settings, context.common
    measurements = (
        Measurement("published lines", measure_published, settings.lines),
        Measurement("descent", measure_descent, settings.rho),
    )
    steps = every(settings.measure_every, settings.training.steps(common))
    at = tuple((step, measurement) for step in steps for measurement in measurements)
    yield [
        Trained(settings.training.subject(common, head, seed), at) for seed in context.seeds for head in settings.heads
    ]


KEYS = ["network", "dataset", "head", "seed"]


def by_step(records: pd.DataFrame, layer: str, quantity: str) -> pd.DataFrame:
    """A quantity of a line at each step (KEYS, step, value): geometric mean over its points; of a loss, max - min over them."""
    part = records[(records.layer == layer) & (records.quantity == quantity)]
    points = part.groupby([*KEYS, "step"], sort=False).value
    if quantity == "loss":
        return (points.max() - points.min()).reset_index()
    return geometric(part, [*KEYS, "step"])


def late(records: pd.DataFrame, layer: str, quantity: str) -> pd.DataFrame:
    """The geometric mean over the later half of training, by network, head and seed.

    A value that is not finite makes that of its seed so; a network that diverges does not look smooth.
    """
    steps = by_step(records, layer, quantity)
    last = records[records.quantity == "train_loss"].groupby("network").step.max()
    later = steps[steps.step >= steps.network.map(last) / 2]
    return geometric(later, KEYS)


def geometric(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Geometric means of value by `keys`; zero or infinite where one of the values is."""
    with np.errstate(divide="ignore"):
        return np.exp(np.log(table.value).groupby([table[key] for key in keys], sort=False).mean()).reset_index()


def _contrast(name: str, layer: str, quantity: str, of: str = "gcp", to: str = "gap") -> Claim:
    return contrast(name, "landscape", f"{name}, {layer}", partial(late, layer=layer, quantity=quantity), of, to)


PRIMARY = {"smoother loss": FIRST_ORDER, "predictive gradients": CHANGE}
PAIRS = (("gcp", "gap_lifted"), ("gap_lifted", "gap"), ("gcp", "covariance"), ("gcp_exact", "gap"))
CONTROLS = {
    quantity: [_contrast(quantity, DESCENT, quantity, *pair) for pair in PAIRS] for quantity in PRIMARY.values()
}
OTHER_MEASURES = [
    _contrast("loss variation along +g", PUBLISHED, "loss"),
    _contrast("gradient distance along +g", PUBLISHED, "gradient distance"),
    _contrast("effective beta along +g", PUBLISHED, "beta"),
    _contrast("loss variation along the optimiser's step", STEP, "loss"),
]
OVER = "over a walk of the same predicted improvement"
SMOOTHER = {
    "supported": f"The loss of GCP is smoother: {OVER} its linear prediction errs less.",
    "contradicted": f"The loss of GCP is rougher: {OVER} its linear prediction errs more.",
    "no effect": f"The loss is as smooth under both heads: {OVER} its linear prediction errs as much.",
}
PREDICTIVE = {
    "supported": f"Gradients of GCP are more predictive: {OVER} they change less.",
    "contradicted": f"Gradients of GCP are less predictive: {OVER} they change more.",
    "no effect": f"Gradients are as predictive under both heads: {OVER} they change as much.",
}
CLAIMS = [
    primary(1).measured(partial(late, layer=DESCENT, quantity=FIRST_ORDER), SMOOTHER),
    primary(2).measured(partial(late, layer=DESCENT, quantity=CHANGE), PREDICTIVE),
    *(claim for controls in CONTROLS.values() for claim in controls),
    *OTHER_MEASURES,
]


def folds(results: Results) -> Sequence[Fold]:
    """A fold for each of the two claims, and one about what was published."""
    return [*(_claim(results, n, *item) for n, item in enumerate(PRIMARY.items(), start=1)), _published(results)]


def _claim(results: Results, number: int, name: str, quantity: str) -> Fold:
    """The quantity by step under every head, and its ratio to that under GAP."""
    steps, judged = by_step(results.records, DESCENT, quantity), results.of(name)
    gap = steps[steps["head"] == "gap"].rename(columns={"value": "gap"}).drop(columns="head")
    ratio = steps.merge(gap).assign(value=lambda table: table.value / table.gap)
    curves = partial(Curves, "step", "value", x_label="training step", mean="geometric")
    drawn = {f"landscape_{number}": curves(y_label=quantity).draw(steps)} if len(steps) else {}
    if len(ratio):
        relative = curves(y_label=f"{quantity} / that of GAP", zone=(0.9, 1.1)).draw(ratio)
        drawn[f"landscape_{number}_ratio"] = relative
    words = "Means over seeds, bands are 95 % intervals, thin lines the seeds; grey counts as no effect."
    return Fold(
        judged=judged,
        pictures=[Picture(name, f"{judged[0].sentence} {words}", figure) for name, figure in drawn.items()],
        controls=results.of(*(claim.name for claim in CONTROLS[quantity])),
        method=[_method(results)] if number == 1 else ["As for claim 1."],
        provenance=results.provenance,
    )


def _published(results: Results) -> Fold:
    """What Wang et al. measure, beside |g|^2, which it turns out to be."""
    line = results.records[(results.records.layer == PUBLISHED) & (results.records.quantity == "loss")]
    longest = line.setting.max()
    variation = by_step(results.records, PUBLISHED, "loss").rename(columns={"value": "variation"})
    table = variation.merge(by_step(results.records, PUBLISHED, "gradient norm"))
    table["straight"] = longest * table.value**2
    with np.errstate(divide="ignore"):
        logs = np.log(table[["variation", "straight"]].to_numpy())
    logs = logs[np.isfinite(logs).all(axis=1)]
    words = (
        f"Over all networks and steps the logarithms of the published loss variation and of {longest:g} |g|², that of a straight "
        f"line, correlate at {np.corrcoef(logs.T)[0, 1]:.4f}; the median of their ratio is "
        f"{np.exp(np.median(logs[:, 0] - logs[:, 1])):.3g}."
    )
    labels = {"x_label": f"{longest:g} |g|²", "y_label": "max L − min L"}
    figure = Scatter("straight", "variation", line="identity", log="xy", **labels).draw(table)
    return Fold(
        title="The published measures of smoothness",
        sentences=[words],
        pictures=[Picture("landscape_published", f"{words} A point is one network at one step.", figure)],
        exploratory=results.of(*(claim.name for claim in OTHER_MEASURES)),
        method=[_method(results)],
        provenance=results.provenance,
    )


def _method(results: Results) -> str:
    settings = results.origins.settings
    training, lines = settings["training"], settings["lines"]
    data = results.origins.data.get("label", training["dataset"])
    return (
        f"{training['network']} on {data}, SGD, {training['epochs']} epochs, batch {training['batch_size']}, learning rate "
        f"{training['learning_rate']:g} ({training['schedule']}). For each seed all heads start from the same weights below them "
        f"and see the same batches. Every {settings['measure_every']} steps, on the next step's batch, with its batch statistics "
        f"and dropout masks, L and g are taken at predicted improvements of {', '.join(map(str, settings['rho']))} L along -g, "
        f"at {lines['eta_points']} eta in [{lines['eta_low']:g}, {lines['eta_high']:g}] along +g, and at [{lines['step_low']:g}, "
        f"{lines['step_high']:g}] steps of the optimiser. Values are geometric means over these and the later half of training."
    )


STUDY = Study(
    name="landscape",
    title="is the loss smoother, are the gradients more predictive under GCP",
    presets={
        "smoke": Settings(
            heads=("gap", "covariance", "gcp"),
            training=Training(epochs=1, train_limit=192),
            measure_every=2,
            rho=(0.1, 0.5),
            lines=Lines(eta_points=3),
        ),
        "quick": Settings(),
        "cifar10": Settings(
            training=Training(
                "cifar_resnet8", "cifar10", stride="published", epochs=6, batch_size=128, channels_last=True
            ),
            measure_every=390,
            lines=Lines(eta_points=8),
        ),
        "paper": Settings(
            heads=("gap", "gcp"),
            training=Training("resnet18", "imagefolder", epochs=100, batch_size=256, channels_last=True, amp="float16"),
            measure_every=5000,
            lines=Lines(eta_points=50),
        ),
    },
    seeds={"smoke": 2, "quick": 10, "cifar10": 3, "paper": 3},
    plan=plan,
    claims=CLAIMS,
    folds=folds,
)
