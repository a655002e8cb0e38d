"""What the curvature study measures of a network: GGN blocks and their conditioning, K-FAC and the Hessian against them.

Blocks are the weights of the first, the middle and the last convolution; the last is the one before the pooling, the 1x1
reduction if there is one. The loss is the mean cross-entropy of N training images with K classes, drawn by the seed, the same for
every head and not augmented. The network is in training mode: batch norm takes the statistics of these images and is
differentiated through them. With statistics as constants the loss would have curvature along the scale and the mean of every
channel, in which the loss that is trained is flat.

A block G = sum_n J_n^T H_n J_n of P weights, J_n [K, P] of the logits and H_n that of the softmax, has rank at most
r = min(P, N (K - 1)) under every head. Without a threshold, and at the same rank for every head, its conditioning is

    condition           lambda_1 / lambda_k at k = r / 2, rounded up
    largest / mean      lambda_1 r / tr G

H_n is as badly conditioned as the confidence of the classifier differs between images. Without it, G = sum_n J_n^T J_n of the
squared error has rank at most min(P, N K), and "condition, squared error".
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secondorder.curvature import (
    curvature_blocks,
    fidelity,
    half_rank_condition,
    output_jacobians,
    relative_difference,
)
from secondorder.curvature.operators import FactoredOperator
from secondorder.networks import Network, frozen_at, maps_below_pooling
from secondorder.networks.split import last_linear
from secondorder.preconditioning import head_spectrum, varying_images
from secondorder.training import Snapshot
from studies.backbones import first_middle_last, shared_backbone
from studies.checks import check_count
from studies.engine.records import Row

Batch = tuple[Tensor, Tensor]
CONDITION, SPREAD, SQUARED = "condition", "largest / mean", "condition, squared error"
PUT_ON = "condition, head put on"
"""Of a head on a backbone that was trained under another, or the same, its classifier fitted anew."""
KFAC, HESSIAN, EIGENVALUE = "K-FAC cosine", "|H - G| / |H|", "eigenvalue"
HEAD, ROOTS = "head's condition", ("gcp", "gcp_exact")
"""The median over images of the condition number of a head's Jacobian, and the heads that it is measured of."""
RANKS = 20
"""Eigenvalues kept of a spectrum, at geometrically spaced ranks down to k."""
LOSS = nn.CrossEntropyLoss()
DRY_IMAGES, DRY_CLASSES = 2, 8
MANY = 100
"""Classes above which a dry run makes do with `DRY_CLASSES`."""


@dataclass(frozen=True)
class Limits:
    """How much is measured of a network."""

    images: int = 16
    """Training images whose mean loss is measured (all if there are fewer). The time grows with their square."""
    precision: Literal["float32", "float64"] = "float32"
    """Number format of the network; spectra are in float64 always."""
    block: int = 300_000
    """Weights up to which a convolution is measured; larger ones are passed over."""
    probes: int = 8
    """Random vectors for the distance of Hessian and GGN."""

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("block", 1), ("probes", 2)):
            check_count(f"limits.{name}", getattr(self, name), least)


@dataclass(frozen=True)
class PutOn:
    """Heads that are put on a trained backbone."""

    heads: tuple[str, ...]
    limits: Limits


def measure_blocks(at: Snapshot, limits: Limits) -> Iterator[Row]:
    """Conditioning and K-FAC's fidelity, some eigenvalues of the last convolution and, of a root, the head's own condition."""
    return _of_blocks(at.run.pooling, *problem(at.model, drawn(at, limits.images), limits))


def measure_dry(at: Snapshot, limits: Limits) -> Iterator[Row]:
    """The same for a dry run: with two images, and a classifier of `DRY_CLASSES` classes."""
    network: Any = copy.deepcopy(at.model)
    linear: Any = last_linear(network.classifier)
    device = linear.weight.device
    network.classifier = nn.Linear(linear.in_features, DRY_CLASSES, device=device)
    images, labels = (tensor.to(device) for tensor in at.data.train.plain(torch.arange(DRY_IMAGES)))
    return _of_blocks(at.run.pooling, *problem(network, (images, labels % DRY_CLASSES), limits))


