"""How well the gradients of weights agree with what inputs and output gradients give: E against A = sum_nt g a^T.

All numbers of all layers come to the host in one answer and those at the outputs in another: a device is waited for twice.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.accelerator import widest
from secondorder.kfac.layers import KroneckerLayer

MOST_ON_HOST = 2**22
"""Numbers; more would take the host longer than the waits that they save."""


class Agreement(NamedTuple):
    """How well one layer's gradient of the weight, E, agrees with A = sum_nt g a^T, in numbers.

    Args:
        finite: whether E is. error: |E - A|. norm: max(|E|, |A|). size: sum |a| |g|. overlap: <E, A>. square: |A|^2.
        made, now: squares of the weight's gradient that backward passes made, and as it is; 0 without one.
    """

    finite: float
    error: float
    norm: float
    size: float
    overlap: float
    square: float
    made: float
    now: float

    @property
    def ratio(self) -> float:
        """<E, A> / |A|^2, the multiple of A that is nearest to E; nan where A is zero."""
        return self.overlap / self.square if self.square else math.nan


def agreements(
    expected: Mapping[KroneckerLayer, Tensor],
    actual: Mapping[KroneckerLayer, Tensor],
    sizes: Mapping[KroneckerLayer, Tensor],
) -> dict[KroneckerLayer, Agreement]:
    """The agreement of each layer's `expected` E `[G, O, D]` with its `actual` A `[G, O, D]`; zeros without an A or size."""
    if not expected:
        return {}
    rows = []
    for layer, E in expected.items():
        A, zero = actual.get(layer, torch.zeros_like(E)), E.new_zeros(())
        numbers = [torch.isfinite(E).all(), (E - A).norm(), torch.maximum(E.norm(), A.norm()), sizes.get(layer, zero)]
        wide, weight = widest(E.device), layer.weight
        squares = [zero, zero]
        if weight.grad is not None:
            squares = [g.to(wide).square().sum() for g in (E[..., : layer.kind.inputs], weight.grad)]
        numbers += [(E * A).sum(), A.square().sum(), *squares]
        rows.append(torch.stack([number.to(wide) for number in numbers]))
    values = torch.stack([row.to(rows[0].device) for row in rows]).tolist()
    return {layer: Agreement(*numbers) for layer, numbers in zip(expected, values, strict=True)}


def rescaling(found: Collection[Agreement]) -> float:
    """Norm of the gradients as they are now over that of the gradients that backward made."""
    made, now = sum(one.made for one in found), sum(one.now for one in found)
    return math.sqrt(now / made) if made > 0 else 1.0


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device on the CPU, from one copy; as they are where there are too many numbers or several formats."""
    numbers = sum(tensor.numel() for tensor in tensors)
    if tensors[0].device.type == "cpu" or numbers > MOST_ON_HOST or len({tensor.dtype for tensor in tensors}) > 1:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
