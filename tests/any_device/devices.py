"""The same computation on the CPU and on another device, compared."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.networks import network


def moved(value: Any, device: str) -> Any:
    """Tensors, modules and collections of them on the device; modules are copied."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return {name: moved(item, device) for name, item in value.items()} if isinstance(value, Mapping) else value


def check(found: Any, expected: Any, device: str, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Equal up to rounding; tensors of `found` are on the device."""
    if isinstance(expected, Tensor):
        assert found.device.type == device.partition(":")[0]
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=rtol, atol=atol)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected)
        for name in expected:
            check(found[name], expected[name], device, rtol, atol)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            check(ours, theirs, device, rtol, atol)
    elif isinstance(expected, float):
        torch.testing.assert_close(float(found), expected, rtol=rtol, atol=atol)


def tiny(pooling: str = "gcp") -> nn.Module:
    """digits_tiny in float64 and eval mode for images [N, 1, 6, 6] of 3 classes."""
    torch.manual_seed(0)
    return network("digits_tiny", pooling, 3, 1).double().eval()


def images_and_labels(count: int = 6, size: int = 6) -> tuple[Tensor, Tensor]:
    """Images [N, 1, size, size] in float64 and labels of 3 classes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, size, size, dtype=torch.float64, generator=generator)
    return images, torch.arange(count) % 3
