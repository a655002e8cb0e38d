"""What curvature costs beside a plain forward and backward pass, on one CIFAR network with a GCP head; its physical floor.

The network is 3-32-32-P-64-64-P (3x3 convolutions with ReLU, P = 2x2 max-pooling) with a GCP head, on 32x32 images. Each
quantity is computed from scratch, forward pass included, but for the products whose name says that the graph is kept.

The floor of a quantity is what it cannot do without: the larger of its multiplications and additions at the rate of a
large matrix product, and of its bytes at the rate of a large copy, both measured in the same process. With f the forward
pass's multiply-adds (f_1 in the first layer), n the products of the layers' Kronecker factors, and a the bytes of the
activations, each read or written once a pass, QUANTITIES says how often each of them is needed.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from backpack import backpack, extend, extensions
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.curvature.backpack import DiagHessianMC, WeightSharingKFAC, backpack_network, register
from secondorder.curvature.backpack.quantity import quiet
from secondorder.curvature.kronecker.autocorrelation import autocorrelation_is_faster
from secondorder.curvature.kronecker.factors import input_width
from secondorder.pooling import pooling_head
from secondorder.untouched import same_randomness
from studies.engine.records import Row
from studies.timing import Action, costs

CLASSES = 10
BASELINE = "forward + backward"
QUANTITIES = {
    BASELINE: (3, 1, 0, 3, math.nan),  # forward; gradients of weights and of inputs
    "K-FAC factors": (2, 1, 1, 3, 5.0),  # forward, one sampled column back, the factors; no weight gradients
    "K-FAC factors, BackPACK": (2, 1, 1, 3, 5.0),
    "GGN diagonal, sampled": (3, 1, 0, 3, 4.0),  # the same as forward + backward, per sample
    "GGN-vector product": (5, 2, 0, 5, 3.0),  # forward, tangents of inputs and weights, backward
    "GGN-vector product, graph kept": (4, 2, 0, 4, math.nan),
    "Hessian-vector product": (8, 4, 0, 8, math.nan),  # forward + backward and the tangent of each
    # 15 (2 f - f_1): gradient; 14 columns back and squared, 10 classes and 2 drawn each for the residual of covariance and root
    "Hessian diagonal, sampled": (30, 15, 0, 16, 20.0),
}
"""Quantity -> multiples of f, f_1 (taken off), n and a in its floor; of a pass, below which it should stay (nan: none)."""

PRODUCT, COPY = "matrix product", "copy"
PRODUCT_SIZE = 1024
PRODUCT_OPERATIONS, COPY_BYTES = 2 * PRODUCT_SIZE**3, 2 * 4 * 16 * PRODUCT_SIZE**2
"""Of the large matrix product and the large copy (read and written) that give the machine's rates."""


def cost_network(channels: int = 32) -> nn.Sequential:
    """The network that is timed, 3-c-c-P-2c-2c-P-GCP-linear for c = `channels`, as leaf modules."""
    wide = 2 * channels
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise((3, channels, channels, wide, wide))):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (place % 2)
    return nn.Sequential(*layers, *pooling_head("gcp", wide).chain(), nn.Linear(wide * (wide + 1) // 2, CLASSES))


def random_batch(images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images 32x32 in colour, and labels: the same in every call."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, 3, 32, 32, generator=generator)
    return batch.to(device), torch.randint(CLASSES, (images,), generator=generator).to(device)


class Work(NamedTuple):
    """Multiply-adds of a forward pass f and of its first layer f_1, of the Kronecker factors n; bytes of activations a."""

    forward: float
    first: float
    factors: float
    activations: float

    def of(self, quantity: str) -> tuple[float, float]:
        """(floating-point operations, bytes) that a quantity cannot do without."""
        forward, first, factors, activations, _ = QUANTITIES[quantity]
        multiply_adds = forward * self.forward - first * self.first + factors * self.factors
        return 2 * multiply_adds, activations * self.activations


@torch.no_grad()
def work(model: nn.Sequential, images: Tensor) -> Work:
    """The work of convolutions and linear layers on these images, counted by formula; the pooling head's is left out."""
    forward: list[float] = []
    factors = activations = 0.0
    x = images
    for layer in model:
        y = layer(x)
        activations += y.numel() * y.element_size()
        if isinstance(layer, nn.Conv2d | nn.Linear):
            outputs = layer.weight.shape[0]
            positions = y.numel() / outputs
            forward.append(positions * layer.weight.numel())
            # a symmetric result needs half of its entries; overlapping 3x3 patches have 25 offsets, not 81
            overlapping = isinstance(layer, nn.Conv2d) and autocorrelation_is_faster(layer, x)
            pairs = 25 * x.shape[1] ** 2 if overlapping else input_width(layer) ** 2
            factors += positions * (pairs + outputs**2) / 2
        x = y
    return Work(sum(forward), forward[0], factors, activations)


def actions(images: Tensor, labels: Tensor, channels: int = 32) -> dict[str, Action]:
    """What is timed, by name."""
    device = images.device
    model = cost_network(channels).to(device)
    loss = nn.CrossEntropyLoss()
    extended, extended_loss = backpack_network(model), extend(nn.CrossEntropyLoss()).to(device)
    blocks = partial(curvature_blocks, model, loss, (images, labels))
    vector = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    kept = blocks("ggn").whole

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    def through_backpack(extension: Any) -> None:
        extended.zero_grad()
        with quiet(), backpack(register(extension())):
            extended_loss(extended(images), labels).backward()

    return {
        BASELINE: plain,
        "K-FAC factors": lambda: blocks("kfac_expand", fisher="mc"),
        "K-FAC factors, BackPACK": lambda: through_backpack(partial(WeightSharingKFAC, "expand")),
        "GGN diagonal, sampled": lambda: through_backpack(extensions.DiagGGNMC),
        "GGN-vector product": lambda: blocks("ggn").whole @ vector,
        "GGN-vector product, graph kept": lambda: kept @ vector,
        "Hessian-vector product": lambda: blocks("hessian").whole @ vector,
        "Hessian diagonal, sampled": lambda: through_backpack(DiagHessianMC),
    }


def peak_rates(device: torch.device) -> dict[str, Action]:
    """A large matrix product and a large copy, whose rates give the floor its milliseconds."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device) for _ in range(2))
    source = torch.randn(COPY_BYTES // 8, device=device)
    target = torch.empty_like(source)
    return {PRODUCT: lambda: a @ b, COPY: lambda: target.copy_(source)}


def measure_curvature(settings: Mapping[str, Any]) -> Iterator[Row]:
    """The costs of all quantities and their operations and bytes; those of a large product and a large copy."""
    channels, device = settings["channels"], torch.device(settings["device"])
    images, labels = random_batch(settings["images"], device)
    with same_randomness():
        torch.manual_seed(0)
        timed = actions(images, labels, channels)
        necessary = work(cost_network(channels).to(device), images)
        for name in QUANTITIES:
            operations, moved = necessary.of(name)
            yield {"layer": name, "quantity": "operations", "value": operations, "error": 0.0}
            yield {"layer": name, "quantity": "bytes", "value": moved, "error": 0.0}
        yield from costs(timed | peak_rates(device), settings["repeats"], device)
