"""The K-FAC preconditioner: P grad with P = (B kron A + lambda I)^-1 for each layer, B and A running means of its factors."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.kfac.blocks import Blocks, Directions
from secondorder.kfac.distributed import Processes
from secondorder.kfac.gathering import Gathering
from secondorder.kfac.layers import Treatment
from secondorder.kfac.model_layers import ModelLayers
from secondorder.kfac.options import Damping, Fisher, Options, check_number, check_sharing
from secondorder.kfac.outputs import as_outputs
from secondorder.kfac.report import Report, Stopwatch, parameter_rows
from secondorder.kfac.schedule import Intervals
from secondorder.kfac.state import check_state, state_of, treats_otherwise
from secondorder.matrix_power.transforms import full_precision


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
        self.model_layers = ModelLayers(model, approximation, sharing, options)
        self.layers = self.model_layers.layers
        self.processes = Processes(options.synchronise)
        layers = list(self.layers.values())
        self.gathering = Gathering(layers, model, self.fisher, self.processes, options.check)
        self.statistics = self.gathering.statistics
        self.blocks = Blocks(self.layers, self.statistics, self.damping, self.processes)
        costs = self.blocks.costs
        self.intervals = Intervals(factor_interval, inverse_interval, options.warm_up, options.stagger, costs)
        self.events: Counter[str] = Counter()
        self.stopwatch = Stopwatch(self.device, options.timing)
        self._begin()

    @property
    def treatments(self) -> list[Treatment]:
        """What every parameter of the model is treated as."""
        return self.model_layers.treatments

    @property
    def device(self) -> torch.device:
        """The device of the model's weights, that of the first layer."""
        return self.blocks.device

    @property
    def factor_step(self) -> bool:
        """Whether the present step updates the factors, so that hooks are on and `update_curvature` does something."""
        return self.gathering.due

    def follow_model(self, between_steps: bool = False) -> Collection[nn.Parameter]:
        """Take in how the model has changed since the last step; the parameters that are treated otherwise from now on.

        Parameters that have become trainable, and those of modules that were put in, are adopted: as layers with fresh
        statistics, which they get in the next step and till then go along their gradient, or with the fallback. Statistics and
        inverses follow the number format and the device of the weights. `report()` has an event for each.

        between_steps: the forward pass of the present step is still to come. Otherwise, if modules came or went, it updates no
        factors: its passes were not those of the model as it is now. InputError as at construction.
        """
        step = self.intervals.step
        if self.model_layers.moved:
            self.model_layers.note_formats()
            self.gathering.follow_weights()
            self.blocks.follow_weights()
            self.stopwatch.device = self.device
            self.events[f"the model has another number format or device since step {step}"] += 1
        if not self.model_layers.changed:
            return ()
        change = self.model_layers.read_again(step)
        self.gathering.adopt(self.layers, change.fresh)
        self.blocks.adopt(change.fresh)
        self.intervals.adopt(self.blocks.costs, change.fresh, step if between_steps else step + 1)
        self.events[change.event] += 1
        if between_steps:
            self._begin("the model changed")
        elif change.modules:
            self.gathering.begin(False, step)
        return change.parameters

    def _begin(self, since: str = "the last step") -> None:
        """Watch the passes of the present step, if it updates the factors."""
        self.gathering.begin(self.intervals.factors_due, self.intervals.step, since)

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
        if self.factor_step:
            self.follow_model()
        if not self.factor_step:
            self.gathering.note_rows(outputs)
            return
        with self.stopwatch("curvature"), full_precision(outputs[0]):
            self.gathering.update(outputs)

    def damp(self, dampings: Mapping[str, float]) -> None:
        """Use these dampings, one for each layer by its name, from now on; without this all have the one of the construction."""
        self.blocks.dampings = {name: dampings[name] for name in self.layers}

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
        self.follow_model()
        gradients = self.gradients(decay)
        return None if gradients is None else self.solve(gradients)

    @torch.no_grad()
    def solve(self, gradients: Directions) -> Directions:
        """P times the gradients, by parameter, that `gradients` gave; what goes wrong is counted in `report()`."""
        with self.stopwatch("preconditioning"), full_precision(next(iter(gradients.values()))):
            return self.blocks.solve(gradients, self.events)

    @torch.no_grad()
    def gradients(self, decay: Mapping[nn.Parameter, float] | None = None) -> Directions | None:
        """grad + decay w, of the mean loss, of every parameter with a gradient, once factors and inverses are those of this step.

        Parameters that are frozen have none. None, and InputError, as `directions`.
        """
        trainable = [t.parameter for t in self.treatments if t.parameter.requires_grad]
        gradients = {parameter: dense(parameter.grad) for parameter in trainable if parameter.grad is not None}
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
        self._begin()
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
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        InputError, which names the entry, and nothing has changed, for a state of another architecture or other settings, and
        for one that is not whole: a missing or unknown entry, a wrong type, shape or number format, a number that is not finite.
        """
        if treats_otherwise(state, self.treatments):  # it may be of the model as it has become since
            self.follow_model(between_steps=True)
        check_state(self, state)
        self.continue_with(state)

    def continue_with(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `check_state` has found right: all of it is on the device before any of it is used."""
        inverses, statistics = self.blocks.restored(state), self.gathering.restored(state)
        self.gathering.continue_with(statistics, float(state["samples"]), state["checked"])
        self.blocks.continue_with(inverses, state["dampings"])
        self.events = Counter(state["events"])
        self.intervals.load_state_dict(state["intervals"])
        self.intervals.pace(*self.blocks.work())
        self._begin("load_state_dict()")


def dense(gradient: Tensor | None) -> Tensor:
    """The gradient of a parameter as a dense tensor; that of an embedding may be sparse."""
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def _all_finite(tensors: list[Tensor]) -> bool:
    """One pass over the numbers, one answer to the host; norms of 16 bits would overflow."""
    norms = torch._foreach_norm([tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors])
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms]).sum()))
