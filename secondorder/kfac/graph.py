"""Which nodes of an autograd graph a backward pass has to reach so that it runs through all of some others."""

from collections.abc import Collection

from torch.autograd.graph import Node


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
