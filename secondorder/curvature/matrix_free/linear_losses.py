"""Losses without curvature in the outputs: linear, or so piece by piece, as NLLLoss of log-probabilities, L1Loss and the hinge.

Their Gauss-Newton matrix is zero. That is right, and is no curvature of anybody's problem, so that it is refused.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secondorder.errors import InputError

NEAR_AND_FAR = (1e-2, 1e-1, 1.0, 10.0)
"""Of random outputs at which a loss is tried, in units of the outputs."""


def check_curved(
    name: str,
    gradient: Callable[[Tensor], Tensor],
    product: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    labels: Tensor | None,
) -> None:
    """InputError for a loss of which M is zero at outputs near and far from z, and the gradient at z is not.

    Args:
        name: of the loss.
        gradient: dL/dz of outputs `[N, K]`.
        product: (z, U) -> M U.
        z: outputs at which M was zero.
        labels: as outputs `[N, K]`, near which a loss of small residuals is round, or None.
    """
    if not bool(gradient(z).any()):
        return  # flat there, as a hinge that is satisfied
    generator = torch.Generator().manual_seed(0)
    size = float(z.abs().max()) or 1.0
    u, *others = (torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for _ in range(5))
    points = [z + scale * size * other for scale, other in zip(NEAR_AND_FAR, others, strict=True)]
    for point in points if labels is None else [*points, labels.to(z)]:
        try:
            if bool((product(point, u) != 0).any()):
                return
        except InputError:  # outputs that the loss does not take
            return
    raise InputError(
        f"{name} is linear in the outputs, or so piece by piece: its Gauss-Newton matrix is zero; use quantity 'hessian', or for "
        "log-probabilities CrossEntropyLoss, on these outputs or on the logits"
    )
