"""How each kind of container is written as leaf modules and branches: the table `TWINS`.

A row gets the container and a function `part`: ``part("conv1")`` is the twin of the container's submodule of that name.
A network of your own needs one row for each class with a `forward` of its own:

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x).tanh()

    TWINS[Gate] = lambda gate, part: residual(part("conv"), nn.Tanh())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from secondorder.curvature.backpack.branches import Branches, ChannelShuffle, ChannelSlice, Concatenate, Sum
from secondorder.networks import Network
from secondorder.networks.small import ResidualBlock
from secondorder.pooling import AsMaps, PoolingHead
from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout

if TYPE_CHECKING:
    from torchvision.models import mobilenetv2, resnet, shufflenetv2

Part = Callable[[str], nn.Module]
Rule = Callable[[Any, Part], nn.Module]


def residual(*main: nn.Module, shortcut: nn.Module | None = None) -> nn.Module:
    """main(x) + shortcut(x); without a shortcut, main(x) + x."""
    return Branches([nn.Sequential(*main), nn.Sequential() if shortcut is None else shortcut], Sum())


def children(container: nn.Module, part: Part) -> nn.Module:
    """The twins of a container's children one after the other (`named_children` would leave out the second use of a module)."""
    return nn.Sequential(*(part(name) for name in container._modules))


def chain(*names: str) -> Rule:
    """The row of a container that runs these submodules one after the other."""
    return lambda container, part: nn.Sequential(*(part(name) for name in names))


def identity(module: nn.Module, part: Part) -> nn.Module:
    """An empty `nn.Sequential`, the twin of a module that hands its input on."""
    return nn.Sequential()


def shortcut(block: Any, part: Part) -> nn.Module | None:
    """The shortcut of a ResNet block; None where it hands the input on."""
    return None if block.downsample is None else part("downsample")


def branches(module: Branches, part: Part) -> nn.Module:
    """The twin of a `Branches` that is part of a network: branches and merge, each as its twin."""
    return Branches([part(f"branches.{index}") for index in range(len(module.branches))], part("merge"))


def small_block(block: ResidualBlock, part: Part) -> nn.Module:
    """The twin of a block of the CIFAR ResNets: two convolutions and a shortcut."""
    main = [part(name) for name in ("conv1", "bn1", "relu1", "conv2", "bn2")]
    return nn.Sequential(residual(*main, shortcut=shortcut(block, part)), part("relu2"))


def basic_block(block: resnet.BasicBlock, part: Part) -> nn.Module:
    """A block of ResNet-18 and 34, which uses one ReLU twice."""
    main = [part(name) for name in ("conv1", "bn1", "relu", "conv2", "bn2")]
    return nn.Sequential(residual(*main, shortcut=shortcut(block, part)), part("relu"))


def bottleneck(block: resnet.Bottleneck, part: Part) -> nn.Module:
    """A block of ResNet-50 and deeper, which uses one ReLU three times."""
    main = [part(name) for name in ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")]
    return nn.Sequential(residual(*main, shortcut=shortcut(block, part)), part("relu"))


def mobile_block(block: mobilenetv2.InvertedResidual, part: Part) -> nn.Module:
    """A block of MobileNetV2; its sum is there only where input and output have one shape."""
    return residual(part("conv")) if block.use_res_connect else part("conv")


def shuffle_block(block: shufflenetv2.InvertedResidual, part: Part) -> nn.Module:
    """A unit of ShuffleNetV2: with stride 1 the first half of the channels skips it, with stride 2 both branches see all."""
    if block.stride == 1:
        width = block.branch2[0].in_channels
        first: nn.Module = ChannelSlice(0, width)
        second: nn.Module = nn.Sequential(ChannelSlice(width, 2 * width), part("branch2"))
    else:
        first, second = part("branch1"), part("branch2")
    return nn.Sequential(Branches([first, second], Concatenate()), ChannelShuffle(2))


def pooling_head(head: PoolingHead, part: Part) -> nn.Module:
    """The twin of a pooling head: its reduction and layers, after what makes maps of another layout."""
    first = [] if head.layout == "NCHW" else [AsMaps(head.layout)]
    return nn.Sequential(*first, part("reduction"), part("layers"))


def torchvision_resnet(model: resnet.ResNet, part: Part) -> nn.Module:
    """The twin of torchvision's ResNet, its functional flattening as a module."""
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
    return nn.Sequential(*(part(name) for name in names), nn.Flatten(), part("fc"))


def torchvision_mobilenet(model: mobilenetv2.MobileNetV2, part: Part) -> nn.Module:
    """The twin of torchvision's MobileNetV2, its functional pooling as modules."""
    return nn.Sequential(part("features"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), part("classifier"))


def torchvision_shufflenet(model: shufflenetv2.ShuffleNetV2, part: Part) -> nn.Module:
    """The twin of torchvision's ShuffleNetV2, its mean over the positions as modules."""
    names = ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")
    return nn.Sequential(*(part(name) for name in names), nn.AdaptiveAvgPool2d(1), nn.Flatten(), part("fc"))


TWINS: dict[type[nn.Module] | str, Rule] = {
    nn.Sequential: children,
    Branches: branches,
    nn.DataParallel: chain("module"),
    nn.parallel.DistributedDataParallel: chain("module"),
    Network: chain("stem", "features", "head", "classifier"),
    PoolingHead: pooling_head,
    ResidualBlock: small_block,
    nn.Identity: identity,
    AdaptiveChannelDropout: identity,  # in training mode it is refused
    "torchvision.ops.misc.Conv2dNormActivation": children,
    "torchvision.models.resnet.BasicBlock": basic_block,
    "torchvision.models.resnet.Bottleneck": bottleneck,
    "torchvision.models.mobilenetv2.InvertedResidual": mobile_block,
    "torchvision.models.shufflenetv2.InvertedResidual": shuffle_block,
    "torchvision.models.resnet.ResNet": torchvision_resnet,
    "torchvision.models.mobilenetv2.MobileNetV2": torchvision_mobilenet,
    "torchvision.models.shufflenetv2.ShuffleNetV2": torchvision_shufflenet,
}
"""Exact class of a container -> its twin. Classes of a library that may be missing stand with their full name."""


def rule_for(kind: type[nn.Module]) -> Rule | None:
    """The row of TWINS for this class, or for its full name; None where there is none."""
    return TWINS.get(kind) or TWINS.get(f"{kind.__module__}.{kind.__qualname__}")
