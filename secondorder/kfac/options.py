"""Options of the K-FAC optimiser: validated when they are made, each with what it is and why its default is what it is."""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from secondorder.curvature.kronecker.factors import SHARINGS
from secondorder.errors import InputError, check_flag, check_known, check_seed, check_whole, short
from secondorder.kfac.declared import TreatAs, check_treat_as
from secondorder.kfac.fisher import FISHERS, LIKELIHOODS, REDUCTIONS

INVERSES = ("eigen", "cholesky")
FALLBACKS = ("sgd", "adam")
SETTINGS = ("lr", "momentum", "weight_decay", "damping")
"""Of a parameter group."""
DAMPING = 0.01
"""Default damping, relative to the scale of a block: see `Damping`."""
LARGEST = 3.4e38
"""Learning rates, weight decays and the like from here on are no numbers of single precision."""
WIDE_INPUT = 1024
"""Inputs from which the factor A is not built: decomposing 2,081 inputs takes a second, 128 rows of them ten milliseconds."""
WIDE_OUTPUT = 1024
"""Outputs from which the factor B is its diagonal: decomposing 1,000 outputs takes 0.2 s, 6,000 of them 50 s."""


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping by the ratio of the actual to the predicted change of the loss, every so many steps.

    ratio < 1/4: damping / factor^every; ratio > 3/4: damping * factor^every (Martens & Grosse, ICML 2015, section 6.5).

    Args:
        every, factor: steps from one adaptation to the next, and a number in (0, 1).
        least, most: bounds of the damping.

    Raises:
        InputError: for other values.
    """

    every: int = 5
    factor: float = 0.95
    least: float = 1e-8
    most: float = 1e8

    def __post_init__(self) -> None:
        check_whole("every", self.every)
        check_number("factor", self.factor, 0.0, 1.0)
        if self.factor == 0:
            raise InputError(f"factor {self.factor!r}: must lie in (0, 1)")
        for name in ("least", "most"):
            check_positive(name, getattr(self, name))
        if not self.least <= self.most:
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

    Args:
        value: lambda, or its part of the block's scale.
        relative: lambda = value times the scale of the block F = B kron A, |F|_F^2 / tr F = (|A|_F^2 / tr A)(|B|_F^2 / tr B): its
            mean eigenvalue, each weighted by its own size. Neither the scale of the loss nor that of the activations matters,
            unless these are much smaller than the 1 of a bias beside them, nor inputs that are always zero. Else lambda = value.
        inverse: "eigen" damps exactly, in the eigenbasis of the factors; "cholesky" damps each factor, (A + pi sqrt(lambda) I)
            and (B + sqrt(lambda) / pi I) with pi^2 = (tr A / D) / (tr B / O): cheaper, and an approximation.
        adapt: Levenberg-Marquardt adaptation; it needs `step(closure)` with step_rule="natural", or `quadratic_step`.

    Raises:
        InputError: for other values.
    """

    value: float = DAMPING
    relative: bool = True
    inverse: str = "eigen"
    adapt: LevenbergMarquardt | None = None

    def __post_init__(self) -> None:
        check_damping(self.value)
        object.__setattr__(self, "value", float(self.value))
        check_flag("relative", self.relative)
        check_known("inverse", self.inverse, INVERSES)
        if self.adapt is not None and not isinstance(self.adapt, LevenbergMarquardt):
            raise InputError(f"adapt {self.adapt!r}: must be LevenbergMarquardt(...), or None (a fixed damping)")


