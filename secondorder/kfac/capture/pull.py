"""K-FAC's own backward passes: gradients at the outputs of the network, back to those of its layers and into the statistics."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from secondorder.errors import InputError
from secondorder.kfac.capture.calls import LayerCall, Output, by_forward
from secondorder.kfac.capture.hooks import pulling, remove
from secondorder.kfac.statistics import LayerStatistics


def pull(
    statistics: Mapping[str, LayerStatistics],
    logits: Sequence[Tensor],
    outputs: Sequence[Output],
    passes: Iterable[Sequence[tuple[Tensor, Tensor]]],
) -> None:
    """Add to the statistics what backward passes bring to these outputs of layers; the user's gradients stay as they are.

    Args:
        statistics: of the layers, by name; what they have staged is lost when a pass fails.
        logits: outputs of the network.
        outputs: those of the layers below them, in the order of their calls.
        passes: each starts at some of the logits, with a gradient of the same shape for each.

    Raises:
        InputError: for a graph that is gone or hides layers, and an input that was changed since.
    """
    nodes = [edge.node for _, edge in outputs]
    ends = set().union(*(last_of(z.grad_fn, nodes) for z in logits if z.grad_fn is not None))
    last = [output for output in outputs if output.edge.node in ends]
    collector = GradientCollector(statistics, [call for call, _ in outputs])
    handles: list[RemovableHandle] = [
        edge.node.register_prehook(partial(collector.take_at, call, edge.output_nr))
        for call, edge in outputs
        if edge.node not in ends
    ]
    try:
        with pulling():
            for starts in passes if last else ():
                z, given = zip(*((z, gradient.to(z.dtype)) for z, gradient in starts), strict=True)
                edges = [edge for _, edge in last]
                found = torch.autograd.grad(z, edges, given, retain_graph=True, allow_unused=True)
                for (call, _), g in zip(last, found, strict=True):
                    if g is not None:
                        collector.take(call, g)
                collector.finish()
    except RuntimeError as error:
        for own in statistics.values():  # nothing half counted
            own.discard()
        for call, _ in outputs:
            call.check()
        raise _explained(error) from error
    finally:
        remove(handles)


class GradientCollector:
    """Takes the gradients at the outputs of layers from one backward pass after the other into the statistics.

    A gradient is freed as soon as those of all calls of the layer in the same forward are there: together they are as large as
    the outputs of all layers.
    """

    def __init__(self, statistics: Mapping[str, LayerStatistics], calls: Sequence[LayerCall]) -> None:
        self.statistics = statistics
        self._together = {call: group for group in by_forward(calls) for call in group}
        self._here: dict[LayerCall, Tensor] = {}

    def take(self, call: LayerCall, g: Tensor) -> None:
        """The gradient at the output of a call; into the statistics when those of the calls that go with it are there."""
        self._here[call] = g
        if all(other in self._here for other in self._together[call]):
            self._add(self._together[call])

    def take_at(self, call: LayerCall, index: int, gradients: tuple[Tensor | None, ...]) -> None:
        """The gradient at the output of a call, number `index` of the node that the backward pass goes through."""
        g = gradients[index]
        if g is not None:
            self.take(call, g)

    def finish(self) -> None:
        """Into the statistics with those whose companions are not below the logits."""
        for calls in by_forward(sorted(self._here, key=lambda call: call.order)):
            self._add(calls)

    @torch.no_grad()
    def _add(self, calls: Sequence[LayerCall]) -> None:
        gradients = [self._here.pop(call)[None] for call in calls]
        with torch.autocast(gradients[0].device.type, enabled=False):
            self.statistics[calls[0].layer.name].add_gradients([call.input for call in calls], gradients)


def nodes_below(root: Node) -> list[Node]:
    """`root` and the nodes of its graph below it."""
    seen = {root}
    stack = [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return list(seen)


def last_of(root: Node, nodes: Collection[Node]) -> set[Node]:
    """The `nodes` at or below `root` that a backward pass from `root` can leave for no other of them: it ends there."""
    wanted = set(nodes)
    leads_on: dict[Node, bool] = {}
    """Whether one of `nodes` is at a node or below it; the keys also keep the visited nodes alive, and so their identity."""
    last: set[Node] = set()
    below: dict[Node, list[Node]] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node in leads_on:
            stack.pop()
        elif node not in below:
            below[node] = [next_node for next_node, _ in node.next_functions if next_node is not None]
            stack += [next_node for next_node in below[node] if next_node not in leads_on]
        else:
            stack.pop()
            further = any(leads_on[next_node] for next_node in below[node])
            if node in wanted and not further:
                last.add(node)
            leads_on[node] = further or node in wanted
    return last


def _explained(error: RuntimeError) -> Exception:
    if "use_reentrant" in str(error):
        return InputError(
            "torch.utils.checkpoint with use_reentrant=True hides layers from K-FAC; use use_reentrant=False"
        )
    if "backward through the graph a second time" in str(error):
        return InputError("update_curvature(logits) after loss.backward(): it needs the graph; call it before")
    return error
