"""Bytes that Kronecker factors take, from the shapes of layers: known before anything is computed.

Index letters: N samples, T positions of all uses of a layer, G groups, D inputs and O outputs of a group.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secondorder.curvature.kronecker.layer_kinds import layer_kind

WORK_SPACE = {"kfac": 1, "ekfac": 4}
"""Copies of a layer's factors while they are computed: a new term; a scaled copy, LAPACK's two matrices, eigenvectors."""
UNFOLDED_COPIES, PROJECTED_COPIES = 3, 3


@dataclass(frozen=True)
class FactorSizes:
    """Numbers in a layer's A (or the rows it is kept as, `[G, D', D]`), B `[G, O, O]`, scales `[G, O, D']`, its patches."""

    input: int
    gradient: int
    scales: int
    unfolded: int


def factor_sizes(
    layer: nn.Module, shapes: Sequence[torch.Size], kind: str, samples: int, sharing: str, wide: int
) -> FactorSizes:
    """The sizes for a layer with these output shapes `[n, *out]`, one for each use, and its weight or bias.

    A of inputs wider than `wide` and than the number of rows is kept as rows.
    """
    described, linear = layer_kind(layer), isinstance(layer, nn.Linear | nn.MultiheadAttention)
    G, outputs, D = described.groups, described.outputs, described.inputs
    if kind == "bias":
        return FactorSizes(0, G * outputs**2, G * outputs, 0)
    T = sum(math.prod(shape[1:-1] if linear else shape[2:]) for shape in shapes)
    vectors = samples * (T if sharing == "expand" else 1)
    rows = vectors if wide < D > vectors else D
    return FactorSizes(G * rows * D, G * outputs**2, G * outputs * rows, 0 if linear else G * D * T)


def factor_bytes(
    layers: Mapping[str, tuple[tuple[nn.Module, ...], str]],
    shapes: Mapping[nn.Module, Sequence[torch.Size]],
    samples: int,
    sharing: str,
    wide: int,
    itemsize: int,
    corrected: bool = False,
) -> int:
    """Bytes of the factors of all parameters: their sums and the blocks made of them, and work space for the largest.

    `corrected`: with the eigenbases and scales of EKFAC.
    """
    sizes = [
        factor_sizes(shared[0], [s for layer in shared for s in shapes.get(layer, ())], kind, samples, sharing, wide)
        for shared, kind in layers.values()
    ]
    work = WORK_SPACE["ekfac" if corrected else "kfac"]
    numbers = 2 * sum(s.input + s.gradient for s in sizes)
    numbers += work * _most(s.input + s.gradient for s in sizes) + UNFOLDED_COPIES * _most(s.unfolded for s in sizes)
    if corrected:
        numbers += sum(s.scales for s in sizes) + PROJECTED_COPIES * _most(s.scales for s in sizes)
    return numbers * itemsize


def _most(numbers: Iterable[int]) -> int:
    return max(numbers, default=0)
