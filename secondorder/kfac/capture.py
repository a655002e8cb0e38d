"""What goes into the layers of a model and what comes back at their outputs, in the steps that update the factors.

While capturing, a forward hook records each use of a layer: its input, with the node of the graph that made its output, which
is the same after an operation in place. The graph keeps the record, so that it lives as long as the graph of that forward and
no longer. `from_logits` pulls given gradients back to these nodes; with `from_backward`, the user's own backward delivers
them. The model, its gradients and random numbers are never changed.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from secondorder.errors import InputError
from secondorder.kfac.attention import AttentionWatch
from secondorder.kfac.graph import last_of, nodes_below
from secondorder.kfac.hooks import Hook, Uncompiled, handles_of, is_pulling, pulling, remove
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.pull import Pull
from secondorder.kfac.statistics import LayerStatistics
from secondorder.kfac.uses import Forward, Use, by_forward, rows_of

Listener = Callable[[KroneckerLayer, Sequence[Use], Sequence[Tensor], Tensor], None]
"""Called when a backward pass of the user has a layer's gradient: the uses it went through, g at each output, weight gradient."""


class Output(NamedTuple):
    """Where a use is in a graph."""

    use: Use
    edge: GradientEdge


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
        self.rows: int | None = 0
        """Of the outputs of the forwards that backward passes of the user went through; None: an output is not a tensor."""
        self.differentiable: set[int] = set()
        """Backward passes of the user with create_graph=True."""
        self._key = object()
        self._forward = Forward()
        self._order = 0
        self._step = 1
        self._filling = False
        self._delivered: set[KroneckerLayer] = set()
        self._handles: list[Any] = handles_of(self)
        self._listeners: list[weakref.WeakMethod[Any]] = []
        self._recorded: weakref.WeakSet[Use] = weakref.WeakSet()
        self._waiting: weakref.WeakSet[Use] = weakref.WeakSet()  # whose gradient may come
        self._arrived: dict[KroneckerLayer, list[tuple[int, Use, Tensor]]] = {}

    def start(self) -> None:
        """Record from now on."""
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

    def stop(self) -> None:
        """Remove all hooks and forget everything recorded; what the statistics have, they keep."""
        self.forget()
        remove(self._handles)
        self._listeners, self._delivered = [], set()
        self.active = self._filling = False

    def forget(self) -> None:
        """Forget everything recorded and go on recording: between two steps."""
        for use in list(self._waiting):
            self._drop(use)
        self._arrived, self.uses, self.rows, self.differentiable = {}, 0, 0, set()
        self._forward = Forward()
        self._step += 1

    def forget_past(self) -> None:
        """Forget the uses whose backward by the user is over."""
        for use in list(self._recorded):
            if use.over:
                self._drop(use)
        self.rows = 0

    def from_logits(self, logits: Tensor, gradients: Tensor) -> None:
        """Pull the gradients `[V, *logits.shape]` back to the recorded uses below `logits`, which are then forgotten."""
        self.pull([logits], self.below(logits), ([(logits, gradient)] for gradient in gradients))

    def below(self, logits: Tensor) -> list[Output]:
        """The recorded uses that logits depend on; InputError for a forward that `pull` has been through."""
        nodes = [] if logits.grad_fn is None else nodes_below(logits.grad_fn)
        found = [Output(use, GradientEdge(node, index)) for node in nodes for use, index in self._on(node)]
        if any(use.pulled_in == self._step for use, _ in found):
            raise InputError(
                "update_curvature(logits): a forward pass below these logits has been counted; call it once per forward, with "
                "all outputs in one call: update_curvature([first, second])"
            )
        return sorted((output for output in found if output.use.recorded), key=lambda output: output.use.order)

    def pull(
        self, logits: Sequence[Tensor], outputs: Sequence[Output], passes: Iterable[Sequence[tuple[Tensor, Tensor]]]
    ) -> None:
        """Statistics of these uses below `logits`; each backward pass starts at some of these, with a gradient for each."""
        self._pull_back(logits, outputs, passes)
        uses = [use for use, _ in outputs]
        for use in uses:
            use.check()
        for together in by_forward(uses):
            self.statistics[together[0].layer.name].add_inputs([use.input for use in together])
        for use in uses:
            self._recorded.discard(use)
            use.recorded, use.pulled_in = False, self._step
            if not self._listeners:
                self._release(use)

    def from_backward(self) -> None:
        """Let the user's own backward fill the statistics, also for uses already recorded."""
        self._filling = True
        self._deliver_all()

    def listen(self, listener: Listener) -> None:
        """Call the listener, a method, for each layer whose weight gets a gradient in a backward of the user.

        Like all hooks, this does not keep the method's object alive.
        """
        self._listeners.append(weakref.WeakMethod(listener))
        self._deliver_all()

    def has(self, listener: Listener) -> bool:
        """Whether this listener is called."""
        return weakref.WeakMethod(listener) in self._listeners

    def dismiss(self, listener: Listener) -> None:
        """Call this listener no more."""
        if self.has(listener):
            self._listeners.remove(weakref.WeakMethod(listener))

    def _on(self, node: Node) -> list[tuple[Use, int]]:
        records: dict[Any, Any] = cast(Any, node).metadata
        return records.get(self._key, [])

    def _drop(self, use: Use) -> None:
        self._recorded.discard(use)
        use.recorded = False
        self._release(use)

    def _release(self, use: Use) -> None:
        self._waiting.discard(use)
        remove(use.handles)
        use.input = use.input.new_empty(0)

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        self._forward = Forward()
        if torch._C._current_graph_task_id() == -1:
            self._arrived.clear()  # of backward passes that did not go on to the weights

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forward.rows = rows_of(output)

    def _record(
        self, layer: KroneckerLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        recomputed = torch._C._current_graph_task_id() != -1
        if recomputed and not self._filling:
            return  # a checkpointed segment: the graph of its first forward is the one that counts
        x = args[0] if args else next(iter(kwargs.values()))
        layer.kind.check_call(x, output)
        self._order += 1
        use = Use(layer, x.detach(), x._version, self._forward, self._order)
        edge = get_gradient_edge(output)
        cast(Any, edge.node).metadata.setdefault(self._key, []).append((use, edge.output_nr))
        use.handles.append(edge.node.register_prehook(Hook(self, Capture._arrive, use, edge.output_nr)))
        self._recorded.add(use)
        self._waiting.add(use)
        self.uses += 1
        if self._filling or self._listeners:
            self._deliver(layer)

    def _pull_back(
        self, logits: Sequence[Tensor], outputs: Sequence[Output], passes: Iterable[Sequence[tuple[Tensor, Tensor]]]
    ) -> None:
        """Add the gradients at the outputs to the statistics, each as it comes."""
        nodes = [edge.node for _, edge in outputs]
        ends = set().union(*(last_of(z.grad_fn, nodes) for z in logits if z.grad_fn is not None))
        last = [output for output in outputs if output.edge.node in ends]
        pull = Pull(self.statistics, [use for use, _ in outputs])
        handles = [
            edge.node.register_prehook(partial(pull.take_from, use, edge.output_nr))
            for use, edge in outputs
            if edge.node not in ends
        ]
        try:
            with pulling():
                for starts in passes if last else ():
                    z, given = zip(*((z, gradient.to(z.dtype)) for z, gradient in starts), strict=True)
                    edges = [edge for _, edge in last]
                    found = torch.autograd.grad(z, edges, given, retain_graph=True, allow_unused=True)
                    for (use, _), g in zip(last, found, strict=True):
                        if g is not None:
                            pull.take(use, g)
                    pull.finish()
        except RuntimeError as error:
            for own in self.statistics.values():  # nothing half counted
                own.discard()
            for use, _ in outputs:
                use.check()
            raise _explained(error) from error
        finally:
            remove(handles)

    def _arrive(self, use: Use, index: int, gradients: tuple[Tensor | None, ...]) -> None:
        """The gradient at the output of a use, in a backward of the user."""
        g = gradients[index]
        if g is None or is_pulling():
            return
        backward = torch._C._current_graph_task_id()
        if torch.is_grad_enabled():
            self.differentiable.add(backward)
        if use.layer in self._delivered:
            self._arrived.setdefault(use.layer, []).append((backward, use, g))

    def _deliver_all(self) -> None:
        for layer in self.layers:
            self._deliver(layer)

    def _deliver(self, layer: KroneckerLayer) -> None:
        if layer not in self._delivered and layer.weight.requires_grad:
            self._delivered.add(layer)
            self._handles.append(layer.weight.register_hook(Hook(self, Capture._on_gradient, layer)))

    def _on_gradient(self, layer: KroneckerLayer, weight_gradient: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        arrived = [(use, g) for task, use, g in self._arrived.pop(layer, []) if task == backward]
        if is_pulling() or not (self._filling or self._listeners):
            return
        uses, gradients = [use for use, _ in arrived], [g for _, g in arrived]
        with torch.no_grad(), torch.autocast(weight_gradient.device.type, enabled=False):
            if self._filling:
                self._fill(layer, uses, gradients)
            for reference in list(self._listeners):
                listener = reference()
                if listener is not None:
                    listener(layer, uses, gradients, weight_gradient)
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # or there is another backward to come
        for use in uses:
            use.over = True
            if self._filling:
                self._recorded.discard(use)
                use.recorded = False
                if not keep:
                    self._release(use)

    def _fill(self, layer: KroneckerLayer, uses: Sequence[Use], gradients: Sequence[Tensor]) -> None:
        by_use = dict(zip(uses, gradients, strict=True))
        for together in by_forward(uses):
            for use in together:
                use.check()
            inputs = [use.input for use in together]
            self.statistics[layer.name].add_inputs(inputs)
            self.statistics[layer.name].add_gradients(inputs, [by_use[use][None] for use in together])
            self._count(together[0].forward)

    def _count(self, forward: Forward) -> None:
        if not forward.counted:
            forward.counted = True
            self.rows = None if self.rows is None or forward.rows is None else self.rows + forward.rows


def _explained(error: RuntimeError) -> Exception:
    if "use_reentrant" in str(error):
        return InputError(
            "torch.utils.checkpoint with use_reentrant=True hides layers from K-FAC; use use_reentrant=False"
        )
    if "backward through the graph a second time" in str(error):
        return InputError("update_curvature(logits) after loss.backward(): it needs the graph; call it before")
    return error
