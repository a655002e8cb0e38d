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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks, fidelity, relative_difference
from secondorder.curvature.matrix_free.loss_curvature import loss_curvature
from secondorder.curvature.operators import FactoredOperator, SymmetricOperator
from secondorder.errors import InputError
from secondorder.networks import Network
from secondorder.pooling import PoolingHead
from secondorder.preconditioning import head_spectrum
from secondorder.training import Snapshot
from secondorder.untouched import untouched
from studies.checks import check_count
from studies.frozen_statistics import frozen_at
from studies.shared_backbone import SharedBackbone

Row = Mapping[str, Any]
CONVOLUTIONS = ("first", "middle", "last")
CONDITION, SPREAD, SQUARED = "condition", "largest / mean", "condition, squared error"
PUT_ON = "condition, head put on"
"""Of a head on a backbone that was trained under another, or the same, its classifier fitted anew."""
KFAC, HESSIAN, EIGENVALUE = "K-FAC cosine", "|H - G| / |H|", "eigenvalue"
HEAD, ROOTS = "head's condition", ("gcp", "gcp_exact")
"""The median over images of the condition number of a head's Jacobian, and the heads that it is measured of."""
RANKS = 20
"""Eigenvalues kept of a spectrum, at geometrically spaced ranks down to k."""
RESOLVED = 1e-12
"""Eigenvalues below this share of the largest are rounding errors of rows in float32."""


@dataclass(frozen=True)
class Limits:
    """How much is measured of a network."""

    images: int = 16
    """Training images whose mean loss is measured (all if there are fewer). The time grows with their square."""
    precision: Literal["float32", "float64"] = "float32"
    """Number format of the network; spectra are in float64 always."""
    block: int = 300_000
    """Parameters up to which a convolution is measured; larger ones are passed over for the next smaller."""
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


@dataclass(frozen=True)
class Problem:
    """A network in training mode, the images and labels of its loss, and the names of the weights that are looked at, by role."""

    network: nn.Module
    batch: tuple[Tensor, Tensor]
    names: Mapping[str, str]

    @classmethod
    def of(
        cls,
        network: nn.Module,
        batch: tuple[Tensor, Tensor],
        limits: Limits,
        roles: Collection[str] = CONVOLUTIONS,
    ) -> "Problem":
        """A copy of the network in the precision of the limits, with the weights of some roles."""
        dtype = getattr(torch, limits.precision)
        own = copy.deepcopy(network).to(dtype).train()
        names = block_names(own, limits.block)
        return cls(own, (batch[0].to(dtype), batch[1]), {role: names[role] for role in roles})

    def jacobians(self) -> tuple[dict[str, Tensor], Tensor]:
        """J = dz/dw `[N, K, P]` of each weight, by role, and the logits z `[N, K]`, in float64.

        The rows of the Gauss-Newton matrix of |z - y|^2 are sqrt(2) J.
        """
        images = self.batch[0]
        with torch.no_grad(), untouched(self.network):
            z = self.network(images)
        loss, targets = nn.MSELoss(reduction="sum"), torch.zeros_like(z)
        blocks = curvature_blocks(self.network, loss, (images, targets), "ggn", set(self.names.values()))
        rows = blocks.whole.factored().rows.unflatten(0, z.shape)  # type: ignore[attr-defined]
        parts = dict(zip(blocks, rows.split([block.size for block in blocks.values()], 2), strict=True))
        return {role: parts[name].double() / 2**0.5 for role, name in self.names.items()}, z.double()

    def ggn(self) -> tuple[dict[str, FactoredOperator], dict[str, Tensor]]:
        """The GGN of each weight by role, in float64, and its J."""
        J, z = self.jacobians()
        F = loss_curvature(nn.CrossEntropyLoss(), z.shape, self.batch[1], z.dtype).root(z)  # type: ignore[attr-defined]
        return {role: FactoredOperator((F.mT @ rows).flatten(0, 1)) for role, rows in J.items()}, J  # F F^T = H

    def curvature(self, quantity: str) -> dict[str, SymmetricOperator]:
        """Other matrices of each weight by role, as `curvature_blocks` has them."""
        names = set(self.names.values())
        blocks = curvature_blocks(self.network, nn.CrossEntropyLoss(), self.batch, quantity, names)
        return {role: blocks[name] for role, name in self.names.items()}


def measure_blocks(at: Snapshot, limits: Limits) -> Iterator[Row]:
    """Conditioning and K-FAC's fidelity, some eigenvalues of the last convolution and, of a root, the head's own condition."""
    problem = Problem.of(at.model, drawn(at, limits.images), limits)
    (blocks, J), kfac = problem.ggn(), problem.curvature("kfac_expand")
    for role, block in blocks.items():
        values = descending(block)
        yield from conditioning(role, values, possible := rank_of(J[role], outputs=-1))
        squared = descending(FactoredOperator(J[role].flatten(0, 1)))
        yield row(role, SQUARED, condition(squared, rank_of(J[role])))
        exact = FactoredOperator(block.rows.to(kfac[role].dtype))
        yield row(role, KFAC, fidelity(kfac[role], exact).cosine.value)
        if role == "last":
            ranks = torch.logspace(0, torch.tensor(float(half(possible))).log10(), RANKS).round().long().unique()
            yield from (row(role, EIGENVALUE, values[rank - 1], index=rank) for rank in ranks.tolist())
    if at.run.pooling in ROOTS and isinstance(at.model, Network):
        yield row("", HEAD, head_condition(problem.network, problem.batch[0], at.run.pooling))


