"""Nodes of an autograd graph: those a backward pass has to reach to run through all of some others, and what made a tensor."""

from collections.abc import Collection

from torch import Tensor
from torch.autograd.graph import Node

RESHAPING = (
    *(
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "T",
        "Permute",
        "Select",
        "Slice",
        "Expand",
    ),
    *("Alias", "Clone", "ToCopy"),
)
"""Nodes that pass numbers on as they are."""


def made_by(tensor: Tensor) -> str:
    """The operation that computed the numbers of a tensor, "Softmax" for SoftmaxBackward0, whatever has reshaped them since."""
    node = tensor.grad_fn
    while node is not None:
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if name not in RESHAPING:
            return name
        node = node.next_functions[0][0]
    return ""


def last_of(root: Node, nodes: Collection[Node]) -> set[Node]:
    """Those of `nodes` at or below `root` that a backward pass from `root` can leave for no other of them: it ends there."""
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


def nodes_below(root: Node) -> list[Node]:
    """`root` and the nodes below it."""
    seen = {root}
    stack = [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return list(seen)
