"""Time and memory of pooling heads, forward and backward, against five Newton-Schulz steps as a textbook writes them.

The bound is one batched product of C x n by n x C matrices, n = min(C, H W): neither the covariance nor its root is formed with
less.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.matrix_power.newton_schulz import newton_schulz_sqrt
from secondorder.pooling import Covariance, UpperTriangle, pooling_head
from studies.engine.records import Row
from studies.timing import Action, costs

TEXTBOOK, BOUND = "textbook", "one matrix product"


def parse_shape(text: str) -> list[int]:
    """``32x256x7x7`` as [32, 256, 7, 7]; InputError for anything else."""
    parts = text.split("x")
    if len(parts) != 4 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"shape {text!r} is not images x channels x height x width, such as 32x256x7x7")
    return [int(p) for p in parts]


def textbook(features: Tensor) -> Tensor:
    """The head as a textbook writes it: covariance, five Newton-Schulz steps, upper triangle, in plain autograd."""
    return UpperTriangle()(newton_schulz_sqrt(Covariance()(features), num_iter=5))


VARIANTS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    TEXTBOOK: lambda channels: textbook,
    "gcp": partial(pooling_head, "gcp"),
    "gcp, products": partial(pooling_head, "gcp", method="newton_schulz"),
    "gcp_exact": partial(pooling_head, "gcp_exact"),
    "covariance": partial(pooling_head, "covariance"),
}
"""Name -> the head for so many channels."""


def measure_heads(settings: Mapping[str, Any]) -> Iterator[Row]:
    """The costs of a forward and backward pass of every variant at one shape, and of the bound."""
    shape, device = parse_shape(settings["shape"]), torch.device(settings["device"])
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu_().to(device).requires_grad_()
    factor = features.detach().flatten(2)[..., : shape[1]].contiguous()
    actions: dict[str, Action] = {BOUND: lambda: torch.bmm(factor, factor.mT)}
    for name, build in VARIANTS.items():
        head = build(shape[1])
        with torch.no_grad():
            cotangent = torch.randn_like(head(features))
        actions[name] = lambda head=head, cotangent=cotangent: torch.autograd.grad(head(features), features, cotangent)  # type: ignore[misc]
    yield from costs(actions, settings["repeats"], device)
