"""Small networks for one machine: CIFAR ResNets and tiny networks for 8x8 digits.

Every activation is a module of its own, used once and never in place, and every sum is a plain `+`: this is what
per-layer curvature (BackPACK) needs. Convolutions have no bias and start from He et al. 2015, fan-out.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)), `[N, c, H, W] -> [N, C, H/stride, W/stride]`.

    He et al. 2016, figure 2. Where the shape changes, the shortcut is a strided 1x1 convolution with BN (their option
    B, and torchvision's) and not the parameter-free subsampling and padding (option A, which they used on CIFAR):
    every parameter and every operation then sits in a layer, which curvature per layer and `last_stride` rely on.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.relu2 = nn.ReLU()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`[N, c, H, W] -> [N, C, H/stride, W/stride]`."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu2(residual + shortcut)


def cifar_resnet(depth: int, in_channels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Stem and features of the CIFAR ResNet of depth 6n + 2 (He et al. 2016, section 4.2), `[N, 64, H/4, W/4]`.

    Stem: 3x3 convolution to 16 channels, BN, ReLU. Features: 3 stages of n blocks, 16, 32 and 64 channels wide, the
    second and third with stride 2 (32x32 images: 8x8 maps).
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    previous = 16
    for stage, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1):
        blocks = [ResidualBlock(previous, width, stride)]
        blocks += [ResidualBlock(width, width, 1) for _ in range((depth - 2) // 6 - 1)]
        stages[f"stage{stage}"] = nn.Sequential(*blocks)
        previous = width
    return initialise(conv_bn_relu(in_channels, 16)), initialise(nn.Sequential(stages))


def digits_net(in_channels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Stem and features of a tiny network for 8x8 images, `[N, in_channels, H, W] -> [N, 32, H, W]`.

    23,408 parameters for grey images. No stride: the 64 positions of an 8x8 map give 32 channels a covariance of full rank.
    """
    return plain_net(in_channels, 16, (32, 32, 32))


def digits_slim(in_channels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Stem and features of `digits_net` at half the width, `[N, in_channels, H, W] -> [N, 16, H, W]`: 5,944 parameters."""
    return plain_net(in_channels, 8, (16, 16, 16))


def digits_small(in_channels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Stem and features of `digits_slim` less one convolution, `[N, in_channels, H, W] -> [N, 16, H, W]`: 3,608 parameters."""
    return plain_net(in_channels, 8, (16, 16))


def digits_tiny(in_channels: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Stem and features of 608 parameters, whose whole Hessian is a small matrix: `[N, in_channels, H, W] -> [N, 6, H, W]`."""
    return plain_net(in_channels, 4, (6, 6))


def plain_net(in_channels: int, stem: int, widths: Sequence[int]) -> tuple[nn.Sequential, nn.Sequential]:
    """3x3 convolutions with BN and ReLU, without strides: one to `stem` channels as stem, then one to each of `widths`."""
    pairs = zip((stem, *widths), widths, strict=False)
    features = nn.Sequential(*(layer for c, C in pairs for layer in conv_bn_relu(c, C)))
    return initialise(conv_bn_relu(in_channels, stem)), initialise(features)


def conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """relu(bn(conv3x3(x))), `[N, c, H, W] -> [N, C, H/stride, W/stride]`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def initialise(module: nn.Sequential) -> nn.Sequential:
    """Convolution weights from N(0, 2 / fan_out), which keeps the gradient's variance through ReLUs."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return module
