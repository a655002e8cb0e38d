"""Networks composed of stem, features, pooling head and classifier."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from secondorder.errors import MOST, InputError, check_known, check_whole, short
from secondorder.matrix_power.checks import FLOATS
from secondorder.matrix_power.transforms import inside_transform, known_shape
from secondorder.networks.backbones import NETWORKS, Backbone
from secondorder.networks.heads import Pooling, check_pooling, make_head
from secondorder.networks.split import check_stride, first_convolution, last_linear, set_last_stride
from secondorder.pooling import LAYOUTS, Covariance
from secondorder.pooling.layout import channels_first, check_layout
from secondorder.untouched import undrawn_if_refused

MOST_CLASSES = 2**24
MOST_INPUT_CHANNELS = 2**16
MOST_SIDE = 2**16
"""Bounds on what a size by mistake would allocate."""


class Network(nn.Module):
    """classifier(head(features(stem(x)))): images `[N, in_channels, H, W]` to logits `[N, num_classes]`.

    The stem's output is where the landscape study enters feature space; `rest` is everything after it. No module may
    change its input in place. An empty batch gives empty logits in eval mode and is refused in training, where batch
    statistics need samples. Raises InputError for input of the wrong shape or type, and for images so small that a covariance
    head sees a single position, where every covariance is zero, or batch normalisation in training a single value; its
    buffers are then as before.

    Args:
        layout: key of `pooling.LAYOUTS`, the layout of the input: "NCHW" for images, "NCL" for sequences, "NCTHW" for video. That
            of the features is the head's (`PoolingHead.layout`).
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
        self._size_that_fits: tuple[object, ...] | None = None  # of the last batch that was trained on

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of the input `[N, in_channels, H, W]`, or of its `layout`.

        Raises InputError for other input.
        """
        x = checked_images(x, self.layout, self.in_channels, self.training)
        if not self.training or isinstance(x, torch.fx.Proxy) or inside_transform() or torch.jit.is_tracing():
            return self._logits(x)
        return self._logits_or_unchanged(x)

    def _logits(self, x: Tensor) -> Tensor:
        try:
            activation = self.stem(x)
        except (RuntimeError, ValueError) as error:
            refusal = understood(error, x, self.stem)
            if refusal is None:
                raise
            raise refusal from error
        return self.rest(activation)

    def _logits_or_unchanged(self, x: Tensor) -> Tensor:
        """The logits; where that fails in training, buffers (batch statistics) and random numbers are as before.

        They are kept for the first batch of each size only: nothing fails because of its size where another of it did not.
        """
        size = (len(x) > 1, *x.shape[1:])
        if size == self._size_that_fits:
            return self._logits(x)
        kept = [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            with undrawn_if_refused():
                logits = self._logits(x)
        except BaseException:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)
            raise
        self._size_that_fits = size
        return logits

    def rest(self, activation: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of the stem's output, which is left as it is."""
        try:
            maps = self.features(activation)
        except (RuntimeError, ValueError) as error:
            refusal = understood(error, activation, self.features)
            if refusal is None:
                raise
            raise refusal from error
        maps = checked_positions(maps, self._feature_layout, self.min_positions)
        return self.classifier(self.head(maps))

    def check_image_size(self, image_size: int | tuple[int, ...]) -> None:
        """Raise InputError when images of this size are too small for the network; nothing is computed or changed."""
        _, *positions = self.feature_shape(image_size)
        check_positions(tuple(positions), self.min_positions)

    @property
    def _feature_layout(self) -> str:
        return getattr(self.head, "layout", "NCHW")

    def feature_shape(self, image_size: int | tuple[int, ...]) -> tuple[int, ...]:
        """(C, H, W) of the features that the head reads, for images of this size; nothing is computed or changed.

        Of another layout than maps: (C, L) or (C, T, H, W), for as many sizes as the input's layout has positions. Raises
        InputError for other sizes, and for images that are too small for a convolution.
        """
        axes = len(self.layout) - 2
        size = image_size if isinstance(image_size, tuple | list) else (image_size,) * axes
        if len(size) != axes:
            raise InputError(f"image_size {short(image_size)}: must be one whole number, or {axes} of them")
        for side in size:
            check_whole("image_size", side, most=MOST_SIDE)
        trunk = nn.Sequential(self.stem, self.features)
        state = {name: tensor.to("meta") for name, tensor in (*trunk.named_parameters(), *trunk.named_buffers())}
        dtype = next((p.dtype for p in trunk.parameters()), torch.get_default_dtype())
        channels = self.in_channels or 3
        shape = (2, *size, channels) if LAYOUTS[self.layout].channels_last else (2, channels, *size)
        try:
            with torch.no_grad():
                maps = torch.func.functional_call(trunk, state, (torch.empty(shape, device="meta", dtype=dtype),))
        except RuntimeError as error:  # a convolution or max-pooling larger than its input
            raise InputError(f"images of size {image_size} are too small for this network; use larger ones") from error
        return tuple(channels_first(maps, self._feature_layout).shape[1:])


