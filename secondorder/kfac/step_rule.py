"""Step rules: how the gradient and K-FAC's factors become the step of a layer, its direction and its length.

With g the gradient of a layer `[G, O, D]`, m its momentum, Q = Q_B kron Q_A the eigenvectors of the factors and
P = (B kron A + lambda I)^-1:

    direction   natural         P g, then momentum
                eigenbasis      Q [Q^T m / sqrt(v)], v a running mean of (Q^T g)^2: Adam in K-FAC's eigenbasis
                preconditioned  m / sqrt(v), running means of P g and (P g)^2: Adam on P g
    length      free            as it comes; with the natural direction this is K-FAC as published
                signal          by layer, the root mean square is `rms` times how far the gradients agree: that of m / sqrt(v), at
                                most 1; without v, |m| over the running mean of |P g|
                fixed           by layer, the root mean square is `rms`

A natural step is as long as the quadratic model says: right where the model is (regression, full batches), wrong where F
vanishes with the loss. On separable classes F, and the relative damping with it, go to 0 and the step to infinity. The other
lengths neither vanish nor explode with F, so that the learning rate and its schedule decide them. `signal` is 1 where gradients
agree and about a quarter where they are noise, at the end of a training or of samples known by heart; it is shorter in the first
ten steps, too, in which m is not full. No length of Adam's or Muon's shrinks at a minimum, which is what a schedule that ends at
0 is for.

Adam in an eigenbasis: Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024, there of Shampoo's factors, here
of those of the Fisher matrix. The length: Liu et al., "Muon is scalable for LLM training", 2025. Where the length is
not free, momentum is Nesterov's. m is kept in the eigenbasis; when that is renewed m goes over to the new one, and v stays as it
is: to carry it over changed no result of the development tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.errors import InputError, check_known
from secondorder.kfac.options import check_number, check_positive

DIRECTIONS = ("natural", "eigenbasis", "preconditioned")
LENGTHS = ("free", "signal", "fixed")


@dataclass(frozen=True)
class StepRule:
    """Direction and length of the step of a layer: see `secondorder.kfac.step_rule`.

    Args:
        direction: "natural", "eigenbasis" or "preconditioned". length: "free", "signal" or "fixed".
        rms: root mean square of an update of fixed length, or of agreeing gradients, in units of lr.
        decay: of the running mean of squares, in [0, 1). InputError for other values.
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
        """Whether the step is K-FAC's own, that of a quadratic model: natural and of free length."""
        return self.direction == "natural" and self.length == "free"

    @property
    def words(self) -> str:
        """Direction and length, for a state: buffers of one rule mean nothing to another."""
        return f"{self.direction}, {self.length}"

    def check_formats(self, parameters: Mapping[str, Tensor]) -> None:
        """InputError for parameters, by name, whose number format is too short for the rule."""
        small = [name for name, parameter in parameters.items() if parameter.dtype == torch.float16]
        if small and not self.is_plain:
            raise InputError(
                f"{small[0]} is float16, whose squares underflow: use float32 with autocast, or step_rule='natural'"
            )

    @property
    def learning_rate(self) -> float:
        """A learning rate to begin with, at the top of a schedule."""
        return {"signal": 0.06, "fixed": 0.03}.get(self.length, 0.1 if self.is_plain else 0.01)


STEP_RULES = {
    "adam": StepRule("eigenbasis", "signal"),
    "natural": StepRule("natural", "free"),
    "adam_fixed": StepRule("eigenbasis", "fixed"),
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
