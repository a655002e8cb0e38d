"""The maps of a classification network at several resolutions, merged to a feature pyramid."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from secondorder.errors import InputError, check_flag, check_known, check_whole, short
from secondorder.networks.replacement import checked_parts, default_image_size
from secondorder.networks.split import Split, first_convolution, set_last_stride, stage_name, without_inplace
from secondorder.optional import needed_by

ADAPTATIONS = ("none", "gcp_d", "gcp_m")
"""What is done to the last stage of a GCP ResNet, whose stride is 1: nothing, stride 2 of its first convolutions, or a
max-pooling in front of it. Source: Wang et al. (2020), which names them GCP_D and GCP_M."""
DEEPEST = 8
"""Levels are at most this many times as fine as the deepest one: strides 4, 8, 16 and 32 of a ResNet."""
PROBED = 512
"""Side of the images, which are not computed, that show the strides."""
POOL = "pool"


class FeaturePyramid(nn.Module):
    """A module from images ``[N, C, H, W]`` to maps ``[N, width, H / s, W / s]``: of each level's stride s, and twice the last.

    C_l is a network's last map of stride s_l. With 1x1 convolutions L_l (lateral) and 3x3 convolutions O_l

        M_l = L_l(C_l) + upsampled(M_{l+1}),    P_l = O_l(M_l),    P_pool = every second position of the last P_l.

    Levels are those whose stride is at least 2 and an eighth of the deepest one; one of stride 1 where there is no other.

    Source: Lin et al. (CVPR 2017), as in torchvision.

    Attributes:
        stem, features: copies of the network's parts, under the names that they have there. `maps` is what they give.
        in_channels: C of the images.
        strides: of the levels, the finest first, without that of the pooling.
        out_channels: ``width``, as torchvision's detectors ask for it.
        frozen: whether stem and features stay as they are: no gradients, batch normalisation in eval mode whatever the mode.
    """

    def __init__(self, network: nn.Module, width: int = 256, *, adaptation: str = "none", frozen: bool = False) -> None:
        """Copy the network's convolutions with weights and batch-norm statistics, in training mode; it is left as it is.

        Args:
            network: a `Network`, or a model that `replace_pooling` takes apart; its features must be maps ``[N, C, H, W]``.
            width: channels of the pyramid.
            adaptation: one of `ADAPTATIONS`.
            frozen: keep the copy as it is.

        Raises:
            InputError: for other arguments, features without two positions a side, and an adaptation of a network whose last
                stage is no ResNet's or has stride 2 already.
            MissingLibraryError: without torchvision.
        """
        super().__init__()
        check_known("adaptation", adaptation, ADAPTATIONS)
        check_whole("width", width)
        check_flag("frozen", frozen)
        if not isinstance(network, nn.Module):
            raise InputError(f"network {short(network)}: must be an nn.Module")
        parts = checked_parts(network, default_image_size(network)).split
        if parts.layout != "NCHW":
            raise InputError(f"features of layout {parts.layout}: a feature pyramid needs maps [N, C, H, W]")
        self.stem, self.features = parts.stem, adapted(staged(parts), adaptation)
        for part in (self.stem, self.features):
            without_inplace(part)
        self.after, channels, self.strides = levels(self.stem, self.features)
        first = first_convolution(self.stem) or first_convolution(self.features)
        self.in_channels = 3 if first is None else first.in_channels
        self.out_channels = width
        self.frozen = frozen
        with needed_by("a feature pyramid"):
            from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool())
        if frozen:
            for p in (*self.stem.parameters(), *self.features.parameters()):
                p.requires_grad_(False)
        self.to(next((p.device for p in self.stem.parameters()), torch.device("cpu")))
        self.train()

    @property
    def names(self) -> list[str]:
        """Keys of the levels in what `forward` gives, the finest first, without that of the pooling, "pool"."""
        return [str(level) for level in range(len(self.strides))]

    def maps(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """C_l of each level, ``[N, C_l, H / s_l, W / s_l]``, by its key. InputError for images smaller than the last stride."""
        deepest = self.strides[-1]
        if images.ndim != 4 or min(images.shape[-2:]) < deepest:
            raise InputError(
                f"images of shape {list(images.shape)}: a network of stride {deepest} needs [N, C, H, W] of at least "
                f"{deepest} pixels a side"
            )
        found: OrderedDict[str, Tensor] = OrderedDict()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = images
            for place, part in enumerate([self.stem, *self.features]):
                x = part(x)
                if place in self.after:
                    found[str(self.after.index(place))] = x
        return found

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """P_l of each level, ``[N, width, H / s_l, W / s_l]``, by its key, and "pool"; InputError as of `maps`."""
        return self.fpn(self.maps(images))

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Set the mode, except that of frozen parts, which is eval."""
        super().train(mode)
        if self.frozen:
            self.stem.eval()
            self.features.eval()
        return self

    @torch.no_grad()
    def recalibrate(self, images: Tensor, batch_size: int = 16) -> None:
        """Make the batch-norm statistics of stem and features the means over batches of `images`, normalised ``[N, C, H, W]``.

        What a frozen network needs before it is compared on images of another kind, and a random one before it is compared at
        all. Batches have ``batch_size`` images; a last one of a single image is left out. Raises InputError for images of another
        shape, fewer than two, and a batch size below two.
        """
        check_whole("batch_size", batch_size, least=2)
        if images.ndim != 4 or len(images) < 2:
            raise InputError(f"images of shape {list(images.shape)}: must be [N, C, H, W] with N >= 2")
        batches = [batch for batch in images.split(batch_size) if len(batch) > 1]
        update_bn(batches, nn.Sequential(self.stem, self.features))
        self.train(self.training)


