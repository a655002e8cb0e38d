"""Functions of PyTorch whose derivatives are missing or wrong, by operations that have them all.

    embedding       with `sparse` or `scale_grad_by_freq`: its gradient has another layout, or is not that of the function
    embedding_bag   has one derivative, by reverse mode
    weight_norm     its second derivative is wrong
    layer_norm      its third derivative is wrong, which the Hessian of a network takes that differentiates itself

A network's graph tells which it needs (`needed_by`); evaluated within `PlainFunctions` it has them in place of PyTorch's.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Functions = Mapping[Callable[..., Any], Callable[..., Any]]
"""A function of PyTorch -> what computes the same."""


class PlainFunctions(TorchFunctionMode):
    """While it is entered, some functions are computed by others."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Any function of torch as it is, but for these."""
        return self.functions.get(func, func)(*args, **(kwargs or {}))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of `weight [V, D]` at `input [...]`, with a gradient that is dense and the function's own."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or largest numbers `[N, D]` of the rows in each bag: a row of `input [N, T]`, or from an offset to the next."""
    if input.ndim == 2:
        offsets = torch.arange(0, input.numel(), max(1, input.shape[1]), device=input.device)[: len(input)]
    elif include_last_offset and offsets is not None:
        offsets = offsets[:-1]
    assert offsets is not None
    tokens, places = input.flatten(), torch.arange(input.numel(), device=input.device)
    bags = torch.searchsorted(offsets, places, right=True) - 1
    rows = F.embedding(tokens, weight, None, max_norm, norm_type)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten()[:, None]
    if padding_idx is not None:
        counted = tokens != padding_idx % len(weight)
        rows, bags = rows[counted], bags[counted]
    counts = torch.bincount(bags, minlength=len(offsets))
    if mode == "max":
        return _largest(rows, bags, counts)
    sums = rows.new_zeros(len(offsets), rows.shape[1]).index_add(0, bags, rows)
    return sums if mode == "sum" else sums / counts.clamp_min(1)[:, None]


def _largest(rows: Tensor, bags: Tensor, counts: Tensor) -> Tensor:
    """The largest numbers `[N, D]` of rows whose bags are in order, zero for an empty bag."""
    places = torch.arange(len(bags), device=bags.device) - (counts.cumsum(0) - counts)[bags]
    padded = rows.new_full((len(counts), max(1, int(counts.max())), rows.shape[1]), -torch.inf)
    largest = padded.index_put((bags, places), rows).max(1).values
    return torch.where(counts[:, None] > 0, largest, 0)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, a norm for each place of the dimension, or one of all for -1."""
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True)) if others else v.sign() * g


def layer_norm(
    input: Tensor,
    normalized_shape: Iterable[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimensions, times weight, plus bias."""
    dims = list(range(-len(tuple(normalized_shape)), 0))
    centred = input - input.mean(dims, keepdim=True)
    normed = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = normed if weight is None else normed * weight
    return scaled if bias is None else scaled + bias


@dataclass(frozen=True)
class Replacement:
    """The node of a graph that tells that functions are to be replaced, and by which."""

    node: str
    functions: Functions
    options: tuple[str, ...] = ()
    """Attributes of the node, one of which must be true; none: any node of this name."""


REPLACEMENTS = (
    Replacement("EmbeddingBackward0", {F.embedding: embedding}, ("_saved_sparse", "_saved_scale_grad_by_freq")),
    Replacement("EmbeddingBagBackward0", {F.embedding_bag: embedding_bag}),
    Replacement("WeightNormInterfaceBackward0", {torch._weight_norm: weight_norm}),
    Replacement("NativeLayerNormBackwardBackward0", {F.layer_norm: layer_norm, torch.layer_norm: layer_norm}),
)


def needed_by(nodes: Iterable[Node]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The functions that the nodes of a graph ask for."""
    nodes = list(nodes)
    functions: dict[Callable[..., Any], Callable[..., Any]] = {}
    for row in REPLACEMENTS:
        found = (node for node in nodes if node.name() == row.node)
        if any(not row.options or any(getattr(node, name) for name in row.options) for node in found):
            functions |= row.functions
    return functions
