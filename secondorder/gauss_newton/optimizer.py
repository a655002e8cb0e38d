"""The Gauss-Newton optimiser: momentum on (G + lambda I)^-1 grad, by conjugate gradients."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secondorder.curvature.conjugate_gradients import conjugate_gradients
from secondorder.curvature.matrix_free.jacobian import flattened
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.relative_damping import norm_over_trace
from secondorder.errors import InputError, check_flag, check_known, check_whole
from secondorder.gauss_newton.batch_curvature import LIKELIHOODS, BatchCurvature
from secondorder.kfac.optimizer import CLIP
from secondorder.kfac.options import (
    DAMPING,
    SETTINGS,
    check_closure,
    check_group,
    check_positive,
    checked_settings,
)
from secondorder.kfac.report import Stopwatch
from secondorder.kfac.state_check import check_count, check_entries, check_float, check_optimizer
from secondorder.kfac.update import move, shorten

TOLERANCE, ITERATIONS = 0.1, 20
BUFFERS = ("momentum_buffer",)
"""Of a parameter."""
SCALE_DECAY = 0.95
"""Of the running means that the scale of G is made of; K-FAC's factors have the same."""


@dataclass(frozen=True)
class Report:
    """Steps so far, conjugate-gradient iterations, how they ended, the scale of G and seconds by phase.

    `print` shows one line.
    """

    steps: int
    iterations: float
    """Of conjugate gradients in a step, on average."""
    unconverged: float
    """Share of the steps whose iterations ended before the tolerance."""
    skipped: int
    """Steps without an update, because a gradient was not finite."""
    scale: float
    """|G|_F^2 / tr G, of the running means: lambda is damping times this."""
    seconds: Mapping[str, float]
    """By phase."""

    def __str__(self) -> str:
        return (
            f"{self.steps} steps of {self.iterations:.1f} iterations on average, {self.unconverged:.0%} ended before the "
            f"tolerance, {self.skipped} skipped; scale of G {self.scale:.3g}; {sum(self.seconds.values()):.1f} s"
        )


