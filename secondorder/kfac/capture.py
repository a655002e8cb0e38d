"""What goes into the layers of a model and what comes back at their outputs, in the steps that update the factors.

While capturing, a forward hook records each use of a layer: its input, and the node of the graph that made its output, which
is the same after an operation in place. `from_logits` pulls given gradients back to these nodes; with `from_backward`, the
user's own backward delivers them. The model, its gradients and random numbers are never changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from secondorder.errors import InputError
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
        """Add the gradients at the outputs to the statistics; which uses were reached."""
        edges = [edge for _, edge in recorded]
        reached = [False] * len(edges)
        for v, gradient in enumerate(gradients):
            self.pulling = True
            try:
                pulled = torch.autograd.grad(
                    logits, edges, gradient.to(logits.dtype), retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                for use, _ in recorded:
                    use.check()
                raise _explained(error) from error
            finally:
                self.pulling = False
            reached = [g is not None for g in pulled] if v == 0 else reached
            by_use = {use: g for (use, _), g in zip(recorded, pulled, strict=True) if g is not None}
            del pulled
            for uses in _forwards(list(by_use)):
                self.statistics[uses[0].layer.name].add_gradients(
                    [use.input for use in uses], [by_use.pop(use)[None] for use in uses]
                )
        return reached

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
