"""Records of the calls of a model's layers, and their way into the statistics, by K-FAC's own passes or those of the user.

While capturing, a forward hook records each call of a layer: its input, with the node of the graph that made its output, which
is the same after an operation in place. The graph keeps the record, so that it lives as long as the graph of that forward and
no longer. `from_logits` pulls given gradients back to these nodes; with `from_backward`, the user's own backward delivers
them. The model, its gradients and random numbers are never changed.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder.curvature.matrix_free.layer_uses import read_call
from secondorder.errors import InputError
from secondorder.kfac.capture.attention import AttentionWatch
from secondorder.kfac.capture.calls import Forward, LayerCall, Output, by_forward, rows_of
from secondorder.kfac.capture.held import HeldGradients
from secondorder.kfac.capture.hooks import Hook, Uncompiled, handles_of, is_pulling, remove
from secondorder.kfac.capture.pull import nodes_below, pull
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.statistics import LayerStatistics


class Listener(Protocol):
    """What watches the gradients that backward passes of the user bring to the weights."""

    def compare(
        self, layer: KroneckerLayer, calls: Sequence[LayerCall], gradients: Sequence[Tensor], weight_grad: Tensor
    ) -> None:
        """A backward pass has a layer's gradient: the calls it went through, g at each output, the gradient of the weight."""

    def forget(self, layers: Sequence[KroneckerLayer]) -> None:
        """What earlier backward passes have brought to these weights has been cleared."""


