"""Time and memory of pooling heads, forward and backward, against five Newton-Schulz steps as a textbook writes them.

The bound is one batched product of C x n by n x C matrices, n = min(C, H W): neither the covariance nor its root is formed with
less.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.matrix_power.newton_schulz import newton_schulz_sqrt
from secondorder.pooling import Covariance, UpperTriangle, pooling_head
from studies.engine.records import Row
from studies.timing import interleaved, peak_bytes

Shape = tuple[int, int, int, int]
Step = Callable[[Tensor], Tensor]
TEXTBOOK, BOUND = "textbook", "one matrix product"


def parse_shape(text: str) -> Shape:
    """``32x256x7x7`` as (32, 256, 7, 7); InputError for anything else."""
    parts = text.split("x")
    if len(parts) != 4 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"shape {text!r} is not images x channels x height x width, such as 32x256x7x7")
    n, c, h, w = (int(p) for p in parts)
    return n, c, h, w


def textbook(features: Tensor) -> Tensor:
    """The head as a textbook writes it: covariance, five Newton-Schulz steps, upper triangle, in plain autograd."""
    return UpperTriangle()(newton_schulz_sqrt(Covariance()(features), num_iter=5))


def _head(name: str, **options: Any) -> Callable[[int], Step]:
    return lambda channels: pooling_head(name, channels, **options)


VARIANTS: dict[str, Callable[[int], Step]] = {
    "textbook": lambda channels: textbook,
    "gcp": _head("gcp"),
    "gcp, products": _head("gcp", method="newton_schulz"),
    "gcp_exact": _head("gcp_exact"),
    "covariance": _head("covariance"),
}


def forward_backward(step: Step, features: Tensor, cotangent: Tensor) -> None:
    """One forward and backward pass with a given gradient of the output."""
    features.grad = None
    step(features).backward(cotangent)


def measure_heads(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Milliseconds of each repeat and peak memory of every variant at one shape; repeats are interleaved."""
    shape, device = parse_shape(settings["shape"]), torch.device(settings["device"])
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).relu_().to(device).requires_grad_()
    factor = features.detach().flatten(2)[..., : shape[1]].contiguous()
    actions: dict[str, Callable[[], object]] = {BOUND: lambda: torch.bmm(factor, factor.mT)}
    for name, build in VARIANTS.items():
        actions[name] = _action(build(shape[1]), features)
    for name, action in actions.items():
        features.grad = None  # else the first to run would be charged with the gradient that the others replace
        yield {"layer": name, "quantity": "peak MiB", "value": peak_bytes(action, device) / 2**20}
    for name, repeat, milliseconds in interleaved(actions, settings["repeats"], device):
        yield {"layer": name, "quantity": "milliseconds", "index": repeat, "value": milliseconds}


def _action(step: Step, features: Tensor) -> Callable[[], object]:
    with torch.no_grad():
        cotangent = torch.randn_like(step(features.detach()))
    return lambda: forward_backward(step, features, cotangent)
