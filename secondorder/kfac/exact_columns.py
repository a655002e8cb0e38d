"""Columns of a root of the Hessian of each sample's own loss at its outputs, some at a time: sum_v g_v g_v^T = H_n.

    cross_entropy   column (t, k): sqrt(c p_tk) (e_k - p_t) at position t, zero at the others     c = 1 / T
    mse             column e: sqrt(2 c) e_e                                                       c = 1 / E
    bce             column e: sqrt(c p_e (1 - p_e)) e_e                                           c = 1 / E

c = 1 with reduction "sum". All columns together are as large as the outputs times their number: nothing `[N, E, E]` is built.

Index letters: N samples, K classes, T further positions, E = K T outputs of a sample, V columns.
"""

import torch
from torch import Tensor

BYTES_AT_A_TIME = 16 * 2**20


def parts_of_columns(z: Tensor) -> list[range]:
    """The columns of outputs `[N, *]` in parts of BYTES_AT_A_TIME, at least one column each."""
    count = z[0].numel()
    step = max(1, BYTES_AT_A_TIME // max(1, z.nbytes))
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def exact_columns(z: Tensor, likelihood: str, reduction: str, columns: range) -> Tensor:
    """The named columns `[V, *z.shape]` of a root of each sample's Hessian at the outputs z `[N, K, *]`.

    Args:
        likelihood: "cross_entropy", "mse" or "bce". reduction: "mean" or "sum", over a sample's own positions or
            outputs.
    """
    v = torch.arange(columns.start, columns.stop, device=z.device)
    if likelihood == "cross_entropy":
        return _of_softmax(z, reduction, v)
    c = 1.0 if reduction == "sum" else 1 / z[0].numel()
    if likelihood == "mse":
        entries = torch.full_like(z, (2 * c) ** 0.5)
    else:
        p = z.sigmoid()
        entries = (c * p * (1 - p)).sqrt()
    found = z.new_zeros(len(v), len(z), z[0].numel())
    found[torch.arange(len(v), device=z.device), :, v] = entries.flatten(1).mT[v]
    return found.view(len(v), *z.shape)


def _of_softmax(z: Tensor, reduction: str, v: Tensor) -> Tensor:
    last = z.movedim(1, -1)  # [N, *, K]
    p = last.flatten(1, -2).softmax(-1) if last.ndim > 2 else last[:, None].softmax(-1)  # [N, T, K]
    (N, T, K), c = p.shape, 1.0 if reduction == "sum" else 1 / p.shape[1]
    t, k, own = v // K, v % K, torch.arange(len(v), device=z.device)
    values = -p[:, t].transpose(0, 1)  # [V, N, K]
    values[own, :, k] += 1
    values = values * (c * p[:, t, k].mT).sqrt()[..., None]
    found = z.new_zeros(len(v), N, T, K)
    found[own, :, t] = values
    return found.view(len(v), *last.shape).movedim(-1, 2)