# Functions of tensors and numbers, each one node of a graph that torch.fx traces: there sizes are not known.


def checked_images(x: Tensor, layout: str, in_channels: int | None, training: bool) -> Tensor:
    """The input x itself.

    Raises InputError for another layout, number of channels or type, and in training for an empty batch.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"images must be a tensor, got {short(x)} of type {type(x).__name__}")
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


def understood(error: Exception, x: Tensor, part: nn.Module) -> InputError | None:
    """The InputError for an input x that a part of a network cannot take, None for any other error."""
    if isinstance(error, InputError):
        return None
    parameter = next(part.parameters(), None)
    if "more than 1 value per channel" in str(error):
        return InputError(
            f"batch normalisation in training gets one value per channel ({str(error)[-60:]}); use a larger batch, larger "
            "images or eval()"
        )
    if parameter is not None and parameter.device != x.device:
        return InputError(f"images on the device {x.device}, the network on {parameter.device}; move one with .to(...)")
    if parameter is not None and parameter.dtype != x.dtype and "type" in str(error):
        return InputError(f"images of type {x.dtype}, the network of {parameter.dtype}; convert one with .to(...)")
    return None


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
    """The network of this backbone with this pooling: images `[N, in_channels, H, W]` to logits `[N, num_classes]`.

    Stem and features are built first: the same torch seed gives them the same weights whatever the pooling, the
    stride and the number of classes, so that GAP and GCP can be compared from the same start.

    Args:
        backbone: key of NETWORKS.
        pooling: key of POOLINGS; or a head, any module from maps `[N, C, H, W]` to vectors `[N, F]`, used as it is (not copied);
            or a function or class that makes it from the number C of channels. A head of one's own brings its own reduction and
            options.
        num_classes: outputs of the linear classifier.
        in_channels: channels of the images.
        reduced_channels: width of the 1x1 reduction before the pooling; None: 256 for a covariance of more than 256
            channels, else no reduction; 0: no reduction. `"gap"` reduces only when told to.
        last_stride: stride 1 or 2 of a ResNet's last stage; None: as published, 2 with `"gap"` and 1 with any other pooling
            (CIFAR ResNets: 2 with all). The published comparison changes stride and pooling at once; give both the same.
        dropout: probability in [0, 1) before the linear classifier; None: as published (0.2 for MobileNetV2, else 0).
        pooling_options: options of the pooling head, e.g. `num_iter` of `"gcp"`.

    Raises:
        InputError: for what cannot be built; torch's random numbers are then as before.
        MissingLibraryError: for a backbone of torchvision's without torchvision.
    """
    check_known("backbone", backbone, NETWORKS)
    row = NETWORKS[backbone]
    check_pooling("network", network, pooling, reduced_channels, dropout, pooling_options)
    check_whole("num_classes", num_classes, most=MOST_CLASSES)
    check_whole("in_channels", in_channels, most=MOST_INPUT_CHANNELS)
    stride = choose_stride(backbone, row, pooling, last_stride)

    with undrawn_if_refused():
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
        raise InputError(
            f"last_stride={short(last_stride)}: {backbone} cannot change it (use None); those that can: {able}"
        )
    if last_stride is not None:
        check_stride(last_stride)
        return last_stride
    return None if row.last_stride is None else row.last_stride[0 if pooling == "gap" else 1]


def linear(in_features: int, num_classes: int, dropout: float) -> nn.Module:
    """The linear classifier, after dropout if there is any: `[N, in_features] -> [N, num_classes]`."""
    if in_features * num_classes > MOST:
        raise InputError(
            f"a classifier from {in_features} features to num_classes {num_classes} has more than {MOST} weights; reduce channels"
        )
    layer = nn.Linear(in_features, num_classes)
    if dropout == 0:
        return layer
    return nn.Sequential(OrderedDict(dropout=nn.Dropout(dropout), linear=layer))