def staged(parts: Split) -> nn.Sequential:
    """The features of a network as a sequence of stages; a single module becomes a sequence of one."""
    return parts.features if isinstance(parts.features, nn.Sequential) else nn.Sequential(parts.features)


def adapted(features: nn.Sequential, adaptation: str) -> nn.Sequential:
    """The features with stride 2 in a last stage of stride 1: by its convolutions (gcp_d), by a max-pooling before it (gcp_m)."""
    if adaptation == "none":
        return features
    stage = features[-1]
    block = next(stage.children(), stage)
    shortcut = first_convolution(getattr(block, "downsample", None))
    if shortcut is None:
        raise InputError(f"adaptation {adaptation!r}: only ResNets have one; these features end in {stage_name(stage)}")
    if shortcut.stride[0] != 1:
        raise InputError(
            f"adaptation {adaptation!r}: the last stage has stride {shortcut.stride[0]} already; use 'none'"
        )
    if adaptation == "gcp_d":
        set_last_stride(features, 2)
    else:
        *before, (name, stage) = features.named_children()
        return nn.Sequential(OrderedDict([*before, (POOL, nn.MaxPool2d(2, ceil_mode=True)), (name, stage)]))
    return features


def levels(stem: nn.Module, features: nn.Sequential) -> tuple[list[int], list[int], list[int]]:
    """The parts (0: the stem, 1: the first stage) after which the levels are, their channels and their strides."""
    convolution = first_convolution(stem) or first_convolution(features)
    parts = copy.deepcopy(nn.ModuleList([stem, *features])).to("meta").eval()
    dtype = next((p.dtype for p in parts.parameters()), torch.get_default_dtype())
    x = torch.empty(
        1, 3 if convolution is None else convolution.in_channels, PROBED, PROBED, device="meta", dtype=dtype
    )
    last: dict[int, tuple[int, int]] = {}
    with torch.no_grad():
        for place, part in enumerate(parts):
            x = part(x)
            last[max(1, round(PROBED / x.shape[-1]))] = place, x.shape[1]
    deepest = max(last)
    kept = sorted(stride for stride in last if stride >= max(2, deepest / DEEPEST)) or [deepest]
    return [last[stride][0] for stride in kept], [last[stride][1] for stride in kept], kept
