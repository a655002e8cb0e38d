"""Step rules: how the gradient and K-FAC's factors become the step of a layer, its direction and its length.

With g the gradient of a layer `[G, O, D]`, m its momentum, Q = Q_B kron Q_A the eigenvectors of the factors and
P = (B kron A + lambda I)^-1:

    direction   natural         P g, then momentum
                eigenbasis      Q [Q^T m / sqrt(v)], v a running mean of (Q^T g)^2: Adam in K-FAC's eigenbasis
                preconditioned  m / sqrt(v), running means of P g and (P g)^2: Adam on P g
    length      free            as it comes; with the natural direction this is K-FAC as published
                fixed           by layer, with the root mean square `rms`

A natural step is as long as the quadratic model says: right where the model is (regression, full batches), wrong where F
vanishes with the loss. On separable classes F, and the relative damping with it, go to 0 and the step to infinity. A fixed length
neither vanishes nor explodes with F, so that the learning rate and its schedule alone decide it; like Adam's and Muon's it does
not shrink at a minimum, which is what a schedule that ends at 0 is for.

Adam in an eigenbasis: Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024, there of Shampoo's factors, here
of those of the Fisher matrix. The length: Liu et al., "Muon is scalable for LLM training", 2025. Where the length is fixed,
momentum is Nesterov's. When the bases are renewed v stays as it is: to carry it over changed no result of the development tasks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import check_known
from secondorder.kfac.blocks import Blocks, Directions
from secondorder.kfac.inverses.eigenbasis import Rotated
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.options import check_number, check_positive
from secondorder.kfac.update import State, adam_scale
from secondorder.matrix_power.transforms import full_precision

DIRECTIONS = ("natural", "eigenbasis", "preconditioned")
LENGTHS = ("free", "fixed")
EPS = 1e-5
"""Of Adam's denominators, relative to their root mean square in a layer: the scale of the loss does not matter, and in directions
in which the loss is flat (a shift of all logits) the step is not that of rounding errors."""
FADED = 0.01
"""Root mean square of m / sqrt(v) below which a fixed length is in proportion shorter: of noise it is about 0.2, and it goes to 0
once a gradient has vanished."""


@dataclass(frozen=True)
class StepRule:
    """Direction and length of the step of a layer: see `secondorder.kfac.step_rule`.

    rms: root mean square of an update of fixed length, in units of lr.
    decay: of the running mean of squares.
    """

    direction: str
    length: str
    rms: float = 0.2
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_known("direction", self.direction, DIRECTIONS)
        check_known("length", self.length, LENGTHS)
        check_positive("rms", self.rms)
        check_number("decay", self.decay, 0.0, 1.0)

    @property
    def is_plain(self) -> bool:
        """Whether the step is K-FAC's own, that of a quadratic model."""
        return self.direction == "natural" and self.length == "free"

    @property
    def words(self) -> str:
        """Direction and length, for a state: buffers of one rule mean nothing to another."""
        return f"{self.direction}, {self.length}"

    @property
    def learning_rate(self) -> float:
        """A learning rate to begin with, at the top of a schedule."""
        return 0.03 if self.length == "fixed" else 0.1 if self.is_plain else 0.01


STEP_RULES = {
    "adam": StepRule("eigenbasis", "fixed"),
    "natural": StepRule("natural", "free"),
    "natural_fixed": StepRule("natural", "fixed"),
    "adam_free": StepRule("eigenbasis", "free"),
    "natural_adam": StepRule("preconditioned", "free"),
}
"""Step rules by name."""


def as_step_rule(rule: object) -> StepRule:
    """The rule of a name, or the rule itself; InputError for anything else."""
    if isinstance(rule, StepRule):
        return rule
    check_known("step_rule", rule, STEP_RULES)
    return STEP_RULES[str(rule)]


def updates(
    rule: StepRule,
    gradients: Directions,
    blocks: Blocks,
    state: State,
    momenta: Mapping[nn.Parameter, float],
    fallback_lr: float,
    events: Counter[str],
) -> Directions:
    """The update of every parameter by a rule that is not plain: lr times it is subtracted.

    Layers without an eigenbasis (wide inputs, damping of Cholesky factors, no factors yet) go in the natural direction, with a
    fixed length; parameters without factors take Adam's step.

    Args:
        rule: direction and length.
        gradients: of the mean loss, by parameter.
        blocks: the layers and their inverses.
        state: the optimiser's of each parameter; gets the buffers momentum_buffer, square and squares.
        momenta: of each parameter, 0 to 1: the decay of the mean of gradients.
        fallback_lr: of parameters without factors, in units of lr.
        events: counts what goes wrong.
    """
    bases = blocks.eigenbases() if rule.direction == "eigenbasis" else {}
    found: Directions = {}
    with full_precision(next(iter(gradients.values()))):
        natural = blocks.solve(gradients, events, [name for name in blocks.layers if name not in bases])
        for name, layer in blocks.layers.items():
            g = blocks.matrix(layer, natural)
            if g is not None:
                update = _of_layer(rule, layer, g, bases.get(name), state, momenta[layer.weight])
                parts = zip((layer.weight, layer.bias), layer.parts(update), strict=True)
                found |= {p: part for p, part in parts if p in gradients and part is not None}
    others = [parameter for parameter in gradients if parameter not in found]
    return found | {p: fallback_lr * _adam(gradients[p], state[p], momenta[p]) for p in others}


