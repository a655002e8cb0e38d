"""The Kronecker factors of all layers, from the passes of the steps that update them to running means."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.kfac.capture import Capture
from secondorder.kfac.capture.hooks import Hook, is_pulling
from secondorder.kfac.diagonal_statistics import layer_statistics
from secondorder.kfac.distributed import Processes
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.options import Fisher
from secondorder.kfac.outputs import as_outputs, batches_of, starts_of
from secondorder.kfac.scaling_check import ScalingCheck, known_scale
from secondorder.kfac.state_check import check_entries, check_float, refused
from secondorder.kfac.statistics import LayerStatistics

UNCOMPILED = (
    "a compiled model ignores hooks: leave torch.compiler.set_stance('force_eager') on in steps with `factor_step`, and "
    "call no exported or traced copy of the model"
)


class Gathering:
    """Watches the passes of a factor step (`begin`, `update`), and commits what it found to the statistics of each layer.

    samples: N of the last commit, of all processes: the rows of the outputs, or, where the model ("empirical") has no output of
    rows, the smallest batch of a layer; a linear layer on flattened positions has more rows than there are samples.
    """

    def __init__(
        self, layers: Sequence[KroneckerLayer], model: nn.Module, fisher: Fisher, processes: Processes, check: bool
    ) -> None:
        self.fisher, self.processes = fisher, processes
        self.layers, self._checks, self._checked = list(layers), check, not check
        self.statistics = {layer.name: layer_statistics(layer) for layer in layers}
        self.samples = 0.0
        self.capture = Capture(layers, self.statistics, model)
        self.check: ScalingCheck | None = ScalingCheck(layers) if check else None
        self.generator = torch.Generator()
        self.quiet = False
        self._rows = 0
        self._backward_seen = False
        self._noted, self._noting, self._unchecked = 0, False, False

    def adopt(self, layers: Mapping[str, KroneckerLayer], fresh: Collection[str]) -> None:
        """Go on with these layers, of which the `fresh` ones begin anew; they are watched, and checked, from `begin` on."""
        self.layers = list(layers.values())
        kept = {
            name: layer_statistics(layer) if name in fresh else self.statistics[name] for name, layer in layers.items()
        }
        self.statistics.clear()
        self.statistics.update(kept)
        self.capture.replace_layers(self.layers)
        self._unchecked = self._checks and bool(fresh)

    def follow_weights(self) -> None:
        """Take the devices and the number formats of the weights, which have changed them."""
        for statistics in self.statistics.values():
            statistics.follow_weight()

    def begin(self, due: bool, step: int, since: str = "the last step") -> None:
        """Hooks on for a step that updates the factors, off otherwise; the labels drawn in it depend on seed, step, process.

        Args:
            since: what the passes of the step have to come after, for messages.
        """
        self._discard()
        self.due, self._since = due, since
        if self._unchecked:
            self._replace_check(ScalingCheck(self.layers))
            self._checked = self._unchecked = False
        if not due:
            self._stop()
            return
        entropy = [self.fisher.seed % 2**64, step, self.processes.rank]
        self.generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        if self.capture.active:
            self.capture.forget()
        else:
            self.capture.start()
        if self.fisher.kind == "empirical":
            self.capture.from_backward()
        elif self.fisher.reduction == "sum":
            self.capture.watch_weights()
        if self.check is not None:
            self.check.watch(self.capture)

    def update(self, logits: Tensor | Sequence[Tensor]) -> None:
        """Statistics from the graph of the outputs, of several heads in one call.

        InputError when they have none, or it holds no layer, or a forward pass that has been counted, or when the Fisher is that
        of another number of outputs.
        """
        outputs = as_outputs(logits)
        fishers = dict(zip(outputs, self.fisher.outputs(len(outputs)), strict=True))
        if self._backward_seen and self.capture.gradients_cleared():
            self.discard_past()
        if not any(z.requires_grad for z in outputs):
            raise InputError(
                "update_curvature(logits): the logits have no graph; call it outside torch.no_grad(), before backward()"
            )
        if not self.capture.uses:
            raise InputError(
                f"update_curvature(logits): no layer of the model was called since {self._since}; {UNCOMPILED}"
            )
        below = [(z, found) for z in outputs if (found := self.capture.below(z))]
        if not below:
            raise InputError(
                f"update_curvature(logits): no layer that was called since {self._since} is below these logits; pass outputs "
                "of the model's last forward pass"
            )
        batches = batches_of(below)
        if self.check is not None:
            for _, together in batches:
                batch = object()
                for z in together:
                    self.check.watch(self.capture, z, fishers[z][0], batch, fishers[z][1])
        uses = {output.call: output for _, found in below for output in found}
        heads = {z: fishers[z] for z, _ in below}
        ordered = sorted(uses.values(), key=lambda output: output.call.order)
        self.capture.pull(list(heads), ordered, starts_of(heads, self.fisher.kind, self.generator))
        self._rows += sum(rows for rows, _ in batches)
        self._watch_backward(heads)

    def note_rows(self, logits: Tensor | Sequence[Tensor]) -> None:
        """N of a step that does not update the factors, for a summed loss; several outputs in one call are of one forward.

        Several processes keep the N of the last update, which they agree on.
        """
        outputs = as_outputs(logits)
        if self.fisher.reduction == "mean" or self.processes.world > 1:
            return
        self._noted = (self._noted if self._noting else 0) + max(map(len, outputs))
        self._noting = True
        self._watch_backward([z for z in outputs if z.requires_grad])

    def _watch_backward(self, outputs: Iterable[Tensor]) -> None:
        self._backward_seen = False
        for z in outputs:
            z.register_hook(Hook(self, Gathering._note_backward))

    def _note_backward(self, gradient: Tensor) -> None:
        if not is_pulling():
            self._backward_seen = True

    def discard_past(self) -> None:
        """Forget what came from backward passes that are over; a forward pass whose backward is still to come stays."""
        if self.fisher.kind == "empirical" or self._backward_seen:
            self._discard()
        self.capture.forget_gradients()
        if self.check is not None:
            self.check.clear()

    def discard(self) -> None:
        """Forget all that the present step has gathered."""
        self._discard()
        self.capture.forget()
        if self.check is not None:
            self.check.clear()

    def check_updated(self) -> None:
        """InputError unless `update` was called in this step, where it is needed: for every batch of a summed loss."""
        if self.fisher.kind == "empirical":
            return
        if not self._rows:
            raise InputError(
                f"this step updates the factors: call update_curvature(logits) between the forward pass and loss.backward() "
                f"(fisher {self.fisher.kind!r}), or use fisher='empirical'; there was none since {self._since}"
            )
        if self.fisher.reduction == "sum" and self.capture.uncounted:
            raise InputError(
                "update_curvature was not called for every forward pass whose gradients are accumulated in this step, and with "
                "reduction='sum' all samples have to be known: call it between each forward and its backward pass"
            )

    def commit(self, ema_decay: float, events: Counter[str]) -> list[LayerStatistics]:
        """Take this step, of all processes, into the running means; empty, and nothing has changed, when it is not finite.

        InputError when activations and gradients do not reproduce the weights' gradients, and when no layer was used.
        """
        if self.check is not None and self.check.verify(self.fisher):
            self.check, self._checked = None, True
        together = self.processes.world > 1
        used = [statistics for statistics in self.statistics.values() if together or statistics.used]
        if not used:
            raise InputError(
                f"this step updates the factors, and no layer was called and had its backward pass since {self._since}; "
                + UNCOMPILED
            )
        rows = float(self._rows if self.fisher.kind != "empirical" else self.capture.rows or 0)
        if together:
            rows = self._exchanged(used, rows)
        if not bool(torch.stack([statistics.is_finite() for statistics in used]).all()):
            events["factors that are not finite, dropped"] += 1
            self._discard()
            return []
        smallest = min(one.staged_samples for one in used if one.staged_samples > 0)
        self.samples = rows if rows > 0 else smallest
        self._noted = 0
        for statistics in used:
            statistics.commit(ema_decay, self._gradient_scale)
        return used

    def _exchanged(self, used: Sequence[LayerStatistics], rows: float) -> float:
        """Sum what is staged, and the number of rows, which is returned, over the processes."""
        total = torch.tensor(rows, dtype=self.layers[0].dtype)
        self.processes.sum_in_one_bucket([tensor for one in used for tensor in one.staged_tensors()] + [total])
        for statistics in used:
            if not statistics.dense:
                statistics.replace_staged_rows(self.processes.gathered(statistics.staged_rows()))
        return float(total)

    @property
    def _gradient_scale(self) -> float:
        """What turns the sum of g g^T into the mean over samples of the samples' own gradients.

        The gradients of `mc` and `exact` are the samples' own. Those of an empirical mean loss are 1/N of them, with W
        processes W/N, and a scaled loss's are as many times larger.
        """
        N, W = self.samples, self.processes.world
        if self.fisher.kind != "empirical":
            return 1 / N
        return (N / W**2 if self.fisher.reduction == "mean" else 1 / N) / known_scale(self.fisher) ** 2

    @property
    def mean_scale(self) -> float:
        """What makes the loss's gradient that of the mean over samples; several processes have the mean of their sums."""
        return 1.0 if self.fisher.reduction == "mean" else self.processes.world / max(1.0, self._noted or self.samples)

    @contextmanager
    def watching_nothing(self, step: int) -> Iterator[None]:
        """Passes inside leave no trace; between two steps, of which `step` is the next."""
        self._stop()
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False
            self.begin(self.due, step)

    def state_dict(self) -> dict[str, Any]:
        """Factors, number of samples, and whether the scaling is verified."""
        statistics = {name: statistics.state_dict() for name, statistics in self.statistics.items()}
        return {"statistics": statistics, "samples": self.samples, "checked": self._checked}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """InputError unless a state has factors of all layers, of their sizes."""
        check_float("kfac.samples", state["samples"])
        if not isinstance(state["checked"], bool):
            raise refused("kfac.checked", f"is {state['checked']!r:.40}, not True or False")
        check_entries("kfac.statistics", state["statistics"], self.statistics)
        for name, own in self.statistics.items():
            own.check_state(f"kfac.statistics.{name}", state["statistics"][name])

    def restored(self, state: Mapping[str, Any]) -> dict[str, LayerStatistics]:
        """The statistics in a state that `check_state` has found right, on the device."""
        found = {layer.name: layer_statistics(layer) for layer in self.layers}
        for name, statistics in found.items():
            statistics.load_state_dict(state["statistics"][name])
        return found

    def continue_with(self, statistics: Mapping[str, LayerStatistics], samples: float, checked: bool) -> None:
        """Use these statistics of the layers, by name, and counters in place of the present ones.

        Args:
            samples: that the factors have seen. checked: whether the check of the first factor step is over.
        """
        for name, own in self.statistics.items():
            own.continue_with(statistics[name])
        self.samples, self._checked = samples, checked
        self._replace_check(None if self._checked else ScalingCheck(self.layers))

    def _replace_check(self, check: ScalingCheck | None) -> None:
        if self.check is not None:
            self.check.stop()
        self.check = check

    def _stop(self) -> None:
        self.capture.stop()
        if self.check is not None:
            self.check.stop()
            self.check.clear()

    def _discard(self) -> None:
        for statistics in self.statistics.values():
            statistics.discard()
        self._rows, self._backward_seen, self._noting = 0, False, False
