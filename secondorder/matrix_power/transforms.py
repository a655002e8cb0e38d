"""What the functions of this package share: batching under `torch.func.vmap`, tangents and number formats."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secondorder.matrix_power.precision import full_precision

__all__ = [
    "exporting",
    "full_precision",
    "inside_transform",
    "known_shape",
    "mapped_first",
    "primals",
    "result_dtype",
    "symmetric",
    "widened",
    "with_transpose",
    "without_mutation",
]


def mapped_first(batch_size: int, in_dims: tuple, arguments: tuple) -> list:
    """The arguments of a vmapped call with the mapped dimension as the first batch dimension of every tensor."""
    moved = []
    for argument, dim in zip(arguments, in_dims, strict=True):
        if not isinstance(argument, Tensor):
            moved.append(argument)
        elif dim is None:
            moved.append(argument.expand(batch_size, *argument.shape))
        else:
            moved.append(argument.movedim(dim, 0))
    return moved


def primals(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """The tensors of a `jvp` without the tangents of its own level, which it is about to account for itself."""
    return [tensor if tensor is None else forward_ad.unpack_dual(tensor).primal for tensor in tensors]


def inside_transform() -> bool:
    """Whether a torch.func transform or the compiler is running: no decision may depend on a tensor's values there."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def exporting() -> bool:
    """Whether torch.export, the ONNX exporter or torch.jit.trace is recording."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def known_shape(x: Tensor) -> Sequence[int]:
    """The shape of x in numbers (or symbols of torch.export), also while torch.jit traces, which has tensors for sizes."""
    if not torch.jit.is_tracing():
        return x.shape
    with warnings.catch_warnings():  # "a Python integer": of checks and choices, not results
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return tuple(int(size) for size in x.shape)


def without_mutation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, or while PyTorch records operations the same without operations in place.

    A recorder (`torch.func.linearize`, `make_fx`) may keep a tensor as a constant and replay the operation that changes it.
    The fast ways go through here; plain definitions have no operation in place at all.
    """
    return torch.func.functionalize(function) if torch._C._len_torch_dispatch_stack() > 0 else function


def symmetric(G: Tensor) -> Tensor:
    """The symmetric part (G + G^T) / 2."""
    return (G + G.mT) * 0.5  # not in place: nested forward mode may pass tensors that cannot be written


def with_transpose(G: Tensor) -> Tensor:
    """G + G^T, twice the symmetric part."""
    return G + G.mT


def widened(x: Tensor) -> Tensor:
    """x in float32 when it has 16 bits, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def result_dtype(x: Tensor) -> torch.dtype:
    """The type of a result for the input x: float32 for 16 bits under autocast, else that of x."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return widened(x).dtype if autocast else x.dtype