class GaussNewton(torch.optim.Optimizer):
    """v <- momentum v + d,  w <- (1 - lr weight_decay) w - lr v,  with d = (G + lambda I)^-1 grad of the mini-batch.

        opt = GaussNewton(model, lr=0.3)
        for images, labels in loader:
            opt.zero_grad()
            logits = model(images)
            opt.update_curvature(logits)
            F.cross_entropy(logits, labels).backward()
            opt.step()

    G is the generalised Gauss-Newton matrix of the mean loss, of all parameters together, batch norm's too (Schraudolph 2002;
    Martens 2010): what `secondorder.kfac.KFAC` approximates by Kronecker factors of each layer. A step evaluates the network
    again on the same images, without a trace: batch norm counts them once. `state_dict()` is complete: a resumed training
    takes the same steps, bit for bit on a CPU.

    Args:
        model: the network; a function of one tensor to one tensor `[N, K]`.
        lr: learning rate, of the order of 1 without momentum.
        momentum: heavy-ball momentum of the directions d.
        weight_decay: decoupled, or in d = (G + lambda I)^-1 (grad + weight_decay w).
        damping: lambda in units of the scale of G, as `secondorder.kfac.Damping` has it: lambda = damping |G|_F^2 / tr G.
            Both are running means of one estimate a step, |G z|^2 and z^T G z with a vector z of random signs.
        tolerance, iterations: conjugate gradients end at this residual, relative to the right side, or after so many steps,
            whichever comes first. They start from zero, so that every iterate descends: the last direction, from which
            Martens (2010) starts with his large batches, is further from the next mini-batch's than zero is.
        clip: trust region: the largest length sqrt(v^T grad) of the velocity v; every direction d is shortened to
            sqrt(d^T grad) <= (1 - momentum) clip, for an exact d its length in the metric G + lambda I. None: no limit.
        likelihood: the loss, a mean over the batch: a key of LIKELIHOODS.
        decoupled: where weight decay enters.

    Raises:
        InputError: for a bad value, a model without a trainable parameter, and several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = DAMPING,
        tolerance: float = TOLERANCE,
        iterations: int = ITERATIONS,
        clip: float | None = CLIP,
        likelihood: str = "cross_entropy",
        decoupled: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model {type(model).__name__}: must be a torch.nn.Module, the model itself, not its parameters()"
            )
        check_flag("decoupled", decoupled)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping}
        settings = checked_settings(settings, decoupled)
        check_positive("tolerance", tolerance)
        if not tolerance < 1:
            raise InputError(f"tolerance {tolerance!r}: must be below 1, a part of the gradient's length")
        check_whole("iterations", iterations)
        if clip is not None:
            check_positive("clip", clip)
        check_known("likelihood", likelihood, LIKELIHOODS)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError("GaussNewton trains in one process: its products are those of its own images; use KFAC")
        self.curvature = BatchCurvature(model, likelihood)
        self.names = {p: name for name, p in self.curvature.module.named_parameters() if p.requires_grad}
        if not self.names:
            raise InputError("the model has no trainable parameter; there is nothing to optimise")
        self.tolerance, self.iterations, self.decoupled = float(tolerance), iterations, decoupled
        self.clip = None if clip is None else float(clip)
        self.counts = {"steps": 0, "iterations": 0, "unconverged": 0, "skipped": 0}
        self.squared_norm = self.trace = 0.0
        self.stopwatch = Stopwatch(next(iter(self.names)).device, synchronise=False)
        super().__init__(list(self.names), settings)
        self._complete = True

    def update_curvature(self, logits: Tensor) -> None:
        """Note the outputs `[N, K]` of the forward pass that this step is about; once a step, before `step()`.

        InputError for a second call in a step, without a forward pass of the model, and for outputs that are not a float `[N, K]`
        of it.
        """
        with self.stopwatch("curvature"):
            self.curvature.take(logits)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the outputs that a skipped step has left."""
        self.curvature.forget()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a batch whose gradients are not finite changes nothing. Returns what the closure returns.

        InputError without a gradient, without `update_curvature(logits)`, for a closure that is no function, and for settings of
        the parameter group that cannot be used.
        """
        check_closure(closure)
        check_group(self.param_groups[0], self.decoupled)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            raise InputError("step() before backward(): no parameter of the model has a gradient")
        if not self.curvature.taken:
            raise InputError("step() without update_curvature(logits): call it between the forward pass and step()")
        gradient = flattened([p.grad for p in parameters])
        if not bool(torch.isfinite(gradient).all()):
            self.counts["skipped"] += 1
            self.curvature.forget()
            return loss
        if not self.decoupled and group["weight_decay"]:
            gradient = gradient + float(group["weight_decay"]) * flattened([p.detach() for p in parameters])
        with self.stopwatch("conjugate gradients"), self.curvature.quietly():
            d = self._direction(parameters, gradient)
        with self.stopwatch("update"), torch.no_grad():
            self._update(parameters, d)
        self.curvature.forget()
        self.counts["steps"] += 1
        return loss

    def report(self) -> Report:
        """Iterations, how they ended, and seconds, of all steps so far."""
        steps = max(1, self.counts["steps"])
        return Report(
            steps=self.counts["steps"],
            iterations=self.counts["iterations"] / steps,
            unconverged=self.counts["unconverged"] / steps,
            skipped=self.counts["skipped"],
            scale=self._scale,
            seconds=dict(self.stopwatch.seconds),
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict with the entry "gauss_newton": counters and the running means."""
        means = {"squared_norm": self.squared_norm, "trace": self.trace}
        own = {"counts": dict(self.counts), "means": means, "names": list(self.names.values())}
        return super().state_dict() | {"gauss_newton": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        InputError, which names the entry, and nothing has changed, for that of another model and for one that is not whole.
        """
        own = state_dict.get("gauss_newton") if isinstance(state_dict, Mapping) else None
        if not isinstance(own, Mapping) or own.get("names") != list(self.names.values()):
            raise InputError(
                f"the state is not of a GaussNewton with the parameters {', '.join(self.names.values()):.150}"
            )
        check_entries("gauss_newton", own, ("names", "counts", "means"))
        check_entries("gauss_newton.counts", own["counts"], self.counts)
        for name, count in own["counts"].items():
            check_count(f"gauss_newton.counts.{name}", count)
        check_entries("gauss_newton.means", own["means"], ("squared_norm", "trace"))
        check_float("gauss_newton.means.squared_norm", own["means"]["squared_norm"])
        check_float("gauss_newton.means.trace", own["means"]["trace"], least=-math.inf)  # of rounding, when it is zero
        rest = {key: value for key, value in state_dict.items() if key != "gauss_newton"}
        check_entries("the state", rest, ("state", "param_groups"))
        check_optimizer(rest, self.param_groups, SETTINGS, partial(checked_settings, decoupled=False), BUFFERS)
        super().load_state_dict(rest)
        self.counts = dict(own["counts"])
        self.squared_norm, self.trace = own["means"]["squared_norm"], own["means"]["trace"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: one damping holds for the whole matrix."""
        if hasattr(self, "_complete"):
            raise InputError("add_param_group: GaussNewton has one group, all trainable parameters; make a new one")
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refused: a copy would watch no model."""
        raise InputError(
            "a GaussNewton cannot be copied or pickled, it watches its model: make a new one and load_state_dict(state_dict())"
        )

    def _direction(self, parameters: list[nn.Parameter], gradient: Tensor) -> Tensor:
        """(G + lambda I)^-1 gradient `[P]`."""
        G = self.curvature.operator([self.names[p] for p in parameters])
        self._update_scale(G)
        damping = float(self.param_groups[0]["damping"]) * self._scale
        solution = conjugate_gradients(
            G.__matmul__, gradient, damping=damping, tolerance=self.tolerance, iterations=self.iterations
        )
        self.counts["iterations"] += solution.iterations
        self.counts["unconverged"] += not solution.converged
        return solution.x

    def _update_scale(self, G: SymmetricOperator) -> None:
        """Running means of |G z|^2 and z^T G z, whose expectations are |G|_F^2 and tr G, with signs z that the step decides."""
        generator = torch.Generator().manual_seed(self.counts["steps"])
        z = 2 * torch.randint(2, (G.size,), generator=generator).to(G.device, G.dtype) - 1
        Gz = G @ z
        for name, estimate in (("squared_norm", Gz.square().sum()), ("trace", Gz @ z)):
            setattr(self, name, SCALE_DECAY * getattr(self, name) + (1 - SCALE_DECAY) * float(estimate))

    @property
    def _scale(self) -> float:
        """|G|_F^2 / tr G: the mean eigenvalue, each weighted by itself. Both means begin at zero, which the quotient undoes."""
        return norm_over_trace(self.squared_norm, self.trace)

    def _update(self, parameters: list[nn.Parameter], d: Tensor) -> None:
        """Trust region, momentum, weight decay."""
        parts = d.split([p.numel() for p in parameters])
        directions = {p: part.view_as(p).to(p.dtype) for p, part in zip(parameters, parts, strict=True)}
        if self.clip is not None:
            shorten(directions, self.param_groups, self.clip, 1.0, self.decoupled)
        move(directions, self.param_groups, self.state, self.decoupled)
