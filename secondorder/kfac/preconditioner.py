"""The K-FAC preconditioner: P grad with P = (B kron A + lambda I)^-1 for each layer, B and A running means of its factors."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.kfac.blocks import Blocks, Directions
from secondorder.kfac.distributed import Processes
from secondorder.kfac.gathering import Gathering
from secondorder.kfac.layers import KroneckerLayer, find_layers
from secondorder.kfac.options import Damping, Fisher, Options, check_number, check_sharing
from secondorder.kfac.outputs import as_outputs
from secondorder.kfac.report import Report, Stopwatch, parameter_rows
from secondorder.kfac.schedule import Intervals
from secondorder.kfac.state_check import check_count, check_entries, check_list, refused
from secondorder.matrix_power.transforms import full_precision

VERSION = 1
"""Of the state."""
ENTRIES = (
    *("version", "sharing", "parameters", "treatments", "intervals", "events"),
    *("statistics", "samples", "checked", "dampings", "inverses"),
)
"""Of the state; KFAC adds the names of its groups."""


class KFACPreconditioner:
    """Replaces the gradients of a model's layers by P grad, for any torch optimiser: `pre.step(); opt.step()`.

    Linear layers, convolutions, attention and embeddings are preconditioned, other parameters keep theirs (`report()`).
    Martens & Grosse, ICML 2015; Grosse & Martens, ICML 2016; George et al., NeurIPS 2018 (ekfac). The curvature is that of
    the mean loss over samples, F = mean_n J_n^T H_n J_n, whichever reduction the loss has.

    The first dimension of a layer's input counts as the samples: transformers with `batch_first=True`. With positions first,
    expand K-FAC is the same, `reduce` and `ekfac` are not.

    In the training loop `pre.update_curvature(logits)` goes before `loss.backward()` (not needed with fisher="empirical");
    it does nothing in steps that do not update the factors.

    Args:
        model: the network, also wrapped by DistributedDataParallel or torch.compile.
        damping: a number, or Damping: Tikhonov's lambda, by default relative to the scale of a block.
        ema_decay: of the running means of the factors, in [0, 1); bias-corrected.
        factor_interval, inverse_interval: steps between two updates of the factors, and of the inverses.
        fisher: "mc", "empirical", "exact", or Fisher (likelihood, reduction, ...).
        approximation: "kfac" or "ekfac", or one for each pattern of layer names: {"head.*": "ekfac", "stem": "fallback"};
            "diagonal" for the diagonal of the layer's own block, which normalisations can have, too.
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
        self.ema_decay, self.sharing, self.options = float(ema_decay), sharing, options
        layers, self.treatments = find_layers(model, approximation, sharing, options.wide_inputs, options.wide_outputs)
        self.layers: dict[str, KroneckerLayer] = {layer.name: layer for layer in layers}
        self.processes = Processes(options.synchronise)
        self.gathering = Gathering(layers, model, self.fisher, self.processes, options.check)
        self.statistics = self.gathering.statistics
        self.blocks = Blocks(self.layers, self.statistics, self.damping, self.processes)
        costs = self.blocks.costs
        self.intervals = Intervals(factor_interval, inverse_interval, options.warm_up, options.stagger, costs)
        self.events: Counter[str] = Counter()
        self.device = layers[0].weight.device
        self.stopwatch = Stopwatch(self.device, options.timing)
        self.gathering.begin(self.factor_step, self.intervals.step)

    @property
    def factor_step(self) -> bool:
        """Whether the present step updates the factors, so that hooks are on and `update_curvature` does something."""
        return self.intervals.factors_due

    @torch._disable_dynamo
    def update_curvature(self, logits: Tensor | Sequence[Tensor]) -> None:
        """Take the factors' statistics from the graph of the outputs `logits` `[N, K, ...]`, before `loss.backward()`.

        A network with several outputs whose losses are added gives all of them in one call, in the order of `Fisher.likelihood`.
        InputError when the factors are due and no layer was called, the outputs have no graph or are not as many as the
        likelihoods, or their forward pass has been counted.
        """
        if self.fisher.kind == "empirical" or self.gathering.quiet:
            return
        outputs = as_outputs(logits)
        if not self.factor_step:
            self.gathering.note_rows(outputs)
            return
        with self.stopwatch("curvature"), full_precision(outputs[0]):
            self.gathering.update(outputs)

    def discard(self) -> None:
        """Forget what the present step has gathered from backward passes that are over: the optimiser's step was skipped.

        A forward pass whose backward is still to come stays: many training loops clear the gradients between the two.
        """
        self.gathering.discard_past()

    @torch._disable_dynamo
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

    def directions(self, decay: Mapping[nn.Parameter, float] | None = None) -> Directions | None:
        """P (grad + decay w) of every parameter with a gradient; None, and nothing has changed, when a gradient is not finite.

        InputError when no parameter has a gradient, or `update_curvature` was due and not called.
        """
        gradients = self.gradients(decay)
        return None if gradients is None else self.solve(gradients)

    @torch.no_grad()
    def solve(self, gradients: Directions) -> Directions:
        """P times the gradients that `gradients` gave."""
        with self.stopwatch("preconditioning"), full_precision(next(iter(gradients.values()))):
            return self.blocks.solve(gradients, self.events)

    @torch.no_grad()
    def gradients(self, decay: Mapping[nn.Parameter, float] | None = None) -> Directions | None:
        """grad + decay w, of the mean loss, of every parameter with a gradient, once factors and inverses are those of this step.

        None, and InputError, as `directions`.
        """
        gradients = {t.parameter: dense(t.parameter.grad) for t in self.treatments if t.parameter.grad is not None}
        if not gradients:
            raise InputError("step() before backward(): no parameter of the model has a gradient")
        if self.factor_step:
            self.gathering.check_updated()
        values = list(gradients.values())
        if not _all_finite(values):
            self.events["step with gradients that are not finite, skipped"] += 1
            self.gathering.discard()
            return None
        if self.factor_step:
            with self.stopwatch("factors"), full_precision(values[0]):
                self._commit()
            if self.intervals.last_factors is None:  # not even the first factors are finite
                self.gathering.discard()
                return None
        with self.stopwatch("inverses"):
            due = [name for name in self.intervals.inverses_due() if self.statistics[name].ready]
            self.blocks.invert(due, self.events)
            self.intervals.last_inverse |= dict.fromkeys(due, self.intervals.step)
        self.intervals.step += 1
        self.gathering.begin(self.factor_step, self.intervals.step)
        return self._regularised(gradients, decay or {})

    def _commit(self) -> None:
        used = self.gathering.commit(self.ema_decay, self.events)
        if used:
            self.blocks.correct(used, self.ema_decay)
            self.intervals.last_factors = self.intervals.step
            self.intervals.pace(*self.blocks.work())

    def _regularised(self, gradients: Directions, decay: Mapping[nn.Parameter, float]) -> Directions:
        """Gradients of the mean loss, with weight decay."""
        scale = self.mean_scale
        if scale != 1:
            gradients = {parameter: gradient * scale for parameter, gradient in gradients.items()}
        decayed = {p: gradients[p].add(p, alpha=factor) for p, factor in decay.items() if p in gradients}
        return gradients | decayed

    @property
    def mean_scale(self) -> float:
        """What makes the loss's gradient that of the mean over samples: 1 for reduction "mean"."""
        return self.gathering.mean_scale

    @contextmanager
    def watching_nothing(self) -> Iterator[None]:
        """Forward and backward passes inside leave no trace in the factors; between two steps."""
        with self.gathering.watching_nothing(self.intervals.step):
            yield

    def report(self) -> Report:
        """What every parameter is treated as, with sizes and memory; time by phase; what went wrong how often."""
        rows = parameter_rows(self.treatments, self.layers, self.statistics, self.blocks.inverses)
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
            "events": dict(self.events),
            **self.gathering.state_dict(),
            **self.blocks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        InputError, which names the entry, and nothing has changed, for a state of another architecture or other settings, and
        for one that is not whole: a missing or unknown entry, a wrong type, shape or number format, a number that is not finite.
        """
        self.check_state(state)
        self.continue_with(state)

    def continue_with(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `check_state` has found right: all of it is on the device before any of it is used."""
        inverses, statistics = self.blocks.restored(state), self.gathering.restored(state)
        self.gathering.continue_with(statistics, float(state["samples"]), state["checked"])
        self.blocks.continue_with(inverses, state["dampings"])
        self.events = Counter(state["events"])
        self.intervals.load_state_dict(state["intervals"])
        self.intervals.pace(*self.blocks.work())
        self.gathering.begin(self.factor_step, self.intervals.step)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """InputError that names the first entry of a state that this preconditioner cannot continue with."""
        version = state.get("version") if isinstance(state, Mapping) else None
        if type(version) is not int or version != VERSION:
            raise InputError(f"not a state of K-FAC in version {VERSION}")
        check_entries("kfac", state, ENTRIES, ("groups", "step_rule"))
        self._check_same(state)
        self.intervals.check_state(state["intervals"])
        if not isinstance(state["events"], Mapping):
            raise refused("kfac.events", "is not a dictionary")
        check_list("kfac.events", list(state["events"]), str)
        for name, count in state["events"].items():
            check_count(f"kfac.events.{name}", count)
        self.gathering.check_state(state)
        self.blocks.check_state(state)
        intervals = state["intervals"]
        if intervals["last_factors"] is None and any({"B", "S"} & one.keys() for one in state["statistics"].values()):
            raise refused("kfac.intervals.last_factors", "is None, and there are factors")
        if intervals["last_inverse"].keys() != state["inverses"].keys():
            raise refused("kfac.intervals.last_inverse", "does not name the layers that have an inverse")

    def _check_same(self, state: Mapping[str, Any]) -> None:
        """InputError that names the first difference between a state's parameters and treatments and those of the model."""
        own = {t.name: list(t.parameter.shape) for t in self.treatments}
        theirs, treatments = state["parameters"], state["treatments"]
        check_entries("kfac.parameters", theirs, (), theirs if isinstance(theirs, Mapping) else ())
        for name, shape in theirs.items():
            check_list(f"kfac.parameters.{name}", shape, int)
        for name in [*own, *theirs]:
            if own.get(name) != theirs.get(name):
                raise InputError(
                    f"state of another architecture: {name} is {theirs.get(name, 'missing')} in the state and "
                    f"{own.get(name, 'missing')} in the model"
                )
        check_entries("kfac.treatments", treatments, own)
        check_list("kfac.treatments and sharing", [*treatments.values(), state["sharing"]], str)
        for t in self.treatments:
            if treatments[t.name] != t.how:
                raise InputError(f"state of other settings: {t.name} was {treatments[t.name]}, and is {t.how} now")
        if state["sharing"] != self.sharing:
            raise InputError(f"state of other settings: sharing was {state['sharing']!r}, and is {self.sharing!r} now")


def dense(gradient: Tensor | None) -> Tensor:
    """The gradient of an embedding may be sparse."""
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def _all_finite(tensors: list[Tensor]) -> bool:
    """One pass over the numbers, one answer to the host; norms of 16 bits would overflow."""
    norms = torch._foreach_norm([tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors])
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms]).sum()))
