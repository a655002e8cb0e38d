"""What curvature costs beside a plain forward and backward pass, on one CIFAR network with a GCP head; its physical floor.

The network is 3-32-32-P-64-64-P (3x3 convolutions with ReLU, P = 2x2 max-pooling) with a GCP head, on 32x32 images. Each
quantity is computed from scratch, forward pass included, but for the products whose name says that the graph is kept.

The floor of a quantity is what it cannot do without: the larger of its multiplications and additions at the rate of a
large matrix product, and of its bytes at the rate of a large copy, both measured in the same process. With f the forward
pass's multiply-adds (f_1 in the first layer), n the products of the layers' Kronecker factors, and a the bytes of the
activations, each read or written once a pass:

    forward + backward       3 f - f_1         3 a      forward; gradients of weights and of inputs
    K-FAC factors            2 f - f_1 + n     3 a      forward, one sampled column back, the factors; no weight gradients
    GGN diagonal, sampled    3 f - f_1         3 a      the same as forward + backward, per sample
    GGN-vector product       5 f - 2 f_1       5 a      forward, tangents of inputs and weights, backward
    ... with the graph kept  4 f - 2 f_1       4 a
    Hessian-vector product   8 f - 4 f_1       8 a      forward + backward and the tangent of each
    Hessian diagonal         15 (2 f - f_1)   16 a     gradient; 14 columns back and squared: 10 classes, and 2 drawn
                                                       ones each for the residual of covariance and root
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from studies.timing import interleaved, peak_bytes

CLASSES = 10
BASELINE = "forward + backward"
QUANTITIES = {
    BASELINE: (3, 1, 0, 3),
    "K-FAC factors": (2, 1, 1, 3),
    "K-FAC factors, BackPACK": (2, 1, 1, 3),
    "GGN diagonal, sampled": (3, 1, 0, 3),
    "GGN-vector product": (5, 2, 0, 5),
    "GGN-vector product, graph kept": (4, 2, 0, 4),
    "Hessian-vector product": (8, 4, 0, 8),
    "Hessian diagonal, sampled": (30, 15, 0, 16),
}
"""Quantity -> multiples of f, f_1 (taken off), n and a in its floor."""
TARGETS = {
    "K-FAC factors": 5.0,
    "K-FAC factors, BackPACK": 5.0,
    "GGN diagonal, sampled": 4.0,
    "GGN-vector product": 3.0,
    "Hessian diagonal, sampled": 20.0,
}
"""Quantity -> the multiple of a forward and backward pass that it should stay below."""

PRODUCT, COPY = "matrix product", "copy"
PRODUCT_SIZE = 1024
PRODUCT_OPERATIONS, COPY_BYTES = 2 * PRODUCT_SIZE**3, 2 * 4 * 16 * PRODUCT_SIZE**2
"""Of the large matrix product and the large copy (read and written) that give the machine's rates."""


def cost_network(channels: int = 32) -> nn.Sequential:
    """3-c-c-P-2c-2c-P-GCP-linear as leaf modules."""
    wide = 2 * channels
    layers: list[nn.Module] = []
    for inputs, outputs, pool in (
        (3, channels, False),
        (channels, channels, True),
        (channels, wide, False),
        (wide, wide, True),
    ):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, *pooling_head("gcp", wide).chain(), nn.Linear(wide * (wide + 1) // 2, CLASSES))


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a forward pass f and of its first layer f_1, of the Kronecker factors n; bytes of activations a."""

    forward: float
    first: float
    factors: float
    activations: float

    def of(self, quantity: str) -> tuple[float, float]:
        """(floating-point operations, bytes) that a quantity cannot do without."""
        forward, first, factors, activations = QUANTITIES[quantity]
        multiply_adds = forward * self.forward - first * self.first + factors * self.factors
        return 2 * multiply_adds, activations * self.activations


def work(model: nn.Sequential, images: Tensor) -> Work:
    """The work of convolutions and linear layers on these images, counted by formula; the pooling head's is left out."""
    forward: list[float] = []
    factors = activations = 0.0
    x = images
    with torch.no_grad():
        for layer in model:
            y = layer(x)
            activations += y.numel() * y.element_size()
            if isinstance(layer, nn.Conv2d | nn.Linear):
                positions = y.numel() / layer.weight.shape[0]
                forward.append(positions * layer.weight.numel())
                width, outputs = input_width(layer), layer.weight.shape[0]
                # a symmetric result needs half of its entries; overlapping 3x3 patches have 25 offsets, not 81
                pairs = 25 * x.shape[1] ** 2 if _overlapping(layer, x) else width**2
                factors += positions * (pairs + outputs**2) / 2
            x = y
    return Work(sum(forward), forward[0], factors, activations)


def _overlapping(layer: nn.Module, x: Tensor) -> bool:
    return isinstance(layer, nn.Conv2d) and autocorrelation_is_faster(layer, x)


def actions(images: Tensor, labels: Tensor, channels: int = 32) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    device = images.device
    model = cost_network(channels).to(device)
    loss = nn.CrossEntropyLoss()
    extended, extended_loss = backpack_network(model), extend(nn.CrossEntropyLoss()).to(device)
    batch = (images, labels)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    kept = curvature_blocks(model, loss, batch, "ggn").whole

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    def through_backpack(extension: Callable[[], Any]) -> None:
        extended.zero_grad()
        with quiet(), backpack(register(extension())):
            extended_loss(extended(images), labels).backward()

    def product(quantity: str) -> Tensor:
        return curvature_blocks(model, loss, batch, quantity).whole @ vector

    return {
        BASELINE: plain,
        "K-FAC factors": lambda: curvature_blocks(model, loss, batch, "kfac_expand", fisher="mc"),
        "K-FAC factors, BackPACK": partial(through_backpack, lambda: WeightSharingKFAC("expand")),
        "GGN diagonal, sampled": partial(through_backpack, extensions.DiagGGNMC),
        "GGN-vector product": partial(product, "ggn"),
        "GGN-vector product, graph kept": lambda: kept @ vector,
        "Hessian-vector product": partial(product, "hessian"),
        "Hessian diagonal, sampled": partial(through_backpack, DiagHessianMC),
    }


def peak_rates(device: torch.device) -> dict[str, Callable[[], object]]:
    """A large matrix product and a large copy, whose rates give the floor its milliseconds."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device) for _ in range(2))
    source = torch.randn(COPY_BYTES // 8, device=device)
    target = torch.empty_like(source)
    return {PRODUCT: lambda: a @ b, COPY: lambda: target.copy_(source)}


def measure_curvature(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Milliseconds of each repeat, peak memory, operations and bytes of all quantities, with a large product and a large copy."""
    images, channels, device = settings["images"], settings["channels"], torch.device(settings["device"])
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(CLASSES, (images,), generator=generator).to(device)
    with same_randomness():
        torch.manual_seed(0)
        timed = actions(batch, labels, channels)
        necessary = work(cost_network(channels).to(device), batch)
        for name, action in timed.items():
            operations, moved = necessary.of(name)
            yield {"layer": name, "quantity": "peak MiB", "value": peak_bytes(action, device) / 2**20}
            yield {"layer": name, "quantity": "operations", "value": operations, "error": 0.0}
            yield {"layer": name, "quantity": "bytes", "value": moved, "error": 0.0}
        for name, repeat, milliseconds in interleaved(timed | peak_rates(device), settings["repeats"], device):
            yield {"layer": name, "quantity": "milliseconds", "index": repeat, "value": milliseconds}
