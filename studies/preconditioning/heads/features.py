"""The features that a pooling head reads, of real images, in float64."""

import copy

import torch
from torch import Tensor

from secondorder.networks import Network
from secondorder.pooling import PoolingHead
from studies.preconditioning.situation import Situation

BATCH = 256
CONSTANT = 1e-12
"""Features whose variance is at most this share of their mean square are constant: they have no covariance."""


@torch.no_grad()
def head_features(situation: Situation) -> Tensor:
    """Features `[N, C, H, W]` below the pooling, after the head's reduction, of the images that the settings ask for."""
    network = in_double(situation.frozen)
    assert isinstance(network.head, PoolingHead)
    images, _ = situation.some_images(situation.settings.images)
    parts = images.double().split(BATCH)
    return torch.cat([network.head.reduction(network.features(network.stem(part))) for part in parts]).cpu()


def in_double(network: Network) -> Network:
    """The network itself when its parameters are float64, else a copy in float64."""
    if all(tensor.dtype == torch.float64 for tensor in network.parameters()):
        return network
    return copy.deepcopy(network).double()


def varying(features: Tensor) -> Tensor:
    """Which images `[N]` have features that are not the same at all positions."""
    x = features.flatten(2)
    return x.var(-1, correction=0).sum(1) > CONSTANT * x.square().mean(-1).sum(1)