@dataclass(frozen=True)
class Fisher:
    """Whose gradients enter the factor B: of sum_k weights_k loss_k, a loss for each output of the model.

    Args:
        kind: "mc" of labels that the model draws (the Fisher matrix, unbiased), "exact" of all labels (as many backward passes as
            outputs), "empirical" of the given labels (no extra backward pass, and not the Fisher matrix: Kunstner et al. 2019).
        likelihood: the loss: "cross_entropy" (F.cross_entropy), "mse" (F.mse_loss), "bce" (F.binary_cross_entropy_with_logits). A
            list for a model of several outputs, in the order in which `update_curvature` gets them: ["cross_entropy", "mse"] for
            policy and value; one word is that of every output. "empirical" asks for none.
        reduction: "mean" or "sum", of all losses.
        weights: constant factors of the losses, one for all or a list of one for each output: 0.5 for 0.5 * F.mse_loss(...).
            Without them a factor s that all losses have changes no direction of "mc" and "exact", whose factors do not see it. A
            step of step_rule="natural" is s times as long, and so its trust region acts earlier; weight decay that is not
            decoupled counts 1/s as much; an absolute damping is that of the loss without s; what compares the quadratic model
            with the loss (`Damping(adapt=...)`, `quadratic_step`) needs the factor. "empirical" sees s^2 in its factors: with
            relative damping a natural step is 1/s times as long, with an absolute one the direction changes, too.
        samples: drawn labels for each sample, of "mc". seed: of the draws.
        grad_scaler: the torch.amp.GradScaler that scales the losses; only "empirical" needs to know it.
    """

    kind: str = "mc"
    likelihood: str | Sequence[str] = "cross_entropy"
    reduction: str = "mean"
    samples: int = 1
    seed: int = 0
    grad_scaler: Any = None
    weights: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        check_known("fisher", self.kind, FISHERS)
        check_known("reduction", self.reduction, REDUCTIONS)
        for word in _each("likelihood", self.likelihood):
            check_known("likelihood", word, LIKELIHOODS)
        for weight in _each("weights", self.weights):
            check_positive("weights", weight)
        for name in ("likelihood", "weights"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.likelihood, tuple) and isinstance(self.weights, tuple):
            self.outputs(len(self.likelihood))
        check_whole("samples", self.samples)
        check_seed(self.seed)
        if self.grad_scaler is not None and not hasattr(self.grad_scaler, "get_scale"):
            raise InputError(f"grad_scaler {self.grad_scaler!r}: must be a torch.amp.GradScaler")

    def outputs(self, count: int) -> list[tuple["Fisher", float]]:
        """The settings of each of `count` outputs by itself, and its weight.

        InputError when likelihoods or weights are for others.
        """
        for name, values in (("likelihood", self.likelihood), ("weights", self.weights)):
            if isinstance(values, tuple) and len(values) != count:
                raise InputError(
                    f"{name} {short(list(values))} is for {len(values)} outputs, and there are {count}: give update_curvature "
                    "all outputs of one forward pass in one call, in that order"
                )
        likelihoods, weights = (
            values if isinstance(values, tuple) else (values,) * count for values in (self.likelihood, self.weights)
        )
        pairs = zip(likelihoods, weights, strict=True)
        return [(replace(self, likelihood=likelihood, weights=weight), float(weight)) for likelihood, weight in pairs]


@dataclass(frozen=True)
class Options:
    """What most users leave as it is.

    The first dimension of every layer's input must be the sample (batch_first=True for transformers): with sequences first,
    `sharing="reduce"` would average over samples, and "ekfac" would square sums over them.

    Args:
        groups: settings of parameters by pattern of their names, the first match counts: {"*.bias": {"weight_decay": 0.0}}. A
            layer's damping is that of its weight's group; so is its momentum, unless step_rule="natural".
        fallback: update of parameters without Kronecker structure (batch norm, LSTM, ...) beside natural steps: "sgd", or "adam";
            beside all others it is Adam's.
        fallback_lr: their learning rate in units of lr.
        decoupled: weight decay acts on the weights, w <- (1 - lr weight_decay) w; otherwise it is added to the gradient, and
            preconditioned with it.
        wide_inputs: layers with more inputs keep the batch's activations instead of the factor A, while these have fewer rows, of
            all processes together, than the layer has inputs.
        wide_outputs: layers with more outputs keep the diagonal of the factor B, so that nothing `[O, O]` is built: the block is
            diag(B) kron A, its eigenvectors on the side of the outputs are the unit vectors. Rows of the gradients g, the
            counterpart of `wide_inputs`, would leave all classes without curvature that no drawn label of the batch is.
        treat_as: what modules of other classes compute, by class or pattern of names: {Conv1D: "linear_transposed"}. A class with
            the forward of a layer of torch is one, one with a forward of its own has the fallback unless it is declared as
            "linear" (weight [O, D]), "linear_transposed" (weight [D, O], as Hugging Face's Conv1D), "conv1d", "conv2d" or
            "conv3d". The check of the first step finds a declaration that is wrong.
        warm_up: factors and inverses are refreshed more often at first, when they change fastest: after t steps every max(1, t /
            4) steps until that reaches the interval; inverses of large networks only as far as renewals take half the work of the
            passes, or at their turns in the interval.
        stagger: layers are inverted at different steps, so that no step is much longer than the others.
        check: the first factor step verifies that the factors' activations and gradients reproduce the weights' gradients, and
            that the loss is the declared likelihood as far as its gradient at the outputs can tell; it warns of a constant
            factor, and of what may be the declared loss with weights of soft labels as well as another.
        synchronise: under torch.distributed, factors and inverses are those of all processes; False: each trains its own model.
        timing: report() has times on a GPU, too, at the price of a synchronisation for each phase.
    """

    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fallback: str = "sgd"
    fallback_lr: float = 1.0
    decoupled: bool = True
    wide_inputs: int = WIDE_INPUT
    wide_outputs: int = WIDE_OUTPUT
    treat_as: TreatAs = field(default_factory=dict)
    warm_up: bool = True
    stagger: bool = True
    check: bool = True
    synchronise: bool = True
    timing: bool = False

    def __post_init__(self) -> None:
        check_known("fallback", self.fallback, FALLBACKS)
        wanted = self.groups.items() if isinstance(self.groups, Mapping) else [(None, None)]
        if not all(isinstance(pattern, str) and isinstance(group, Mapping) for pattern, group in wanted):
            raise InputError(
                f"groups {self.groups!r}: must be settings by pattern, {{'*.bias': {{'weight_decay': 0.0}}}}"
            )
        check_number("fallback_lr", self.fallback_lr, 0.0, LARGEST)
        object.__setattr__(self, "fallback_lr", float(self.fallback_lr))
        check_whole("wide_inputs", self.wide_inputs)
        check_whole("wide_outputs", self.wide_outputs)
        check_treat_as(self.treat_as)
        for name in ("decoupled", "warm_up", "stagger", "check", "synchronise", "timing"):
            check_flag(name, getattr(self, name))


