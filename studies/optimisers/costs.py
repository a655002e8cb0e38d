"""What a training step of each optimiser costs: time next to a step of SGD, and memory."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.accelerator import wait_for
from studies.engine.records import Row
from studies.timing import peak_bytes, seconds

Loss = Callable[[Tensor, Tensor], Tensor]
MILLISECONDS, OF_SGD = "milliseconds of a step", "time of a step, of SGD's"
PEAK, STATE = "peak memory of a step [MiB]", "state [MiB]"


class Stepper:
    """One training step of a model with an optimiser at each call, on the batches in turn."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, batches: list[tuple[Tensor, Tensor]]
    ) -> None:
        self.model, self.optimizer, self.loss, self.batches = model, optimizer, loss, batches
        self.update_curvature = getattr(optimizer, "update_curvature", None)
        self.steps = 0
        self.seconds: Counter[str] = Counter()

    def __call__(self) -> None:
        """One step."""
        self.take(*self.batches[self.steps % len(self.batches)])
        self.steps += 1

    def take(self, inputs: Tensor, targets: Tensor) -> None:
        """A step on one batch."""
        start = self._now(inputs.device)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.model(inputs)
        loss = self.loss(outputs, targets)
        if self.update_curvature is not None:
            self.update_curvature(outputs)
        loss.backward()
        backward = self._now(inputs.device)
        self.optimizer.step()
        self.seconds["forward and backward"] += backward - start  # type: ignore[assignment]
        self.seconds["optimiser's step"] += self._now(inputs.device) - backward  # type: ignore[assignment]

    @staticmethod
    def _now(device: torch.device) -> float:
        wait_for(device)
        return time.perf_counter()

    def parts(self) -> dict[str, float]:
        """Mean milliseconds a step by part; K-FAC's parts are those that its report names."""
        seconds = dict(self.seconds)
        report = getattr(self.optimizer, "report", None)
        if report is not None:
            own = dict(report().seconds)
            backward = own.get("curvature", 0.0)  # update_curvature, called before the backward pass
            step = sum(own.values()) - backward
            for part, inside in (("forward and backward", backward), ("optimiser's step", step)):
                seconds[part] = max(0.0, seconds[part] - inside)
            seconds |= own
        return {part: 1e3 * value / max(1, self.steps) for part, value in seconds.items()}


def slowed(tuning: Mapping[str, float]) -> dict[str, float]:
    """Tuned settings with a thousandth of the learning rate: a step takes as long, and none diverges while it is timed."""
    return {name: value / 1000 if name == "learning_rate" else value for name, value in tuning.items()}


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(state_bytes(item) for item in value.values())
    return sum(state_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


def measure(steppers: Mapping[str, Stepper], steps: int, device: torch.device) -> Iterator[Row]:
    """Milliseconds of the first steps of each optimiser, each also divided by the step of SGD timed next to it, and memory.

    Peak memory is that of a later step in which K-FAC updates its factors, beyond weights and state; the state is counted by
    itself.

    Args:
        steppers: by optimiser, sgd among them.
        steps: how many are timed of each.
        device: where they compute.
    """
    for index in range(steps):
        for optimizer, stepper in steppers.items():
            beside = seconds(steppers["sgd"], device)
            spent = beside if optimizer == "sgd" else seconds(stepper, device)
            labels = {"optimizer": optimizer, "index": index}
            yield labels | {"quantity": MILLISECONDS, "value": 1e3 * spent}
            yield labels | {"quantity": OF_SGD, "value": spent / beside}
    for optimizer, stepper in steppers.items():
        peak = peak_bytes(_factor_step(stepper), device) / 2**20
        state = state_bytes(stepper.optimizer.state_dict()) / 2**20
        yield {"optimizer": optimizer, "quantity": PEAK, "value": peak}
        yield {"optimizer": optimizer, "quantity": STATE, "value": state, "error": 0.0}


def _factor_step(stepper: Stepper) -> Callable[[], None]:
    """The stepper, moved on to a step that updates the factors, if there are any."""
    for _ in range(1000):
        if getattr(stepper.optimizer, "factor_step", True):
            break
        stepper()
    return stepper


def cycled(split: Any, batch_size: int, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` batches of a split."""
    for start in range(0, min(count * batch_size, len(split) - batch_size + 1), batch_size):
        images, labels = split.batch(torch.arange(start, start + batch_size))
        yield images.to(device), labels.to(device)