def dry_parts(limits: Limits, classes: int) -> float:
    """How many such parts a measurement has: its Jacobians have a row for each image and class, and each is of all images."""
    return (limits.images / DRY_IMAGES) ** 2 * classes / DRY_CLASSES


def _of_blocks(pooling: str, network: Network, batch: Batch, names: dict[str, str]) -> Iterator[Row]:
    images, labels = batch
    jacobians = output_jacobians(network, images, names.values())
    kfac = curvature_blocks(network, LOSS, (images, labels), "kfac_expand", names.values())
    for role, name in names.items():
        G, rank = jacobians.gauss_newton(name, LOSS, labels), jacobians.rank(name)
        values, squared = G.eigenvalues().flip(0), jacobians.gauss_newton(name).eigenvalues()
        yield row(role, CONDITION, half_rank_condition(values, rank))
        yield row(role, SPREAD, values[0] * rank / values.sum())
        yield row(role, SQUARED, half_rank_condition(squared, jacobians.rank(name, softmax=False)))
        yield row(role, KFAC, fidelity(kfac[name], FactoredOperator(G.rows.to(images.dtype))).cosine.value)
        if role == "last":
            ranks = torch.logspace(0, torch.tensor((rank + 1) // 2).float().log10(), RANKS).round().long().unique()
            yield from (row(role, EIGENVALUE, values[k - 1], index=k) for k in ranks.tolist())
    if pooling in ROOTS:
        with torch.no_grad():
            features = maps_below_pooling(network, images)
        features = features[varying_images(features)]
        found = head_spectrum(features, pooling).condition.median() if len(features) else torch.nan
        yield row("", HEAD, found)


def measure_hessian(at: Snapshot, limits: Limits) -> Iterator[Row]:
    """|H - G| / |H| of the last convolution in the Frobenius norm, from random vectors."""
    network, (images, labels), names = problem(at.model, drawn(at, limits.images), limits)
    name = names["last"]
    H = curvature_blocks(network, LOSS, (images, labels), "hessian", [name])[name]
    G = output_jacobians(network, images, [name]).gauss_newton(name, LOSS, labels)
    G = FactoredOperator(G.rows.to(H.dtype))
    difference = relative_difference(G, H, "stochastic", probes=limits.probes, seed=at.run.seed)
    yield row("last", HESSIAN, difference.value, error=difference.error)


def measure_put_on(at: Snapshot, settings: PutOn) -> Iterator[Row]:
    """Conditioning of the trained backbone under each head, with a classifier that is fitted to its features."""
    batch = drawn(at, settings.limits.images)
    backbone = shared_backbone(frozen_at(at.model, batch[0], torch.float32), at.data, at.run.weight_decay)
    for head in settings.heads:
        network, (images, labels), names = problem(backbone.under(head), batch, settings.limits)
        jacobians = output_jacobians(network, images, names.values())
        for role, name in names.items():
            values = jacobians.gauss_newton(name, LOSS, labels).eigenvalues()
            yield row(role, PUT_ON, half_rank_condition(values, jacobians.rank(name)), head=head)


def drawn(at: Snapshot, count: int) -> Batch:
    """Training images that the seed chooses, not augmented, and their labels, on the network's device."""
    data, generator = at.data.train, torch.Generator().manual_seed(at.run.seed)
    images, labels = data.plain(torch.randperm(len(data), generator=generator)[:count])
    device = next(at.model.parameters()).device
    return images.to(device), labels.to(device)


def problem(network: nn.Module, batch: Batch, limits: Limits) -> tuple[Network, Batch, dict[str, str]]:
    """A copy of the network in training mode and the batch, in the precision of the limits, and the convolutions by role."""
    dtype = getattr(torch, limits.precision)
    own: Any = copy.deepcopy(network).to(dtype).train()
    return own, (batch[0].to(dtype), batch[1]), first_middle_last(own, limits.block)


def row(layer: str, quantity: str, value: float | Tensor, *, index: int = -1, error: float = 0.0, **labels: str) -> Row:
    """A record of a convolution or, with the layer "", of the whole network."""
    return {"layer": layer, "quantity": quantity, "index": index, "value": float(value), "error": error, **labels}