def _of_layer(
    rule: StepRule, layer: KroneckerLayer, g: Tensor, basis: Rotated | None, state: State, beta: float
) -> Tensor:
    """The update `[G, O, D]` from the gradient g in its eigenbasis or, where there is none, from P g."""
    own, rotates = state[layer.weight], rule.direction == "eigenbasis"
    if rotates and (basis is not None) != ("square" in own):
        _forget(layer, state)  # gradients of another kind
    own["squares"] = steps = own.get("squares", 0) + 1
    fixed = rule.length == "fixed" or (rotates and basis is None)
    m = _momentum(layer, g, state, beta, steps, nesterov=fixed)
    least = 0.0
    if basis is not None:
        v = _root_mean_square(layer, basis.rotated(g), state, rule.decay, steps)
        m, least = basis.rotated_back(basis.rotated(m) / v).to(m.dtype), FADED
    elif rule.direction == "preconditioned":
        m = m / _root_mean_square(layer, g, state, rule.decay, steps)
    return _of_length(m, rule.rms, least) * g.any() if fixed else m  # without a gradient it stays


def _of_length(m: Tensor, rms: float, least: float) -> Tensor:
    """m with this root mean square; in proportion shorter where its own is below `least`."""
    largest = m.abs().amax().clamp_min(torch.finfo(m.dtype).tiny)
    unit = m / largest  # whose squares are numbers
    size = unit.square().mean().sqrt().clamp_min(torch.finfo(m.dtype).tiny)  # 1 / sqrt(entries) to 1, unless m is zero
    factor = rms / size
    return unit * (factor * (largest * size / least).clamp_max(1) if least else factor)


def _momentum(layer: KroneckerLayer, g: Tensor, state: State, beta: float, steps: int, nesterov: bool) -> Tensor:
    """m <- beta m + (1 - beta) g; with it Nesterov's beta m + (1 - beta) g, or m bias-corrected."""
    m = _buffer(layer, "momentum_buffer", state).mul_(beta).add_(g, alpha=1 - beta)
    _store(layer, "momentum_buffer", m, state)
    return torch.lerp(g, m, beta) if nesterov else m / (1 - beta**steps)


def _root_mean_square(layer: KroneckerLayer, g: Tensor, state: State, decay: float, steps: int) -> Tensor:
    """sqrt(v), v <- decay v + (1 - decay) g^2 bias-corrected, with EPS of its size added: above 0."""
    v = _buffer(layer, "square", state).mul_(decay).add_(g.square(), alpha=1 - decay)
    _store(layer, "square", v, state)
    v = v / (1 - decay**steps)
    least = (EPS * v.mean().sqrt()).clamp_min(torch.finfo(v.dtype).tiny)
    return v.sqrt().add_(least)


def _buffer(layer: KroneckerLayer, name: str, state: State) -> Tensor:
    """A buffer of a layer as `[G, O, D]`, zero at first; each parameter keeps its part, in its own shape."""
    parts = [state[p].setdefault(name, torch.zeros_like(p)) for p in (layer.weight, layer.bias) if p is not None]
    return layer.matrix(parts[0], parts[1] if len(parts) > 1 else None)


def _store(layer: KroneckerLayer, name: str, matrix: Tensor, state: State) -> None:
    """Keep a buffer that was changed: it is a view of what is kept, or not (with a bias, or channels last)."""
    weight, bias = layer.parts(matrix)
    state[layer.weight][name].copy_(weight)
    if layer.bias is not None and bias is not None:
        state[layer.bias][name].copy_(bias)


def _forget(layer: KroneckerLayer, state: State) -> None:
    for parameter in (p for p in (layer.weight, layer.bias) if p is not None):
        for name in ("momentum_buffer", "square", "squares"):
            state[parameter].pop(name, None)


def _adam(gradient: Tensor, state: dict[str, Any], beta: float) -> Tensor:
    """Adam's update of a parameter without factors: a bias-corrected running mean of g over `adam_scale`."""
    scale = adam_scale(state, gradient)
    m = state.setdefault("momentum_buffer", torch.zeros_like(gradient)).mul_(beta).add_(gradient, alpha=1 - beta)
    return (m / (1 - beta ** state["squares"])) / scale
