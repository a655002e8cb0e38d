"""Networks that end at a layer of the backbone, with a GCP head there, in float64: where the backward pass is compared."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from secondorder.networks import Network
from secondorder.networks.split import first_convolution
from secondorder.pooling import PoolingHead, pooling_head
from studies.preconditioning.heads.features import in_double
from studies.preconditioning.situation import Situation
from studies.shared_backbone import MOST_IMAGES, SharedBackbone, evenly_spaced

LAYERS = 3
"""Layers at most, evenly spaced from the stem to the last one."""
MOST_CHANNELS = 128
"""Layers of the backbone with more channels have no head of their own: its classifier would be too large to fit."""


def cut_networks(situation: Situation) -> Iterator[tuple[str, Network]]:
    """(name of the layer, network that ends there), the last one with the head that the study fits anyway.

    The others get a GCP head whose classifier is fitted on the reference images.
    """
    last = situation.heads["gcp"]
    cuts = cut_points(last.features)
    for index in evenly_spaced(len(cuts), LAYERS).tolist():
        name, length = cuts[index]
        if index == len(cuts) - 1:
            yield name, copy.deepcopy(in_double(last))
        elif (shorter := _shortened(situation, last, length)) is not None:
            yield name, shorter


def cut_points(features: nn.Module) -> list[tuple[str, int]]:
    """(name, number of leading children) up to every child with a convolution, and of all; named by the last one inside."""
    children = list(features.named_children())
    convolutional = [i for i, (_, child) in enumerate(children) if first_convolution(child) is not None]
    inner = [("stem", 0)] if convolutional[:1] == [0] else []
    ends = [*convolutional[1:], len(children)]
    return inner + [(f"features.{children[i][0]}", end) for i, end in zip(convolutional, ends, strict=True)]


def _shortened(situation: Situation, last: Network, length: int) -> Network | None:
    """Stem and `length` children of the features under a GCP head; None where that has too many channels or one position."""
    features = nn.Sequential(*list(last.features.children())[:length])
    images, _ = situation.some_images(1)
    with torch.no_grad():
        _, channels, height, width = features(last.stem(images)).shape
    if channels > MOST_CHANNELS or height * width < 2:
        return None
    data = situation.data
    classifier = nn.Linear(channels, data.num_classes).to(images)  # replaced by the fitted one
    plain = Network(last.stem, features, pooling_head("gap", channels).to(images), classifier).eval()
    enough = situation.settings.reference_images
    if len(data.train.labels[evenly_spaced(len(data.train), enough)].unique()) < data.num_classes:
        enough = MOST_IMAGES  # of which the study has checked that they have all classes
    return in_double(SharedBackbone(plain, data, situation.settings.weight_decay, enough).with_head("gcp"))


def last_convolution(network: Network) -> nn.Conv2d:
    """The last convolution on the main path below the pooling: a shortcut's is registered later but comes before."""
    assert isinstance(network.head, PoolingHead)
    found = [
        module
        for part in (network.stem, network.features, network.head.reduction)
        for name, module in part.named_modules()
        if isinstance(module, nn.Conv2d) and "downsample" not in name
    ]
    return found[-1]
