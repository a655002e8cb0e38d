"""What goes into the layers of a model and what comes back at their outputs, in the steps that update the factors.

While capturing, a forward hook records each use of a layer: its input, and the node of the graph that made its output, which
is the same after an operation in place. `from_logits` pulls given gradients back to these nodes; with `from_backward`, the
user's own backward delivers them. The model, its gradients and random numbers are never changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from secondorder.errors import InputError
from secondorder.kfac.graph import last_of
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.statistics import LayerStatistics


@dataclass(eq=False)
class Use:
    """One call of a layer: its input, in which forward of the model, and the state of the input then."""

    layer: KroneckerLayer
    input: Tensor
    version: int
    forward: int
    awaiting: RemovableHandle | None = None

    def check(self) -> None:
        """InputError if the input has changed since."""
        if self.input._version != self.version:
            raise InputError(
                f"the input of layer {self.layer.name} was changed in place after the layer had used it; use inplace=False there"
            )


class Hook:
    """A hook of a module that stays behind when the module is copied or pickled: the copy gets one that does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """Call the function."""
        self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """Do nothing."""


Listener = Callable[[KroneckerLayer, Sequence[Use], Sequence[Tensor], Tensor], None]
"""Called when a backward pass of the user has a layer's gradient: the uses it went through, g at each output, weight gradient."""


