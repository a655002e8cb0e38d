"""Small networks, batches and training loops for the tests of the optimiser."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from natural import KFAC
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.kfac import Damping, Fisher, Options

Batch = tuple[Tensor, Tensor]

KINDS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "ekfac": {"approximation": "ekfac"},
    "cholesky": {"damping": Damping(inverse="cholesky")},
    "wide": {"options": Options(wide_inputs=10)},
    "wide cholesky": {"damping": Damping(inverse="cholesky"), "options": Options(wide_inputs=10)},
    "wide outputs": {"options": Options(wide_outputs=2, wide_inputs=17)},
    "empirical": {"fisher": "empirical"},
    "empirical ekfac": {"fisher": "empirical", "approximation": "ekfac"},
    "exact": {"fisher": "exact"},
    "two draws": {"fisher": Fisher(samples=2)},
    "reduce": {"sharing": "reduce"},
    "adam fallback": {"options": Options(fallback="adam", fallback_lr=0.1)},
    "clip": {"clip": 10.0, "weight_decay": 0.1},
}
"""Settings of KFAC that take different paths through it."""


def convnet(seed: int = 0, norm: Callable[[int], nn.Module] = lambda channels: nn.GroupNorm(2, channels)) -> nn.Module:
    """2 convolutions (the second in groups), a normalisation, in-place ReLUs and a classifier of 3 classes, for [N, 2, 5, 5]."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        norm(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def batches(count: int, size: int = 12) -> list[Batch]:
    """Random images, and labels that depend on them."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.randn(size, 2, 5, 5, dtype=torch.float64, generator=generator)
        found.append((x, x.mean((1, 2))[:, :3].argmax(1)))
    return found


def train(model: nn.Module, optimizer: KFAC, data: Iterable[Batch], reduction: str = "mean") -> list[float]:
    """One step a batch; the losses."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        logits = model(x)
        optimizer.update_curvature(logits)
        loss = F.cross_entropy(logits, y, reduction=reduction)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Whether nested states are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def snapshot(value: Any) -> Any:
    """A deep copy of a nested state."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: snapshot(content) for key, content in value.items()}
    return [snapshot(content) for content in value] if isinstance(value, list | tuple) else value


def difference(a: nn.Module, b: nn.Module) -> float:
    """Largest relative difference of a tensor of two models."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs if x.is_floating_point())
