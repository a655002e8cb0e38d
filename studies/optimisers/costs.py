"""Training steps of optimisers to be timed, each next to a step of SGD, and their memory."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.accelerator import wait_for
from studies.timing import peak_bytes, seconds

FORWARD_BACKWARD, STEP = "forward and backward", "optimiser's step"


@dataclass
class Stepper:
    """One training step of a model with an optimiser at each call, on the batches in turn."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: Sequence[tuple[Tensor, Tensor]]
    steps: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    def __call__(self) -> None:
        """One step."""
        self._take(*self.batches[self.steps % len(self.batches)])
        self.steps += 1

    def _take(self, inputs: Tensor, targets: Tensor) -> None:
        start = _now(inputs.device)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.model(inputs)
        loss = self.loss(outputs, targets)
        if hasattr(self.optimizer, "update_curvature"):
            self.optimizer.update_curvature(outputs)
        loss.backward()
        backward = _now(inputs.device)
        self.optimizer.step()
        self.seconds[FORWARD_BACKWARD] += backward - start  # type: ignore[assignment]
        self.seconds[STEP] += _now(inputs.device) - backward  # type: ignore[assignment]

    def milliseconds(self) -> dict[str, float]:
        """Of each part, in all steps so far; K-FAC's parts are those that its report names."""
        spent: dict[str, float] = dict(self.seconds)
        if hasattr(self.optimizer, "report"):
            own = self.optimizer.report().seconds
            curvature = own.get("curvature", 0.0)  # update_curvature, called before the backward pass
            inside = {FORWARD_BACKWARD: curvature, STEP: sum(own.values()) - curvature}
            spent = {part: max(0.0, spent[part] - inside[part]) for part in spent} | dict(own)
        return {part: 1e3 * value for part, value in spent.items()}


class QuadraticStepper(Stepper):
    """An update by `KFAC.quadratic_step`, which does forward and backward pass and the products of the quadratic model."""

    def _take(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.quadratic_step(self.loss, inputs, targets)  # type: ignore[attr-defined]


def _now(device: torch.device) -> float:
    wait_for(device)
    return time.perf_counter()


def next_to(sgd: Stepper, stepper: Stepper, device: torch.device, steps: int = 1) -> tuple[float, float]:
    """Mean milliseconds of a step of SGD and of another optimiser's; each is taken after one of SGD."""
    times = [(seconds(sgd, device), seconds(stepper, device)) for _ in range(steps)]
    of_sgd, own = (1e3 * sum(spent) / steps for spent in zip(*times, strict=True))
    return of_sgd, own


def memory(stepper: Stepper, device: torch.device) -> tuple[float, float]:
    """MiB at the peak of a step, one that updates K-FAC's factors, beyond weights and state; and MiB of the state."""
    for _ in range(1000):
        if getattr(stepper.optimizer, "factor_step", True):
            break
        stepper()
    return peak_bytes(stepper, device) / 2**20, state_bytes(stepper.optimizer.state_dict()) / 2**20


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(state_bytes, value)) if isinstance(value, list | tuple) else 0