class Capture:
    """Fills the statistics of layers from forward and backward passes.

    model: its calls tell several forwards, whose samples are more samples, from several uses of a layer in one forward, which
    are more positions; without it all uses of a layer in one graph count as one forward.
    """

    def __init__(
        self,
        layers: Sequence[KroneckerLayer],
        statistics: Mapping[str, LayerStatistics],
        model: nn.Module | None = None,
    ) -> None:
        self.layers = list(layers)
        self.statistics = statistics
        self.model = model
        self.active = False
        self.uses = 0
        self.pulling = False
        self._forward = 0
        self._delivering = False
        self._handles: list[RemovableHandle] = []
        self._listeners: list[Listener] = []
        self._recorded: list[tuple[Use, GradientEdge]] = []
        self._arrived: dict[KroneckerLayer, list[tuple[int, Use, Tensor]]] = {}
        self._awaited: set[Use] = set()

    def start(self) -> None:
        """Record from now on."""
        self.stop()
        self.active = True
        for layer in self.layers:
            for module in layer.modules:
                hook = Hook(self._recorder(layer))
                self._keep(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        if self.model is not None:
            self._keep(self.model.register_forward_pre_hook(Hook(self._count_forward)))

    def stop(self) -> None:
        """Remove all hooks and forget everything recorded; what the statistics have, they keep."""
        self.forget()
        for handle in self._handles:
            handle.remove()
        self._handles, self._listeners = [], []
        self.active = self._delivering = False

    def forget(self) -> None:
        """Forget everything recorded and go on recording: between two steps."""
        for use in [*self._awaited, *(use for use, _ in self._recorded)]:
            if use.awaiting is not None:
                use.awaiting.remove()
        self._recorded, self._arrived, self._awaited, self.uses = [], {}, set(), 0

    def forget_past(self) -> None:
        """Forget the uses whose backward by the user is over."""
        self._recorded = [pair for pair in self._recorded if pair[0].awaiting is None or pair[0] in self._awaited]

    def from_logits(self, logits: Tensor, gradients: Tensor) -> None:
        """Pull the gradients `[V, *logits.shape]` back to the recorded uses below `logits`, which are then forgotten."""
        recorded, self._recorded = self._recorded, []
        reached = self._pulled_back(logits, gradients, recorded)
        self._recorded = [pair for pair, hit in zip(recorded, reached, strict=True) if not hit]
        found = [use for (use, _), hit in zip(recorded, reached, strict=True) if hit]
        del recorded
        for use in found:
            use.check()
        for uses in _forwards(found):
            self.statistics[uses[0].layer.name].add_inputs([use.input for use in uses])

    def from_backward(self) -> None:
        """Let the user's own backward fill the statistics, also for uses already recorded."""
        if not self.has(self._fill):
            self.listen(self._fill)

    def listen(self, listener: Listener) -> None:
        """Call the listener for each layer whose weight gets a gradient in a backward of the user."""
        if not self._delivering:
            self._delivering = True
            for layer in self.layers:
                self._keep(layer.weight.register_hook(self._deliverer(layer)))
        self._listeners.append(listener)
        for use, output in self._recorded:
            self._await(use, output)

    def has(self, listener: Listener) -> bool:
        """Whether this listener is called."""
        return listener in self._listeners

    def dismiss(self, listener: Listener) -> None:
        """Call this listener no more."""
        if self.has(listener):
            self._listeners.remove(listener)

    def _keep(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def _count_forward(self, module: nn.Module, args: Any) -> None:
        self._forward += 1

    def _recorder(self, layer: KroneckerLayer) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return
            recomputed = torch._C._current_graph_task_id() != -1
            if recomputed and not self.has(self._fill):
                return  # a checkpointed segment: the graph of its first forward is the one that counts
            x = args[0] if args else next(iter(kwargs.values()))
            use = Use(layer, x.detach(), x._version, self._forward)
            edge = get_gradient_edge(output)
            if self._listeners:
                self._await(use, edge)
            self._recorded.append((use, edge))
            self.uses += 1

        return record

    def _pulled_back(
        self, logits: Tensor, gradients: Tensor, recorded: Sequence[tuple[Use, GradientEdge]]
    ) -> list[bool]:
        """Add the gradients at the outputs to the statistics, each as it comes; which uses were reached.

        A gradient is freed as soon as those of all uses of the layer in the same forward are there: together they are as large
        as the outputs of all layers.
        """
        if not recorded or logits.grad_fn is None:
            return [False] * len(recorded)
        ends = last_of(logits.grad_fn, [edge.node for _, edge in recorded])
        pull = Pull(self.statistics, [use for use, _ in recorded])
        handles = [
            edge.node.register_prehook(partial(_taken, pull, use, edge.output_nr))
            for use, edge in recorded
            if edge.node not in ends
        ]
        last = [(use, edge) for use, edge in recorded if edge.node in ends]
        self.pulling = True
        try:
            for gradient in gradients if last else ():
                given = gradient.to(logits.dtype)
                found = torch.autograd.grad(logits, [edge for _, edge in last], given, retain_graph=True)
                for (use, _), g in zip(last, found, strict=True):
                    pull.take(use, g)
                pull.finish()
        except RuntimeError as error:
            for own in self.statistics.values():  # nothing half counted
                own.discard()
            for use, _ in recorded:
                use.check()
            raise _explained(error) from error
        finally:
            self.pulling = False
            for handle in handles:
                handle.remove()
        return [use in pull.reached for use, _ in recorded]

    def _await(self, use: Use, output: GradientEdge) -> None:
        """Note the gradient at the output when a backward of the user brings it."""
        if use.awaiting is not None:
            return
        index = output.output_nr

        def arrive(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[index]
            if g is not None and not self.pulling:
                self._arrived.setdefault(use.layer, []).append((torch._C._current_graph_task_id(), use, g))

        use.awaiting = output.node.register_prehook(arrive)
        self._awaited.add(use)

    def _deliverer(self, layer: KroneckerLayer) -> Callable[[Tensor], None]:
        def deliver(weight_gradient: Tensor) -> None:
            backward = torch._C._current_graph_task_id()
            arrived = [(use, g) for task, use, g in self._arrived.pop(layer, []) if task == backward]
            done = {use for use, _ in arrived}
            self._awaited -= done
            if self.has(self._fill):
                self._recorded = [pair for pair in self._recorded if pair[0] not in done]
            with torch.no_grad(), torch.autocast(weight_gradient.device.type, enabled=False):
                for listener in self._listeners:
                    listener(layer, [use for use, _ in arrived], [g for _, g in arrived], weight_gradient)

        return deliver

    def _fill(
        self, layer: KroneckerLayer, uses: Sequence[Use], gradients: Sequence[Tensor], weight_gradient: Tensor
    ) -> None:
        by_use = dict(zip(uses, gradients, strict=True))
        for together in _forwards(uses):
            for use in together:
                use.check()
            inputs = [use.input for use in together]
            self.statistics[layer.name].add_inputs(inputs)
            self.statistics[layer.name].add_gradients(inputs, [by_use[use][None] for use in together])


class Pull:
    """Gradients of one backward pass on their way into the statistics."""

    def __init__(self, statistics: Mapping[str, LayerStatistics], uses: Sequence[Use]) -> None:
        self.statistics = statistics
        self.reached: set[Use] = set()
        self._together = {use: uses for uses in _forwards(uses) for use in uses}
        self._here: dict[Use, Tensor] = {}

    def take(self, use: Use, g: Tensor) -> None:
        """The gradient at the output of a use; into the statistics when those of the uses that go with it are there."""
        self.reached.add(use)
        self._here[use] = g
        if all(other in self._here for other in self._together[use]):
            self._add(self._together[use])

    def finish(self) -> None:
        """Into the statistics with those whose companions are not below the logits."""
        for uses in _forwards(list(self._here)):
            self._add(uses)

    @torch.no_grad()
    def _add(self, uses: Sequence[Use]) -> None:
        gradients = [self._here.pop(use)[None] for use in uses]
        with torch.autocast(gradients[0].device.type, enabled=False):
            self.statistics[uses[0].layer.name].add_gradients([use.input for use in uses], gradients)


def _taken(pull: Pull, use: Use, index: int, gradients: tuple[Tensor | None, ...]) -> None:
    """Of a node that the backward pass goes through."""
    g = gradients[index]
    if g is not None:
        pull.take(use, g)


def _forwards(uses: Sequence[Use]) -> list[list[Use]]:
    """The uses of each layer in each forward."""
    groups: dict[tuple[KroneckerLayer, int], list[Use]] = {}
    for use in uses:
        groups.setdefault((use.layer, use.forward), []).append(use)
    return list(groups.values())


def _explained(error: RuntimeError) -> Exception:
    if "use_reentrant" in str(error):
        return InputError(
            "torch.utils.checkpoint with use_reentrant=True hides layers from K-FAC; use use_reentrant=False"
        )
    if "backward through the graph a second time" in str(error):
        return InputError("update_curvature(logits) after loss.backward(): it needs the graph; call it before")
    return error
