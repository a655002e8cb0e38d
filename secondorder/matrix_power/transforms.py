"""What the functions of this package share: batching under `torch.func.vmap`, scale and precision."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad


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


def primals(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors of a `jvp` without the tangents of its own level, which it is about to account for itself."""
    return [forward_ad.unpack_dual(tensor).primal for tensor in tensors]


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
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", torch.jit.TracerWarning
        )  # "a Python integer": of checks and choices, not results
        return tuple(int(size) for size in x.shape)


def symmetric(G: Tensor) -> Tensor:
    """The symmetric part (G + G^T) / 2."""
    return (G + G.mT) * 0.5  # not in place: nested forward mode may pass tensors that cannot be written


def homogeneous(function: Callable[[Tensor], Tensor], degree: float, S: Tensor) -> Tensor:
    """c^degree function(S / c) at c = tr(S): equal to function(S), and derivatives of tiny or huge S do not overflow.

    The derivative with respect to c is zero because the function is homogeneous, so c counts as a constant.
    """
    trace = S.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scale = torch.where(trace > 0, trace, 1)
    return scale**degree * function(S / scale)


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Autocast off on the device of x: roots and eigenvalues in 16 bits are noise."""
    if torch.amp.is_autocast_available(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield


def widened(x: Tensor) -> Tensor:
    """x in float32 when it has 16 bits, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def result_dtype(x: Tensor) -> torch.dtype:
    """The type of a result for the input x: float32 for 16 bits under autocast, else that of x."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return widened(x).dtype if autocast else x.dtype
