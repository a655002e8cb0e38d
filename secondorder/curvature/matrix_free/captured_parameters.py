"""Parameters that a network or a loss reads past their modules: from a closure, a list, or a module that holds the network.

Curvature differentiates with respect to tensors that stand in for the parameters of the network's modules. What reads a
parameter itself sees its value, and is taken for a constant.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from secondorder.curvature.matrix_free.graph import graph_leaves, graph_nodes


@contextmanager
def tracked(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters require gradients, so that a graph tells whether they were read."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def captured(tensor: Tensor, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of the parameters that the graph of a tensor, made with them `tracked`, reads themselves."""
    leaves = graph_leaves(graph_nodes([tensor]))
    return [name for name, p in parameters.items() if id(p) in leaves]