def _each(name: str, value: Any) -> Sequence[Any]:
    """The entries of a list for several outputs, or the one value of all; InputError for an empty list."""
    if not isinstance(value, list | tuple):
        return [value]
    if not value:
        raise InputError(f"{name} {value!r}: must have an entry for each output of the model")
    return value


def check_number(name: str, value: object, least: float, below: float = LARGEST) -> None:
    """InputError unless the value is a real number in [least, below), or a tensor that holds one."""
    try:
        number = isinstance(value, numbers.Real | Tensor) and not isinstance(value, bool)
        fits = number and least <= float(value) < below  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # beyond floats, a tensor of several numbers
        fits = False
    if not fits:
        raise InputError(f"{name} {value!r:.100}: must be a number in [{least:g}, {below:g})")


def check_positive(name: str, value: object, otherwise: str = "") -> None:
    """InputError unless the value is a positive finite number."""
    check_number(name, value, 0.0)
    if not value:
        raise InputError(f"{name} {value!r}: must be above 0{otherwise}")


def checked_settings(settings: Mapping[str, Any], decoupled: bool) -> dict[str, Any]:
    """The settings of a parameter group as floats (tensors, which torch allows for learning rates, as they are).

    InputError unless they are known, numbers in their range, and, where decay is decoupled, w <- (1 - lr weight_decay) w is a
    decay: lr weight_decay at most 1.
    """
    for name, value in settings.items():
        check_known("setting of a parameter group", name, SETTINGS)
        if name == "damping":
            check_damping(value)
        else:
            check_number(name, value, 0.0, 1.0 if name == "momentum" else LARGEST)
    if decoupled and {"lr", "weight_decay"} <= settings.keys():
        check_decay(float(settings["lr"]), float(settings["weight_decay"]))
    return {name: value if isinstance(value, Tensor) else float(value) for name, value in settings.items()}


def check_decay(lr: float, weight_decay: float) -> None:
    """InputError for a decoupled weight decay that would turn the weights round."""
    if lr * weight_decay > 1:
        raise InputError(
            f"weight_decay {weight_decay:g} with lr {lr:g} multiplies the weights by {1 - lr * weight_decay:g} in each step; "
            "lr * weight_decay must be at most 1"
        )


def check_group(group: Mapping[str, Any], decoupled: bool) -> None:
    """InputError unless the settings of a parameter group, which a user or a scheduler may have changed, can be used."""
    checked_settings({name: group[name] for name in SETTINGS if name in group}, decoupled)


def check_closure(closure: object) -> None:
    """Raises InputError unless the argument of `step` is a function, or None."""
    if closure is not None and not callable(closure):
        raise InputError(
            f"step({closure!r}): the only argument is a function that computes the loss and its gradients and returns the loss"
        )


def check_damping(value: object) -> None:
    """InputError unless the damping is a positive finite number."""
    check_positive("damping", value, "; 1e-8 is as good as none")


def check_sharing(sharing: object) -> None:
    """Raises InputError unless this is a weight sharing of SHARINGS: "expand" or "reduce"."""
    check_known("sharing", sharing, SHARINGS)
