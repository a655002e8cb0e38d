"""The row-major upper triangle of a matrix, and its transpose."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from secondorder.matrix_power.transforms import inside_transform, known_shape


def _positions(size: int, device: torch.device) -> Tensor:
    """Positions i C + j, i <= j, in a flattened `[C, C]` matrix, row by row."""
    row, column = torch.triu_indices(size, size, device=device).unbind()
    return row * size + column


def _sources(size: int, device: torch.device) -> Tensor:
    """For each entry of a flattened symmetric `[C, C]` matrix, its place in the upper triangle."""
    row, column = torch.triu_indices(size, size, device=device).unbind()
    source = torch.empty(size, size, dtype=torch.long, device=device)
    source[row, column] = source[column, row] = torch.arange(len(row), device=device)
    return source.flatten()


@lru_cache(maxsize=64)
def _cached(build: Callable[[int, torch.device], Tensor], size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve training afterwards
        return build(size, device)


def _index(build: Callable[[int, torch.device], Tensor], size: int, device: torch.device) -> Tensor:
    """An index, from the cache unless a transform or mode is active, whose wrapped tensors must not outlive it."""
    if inside_transform() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return build(size, device)
    return _cached(build, size, device)


def upper_triangle(S: Tensor) -> Tensor:
    """Entries (0, 0), (0, 1), ..., (0, C-1), (1, 1), ...: `[..., C, C] -> [..., C (C + 1) / 2]`."""
    return S.flatten(-2).index_select(-1, _index(_positions, known_shape(S)[-1], S.device))


def twice_symmetric(g: Tensor) -> Tensor:
    """G + G^T for the gradient g `[..., C (C + 1) / 2]` of an upper triangle put back into the matrix G `[..., C, C]`."""
    size = math.isqrt(2 * g.shape[-1])
    G = g.index_select(-1, _index(_sources, size, g.device)).view(*g.shape[:-1], size, size)
    G.diagonal(dim1=-2, dim2=-1).mul_(2)
    return G
