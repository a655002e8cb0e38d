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
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from secondorder.landscape import equally_spaced, feature_landscape, optimiser_step, weight_landscape
from secondorder.training import Snapshot
from studies.checks import check_count, check_names
from studies.draw import Curves, Scatter
from studies.engine.plan import Measurement, Trained, every
from studies.engine.records import Row
from studies.engine.run import Plan
from studies.engine.study import Context, Results, Study
from studies.judge import Claim, contrast, primary
from studies.judge.matched import KEYS
from studies.page import Fold, Picture
from studies.training import PRESETS, Training, TrainingFlags, trained_so

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
        equally_spaced(self.eta_low, self.eta_high, self.eta_points)
        equally_spaced(self.step_low, self.step_high, self.eta_points)


@dataclass(frozen=True)
class Settings:
    """Settings of the landscape study."""

    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp", "gcp_exact")
    """Pooling heads to compare."""
    training: TrainingFlags = field(default_factory=Training)
    """How they are trained."""
    control_seeds: int = 3
    """Seeds of the controls, every head but gap and gcp; at most those of gap and gcp."""
    line_seeds: int | None = None
    """Seeds whose lines at fixed lengths are measured, in all of training; of others only what the claims are about, in its later
    half. All when not given."""
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
        for name in ("control_seeds", "measure_every"):
            check_count(name, getattr(self, name))
        if self.line_seeds is not None:
            check_count("line_seeds", self.line_seeds, least=0)


def measure_published(at: Snapshot, lines: Lines) -> Iterator[Row]:
    """The lines at fixed eta and along the optimiser's step, on the next step's batch; the network is left as it was."""
    on = (at.model, F.cross_entropy, at.images, at.labels)
    etas = equally_spaced(lines.eta_low, lines.eta_high, lines.eta_points)
    steps = equally_spaced(lines.step_low, lines.step_high, lines.eta_points)
    step = optimiser_step(at.model, at.optimizer, F.cross_entropy, at.images, at.labels)
    found = {PUBLISHED: feature_landscape(*on, etas, "ascent"), STEP: weight_landscape(*on, steps, step)}
    for layer, line in found.items():
        yield {"layer": layer, "quantity": "loss at origin", "value": line.loss_at_origin}
        yield {"layer": layer, "quantity": "gradient norm", "value": line.gradient_norm}
        distances = {"gradient distance": line.gradient_distance, "cosine": line.cosine, "beta": line.betas}
        yield from _rows(layer, line.etas, {"loss": line.loss} | distances)


def measure_descent(at: Snapshot, rho: tuple[float, ...]) -> Iterator[Row]:
    """The line along -g at equal predicted improvements, on the next step's batch; the network is left as it was."""
    shares = torch.tensor(rho, dtype=torch.float64)
    line = feature_landscape(at.model, F.cross_entropy, at.images, at.labels, shares, "descent", predicted=True)
    improvements = line.loss_at_origin * shares  # = eta |g|^2
    error = (line.loss - line.loss_at_origin + improvements).abs() / improvements
    yield from _rows(DESCENT, shares, {FIRST_ORDER: error, CHANGE: line.gradient_distance / line.gradient_norm})


def descent_along(rho: tuple[float, ...]) -> Measurement:
    """The measurement of `measure_descent`, of which a dry run makes one point and, as of all of them, the origin."""
    dry = lambda at, rho: measure_descent(at, rho[:1]), (len(rho) + 1) / 2
    return Measurement("descent", measure_descent, rho, dry=dry, of_batch=True)


def _rows(layer: str, settings: Tensor, quantities: Mapping[str, Tensor]) -> Iterator[Row]:
    for quantity, values in quantities.items():
        for index, (setting, value) in enumerate(zip(settings.tolist(), values.tolist(), strict=True)):
            yield {"layer": layer, "quantity": quantity, "index": index, "setting": setting, "value": value}


def plan(context: Context) -> Plan:
    """Every head with every seed, all heads of a seed before the next seed."""
    settings, common, total = context.settings, context.common, context.settings.training.steps(context.common)
    lines, descent = settings.lines, descent_along(settings.rho)
    dry = lambda at, lines: measure_published(at, replace(lines, eta_points=1)), (lines.eta_points + 1) / 2
    published = Measurement("published lines", measure_published, lines, dry=dry, of_batch=True)
    steps = every(settings.measure_every, total)
    whole = tuple((step, measurement) for step in steps for measurement in (published, descent))
    claimed = tuple((step, descent) for step in steps if 2 * step >= total)
    seeds_of_lines = len(context.seeds) if settings.line_seeds is None else settings.line_seeds
    yield [
        Trained(settings.training.subject(common, head, seed), whole if seed < seeds_of_lines else claimed)
        for seed, head in product(context.seeds, settings.heads)
        if head in ("gap", "gcp") or seed < settings.control_seeds
    ]


def by_step(records: pd.DataFrame, layer: str, quantity: str) -> pd.DataFrame:
    """A quantity of a line at each step (KEYS, step, value): geometric mean over its points; of a loss, max - min over them."""
    part = records[(records.layer == layer) & (records.quantity == quantity)].fillna({"value": np.inf})
    points = part.groupby([*KEYS, "step"], sort=False).value
    return (points.max() - points.min()).reset_index() if quantity == "loss" else geometric(part, [*KEYS, "step"])


def late(records: pd.DataFrame, layer: str, quantity: str) -> pd.DataFrame:
    """The geometric mean over the later half of training, by network, head and seed.

    A value that is not finite makes that of its seed so; a network that diverges does not look smooth.
    """
    steps = by_step(records, layer, quantity)
    last = records[records.quantity == "train_loss"].groupby("network").step.max()
    return geometric(steps[steps.step >= steps.network.map(last) / 2], KEYS)


