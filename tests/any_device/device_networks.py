"""Every pooling head with its second derivative, a training step of every network, and corrupted images, on any device."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from devices import check, moved
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.networks import NETWORKS, network
from secondorder.pooling import POOLINGS, pooling_head
from secondorder.robustness import corrupt

OPTIONS = [(name, {}) for name in POOLINGS] + [("gcp", {"method": "newton_schulz"})]


@pytest.mark.parametrize(("pooling", "options"), OPTIONS)
@pytest.mark.parametrize("size", [2, 4])  # fewer positions than channels, and more
def test_heads_and_their_second_derivatives(pooling: str, options: dict, size: int, device: str) -> None:
    head = pooling_head(pooling, 5, **options).double().eval()
    x, V = torch.randn(2, 2, 5, size, size, dtype=torch.float64)

    def derivatives(head: nn.Module, x: Tensor, V: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        outputs = [head(x), nn.Sequential(*head.chain())(x)]
        first = [torch.autograd.grad(y.square().sum(), x, create_graph=True)[0] for y in outputs]
        return [*outputs, *first, *(torch.autograd.grad((g * V).sum(), x, retain_graph=True)[0] for g in first)]

    check(derivatives(*moved((head, x, V), device)), derivatives(head, x, V), device, 1e-6, 1e-8)


@pytest.mark.parametrize("backbone", NETWORKS)
def test_training_step_of_every_network(backbone: str, device: str) -> None:
    small = "digits" in backbone or "cifar" in backbone
    side = 8 if small else 16 if backbone.endswith("_small_images") else 64
    there = network(backbone, "gcp", 3, 3, None if "digits" in backbone else 4).to(device)
    optimizer = torch.optim.SGD(there.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(2, 3, side, side).to(device)
    F.cross_entropy(there(images), torch.tensor([0, 2]).to(device)).backward()
    optimizer.step()
    for name, parameter in there.named_parameters():
        assert parameter.device.type == parameter.grad.device.type == device.partition(":")[0], name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("pooling", POOLINGS)
def test_waits_of_a_step_of_sgd(pooling: str, device: str, waits: Callable[[], AbstractContextManager]) -> None:
    """None, but that of the exact decomposition, which tells the CPU whether it has converged."""
    model = network("digits_net", pooling, 3, 1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(4, 1, 8, 8).to(device), torch.arange(4).remainder(3).to(device)
    for _ in range(2):
        with waits() as found:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        decomposes = pooling in ("gcp_exact", "gcp_power", "gcp_log")
        assert len(found) == decomposes, found


@pytest.mark.parametrize("severity", [0, 3])
def test_corrupted_images_come_back(severity: int, device: str) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    there = corrupt(images.to(device), "glass_blur", severity, indices=torch.arange(3).to(device))
    check(there, corrupt(images, "glass_blur", severity), device, 0, 0)
