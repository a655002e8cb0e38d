"""What studies of a trained backbone share: its convolutions, training images of every class, and other heads on it."""

import torch
from torch import Tensor, nn

from secondorder.data import ImageDataset
from secondorder.errors import InputError
from secondorder.networks import SharedBackbone

BATCH = 256
MOST_IMAGES = 2000
"""Training images at most that classifiers are fitted to."""


def convolutions(network: nn.Module) -> list[str]:
    """Names of the weights of the convolutions below the pooling, first to last, but for those of shortcuts and with groups."""
    return [
        f"{name}.weight"
        for name, part in network.named_modules()
        if isinstance(part, nn.Conv2d) and part.groups == 1 and "downsample" not in name
    ]


def first_middle_last(network: nn.Module, largest: int) -> dict[str, str]:
    """The first, the middle and the last of the convolutions with at most `largest` weights. InputError when there is none."""
    small = [name for name in convolutions(network) if network.get_parameter(name).numel() <= largest]
    if not small:
        raise InputError(f"{type(network).__name__}: no convolution of at most {largest:,} weights")
    return {"first": small[0], "middle": small[len(small) // 2], "last": small[-1]}


def evenly_spaced(total: int, count: int = MOST_IMAGES) -> Tensor:
    """`count` (or all) of the indices below `total`, evenly spaced: of images in the order of their classes, all classes."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()


def check_sharing(data: ImageDataset, weight_decay: float) -> None:
    """InputError unless a classifier can be fitted: a penalty, and images of every class."""
    if weight_decay <= 0:
        raise InputError(f"weight_decay {weight_decay}: a shared backbone needs a positive one; or share none")
    classes = len(data.train.labels[evenly_spaced(len(data.train))].unique())
    if classes < data.num_classes:
        raise InputError(
            f"only {classes} of {data.num_classes} classes among the training images; use more, or share none"
        )


def shared_backbone(network: nn.Module, data: ImageDataset, penalty: float) -> SharedBackbone:
    """The backbone of a network in eval mode, with classifiers that are fitted to evenly spaced training images."""
    indices = evenly_spaced(len(data.train))
    return SharedBackbone(network, (data.train.plain(part) for part in indices.split(BATCH)), penalty)
