"""Networks composed of stem, features, pooling head and classifier."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, unknown
from secondorder.matrix_power.transforms import known_shape
from secondorder.networks.backbones import NETWORKS, Backbone
from secondorder.networks.heads import Pooling, check_pooling, check_positive, make_head
from secondorder.networks.split import check_stride, first_convolution, last_linear, set_last_stride
from secondorder.pooling import LAYOUTS, Covariance
from secondorder.pooling.layout import FLOATS, channels_first, check_layout


class Network(nn.Module):
    """classifier(head(features(stem(x)))): images `[N, in_channels, H, W]` to logits `[N, num_classes]`.

    The stem's output is where the landscape study enters feature space; `rest` is everything after it. No module may
    change its input in place. An empty batch gives empty logits in eval mode and is refused in training, where batch
    statistics need samples. Raises InputError for input of the wrong shape or type, and for images so small that a covariance
    head sees a single position, where every covariance is zero, or batch normalisation in training a single value.

    layout: key of `pooling.LAYOUTS`, the layout of the input: "NCHW" for images, "NCL" for sequences, "NCTHW" for video. That of
        the features is the head's (`PoolingHead.layout`).
    """

    def __init__(
        self, stem: nn.Module, features: nn.Module, head: nn.Module, classifier: nn.Module, *, layout: str = "NCHW"
    ) -> None:
        super().__init__()
        self.stem = stem
        self.features = features
        self.head = head
        self.classifier = classifier
        self.layout = check_layout(layout)
        last = last_linear(classifier)
        first = first_convolution(stem if next(stem.parameters(), None) is not None else features)
        self.in_channels = None if first is None else first.in_channels
        self.num_classes = None if last is None else last.out_features
        self.min_positions = 2 if any(isinstance(part, Covariance) for part in head.modules()) else 1

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of the input `[N, in_channels, H, W]`, or of its `layout`."""
        return self.rest(self.stem(checked_images(x, self.layout, self.in_channels, self.training)))

    def rest(self, activation: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of the stem's output, which is left as it is."""
        try:
            maps = self.features(activation)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"batch normalisation in training gets one value per channel ({str(error)[-60:]}); use a larger batch, larger "
                "images or eval()"
            ) from error
        maps = checked_positions(maps, self._feature_layout, self.min_positions)
        return self.classifier(self.head(maps))

    def check_image_size(self, image_size: int | tuple[int, ...]) -> None:
        """Raise InputError when images of this size are too small for the network; nothing is computed or changed."""
        try:
            _, *positions = self.feature_shape(image_size)
        except RuntimeError as error:  # a convolution or max-pooling larger than its input
            raise InputError(f"images of size {image_size} are too small for this network; use larger ones") from error
        check_positions(tuple(positions), self.min_positions)

    @property
    def _feature_layout(self) -> str:
        return getattr(self.head, "layout", "NCHW")

    def feature_shape(self, image_size: int | tuple[int, ...]) -> tuple[int, ...]:
        """(C, H, W) of the features that the head reads, for images of this size; nothing is computed or changed.

        Of another layout than maps: (C, L) or (C, T, H, W), for as many sizes as the input's layout has positions.
        """
        axes = len(self.layout) - 2
        size = (image_size,) * axes if isinstance(image_size, int) else image_size
        for side in size:
            check_positive("image_size", side)
        trunk = nn.Sequential(self.stem, self.features)
        state = {name: tensor.to("meta") for name, tensor in (*trunk.named_parameters(), *trunk.named_buffers())}
        dtype = next((p.dtype for p in trunk.parameters()), torch.get_default_dtype())
        channels = self.in_channels or 3
        shape = (2, *size, channels) if LAYOUTS[self.layout].channels_last else (2, channels, *size)
        with torch.no_grad():
            maps = torch.func.functional_call(trunk, state, (torch.empty(shape, device="meta", dtype=dtype),))
        return tuple(channels_first(maps, self._feature_layout).shape[1:])


# Functions of tensors and numbers, each one node of a graph that torch.fx traces: there sizes are not known.


