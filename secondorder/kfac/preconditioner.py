"""The K-FAC preconditioner: P grad with P = (B kron A + lambda I)^-1 for each layer, B and A running means of its factors."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.kfac.capture import Capture
from secondorder.kfac.distributed import Processes
from secondorder.kfac.fisher import output_gradients
from secondorder.kfac.inverses import CorrectedEigenbasis, Factors, Inverse, State, invert, restored
from secondorder.kfac.layers import KroneckerLayer, find_layers
from secondorder.kfac.options import Damping, Fisher, Options, check_number, check_sharing
from secondorder.kfac.report import Report, Stopwatch, parameter_rows
from secondorder.kfac.scaling_check import ScalingCheck, known_scale
from secondorder.kfac.schedule import Intervals
from secondorder.kfac.statistics import LayerStatistics
from secondorder.matrix_power.transforms import full_precision

Directions = dict[nn.Parameter, Tensor]
VERSION = 1
"""Of the state."""


class KFACPreconditioner:
    """Replaces the gradients of a model's layers by P grad, for any torch optimiser: `pre.step(); opt.step()`.

    Linear layers and 1d and 2d convolutions are preconditioned, other parameters keep their gradient (`report()` lists them).
    Martens & Grosse, ICML 2015; Grosse & Martens, ICML 2016; George et al., NeurIPS 2018 (ekfac). The curvature is that of
    the mean loss over samples, F = mean_n J_n^T H_n J_n, whichever reduction the loss has.

    In the training loop `pre.update_curvature(logits)` goes before `loss.backward()` (not needed with fisher="empirical");
    it does nothing in steps that do not update the factors.

    Args:
        model: the network, also wrapped by DistributedDataParallel or torch.compile.
        damping: a number, or Damping: Tikhonov's lambda, by default in units of a block's mean eigenvalue.
        ema_decay: of the running means of the factors, in [0, 1); bias-corrected.
        factor_interval, inverse_interval: steps between two updates of the factors, and of the inverses.
        fisher: "mc", "empirical", "exact", or Fisher (likelihood, reduction, ...).
        approximation: "kfac" or "ekfac", or one for each pattern of layer names: {"head.*": "ekfac", "stem": "fallback"}.
        sharing: how positions of a convolution count: "expand" (each by itself) or "reduce" (their mean).
        options: the rest.

    Raises:
        InputError: for a bad value, or a model without a layer to precondition.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float | Damping = Damping(),  # noqa: B008  a frozen dataclass
        ema_decay: float = 0.95,
        factor_interval: int = 10,
        inverse_interval: int = 10,
        fisher: str | Fisher = "mc",
        approximation: str | Mapping[str, str] = "kfac",
        sharing: str = "expand",
        options: Options = Options(),  # noqa: B008
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model {type(model).__name__}: must be a torch.nn.Module, the model itself, not its parameters()"
            )
        if not isinstance(options, Options):
            raise InputError(f"options {options!r}: must be Options(...)")
        check_number("ema_decay", ema_decay, 0.0, 1.0)
        check_sharing(sharing)
        self.damping = damping if isinstance(damping, Damping) else Damping(damping)
        self.fisher = fisher if isinstance(fisher, Fisher) else Fisher(fisher)
        self.ema_decay, self.sharing, self.options = ema_decay, sharing, options
        layers, self.treatments = find_layers(model, approximation, sharing, options.wide_inputs)
        self.layers: dict[str, KroneckerLayer] = {layer.name: layer for layer in layers}
        self.statistics = {layer.name: LayerStatistics(layer) for layer in layers}
        self.inverses: dict[str, Inverse] = {}
        self.dampings: dict[str, float] = dict.fromkeys(self.layers, self.damping.value)
        """Of each layer; the optimiser sets those of its parameter groups."""
        costs = {layer.name: _cost(layer) for layer in layers}
        self.intervals = Intervals(factor_interval, inverse_interval, options.warm_up, options.stagger, costs)
        self.processes = Processes(options.synchronise)
        self.owners = self.processes.owners(costs)
        self.generator = torch.Generator().manual_seed(self.fisher.seed + self.processes.rank)
        self.events: Counter[str] = Counter()
        self.device = layers[0].weight.device
        self.stopwatch = Stopwatch(self.device, options.timing)
        self.capture = Capture(layers, self.statistics, model)
        self.check: ScalingCheck | None = ScalingCheck(layers) if options.check else None
        self._watching = True
        self._curvature_updated = self._backward_seen = False
        self._prepare()

    @property
    def factor_step(self) -> bool:
        """Whether the present step updates the factors, so that hooks are on and `update_curvature` does something."""
        return self.intervals.factors_due

    def update_curvature(self, logits: Tensor) -> None:
        """Take the factors' statistics from the graph of the outputs `logits` `[N, K, ...]`, before `loss.backward()`.

        InputError when the factors are due and no layer was called, or the outputs have no graph.
        """
        if not self.factor_step or self.fisher.kind == "empirical" or not self._watching:
            return
        if not logits.requires_grad:
            raise InputError(
                "update_curvature(logits): the logits have no graph; call it outside torch.no_grad(), before backward()"
            )
        if not self.capture.uses:
            raise InputError(
                "update_curvature(logits): no layer of the model was called since the last step; a compiled model ignores "
                "hooks: run it uncompiled in steps with `factor_step`"
            )
        with self.stopwatch("curvature"), full_precision(logits):
            gradients = output_gradients(
                logits.detach(),
                self.fisher.kind,
                self.fisher.likelihood,
                self.fisher.reduction,
                self.generator,
                self.fisher.samples,
            )
            if self.check is not None:
                self.check.watch(self.capture, logits, self.fisher)
            self.capture.from_logits(logits, gradients)
        self._curvature_updated, self._backward_seen = True, False
        logits.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        self._backward_seen = True

    def discard(self) -> None:
        """Forget what the present step has gathered from backward passes that are over: the optimiser's step was skipped.

        A forward pass whose backward is still to come stays: many training loops clear the gradients between the two.
        """
        if self.fisher.kind == "empirical" or self._backward_seen:
            for statistics in self.statistics.values():
                statistics.discard()
            self.capture.forget_past()
            self._curvature_updated = self._backward_seen = False
        if self.check is not None:
            self.check.clear()

    def step(self) -> bool:
        """Replace the gradients by P grad, in place.

        False, and nothing has changed, when a gradient is not finite: the optimiser's step is better left out then.
        """
        directions = self.directions()
        with torch.no_grad():
            for parameter, direction in (directions or {}).items():
                assert parameter.grad is not None
                if parameter.grad.is_sparse:
                    parameter.grad = direction
                elif parameter.grad is not direction:
                    parameter.grad.copy_(direction)
        return directions is not None

    @torch.no_grad()
    def directions(self, decay: Mapping[nn.Parameter, float] | None = None) -> Directions | None:
        """P (grad + decay w) of every parameter with a gradient; None, and nothing has changed, when a gradient is not finite.

        InputError when no parameter has a gradient, or `update_curvature` was due and not called.
        """
        gradients = {t.parameter: dense(t.parameter.grad) for t in self.treatments if t.parameter.grad is not None}
        if not gradients:
            raise InputError("step() before backward(): no parameter of the model has a gradient")
        if self.factor_step:
            self._check_called()
        if not _all_finite(list(gradients.values())):
            self._drop("step with gradients that are not finite, skipped")
            return None
        if self.factor_step:
            with self.stopwatch("factors"), full_precision(next(iter(gradients.values()))):
                self._commit()
            if self.intervals.last_factors is None:  # not even the first factors are finite
                self._forget()
                return None
        with self.stopwatch("inverses"):
            self._invert(self.intervals.inverses_due())
        with self.stopwatch("preconditioning"), full_precision(next(iter(gradients.values()))):
            scale = self.mean_scale
            if scale != 1:
                gradients = {parameter: gradient * scale for parameter, gradient in gradients.items()}
            for parameter, factor in (decay or {}).items():
                if parameter in gradients:
                    gradients[parameter] = gradients[parameter].add(parameter, alpha=factor)
            directions = self._solved(gradients)
        self.intervals.step += 1
        self._prepare()
        return directions

    @property
    def mean_scale(self) -> float:
        """What makes the loss's gradient that of the mean over samples; several processes have the mean of their sums."""
        if self.fisher.reduction == "mean":
            return 1.0
        return self.processes.world / max(1.0, *(float(s.samples) for s in self.statistics.values()))

    def quadratic_form(self, directions: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """sum of tr(W^T B W A) over the layers, W a direction: d^T F d of K-FAC's model, undamped."""
        total = torch.zeros((), device=self.device)
        for name, layer in self.layers.items():
            W = self._matrix(layer, directions)
            if W is None or self.statistics[name].B is None:
                continue
            factors = self._factors(name)
            WA = W @ factors.A if factors.A is not None else (W @ factors.given.mT) @ factors.given
            total = total + ((factors.B @ W) * WA).sum()
        return total

    def tikhonov(self, name: str) -> float:
        """lambda of a layer: damping, times the mean eigenvalue of its block where that is relative (mean over groups)."""
        damping = self.dampings[name]
        if not self.damping.relative or self.statistics[name].B is None:
            return damping
        of_A, of_B = self._factors(name).means()
        return damping * float((of_A * of_B).mean())

    @contextmanager
    def watching_nothing(self) -> Iterator[None]:
        """Forward and backward passes inside leave no trace in the factors; between two steps."""
        self.capture.stop()
        self._watching = False
        try:
            yield
        finally:
            self._watching = True
            self._prepare()

    def report(self) -> Report:
        """What every parameter is treated as, with sizes and memory; time by phase; what went wrong how often."""
        rows = parameter_rows(self.treatments, self.layers, self.statistics, self.inverses)
        return Report(
            rows, dict(self.stopwatch.seconds), dict(self.stopwatch.calls), dict(self.events), self.intervals.step
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on: tensors, numbers, words; loads with `torch.load(weights_only=True)`."""
        return {
            "version": VERSION,
            "sharing": self.sharing,
            "parameters": {t.name: list(t.parameter.shape) for t in self.treatments},
            "treatments": {t.name: t.how for t in self.treatments},
            "intervals": self.intervals.state_dict(),
            "generator": self.generator.get_state(),
            "events": dict(self.events),
            "dampings": dict(self.dampings),
            "checked": self.check is None,
            "statistics": {name: statistics.state_dict() for name, statistics in self.statistics.items()},
            "inverses": {name: inverse.tensors() for name, inverse in self.inverses.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; InputError, and nothing has changed, for that of another architecture."""
        self.check_same(state)
        statistics = {name: LayerStatistics(layer) for name, layer in self.layers.items()}
        for name, own in statistics.items():
            own.load_state_dict(state["statistics"][name])
        moved = {
            name: {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in content.items()}
            for name, content in state["inverses"].items()
        }
        self.inverses = {name: restored(content) for name, content in moved.items()}
        for name, own in statistics.items():
            self.statistics[name].load_state_dict(own.state_dict())
            self.statistics[name].bases = None
        self._share_bases()
        self.generator.set_state(state["generator"].cpu())
        self.events = Counter(state["events"])
        self.dampings = dict(state["dampings"])
        self.intervals.load_state_dict(state["intervals"])
        if self.check is not None:
            self.check.stop()
        self.check = ScalingCheck(list(self.layers.values())) if self.options.check and not state["checked"] else None
        self._prepare()

    def _prepare(self) -> None:
        """Hooks on for a step that updates the factors, off otherwise."""
        self._curvature_updated = self._backward_seen = False
        if not self.factor_step:
            self.capture.stop()
        elif self.capture.active:
            self.capture.forget()
        else:
            self.capture.start()
        if self.factor_step and self.fisher.kind == "empirical":
            self.capture.from_backward()
            if self.check is not None:
                self.check.watch(self.capture)

    def _check_called(self) -> None:
        if self.fisher.kind != "empirical" and not self._curvature_updated:
            raise InputError(
                f"this step updates the factors: call update_curvature(logits) between the forward pass and loss.backward() "
                f"(fisher {self.fisher.kind!r}), or use fisher='empirical'"
            )

    def _drop(self, event: str) -> None:
        self.events[event] += 1
        self._forget()

    def _forget(self) -> None:
        for statistics in self.statistics.values():
            statistics.discard()
        self.capture.forget()
        self._curvature_updated = self._backward_seen = False
        if self.check is not None:
            self.check.clear()

    def _commit(self) -> None:
        """The statistics of this step, of all processes, into the running means; dropped when they are not finite."""
        if self.check is not None and self.check.verify(self.fisher):
            self.check = None
        used = [statistics for statistics in self.statistics.values() if self.processes.world > 1 or statistics.used]
        self.processes.sum_in_one_bucket([tensor for statistics in used for tensor in statistics.staged_tensors()])
        for statistics in used:
            if not statistics.dense:
                statistics.replace_staged_rows(self.processes.gathered(statistics.staged_rows()))
        if not used:
            raise InputError(
                "this step updates the factors, and no layer was called and had its backward pass since the last step; "
                "a compiled model ignores hooks: run it uncompiled in steps with `factor_step`"
            )
        if not bool(torch.stack([statistics.is_finite() for statistics in used]).all()):
            self.events["factors that are not finite, dropped"] += 1
            for statistics in used:
                statistics.discard()
            return
        for statistics in used:
            statistics.commit(self.ema_decay, self._gradient_scale(statistics))
            inverse = self.inverses.get(statistics.layer.name)
            if isinstance(inverse, CorrectedEigenbasis) and statistics.squares is not None:
                inverse.update(statistics.squares, self.ema_decay)
        self.intervals.last_factors = self.intervals.step

    def _gradient_scale(self, statistics: LayerStatistics) -> float:
        """What turns the sum of g g^T into the mean over samples of the samples' own gradients.

        The gradients of `mc` and `exact` are the samples' own. Those of an empirical mean loss are 1/N of them, with several
        processes W/N, and a scaled loss's are as many times larger.
        """
        N = float(statistics.staged_samples)
        if self.fisher.kind != "empirical":
            return 1 / N
        W = self.processes.world
        return (N / W**2 if self.fisher.reduction == "mean" else 1 / N) / known_scale(self.fisher) ** 2

    def _invert(self, names: Sequence[str]) -> None:
        names = [name for name in names if self.statistics[name].B is not None]
        if not names:
            return

        def compute(mine: list[str]) -> dict[str, State]:
            return {name: inverse.tensors() for name, inverse in self._inverted(mine).items()}

        if self.processes.world == 1:
            self.inverses |= self._inverted(names)
        else:
            contents = self.processes.computed_by_owners(names, self.owners, compute, self.device)
            self.inverses |= {name: restored(content) for name, content in contents.items()}
        self.intervals.last_inverse |= dict.fromkeys(names, self.intervals.step)
        self._share_bases()

    def _share_bases(self) -> None:
        """Squared gradients are gathered in the bases of the present inverses."""
        for name, inverse in self.inverses.items():
            if isinstance(inverse, CorrectedEigenbasis):
                self.statistics[name].bases = (inverse.Q_A, inverse.Q_B)

    def _inverted(self, names: Sequence[str]) -> dict[str, Inverse]:
        """Inverses of the layers, those of one kind together."""
        found: dict[str, Inverse] = {}
        for approximation in ("kfac", "ekfac"):
            chosen = [name for name in names if self.layers[name].approximation == approximation]
            if chosen:
                kind = "ekfac" if approximation == "ekfac" else self.damping.inverse
                found |= invert(
                    [self._factors(name) for name in chosen],
                    kind,
                    [self.dampings[name] for name in chosen],
                    self.damping.relative,
                    self.inverses,
                    self.events,
                )
        return found

    def _factors(self, name: str) -> Factors:
        statistics = self.statistics[name]
        assert statistics.B is not None
        return Factors(name, statistics.A, statistics.rows, statistics.B)

    def _solved(self, gradients: Directions) -> Directions:
        """P grad for layers with an inverse, the gradient itself for the others."""
        directions = dict(gradients)
        for name, layer in self.layers.items():
            W = self._matrix(layer, directions)
            if W is None:
                continue
            if name not in self.inverses:
                self.events[f"{name}: no factors yet, its gradient is used as it is"] += 1
                continue
            solution = self.inverses[name].solve(W, self.dampings[name], self.damping.relative)
            weight, bias = layer.parts(solution)
            directions[layer.weight] = weight
            if layer.bias is not None and layer.bias in directions:
                assert bias is not None
                directions[layer.bias] = bias
        return directions

    def _matrix(self, layer: KroneckerLayer, directions: Mapping[nn.Parameter, Tensor]) -> Tensor | None:
        """[G, O, D], or None for a layer that was not used; a bias without gradient counts as zero."""
        if layer.weight not in directions:
            return None
        bias = None
        if layer.bias is not None:
            bias = directions[layer.bias] if layer.bias in directions else torch.zeros_like(layer.bias)
        return layer.matrix(directions[layer.weight], bias)

    def check_same(self, state: Mapping[str, Any]) -> None:
        """InputError that names the first difference between a state's parameters and treatments and those of the model."""
        if not isinstance(state, Mapping) or state.get("version") != VERSION:
            raise InputError(f"not a state of K-FAC in version {VERSION}")
        own = {t.name: list(t.parameter.shape) for t in self.treatments}
        theirs = state["parameters"]
        for name in [*own, *theirs]:
            if own.get(name) != theirs.get(name):
                raise InputError(
                    f"state of another architecture: {name} is {theirs.get(name, 'missing')} in the state and "
                    f"{own.get(name, 'missing')} in the model"
                )
        for t in self.treatments:
            if state["treatments"][t.name] != t.how:
                raise InputError(
                    f"state of other settings: {t.name} was {state['treatments'][t.name]}, and is {t.how} now"
                )
        if state["sharing"] != self.sharing:
            raise InputError(f"state of other settings: sharing was {state['sharing']!r}, and is {self.sharing!r} now")


def _cost(layer: KroneckerLayer) -> float:
    """About proportional to the time of an inversion."""
    inputs = 0 if layer.wide else layer.inputs
    return layer.groups * (inputs**3 + layer.outputs**3)


def dense(gradient: Tensor | None) -> Tensor:
    """The gradient of an embedding may be sparse."""
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def _all_finite(tensors: list[Tensor]) -> bool:
    """One pass over the numbers, one answer to the host; norms of 16 bits would overflow."""
    norms = torch._foreach_norm([tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors])
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms]).sum()))
