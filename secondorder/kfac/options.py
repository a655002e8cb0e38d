"""Options of the K-FAC optimiser: validated when they are made, each with what it is and why its default is what it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secondorder.curvature.kronecker.factors import SHARINGS
from secondorder.errors import InputError, unknown
from secondorder.kfac.fisher import FISHERS, LIKELIHOODS, REDUCTIONS

INVERSES = ("eigen", "cholesky")
FALLBACKS = ("sgd", "adam")
DAMPING = 0.01
"""Default damping, relative to the scale of a block: see `Damping`."""
LARGEST = 3.4e38
"""Of float32: a setting above it is infinite in the arithmetic of most models."""
WIDE_INPUT = 1024
"""Inputs from which the factor A is not built: decomposing 2,081 inputs takes a second, 128 rows of them ten milliseconds."""


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping by the ratio of the actual to the predicted change of the loss, every so many steps.

    ratio < 1/4: damping / factor^every; ratio > 3/4: damping * factor^every (Martens & Grosse, ICML 2015, section 6.5).
    """

    every: int = 5
    factor: float = 0.95
    least: float = 1e-8
    most: float = 1e8

    def __post_init__(self) -> None:
        check_interval("every", self.every)
        if not 0 < self.factor < 1:
            raise InputError(f"factor {self.factor!r}: must lie in (0, 1)")
        if not 0 < self.least <= self.most:
            raise InputError(f"least {self.least!r}, most {self.most!r}: must be positive and in order")

    def adapted(self, damping: float, ratio: float) -> float:
        """The next damping; a ratio that is not finite counts as a failure of the model, more damping."""
        step = self.factor**self.every
        if not ratio >= 0.25:
            damping /= step
        elif ratio > 0.75:
            damping *= step
        return min(max(damping, self.least), self.most)


@dataclass(frozen=True)
class Damping:
    """Tikhonov damping of a block: (B kron A + lambda I)^-1.

    relative: lambda = value times the scale of the block F = B kron A, |F|_F^2 / tr F = (|A|_F^2 / tr A)(|B|_F^2 / tr B): its
    mean eigenvalue, each weighted by its own size. Neither the scale of the loss nor that of the activations matters, nor
    inputs that are always zero. Otherwise lambda = value.
    inverse: "eigen" damps exactly, in the eigenbasis of the factors; "cholesky" damps each factor, (A + pi sqrt(lambda) I) and
    (B + sqrt(lambda) / pi I) with pi^2 = (tr A / D) / (tr B / O): cheaper, and an approximation.
    adapt: Levenberg-Marquardt adaptation; it needs `step(closure)` or `quadratic_step`.
    """

    value: float = DAMPING
    relative: bool = True
    inverse: str = "eigen"
    adapt: LevenbergMarquardt | None = None

    def __post_init__(self) -> None:
        check_damping(self.value)
        if self.inverse not in INVERSES:
            raise unknown("inverse", self.inverse, INVERSES)


@dataclass(frozen=True)
class Fisher:
    """Whose gradients enter the factor B.

    kind: "mc" of labels that the model draws (the Fisher matrix, unbiased), "exact" of all labels (as many backward passes as
    outputs), "empirical" of the given labels (no extra backward pass, and not the Fisher matrix: Kunstner et al. 2019).
    likelihood and reduction: the loss: F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits.
    samples: drawn labels for each sample, of "mc". seed: of the draws.
    grad_scaler: the torch.amp.GradScaler that scales the losses; only "empirical" needs to know it.
    """

    kind: str = "mc"
    likelihood: str = "cross_entropy"
    reduction: str = "mean"
    samples: int = 1
    seed: int = 0
    grad_scaler: Any = None

    def __post_init__(self) -> None:
        for name, allowed in (("kind", FISHERS), ("likelihood", LIKELIHOODS), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in allowed:
                raise unknown("fisher" if name == "kind" else name, getattr(self, name), allowed)
        check_interval("samples", self.samples)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed {self.seed!r}: must be a whole number")
        if self.grad_scaler is not None and not hasattr(self.grad_scaler, "get_scale"):
            raise InputError(f"grad_scaler {self.grad_scaler!r}: must be a torch.amp.GradScaler")


@dataclass(frozen=True)
class Options:
    """What most users leave as it is.

    The first dimension of every layer's input must be the sample (batch_first=True for transformers): with sequences first,
    `sharing="reduce"` would average over samples, and "ekfac" would square sums over them.

    groups: settings of parameters by pattern of their names, the first match counts: {"*.bias": {"weight_decay": 0.0}}.
        A layer's damping is that of its weight's group.
    fallback: update of parameters without Kronecker structure (batch norm, embeddings, ...): "sgd", or "adam".
    fallback_lr: their learning rate in units of lr.
    decoupled: weight decay acts on the weights, w <- (1 - lr weight_decay) w; otherwise it is added to the gradient, and
        preconditioned with it.
    wide_inputs: layers with more inputs keep the batch's activations instead of the factor A, while these have fewer rows, of
        all processes together, than the layer has inputs.
    warm_up: factors and inverses are refreshed more often at first, when they change fastest: after t steps every
        max(1, t / 4) steps until that reaches the interval.
    stagger: layers are inverted at different steps, so that no step is much longer than the others.
    check: the first factor step verifies that the factors' activations and gradients reproduce the weights' gradients.
    synchronise: under torch.distributed, factors and inverses are those of all processes; False: each trains its own model.
    timing: report() has times on a GPU, too, at the price of a synchronisation for each phase.
    """

    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fallback: str = "sgd"
    fallback_lr: float = 1.0
    decoupled: bool = True
    wide_inputs: int = WIDE_INPUT
    warm_up: bool = True
    stagger: bool = True
    check: bool = True
    synchronise: bool = True
    timing: bool = False

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACKS:
            raise unknown("fallback", self.fallback, FALLBACKS)
        if not isinstance(self.groups, Mapping) or not all(isinstance(g, Mapping) for g in self.groups.values()):
            raise InputError(
                f"groups {self.groups!r}: must be settings by pattern, {{'*.bias': {{'weight_decay': 0.0}}}}"
            )
        check_number("fallback_lr", self.fallback_lr, 0.0)
        check_interval("wide_inputs", self.wide_inputs)


def check_interval(name: str, value: object) -> None:
    """InputError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} {value!r}: must be a whole number, at least 1")


def check_number(name: str, value: object, least: float, below: float = LARGEST) -> None:
    """InputError unless the value is a number in [least, below)."""
    try:
        fits = not isinstance(value, bool | str) and least <= float(value) < below  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        fits = False
    if not fits:
        raise InputError(f"{name} {value!r:.100}: must be a number in [{least:g}, {below:g})")


def check_positive(name: str, value: object, otherwise: str = "") -> None:
    """InputError unless the value is a positive finite number."""
    check_number(name, value, 0.0)
    if value == 0:
        raise InputError(f"{name} {value!r}: must be above 0{otherwise}")


def check_damping(value: object) -> None:
    """InputError unless the damping is a positive finite number."""
    check_positive("damping", value, "; 1e-8 is as good as none")


def check_sharing(sharing: object) -> None:
    """InputError for an unknown weight sharing."""
    if sharing not in SHARINGS:
        raise unknown("sharing", sharing, SHARINGS)
