"""The smallest networks that contain a layer: the table `LAYERS`, one row for each layer of the support matrix."""

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torchvision.models import mobilenetv2, resnet, shufflenetv2

from secondorder.curvature.backpack.branches import Branches, ChannelShuffle, ChannelSlice, Concatenate, Sum
from secondorder.networks.small import ResidualBlock
from secondorder.pooling import Covariance, MatrixLogarithm, MatrixPower, MatrixSquareRoot, RandomLift, UpperTriangle
from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout

CHANNELS = 4
CLASSES = 2


def convolution(**options: object) -> nn.Conv2d:
    """3x3, 4 to 4 channels."""
    return nn.Conv2d(CHANNELS, CHANNELS, 3, **{"padding": 1, **options})  # type: ignore[arg-type]


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "Linear": lambda: [nn.Flatten(), nn.Linear(CHANNELS * 9, 3)],
    "Conv2d": lambda: [convolution()],
    "Conv2d, stride and dilation": lambda: [convolution(stride=2, dilation=2, padding=2)],
    "Conv2d, groups": lambda: [convolution(groups=2)],
    "Conv2d, depthwise": lambda: [convolution(groups=CHANNELS)],
    "Conv2d, padding='same'": lambda: [convolution(padding="same")],
    "Conv2d, circular padding": lambda: [convolution(padding_mode="circular")],
    "BatchNorm2d": lambda: [nn.BatchNorm2d(CHANNELS).eval()],
    "BatchNorm2d, training": lambda: [nn.BatchNorm2d(CHANNELS)],
    "ReLU": lambda: [nn.ReLU()],
    "ReLU6": lambda: [nn.ReLU6()],
    "LeakyReLU": lambda: [nn.LeakyReLU()],
    "ELU": lambda: [nn.ELU()],
    "GELU": lambda: [nn.GELU()],
    "SiLU": lambda: [nn.SiLU()],
    "Sigmoid": lambda: [nn.Sigmoid()],
    "Tanh": lambda: [nn.Tanh()],
    "MaxPool2d": lambda: [nn.MaxPool2d(2)],
    "AvgPool2d": lambda: [nn.AvgPool2d(2)],
    "AdaptiveAvgPool2d": lambda: [nn.AdaptiveAvgPool2d(1)],
    "Flatten": lambda: [nn.Flatten()],
    "Dropout": lambda: [nn.Dropout(0.5).eval()],
    "Dropout, training": lambda: [nn.Dropout(0.3)],
    "Covariance": lambda: [nn.Tanh(), Covariance()],
    "MatrixSquareRoot, Newton-Schulz": lambda: [nn.Tanh(), Covariance(), MatrixSquareRoot()],
    "MatrixSquareRoot, exact": lambda: [nn.Tanh(), Covariance(), MatrixSquareRoot("eigh")],
    "MatrixPower": lambda: [nn.Tanh(), Covariance(), MatrixPower(0.7)],
    "MatrixLogarithm": lambda: [nn.Tanh(), Covariance(), MatrixLogarithm()],
    "UpperTriangle": lambda: [nn.Tanh(), Covariance(), UpperTriangle()],
    "RandomLift": lambda: [nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), RandomLift(CHANNELS)],
    "AdaptiveChannelDropout": lambda: [AdaptiveChannelDropout(CHANNELS).eval()],
    "AdaptiveChannelDropout, training": lambda: [AdaptiveChannelDropout(CHANNELS)],
    "Sum": lambda: [Branches([nn.Tanh(), nn.Sequential()], Sum())],
    "Concatenate": lambda: [Branches([nn.Tanh(), nn.Sequential()], Concatenate())],
    "ChannelSlice": lambda: [ChannelSlice(1, 3)],
    "ChannelShuffle": lambda: [ChannelShuffle(2)],
    "ResidualBlock": lambda: [ResidualBlock(CHANNELS, 2, 2).eval()],
    "ResNet BasicBlock": lambda: [resnet.BasicBlock(CHANNELS, CHANNELS).eval()],
    "ResNet Bottleneck": lambda: [resnet.Bottleneck(CHANNELS, 1).eval()],
    "MobileNetV2 InvertedResidual": lambda: [mobilenetv2.InvertedResidual(CHANNELS, CHANNELS, 1, 2).eval()],
    "ShuffleNetV2 InvertedResidual": lambda: [shufflenetv2.InvertedResidual(CHANNELS, CHANNELS, 1).eval()],
    "ShuffleNetV2 InvertedResidual, stride 2": lambda: [shufflenetv2.InvertedResidual(CHANNELS, CHANNELS, 2).eval()],
}
"""Name -> the layer, with others before or after it where it cannot stand alone."""


@cache
def layer_network(layer: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Convolution - the row's layers - flatten - linear in float64, with images `[2, 1, 4, 4]` and labels `[2]`.

    The row's parameters are those whose names begin with ``1.``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, layers = nn.Conv2d(1, CHANNELS, 2), nn.Sequential(*LAYERS[layer]())
        with torch.no_grad():
            width = copy.deepcopy(layers)(torch.zeros(2, CHANNELS, 3, 3)).flatten(1).shape[1]
            for part in layers.modules():
                if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
                    part.running_mean.normal_(0, 0.1)
                    part.weight.uniform_(0.5, 1.5)
        network = nn.Sequential(first, layers, nn.Flatten(), nn.Linear(width, CLASSES)).double()
        return network, torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
