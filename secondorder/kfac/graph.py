"""Which operation of an autograd graph computed the numbers of a tensor."""

from torch import Tensor

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
