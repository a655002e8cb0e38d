"""What the study measures: one trained backbone, several heads on it, and one batch of training images."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from secondorder.data import ImageDataset
from secondorder.errors import InputError, check_known
from secondorder.networks import Network, SharedBackbone, frozen_at
from secondorder.pooling import POOLINGS
from studies.backbones import evenly_spaced, shared_backbone
from studies.checks import check_count, check_names

PUBLISHED = 5
"""Newton-Schulz steps of the published head."""


@dataclass(frozen=True)
class Measures:
    """What is measured of each backbone, and of how many images."""

    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp", "gcp_exact")
    """Heads that are put on each backbone, gap and gcp among them."""
    penalty: float = 1e-3
    """Of the classifiers, which are fitted to the features under each head: mean cross-entropy + penalty / 2 |W|^2."""
    images: int = 1024
    """Training images (at most) in the large batch, whose gradients are compared and which K-FAC's factors are of."""
    head_images: int = 64
    """Training images at whose features heads are differentiated."""
    curvature_images: int = 8
    """Training images whose curvature blocks are measured, as one batch."""
    newton_schulz_steps: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 10, 12)
    """Numbers of Newton-Schulz steps whose head is measured, besides the published 5."""
    dampings: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """Dampings of K-FAC whose directions are compared, relative to a block's scale, besides the optimiser's 0.01."""
    natural_gradient: bool = False
    """Whether directions are compared with the exact natural gradient, too: some 70 passes over the images."""
    precision: Literal["float32", "float64"] = "float64"
    """Number format of curvature and fitted classifiers; heads are measured in float64, directions of gradients in float32."""

    def __post_init__(self) -> None:
        check_names("heads", self.heads)
        for head in self.heads:
            check_known("pooling", head, POOLINGS)
        for needed in ("gap", "gcp"):
            if needed not in self.heads:
                raise InputError(f"--heads {' '.join(self.heads)}: must have {needed!r} among them")
        for name, least in {"images": 2, "head_images": 1, "curvature_images": 2}.items():
            check_count(name, getattr(self, name), least)
        for name in ("dampings", "newton_schulz_steps"):
            check_names(name, tuple(f"{value:g}" for value in getattr(self, name)))
        for damping in self.dampings:
            if not damping > 0:
                raise InputError(f"--dampings {damping:g}: every value must be above 0")
        for steps in self.newton_schulz_steps:
            check_count("newton_schulz_steps", steps)


@dataclass(frozen=True)
class Backbone:
    """The network below the pooling at some step of training, with any head on it, and training images, not augmented.

    Batch norm is in training mode. Classifiers are fitted to features with the statistics of `batch`, those of training mode.
    """

    model: nn.Module
    data: ImageDataset
    measures: Measures
    seed: int

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` evenly spaced training images (all if there are fewer) [n, C, H, W] and their labels [n]."""
        images, labels = self.data.train.plain(evenly_spaced(len(self.data.train), count))
        device = next(self.model.parameters()).device
        return images.to(device, getattr(torch, self.measures.precision)), labels.to(device)

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The images of the one large batch and their labels."""
        return self.images(self.measures.images)

    @cached_property
    def frozen(self) -> nn.Module:
        """The network with the head that it was trained under, batch norm with the statistics of `batch` as constants."""
        images, _ = self.batch
        return frozen_at(self.model, images, images.dtype)

    @cached_property
    def shared(self) -> SharedBackbone:
        """The frozen network under other heads."""
        return shared_backbone(self.frozen, self.data, self.measures.penalty)

    def under(self, head: str, labels: Tensor | None = None) -> Network:
        """The backbone in training mode under a head, the classifier fitted to its features.

        `labels`, of all training images, are those that it is fitted to, as a control.
        """
        if labels is not None:
            labels = labels[evenly_spaced(len(labels))]
        return self.shared.under(head, labels).train()

    @cached_property
    def networks(self) -> Mapping[str, Network]:
        """The backbone under each of the heads; they share its values, not the tensors."""
        return {head: self.under(head) for head in self.measures.heads}