def checked_images(x: Tensor, layout: str, in_channels: int | None, training: bool) -> Tensor:
    """x. Raises InputError for input of another layout, number of channels or type, and in training for an empty batch."""
    shape, channel = list(known_shape(x)), layout.index("C")
    wrong = len(shape) != len(layout) or 0 in shape[1:] or shape[channel] != (in_channels or shape[channel])
    if wrong or (training and shape[0] == 0):
        axes = LAYOUTS[layout].shape.replace("C", str(in_channels or "C"))
        raise InputError(f"images of shape {shape}; use {axes} with N >= 1" + ("" if training else " or 0"))
    if x.dtype not in FLOATS:
        raise InputError(
            f"images of type {x.dtype}: a network takes real numbers; use .float(), of bytes .float() / 255"
        )
    return x


def checked_positions(maps: Tensor, layout: str, least: int) -> Tensor:
    """The features. Raises InputError when they have fewer positions than a covariance head can use."""
    if least > 1 and maps.ndim == len(layout):
        check_positions(tuple(known_shape(channels_first(maps, layout))[2:]), least)
    return maps


def check_positions(positions: tuple[int, ...], least: int) -> None:
    """InputError for fewer positions (H, W) than a covariance head can use."""
    if math.prod(positions) < least:
        raise InputError(
            f"the last feature map is {'x'.join(map(str, positions))}, its covariance is always zero; "
            "use larger images, last_stride=1 or pooling 'gap'"
        )


for _function in ("checked_images", "checked_positions"):
    torch.fx.wrap(_function)


def network(
    backbone: str,
    pooling: str | Pooling,
    num_classes: int,
    in_channels: int = 3,
    reduced_channels: int | None = None,
    *,
    last_stride: int | None = None,
    dropout: float | None = None,
    **pooling_options: object,
) -> Network:
    """The network of this backbone (a key of NETWORKS) with this pooling (a key of POOLINGS, or a head of one's own).

    pooling: a name; or a head, any module from maps `[N, C, H, W]` to vectors `[N, F]`, used as it is (not copied); or a function
        or class that makes it from the number C of channels. A head of one's own brings its own reduction and options.
    reduced_channels: width of the 1x1 reduction before the pooling; None: 256 for a covariance of more than 256
        channels, else no reduction; 0: no reduction. `"gap"` reduces only when told to.
    last_stride: stride 1 or 2 of a ResNet's last stage; None: as published, 2 with `"gap"` and 1 with any other pooling
        (CIFAR ResNets: 2 with all). The published comparison changes stride and pooling at once; give both the same.
    dropout: probability in [0, 1) before the linear classifier; None: as published (0.2 for MobileNetV2, else 0).
    pooling_options: options of the pooling head, e.g. `num_iter` of `"gcp"`.

    Stem and features are built first: the same torch seed gives them the same weights whatever the pooling, the
    stride and the number of classes, so that GAP and GCP can be compared from the same start.
    """
    if not isinstance(backbone, str) or backbone not in NETWORKS:
        raise unknown("backbone", backbone[:40] if isinstance(backbone, str) else type(backbone).__name__, NETWORKS)
    row = NETWORKS[backbone]
    check_pooling("network", network, pooling, reduced_channels, dropout, pooling_options)
    check_positive("num_classes", num_classes)
    check_positive("in_channels", in_channels)
    stride = choose_stride(backbone, row, pooling, last_stride)

    stem, features = row.build(in_channels)
    if stride is not None:
        set_last_stride(features, stride)
    options = {"activation": row.activation, **pooling_options}
    head, size = make_head(pooling, torch.Size((2, row.channels, 4, 4)), "NCHW", reduced_channels, options)
    return Network(stem, features, head, linear(size, num_classes, row.dropout if dropout is None else dropout))


def choose_stride(backbone: str, row: Backbone, pooling: str | Pooling, last_stride: int | None) -> int | None:
    """The stride of the last stage: as asked, else as published; None where the backbone has no such option."""
    if last_stride is not None and row.last_stride is None:
        able = ", ".join(name for name, other in NETWORKS.items() if other.last_stride is not None)
        raise InputError(f"last_stride={last_stride!r}: {backbone} cannot change it (use None); those that can: {able}")
    if last_stride is not None:
        check_stride(last_stride)
        return last_stride
    return None if row.last_stride is None else row.last_stride[0 if pooling == "gap" else 1]


def linear(in_features: int, num_classes: int, dropout: float) -> nn.Module:
    """The linear classifier, after dropout if there is any: `[N, in_features] -> [N, num_classes]`."""
    layer = nn.Linear(in_features, num_classes)
    if dropout == 0:
        return layer
    return nn.Sequential(OrderedDict(dropout=nn.Dropout(dropout), linear=layer))
