"""Backbones: the table `NETWORKS`, one row per network without its pooling and classifier.

torchvision's networks are cut, not rewritten: their own modules, initial weights and child names are kept, so that a
`"gap"` network computes what torchvision's does. Kept in the features are MobileNetV2's last 1x1 convolution (320 to
1280 channels) and ShuffleNetV2's `conv5`: GAP and GCP networks then share every layer up to the pooling head, whose
1x1 reduction is the only convolution that GCP adds.

Those named `..._small_images` reduce images by 8 instead of 32: some strides, and a max-pooling, are all that differs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from secondorder.networks.small import cifar_resnet, digits_net, digits_slim, digits_small, digits_tiny
from secondorder.networks.split import first_convolution, split, without_inplace
from secondorder.optional import needed_by


@dataclass(frozen=True)
class Backbone:
    """One row of `NETWORKS`: how to build stem and features, and how the published network ends."""

    build: Callable[[int], tuple[nn.Module, nn.Module]]  # in_channels -> stem, features
    channels: int  # of the last feature map
    last_stride: tuple[int, int] | None = None  # of the last stage, (with "gap", with any other pooling); None: fixed
    activation: type[nn.Module] = nn.ReLU  # after the head's 1x1 reduction
    dropout: float = 0.0  # before the linear classifier


def from_torchvision(name: str, in_channels: int, fan_out: bool = True) -> tuple[nn.Module, nn.Module]:
    """Stem and features of torchvision's network of this name, for images of `in_channels` channels.

    For other than 3 channels the first convolution is made anew, with torchvision's initialisation of that network
    (N(0, 2 / fan_out), or PyTorch's default where `fan_out` is false). Raises MissingLibraryError without torchvision.
    """
    with needed_by(f"the network {name}"):
        import torchvision
    parts = split(getattr(torchvision.models, name)(weights=None, num_classes=1))
    without_inplace(parts.stem)
    without_inplace(parts.features)
    if in_channels != 3:
        set_in_channels(parts.stem, in_channels, fan_out)
    return parts.stem, parts.features


def mobilenet_v2_small_images(in_channels: int) -> tuple[nn.Module, nn.Module]:
    """Stem and features of MobileNetV2 for small images, `[N, in_channels, H, W] -> [N, 1280, H/8, W/8]` (32x32: 4x4 maps).

    The published network reduces by 32. Here the stem and the last strided stage (160 channels) keep the resolution; weights,
    parameters and the other three strides are as published.
    """
    stem, features = from_torchvision("mobilenet_v2", in_channels)
    for part in (stem, features):
        strided = [layer for layer in part.modules() if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
        strided[-1].stride = (1, 1)
    return stem, features


def shufflenet_v2_small_images(name: str, in_channels: int) -> tuple[nn.Module, nn.Module]:
    """Stem and features of a ShuffleNetV2 for small images, `[N, in_channels, H, W] -> [N, C, H/8, W/8]` (32x32: 4x4 maps).

    The published network reduces by 32. Here the stem is its convolution with stride 1, and there is no max-pooling; weights and
    parameters are as published.
    """
    stem, features = from_torchvision(name, in_channels, fan_out=False)
    convolution = first_convolution(stem)
    assert isinstance(convolution, nn.Conv2d)
    convolution.stride = (1, 1)
    del stem.maxpool
    return stem, features


def set_in_channels(stem: nn.Module, in_channels: int, fan_out: bool) -> None:
    """Replace the stem's first convolution (assumed without bias) by one for `in_channels` channels."""
    old = first_convolution(stem)
    assert isinstance(old, nn.Conv2d)
    assert old.bias is None
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)  # type: ignore[arg-type]
    if fan_out:
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    name = next(name for name, part in stem.named_modules() if part is old)
    stem.set_submodule(name, new)


def resnet(name: str, channels: int) -> Backbone:
    """Row of a torchvision ResNet; with GCP the last stage keeps stride 1 (14x14 maps at 224), as published."""
    return Backbone(partial(from_torchvision, name), channels, last_stride=(2, 1))


def shufflenet(name: str, channels: int) -> Backbone:
    """Row of a torchvision ShuffleNetV2 (PyTorch's default initialisation)."""
    return Backbone(partial(from_torchvision, name, fan_out=False), channels, activation=nn.ReLU6)


def shufflenet_small_images(name: str, channels: int) -> Backbone:
    """Row of a ShuffleNetV2 without the reductions of its stem."""
    return Backbone(partial(shufflenet_v2_small_images, name), channels, activation=nn.ReLU6)


def small_resnet(depth: int) -> Backbone:
    """Row of a CIFAR ResNet; 8x8 maps with every pooling unless `last_stride` says otherwise."""
    return Backbone(partial(cifar_resnet, depth), 64, last_stride=(2, 2))


NETWORKS: dict[str, Backbone] = {
    "mobilenet_v2": Backbone(partial(from_torchvision, "mobilenet_v2"), 1280, activation=nn.ReLU6, dropout=0.2),
    "shufflenet_v2_x0_5": shufflenet("shufflenet_v2_x0_5", 1024),
    "shufflenet_v2_x1_0": shufflenet("shufflenet_v2_x1_0", 1024),
    "shufflenet_v2_x1_5": shufflenet("shufflenet_v2_x1_5", 1024),
    "shufflenet_v2_x2_0": shufflenet("shufflenet_v2_x2_0", 2048),
    "resnet18": resnet("resnet18", 512),
    "resnet34": resnet("resnet34", 512),
    "resnet50": resnet("resnet50", 2048),
    "resnet101": resnet("resnet101", 2048),
    "mobilenet_v2_small_images": Backbone(mobilenet_v2_small_images, 1280, activation=nn.ReLU6, dropout=0.2),
    "shufflenet_v2_x0_5_small_images": shufflenet_small_images("shufflenet_v2_x0_5", 1024),
    "shufflenet_v2_x1_0_small_images": shufflenet_small_images("shufflenet_v2_x1_0", 1024),
    "cifar_resnet8": small_resnet(8),
    "cifar_resnet20": small_resnet(20),
    "cifar_resnet32": small_resnet(32),
    "digits_net": Backbone(digits_net, 32),
    "digits_slim": Backbone(digits_slim, 16),
    "digits_small": Backbone(digits_small, 16),
    "digits_tiny": Backbone(digits_tiny, 6),
}
