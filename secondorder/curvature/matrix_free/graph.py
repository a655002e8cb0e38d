"""What the graph behind tensors is made of: its nodes, how often each leaf is used, and functions that others have written."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from secondorder.errors import InputError

TESTED = ("secondorder.", "torch.")
"""Packages whose autograd Functions have tests of their derivatives."""
LEAF = "torch::autograd::AccumulateGrad"


def graph_nodes(tensors: Iterable[Tensor]) -> dict[Node, None]:
    """All nodes that a backward pass from the tensors can reach, each once."""
    found: dict[Node, None] = {}
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found[node] = None
        waiting += [after for after, _ in node.next_functions if after is not None and after not in found]
    return found


def leaf_uses(nodes: Iterable[Node]) -> Counter[int]:
    """How many places of a graph read each leaf, by the leaf's id: once for each call of a layer with that weight."""
    return Counter(id(leaf) for node in nodes for after, _ in node.next_functions for leaf in _leaf(after))


def graph_leaves(nodes: Iterable[Node]) -> dict[int, Tensor]:
    """The leaves of a graph by their ids."""
    return {id(leaf): leaf for node in nodes for leaf in _leaf(node)}


def saved_tensors(nodes: Iterable[Node]) -> Iterator[Tensor]:
    """What the nodes of a graph have kept for a backward pass, as far as they tell."""
    for node in nodes:
        for name in dir(node):
            if name.startswith("_saved_"):
                kept: object = None
                with suppress(RuntimeError):  # of one that was changed in place since
                    kept = getattr(node, name)
                yield from (t for t in (kept if isinstance(kept, tuple) else (kept,)) if isinstance(t, Tensor))


def check_checkpoints(nodes: Iterable[Node]) -> None:
    """InputError for a reentrant checkpoint: parameters within it would seem to have no gradient."""
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise InputError(
            "torch.utils.checkpoint hides parameters with use_reentrant=True; call it with use_reentrant=False"
        )


def check_nodes(nodes: Iterable[Node]) -> None:
    """InputError for a graph that has no curvature, or none that is right: of reentrant checkpoints, in short formats."""
    check_checkpoints(nodes)
    if short := short_formats(nodes):
        raise InputError(
            f"the network computes in {short[0]}, too short for curvature; leave autocast or conversions out of its forward pass"
        )


def short_formats(nodes: Iterable[Node]) -> list[torch.dtype]:
    """The floating-point numbers of fewer than 32 bits that a graph computes in."""
    formats = {entry.dtype for node in nodes for entry in getattr(node, "_input_metadata", ())}
    return sorted((f for f in formats if f.is_floating_point and f.itemsize < 4), key=str)


def custom_functions(nodes: Iterable[Node]) -> list[str]:
    """The names of autograd Functions that are not of the packages TESTED, so that their derivatives may be wrong."""
    kinds = {type(node) for node in nodes if isinstance(node, BackwardCFunction)}
    functions = {getattr(kind, "_forward_cls", kind) for kind in kinds}
    return sorted({f.__name__ for f in functions if not f.__module__.startswith(TESTED)})


def _leaf(node: Node | None) -> Iterator[Tensor]:
    if node is not None and node.name() == LEAF:
        yield node.variable  # type: ignore[attr-defined]