def geometric(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Geometric means of value by `keys`; zero or infinite where one of the values is, infinite where one is missing."""
    with np.errstate(divide="ignore"):
        logs = np.log(table.value.fillna(np.inf))
    return np.exp(logs.groupby([table[key] for key in keys], sort=False).mean()).reset_index()


MEASURES = {
    FIRST_ORDER: (DESCENT, FIRST_ORDER),
    CHANGE: (DESCENT, CHANGE),
    "loss variation along +g": (PUBLISHED, "loss"),
    "gradient distance along +g": (PUBLISHED, "gradient distance"),
    "effective beta along +g": (PUBLISHED, "beta"),
    "loss variation along the optimiser's step": (STEP, "loss"),
}
"""Name of a comparison of heads -> the line, and the quantity on it."""
PRIMARY = {"smoother loss": FIRST_ORDER, "predictive gradients": CHANGE}
PAIRS = (("gcp", "gap_lifted"), ("gap_lifted", "gap"), ("gcp", "covariance"), ("gcp_exact", "gap"))


def _contrast(name: str, of: str = "gcp", to: str = "gap") -> Claim:
    layer, quantity = MEASURES[name]
    return contrast(name, "landscape", f"{name}, {layer}", partial(late, layer=layer, quantity=quantity), of, to)


CONTROLS = {name: [_contrast(name, *pair) for pair in PAIRS] for name in PRIMARY.values()}
OTHER_MEASURES = [_contrast(name) for name in MEASURES if name not in CONTROLS]
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
    *(*CONTROLS[FIRST_ORDER], *CONTROLS[CHANGE], *OTHER_MEASURES),
]


def folds(results: Results) -> Sequence[Fold]:
    """A fold for each of the two claims, and one about what was published."""
    return [*(_claim(results, n, *item) for n, item in enumerate(PRIMARY.items(), start=1)), _published(results)]


def _claim(results: Results, number: int, name: str, quantity: str) -> Fold:
    """The quantity by step under every head, and its ratio to that under GAP."""
    steps, judged = by_step(results.records, DESCENT, quantity), results.of(name)
    gap = steps[steps["head"] == "gap"].rename(columns={"value": "gap"}).drop(columns="head")
    ratio = steps.merge(gap).assign(value=lambda table: table.value / table.gap)
    words = "Means over seeds, bands are 95 % intervals, thin lines the seeds; grey counts as no effect."
    curves = partial(Curves, "step", "value", x_label="training step", mean="geometric")
    drawn = {
        f"landscape_{number}": (steps, curves(y_label=quantity)),
        f"landscape_{number}_ratio": (ratio, curves(y_label=f"{quantity} / that of GAP", zone=(0.9, 1.1))),
    }
    caption = f"{judged[0].sentence} {words}"
    return Fold(
        judged=judged,
        pictures=[Picture(name, caption, to.draw(table)) for name, (table, to) in drawn.items() if len(table)],
        controls=results.of(*(claim.name for claim in CONTROLS[quantity])),
        method=[_method(results)] if number == 1 else ["As for claim 1."],
        provenance=results.provenance,
    )


def _published(results: Results) -> Fold:
    """What Wang et al. measure, beside |g|^2, which it turns out to be."""
    longest = results.records[results.records.layer == PUBLISHED].setting.max()
    table = by_step(results.records, PUBLISHED, "loss").rename(columns={"value": "variation"})
    table = table.merge(by_step(results.records, PUBLISHED, "gradient norm"))
    table["straight"] = longest * table.value**2
    positive = table[np.isfinite(table.variation) & (table.variation > 0) & (table.straight > 0)]
    variation, straight = np.log(positive.variation), np.log(positive.straight)
    words = (
        f"Over all networks and steps the logarithms of the published loss variation and of {longest:g} |g|², that of a straight "
        f"line, correlate at {np.corrcoef(variation, straight)[0, 1]:.4f}; the median of their ratio is "
        f"{np.exp(np.median(variation - straight)):.3g}."
    )
    x_label = f"{longest:g} |g|²"
    kind = Scatter("straight", "variation", line="identity", log="xy", x_label=x_label, y_label="max L − min L")
    figure = kind.draw(table)
    return Fold(
        title="The published measures of smoothness",
        sentences=[words],
        pictures=[Picture("landscape_published", f"{words} A point is one network at one step.", figure)],
        exploratory=results.of(*(claim.name for claim in OTHER_MEASURES)),
        method=[_method(results)],
        provenance=results.provenance,
    )


def _method(results: Results) -> str:
    settings, lines = results.origins.settings, results.origins.settings["lines"]
    return (
        f"{trained_so(results.origins)}. For each seed all heads start from the same weights below them "
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
            ("gap", "covariance", "gcp"),
            Training(epochs=1, train_limit=192),
            measure_every=2,
            rho=(0.1, 0.5),
            lines=Lines(3),
        ),
        "quick": Settings(),
        "cifar10": Settings(training=PRESETS["cifar10"], line_seeds=1, measure_every=624, lines=Lines(eta_points=8)),
        "paper": Settings(("gap", "gcp"), PRESETS["paper"], measure_every=5000, lines=Lines(eta_points=50)),
    },
    seeds={"smoke": 2, "quick": 10, "cifar10": 3, "paper": 3},
    plan=plan,
    claims=CLAIMS,
    folds=folds,
    may_grow=("heads", "control_seeds", "line_seeds"),
)