class Capture:
    """Fills the statistics of layers from forward and backward passes.

    model: its calls tell several forwards, whose samples are more samples, from several calls of a layer in one forward, which
    are more positions; without it all calls of a layer in one graph count as one forward.
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
        self.differentiable: set[int] = set()
        """Backward passes of the user with create_graph=True."""
        self._key = object()
        self._forward = Forward()
        self._order = 0
        self._step = 1
        self._filling = False
        self._listener: weakref.ref[Any] | None = None
        self._handles: list[Any] = handles_of(self)
        self._recorded: weakref.WeakSet[LayerCall] = weakref.WeakSet()
        self._waiting: weakref.WeakSet[LayerCall] = weakref.WeakSet()  # whose gradient may come
        self._hooked: set[KroneckerLayer] = set()  # those with hooks on their weights
        self._arrived: dict[KroneckerLayer, list[tuple[int, LayerCall, Tensor]]] = {}
        self._backward = -1
        self._held = HeldGradients()

    @property
    def rows(self) -> int | None:
        """Rows of the outputs of the forward passes whose gradients have come to weights; None where an output has no rows."""
        return self._held.rows

    @property
    def uncounted(self) -> bool:
        """Whether the gradient of a forward came to weights that has not entered the statistics from logits."""
        return not all(forward.counted for forward in self._held.forwards)

    def start(self) -> None:
        """Set the hooks that record the calls of all layers and the forward passes of the model, from now on."""
        self.stop()
        self.active = True
        self._handles.append(Uncompiled())
        for layer in self.layers:
            for module in layer.modules:
                hook = Hook(self, Capture._record, layer)
                self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._handles.append(AttentionWatch({layer: Hook(self, Capture._record, layer) for layer in self.layers}))
        if self.model is not None:
            self._handles.append(self.model.register_forward_pre_hook(Hook(self, Capture._begin_forward)))
            self._handles.append(self.model.register_forward_hook(Hook(self, Capture._end_forward)))

    def replace_layers(self, layers: Sequence[KroneckerLayer]) -> None:
        """Record the calls of these layers instead, from the next `start` on."""
        self.layers, self.active = list(layers), False

    def stop(self) -> None:
        """Remove all hooks and forget everything recorded; what the statistics have, they keep."""
        self.forget()
        remove(self._handles)
        self._listener, self._hooked = None, set()
        self.active = self._filling = False

    def forget(self) -> None:
        """Forget everything recorded and go on recording: between two steps."""
        for call in list(self._waiting):
            self._drop(call)
        self._arrived, self.uses, self.differentiable = {}, 0, set()
        self._held.clear()
        self._forward = Forward()
        self._step += 1

    def forget_gradients(self) -> None:
        """The gradients of the weights have been cleared: forget the calls whose backward by the user is over."""
        for call in list(self._recorded):
            if call.over:
                self._drop(call)
        self._held.clear()

    def from_logits(self, logits: Tensor, gradients: Tensor) -> None:
        """Pull the gradients `[V, *logits.shape]` back to the recorded calls below `logits`, which are then forgotten."""
        self.pull([logits], self.below(logits), ([(logits, gradient)] for gradient in gradients))

    def below(self, logits: Tensor) -> list[Output]:
        """The recorded calls that logits depend on; InputError for a forward that `pull` has been through."""
        nodes = [] if logits.grad_fn is None else nodes_below(logits.grad_fn)
        found = [Output(call, GradientEdge(node, index)) for node in nodes for call, index in self._on(node)]
        if any(call.pulled_in == self._step for call, _ in found):
            raise InputError(
                "update_curvature(logits): a forward pass below these logits has been counted; call it once per forward, with "
                "all outputs in one call: update_curvature([first, second])"
            )
        return sorted((output for output in found if output.call.recorded), key=lambda output: output.call.order)

    def pull(
        self, logits: Sequence[Tensor], outputs: Sequence[Output], passes: Iterable[Sequence[tuple[Tensor, Tensor]]]
    ) -> None:
        """Statistics of the calls `outputs` below `logits`, by backward passes.

        Each of the `passes` starts at some of the logits, with a gradient for each, given as (logits, gradient) pairs.
        """
        pull(self.statistics, logits, outputs, passes)
        calls = [call for call, _ in outputs]
        for call in calls:
            call.check()
        for group in by_forward(calls):
            self.statistics[group[0].layer.name].add_inputs([call.input for call in group])
        for call in calls:
            self._recorded.discard(call)
            call.recorded, call.pulled_in, call.forward.counted = False, self._step, True
            if self.listener is None:
                self._release(call)

    def from_backward(self) -> None:
        """Let the user's own backward fill the statistics, also for calls already recorded."""
        self._filling = True
        self.watch_weights()

    def watch_weights(self) -> None:
        """Know the forwards whose gradients the user's backward passes bring to the weights, and which have been cleared."""
        for layer in self.layers:
            self._hook_weight(layer)

    def listen(self, listener: Listener | None) -> None:
        """Tell this one about the backward passes of the user, or none; like all hooks, this does not keep it alive."""
        self._listener = None if listener is None else weakref.ref(listener)
        if listener is not None:
            self.watch_weights()

    @property
    def listener(self) -> Listener | None:
        """The one that is told about the backward passes of the user."""
        return None if self._listener is None else self._listener()

    def gradients_cleared(self) -> bool:
        """Whether what the user's backward passes brought to the weights is no longer in their gradients."""
        if self._hooked:
            return self._held.all_cleared()
        gradients = [layer.weight.grad for layer in self.layers if layer.weight.grad is not None]
        return not any(bool(gradient.any()) for gradient in gradients)

    def _on(self, node: Node) -> list[tuple[LayerCall, int]]:
        records: dict[Any, Any] = cast(Any, node).metadata
        return records.get(self._key, [])

    def _drop(self, call: LayerCall) -> None:
        self._recorded.discard(call)
        call.recorded = False
        self._release(call)

    def _release(self, call: LayerCall) -> None:
        self._waiting.discard(call)
        call.release()

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        self._forward = Forward()
        if torch._C._current_graph_task_id() == -1:
            self._arrived.clear()  # of backward passes that did not go on to the weights

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forward.rows = rows_of(output)

    def _record(
        self, layer: KroneckerLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        seen = read_call(args, kwargs, output)
        recomputed = torch._C._current_graph_task_id() != -1
        if seen is None or (recomputed and not self._filling):
            return  # a checkpointed segment: the graph of its first forward is the one that counts
        x, version, edge = seen
        layer.kind.check_call(x, output)
        self._order += 1
        call = LayerCall(x, version, layer, self._forward, self._order)
        cast(Any, edge.node).metadata.setdefault(self._key, []).append((call, edge.output_nr))
        call.handles.append(edge.node.register_prehook(Hook(self, Capture._arrive, call, edge.output_nr)))
        self._recorded.add(call)
        self._waiting.add(call)
        self.uses += 1
        if self._hooked:
            self._hook_weight(layer)

    def _hook_weight(self, layer: KroneckerLayer) -> None:
        weight = layer.weight
        if layer not in self._hooked and weight.requires_grad:
            self._hooked.add(layer)
            self._handles.append(weight.register_hook(Hook(self, Capture._on_gradient, layer)))
            hook = Hook(self, Capture._on_accumulated, layer)
            self._handles.append(weight.register_post_accumulate_grad_hook(hook))

    def _arrive(self, call: LayerCall, index: int, gradients: tuple[Tensor | None, ...]) -> None:
        """The gradient at the output of a call, in a backward of the user."""
        g = gradients[index]
        if g is None or is_pulling():
            return
        backward = torch._C._current_graph_task_id()
        if torch.is_grad_enabled():
            self.differentiable.add(backward)
        if call.layer not in self._hooked:
            return
        if backward != self._backward:
            self._backward = backward
            self._drop_cleared(call.layer)
        self._arrived.setdefault(call.layer, []).append((backward, call, g))

    def _drop_cleared(self, layer: KroneckerLayer) -> None:
        """A backward pass begins with this layer: forget what earlier ones brought whose gradients have been cleared since."""
        cleared = self._held.drop_cleared(layer)
        for own in cleared if self._filling else ():
            self.statistics[own.name].discard()
        if cleared and self.listener is not None:
            self.listener.forget(cleared)

    def _on_gradient(self, layer: KroneckerLayer, weight_gradient: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        arrived = [(call, g) for task, call, g in self._arrived.pop(layer, []) if task == backward]
        if is_pulling():
            return
        calls, gradients = [call for call, _ in arrived], [g for _, g in arrived]
        with torch.no_grad(), torch.autocast(weight_gradient.device.type, enabled=False):
            if self._filling:
                self._fill(layer, calls, gradients)
            if self.listener is not None:
                self.listener.compare(layer, calls, gradients, weight_gradient)
        self._held.add(layer, {call.forward for call in calls})
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # or there is another backward to come
        for call in calls:
            call.over = True
            if self._filling:
                self._recorded.discard(call)
                call.recorded = False
                if not keep:
                    self._release(call)

    def _on_accumulated(self, layer: KroneckerLayer, weight: Tensor) -> None:
        if not is_pulling():
            self._held.accumulated(layer)

    def _fill(self, layer: KroneckerLayer, calls: Sequence[LayerCall], gradients: Sequence[Tensor]) -> None:
        by_call = dict(zip(calls, gradients, strict=True))
        for group in by_forward(calls):
            for call in group:
                call.check()
            inputs = [call.input for call in group]
            self.statistics[layer.name].add_inputs(inputs)
            self.statistics[layer.name].add_gradients(inputs, [by_call[call][None] for call in group])