def measure_hessian(at: Snapshot, limits: Limits) -> Iterator[Row]:
    """|H - G| / |H| of the last convolution in the Frobenius norm, from random vectors."""
    problem = Problem.of(at.model, drawn(at, limits.images), limits, ["last"])
    H = problem.curvature("hessian")["last"]
    G = FactoredOperator(problem.ggn()[0]["last"].rows.to(H.dtype))
    difference = relative_difference(G, H, "stochastic", probes=limits.probes, seed=at.run.seed)
    yield row("last", HESSIAN, difference.value, error=difference.error)


def measure_put_on(at: Snapshot, settings: PutOn) -> Iterator[Row]:
    """Conditioning of the trained backbone under each head, with a classifier that is fitted to its features."""
    batch = drawn(at, settings.limits.images)
    backbone = SharedBackbone(frozen_at(at.model, batch[0], torch.float32), at.data, at.run.weight_decay)
    for head in settings.heads:
        blocks, J = Problem.of(backbone.with_head(head), batch, settings.limits).ggn()
        for role, block in blocks.items():
            yield {**row(role, PUT_ON, condition(descending(block), rank_of(J[role], outputs=-1))), "head": head}


def drawn(at: Snapshot, count: int) -> tuple[Tensor, Tensor]:
    """Training images that the seed chooses, not augmented, and their labels, on the network's device."""
    data, generator = at.data.train, torch.Generator().manual_seed(at.run.seed)
    images, labels = data.plain(torch.randperm(len(data), generator=generator)[:count])
    device = next(at.model.parameters()).device
    return images.to(device), labels.to(device)


def block_names(model: nn.Module, largest: int) -> dict[str, str]:
    """The parameter names of the blocks: first, middle and last convolution, and the classifier.

    Not counted are convolutions with groups and those on shortcuts. Where one has more than `largest` weights, the nearest
    that has not stands in for it. Raises InputError when there is none.
    """
    convolutions = [
        (f"{name}.weight", part.weight.numel())
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and part.groups == 1 and "downsample" not in name
    ]
    linear = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linear or all(size > largest for _, size in convolutions):
        raise InputError(f"{type(model).__name__}: no convolution of at most {largest:,} weights, or no linear layer")

    def nearest(place: int) -> str:
        able = [i for i, (_, size) in enumerate(convolutions) if size <= largest]
        return convolutions[min(able, key=lambda i: abs(i - place))][0]

    count = len(convolutions)
    return {"first": nearest(0), "middle": nearest(count // 2), "last": nearest(count - 1), "classifier": linear[-1]}


def rank_of(J: Tensor, outputs: int = 0) -> int:
    """min(P, N (K + outputs)) of a Jacobian `[N, K, P]`."""
    N, K, P = J.shape
    return min(P, N * (K + outputs))


def descending(block: FactoredOperator) -> Tensor:
    """All eigenvalues, the largest first."""
    return block.eigenvalues().flip(0).cpu()


def half(rank: int) -> int:
    """k = r / 2, rounded up."""
    return -(-rank // 2)


def condition(values: Tensor, rank: int) -> float:
    """lambda_1 / lambda_k of eigenvalues in descending order at half of a rank; infinite where lambda_k is not resolved."""
    k = half(rank)
    return float(values[0] / values[k - 1]) if values[k - 1] > RESOLVED * values[0] else float("inf")


def conditioning(role: str, values: Tensor, rank: int) -> Iterator[Row]:
    """Both measures of conditioning."""
    yield row(role, CONDITION, condition(values, rank))
    yield row(role, SPREAD, values[0] * rank / values.sum())


def head_condition(model: nn.Module, images: Tensor, head: str) -> float:
    """The median over images of the condition number of the head's Jacobian, at the features that the network has of them."""
    assert isinstance(model, Network)
    assert isinstance(model.head, PoolingHead)
    with torch.no_grad(), untouched(model):
        features = model.head.reduction(model.features(model.stem(images)))
    varying = features.flatten(2).std(-1).amax(1) > 0
    return float(head_spectrum(features[varying], head).condition.median()) if varying.any() else float("nan")


def row(layer: str, quantity: str, value: float | Tensor, *, index: int = -1, error: float = 0.0) -> Row:
    """A record of a convolution or, with the layer "", of the whole network."""
    return {"layer": layer, "quantity": quantity, "index": index, "value": float(value), "error": error}
