"""What every part of the study measures: one backbone under several heads, and the images."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.data import ImageDataset
from secondorder.networks import Network
from studies.frozen_statistics import frozen_at
from studies.preconditioning.settings import Settings
from studies.shared_backbone import SharedBackbone, evenly_spaced

UNTRAINED = "untrained"
"""The backbone before training, the same under every head."""
HEADS = ("gap", "covariance", "gcp")
"""Heads that share each backbone, every classifier fitted on the same features."""
Row = dict[str, Any]
"""part, layer, head, setting, measure, value, and `batch`, the mini-batch it is of (-1: no mini-batch)."""


def row(part: str, layer: str, head: str, setting: object, measure: str, value: float | Tensor, batch: int = -1) -> Row:
    """One measured number. `setting` is what is varied within a head: a damping, a number of steps, a form; or ""."""
    return {
        "part": part,
        "layer": layer,
        "head": head,
        "setting": str(setting),
        "measure": measure,
        "batch": batch,
        "value": float(value),
    }


@dataclass(frozen=True)
class Situation:
    """A backbone whose batch-norm statistics are constants, the heads on it, and training images, not augmented.

    Everything has the precision of the settings; a part converts what it needs otherwise.
    """

    backbone: nn.Module
    data: ImageDataset
    settings: Settings
    seed: int

    @cached_property
    def frozen(self) -> Network:
        """The backbone, with the head it was trained under, in eval mode with the statistics of the reference images."""
        frozen = frozen_at(self.backbone, self.reference[0], self.dtype)
        assert isinstance(frozen, Network)
        return frozen

    @cached_property
    def heads(self) -> Mapping[str, Network]:
        """The backbone under each of HEADS; all share its convolutions' values, not the tensors."""
        return {head: self.with_head(head) for head in HEADS}

    @cached_property
    def training_heads(self) -> Mapping[str, Network]:
        """The same in training mode: batch norm takes the statistics of each batch, and its derivative goes through them.

        With statistics as constants the loss has slopes and curvature along the scale and the mean of every channel, in which
        the loss that is trained is flat, and these are much of the gradient.
        """
        return {head: copy.deepcopy(network).train() for head, network in self.heads.items()}

    @cached_property
    def _shared(self) -> SharedBackbone:
        return SharedBackbone(self.frozen, self.data, self.settings.weight_decay)

    def with_head(self, head: str, labels: Tensor | None = None) -> Network:
        """The backbone under a head whose classifier is fitted on its features, on other labels as a control."""
        return self._shared.with_head(head, labels)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the settings."""
        dtype = getattr(torch, self.settings.precision)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Images that give batch-norm statistics and K-FAC's factors, and their labels."""
        return self.some_images(self.settings.reference_images)

    def some_images(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` evenly spaced training images (all if there are fewer) and their labels."""
        images, labels = self.data.train.plain(evenly_spaced(len(self.data.train), count))
        device = next(self.backbone.parameters()).device
        return images.to(device, self.dtype), labels.to(device)

    def mini_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The mini-batches whose gradients are compared: drawn without replacement within one, the same for every head."""
        device = next(self.backbone.parameters()).device
        batches = (self.data.train.plain(chosen) for chosen in self.mini_batch_indices())
        return [(images.to(device, self.dtype), labels.to(device)) for images, labels in batches]

    def mini_batch_indices(self) -> list[Tensor]:
        """Which training images are in each mini-batch."""
        generator = torch.Generator().manual_seed(self.seed)
        permutations = (
            torch.randperm(len(self.data.train), generator=generator) for _ in range(self.settings.gradient_batches)
        )
        return [permutation[: self.settings.gradient_batch_size] for permutation in permutations]
