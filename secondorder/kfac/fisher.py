"""Gradients at the logits whose outer products are the Fisher matrix of a likelihood, exactly or in expectation.

For each sample, sum_v g_v g_v^T = H_n (exact) or E sum_v g_v g_v^T = H_n (mc), H_n the Hessian of the sample's own loss:

    cross_entropy   softmax over dimension 1, T further positions    H = c (diag p - p p^T) at each position,  c = 1 / T
    mse             sum of squares over E elements                   H = 2 c I,                                c = 1 / E
    bce             sum of Bernoulli likelihoods of E logits         H = c diag(p (1 - p)),                    c = 1 / E

c = 1 with reduction "sum". The logits are `[N, K, ...]`, as the loss functions of torch have them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.separable_losses import CrossEntropy, SeparableLoss, SquaredError
from secondorder.errors import InputError, unknown
from secondorder.kfac.exact_columns import exact_columns

REDUCTIONS = ("mean", "sum")
FISHERS = ("mc", "empirical", "exact")
BACKPROPAGATED = ("mc", "exact")
"""Those with gradients of their own; "empirical" has the loss's."""
MOST_COLUMNS = 4096
"""Columns of an exact root: each takes a backward pass."""
ONE_OUTPUT = "use Fisher(likelihood='bce') or 'mse', or a list with one for each of several outputs"


def output_gradients(
    logits: Tensor,
    kind: str,
    likelihood: str = "cross_entropy",
    reduction: str = "mean",
    generator: torch.Generator | None = None,
    samples: int = 1,
    weight: float = 1.0,
    columns: range | None = None,
) -> Tensor:
    """g `[V, *logits.shape]`: V = samples draws over sqrt(samples) for "mc", the columns of a root of H for "exact".

    weight: a factor of the loss of this output, and so of H. columns: those that are wanted of an exact root, all by default:
    they are as large as the logits times their number. generator: on the CPU, for "mc". Half precision is widened to float32.
    Raises InputError for unknown words, for logits that are not `[N, ...]`, for a softmax over a single output, and for exact
    roots of more than MOST_COLUMNS columns.
    """
    if kind not in BACKPROPAGATED:
        raise unknown("fisher", kind, BACKPROPAGATED)
    if likelihood not in LIKELIHOODS:
        raise unknown("likelihood", likelihood, LIKELIHOODS)
    if reduction not in REDUCTIONS:
        raise unknown("reduction", reduction, REDUCTIONS)
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if z.ndim < 2:
        if likelihood == "cross_entropy" or z.ndim == 0:
            raise InputError(f"logits of shape {list(z.shape)}; {likelihood} needs [N, K, ...]; {ONE_OUTPUT}")
        return output_gradients(z[:, None], kind, likelihood, reduction, generator, samples, weight, columns)[..., 0]
    if likelihood == "cross_entropy" and z.shape[1] == 1:
        raise InputError(
            f"logits of shape {list(z.shape)}: the softmax of one output is always 1, so cross_entropy has no curvature; "
            + ONE_OUTPUT
        )
    if kind == "exact":
        _check_columns(z[0].numel())
        g = exact_columns(z, likelihood, reduction, range(z[0].numel()) if columns is None else columns)
    else:
        g = LIKELIHOODS[likelihood](z, reduction, generator, samples)
    return g if weight == 1 else g * weight**0.5


def _cross_entropy(z: Tensor, reduction: str, generator: torch.Generator | None, samples: int) -> Tensor:
    K = z.shape[1]
    last = z.movedim(1, -1)  # [N, ..., K]
    rows = last.reshape(-1, K)
    T = len(rows) // max(1, len(z))
    c = 1 / T if reduction == "mean" else 1.0
    loss = CrossEntropy(z.new_full((len(rows), 1), c))
    drawn = torch.rand(len(rows), samples, generator=generator, dtype=torch.float64)
    noise = drawn.to(widest(z.device)).to(z.device)
    columns = loss.sampled(rows, noise).movedim(-1, 0)
    return columns.reshape(-1, *last.shape).movedim(-1, 2)


def _mse(z: Tensor, reduction: str, generator: torch.Generator | None, samples: int) -> Tensor:
    rows = z.flatten(1)
    E = rows.shape[1]
    loss: SeparableLoss = SquaredError(rows, E if reduction == "mean" else 1)
    noise = torch.randn(*rows.shape, samples, generator=generator, dtype=torch.float64).to(z)
    return loss.sampled(rows, noise).movedim(-1, 0).reshape(samples, *z.shape)


def _bce(z: Tensor, reduction: str, generator: torch.Generator | None, samples: int) -> Tensor:
    p = z.sigmoid().flatten(1)
    E = p.shape[1]
    c = 1 / E if reduction == "mean" else 1.0
    y = torch.rand(samples, *p.shape, generator=generator, dtype=torch.float64).to(widest(z.device)).to(z.device) < p
    return ((p - y.to(z)) * (c / samples) ** 0.5).reshape(samples, *z.shape)


def _check_columns(columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise InputError(
            f"fisher='exact' takes a backward pass for each of {columns} outputs of a sample (at most {MOST_COLUMNS}); "
            "use fisher='mc'"
        )


LIKELIHOODS: dict[str, Callable[[Tensor, str, torch.Generator | None, int], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "mse": _mse,
    "bce": _bce,
}
