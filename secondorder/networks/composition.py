"""Networks composed of stem, features, pooling head and classifier."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, unknown
from secondorder.networks.backbones import NETWORKS, Backbone
from secondorder.networks.split import check_stride, first_convolution, last_linear, set_last_stride
from secondorder.pooling import POOLINGS, Covariance, pooling_head

REDUCED_CHANNELS = 256  # published width of the covariance; features with no more channels are not reduced


class Network(nn.Module):
    """classifier(head(features(stem(x)))): images `[N, in_channels, H, W]` to logits `[N, num_classes]`.

    The stem's output is where the landscape study enters feature space; `rest` is everything after it. No module may
    change its input in place. Raises InputError for images of the wrong shape, an empty batch, and images so small
    that a covariance head sees a single position, where every covariance is zero.
    """

    def __init__(self, stem: nn.Module, features: nn.Module, head: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.features = features
        self.head = head
        self.classifier = classifier
        first, last = first_convolution(stem), last_linear(classifier)
        self.in_channels = None if first is None else first.in_channels
        self.num_classes = None if last is None else last.out_features
        self.min_positions = 2 if any(isinstance(part, Covariance) for part in head.modules()) else 1

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of the images `[N, in_channels, H, W]`."""
        if x.ndim != 4 or 0 in x.shape or x.shape[1] != (self.in_channels or x.shape[1]):
            raise InputError(f"images of shape {list(x.shape)}; use [N, {self.in_channels or 'C'}, H, W] with N >= 1")
        return self.rest(self.stem(x))

    def rest(self, activation: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of the stem's output, which is left as it is."""
        maps = self.features(activation)
        self._check_positions(maps.shape[-2], maps.shape[-1])
        return self.classifier(self.head(maps))

    def check_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Raise InputError when images of this size are too small for the network; nothing is computed or changed."""
        try:
            _, height, width = self.feature_shape(image_size)
        except RuntimeError as error:  # a convolution or max-pooling larger than its input
            raise InputError(f"images of size {image_size} are too small for this network; use larger ones") from error
        self._check_positions(height, width)

    def _check_positions(self, height: int, width: int) -> None:
        if height * width < self.min_positions:
            raise InputError(
                f"the last feature map is {height}x{width}, its covariance is always zero; "
                "use larger images, last_stride=1 or pooling 'gap'"
            )

    def feature_shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the feature map that the head reads, for images of this size; nothing is computed or changed."""
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        for side in size:
            check_positive("image_size", side)
        trunk = nn.Sequential(self.stem, self.features)
        state = {name: tensor.to("meta") for name, tensor in (*trunk.named_parameters(), *trunk.named_buffers())}
        dtype = next((p.dtype for p in trunk.parameters()), torch.get_default_dtype())
        images = torch.empty(2, self.in_channels or 3, *size, device="meta", dtype=dtype)
        with torch.no_grad():
            channels, height, width = torch.func.functional_call(trunk, state, (images,)).shape[1:]
        return channels, height, width


def network(
    backbone: str,
    pooling: str,
    num_classes: int,
    in_channels: int = 3,
    reduced_channels: int | None = None,
    *,
    last_stride: int | None = None,
    dropout: float | None = None,
    **pooling_options: object,
) -> Network:
    """The network of this backbone (a key of NETWORKS) with this pooling (a key of POOLINGS).

    reduced_channels: width of the 1x1 reduction before the pooling; None: 256 for a covariance of more than 256
        channels, else no reduction; 0: no reduction. `"gap"` reduces only when told to.
    last_stride: stride 1 or 2 of a ResNet's last stage; None: as published, 2 with `"gap"` and 1 with any other pooling
        (CIFAR ResNets: 2 with all). The published comparison changes stride and pooling at once; give both the same.
    dropout: probability in [0, 1) before the linear classifier; None: as published (0.2 for MobileNetV2, else 0).
    pooling_options: options of the pooling head, e.g. `num_iter` of `"gcp"`.

    Stem and features are built first: the same torch seed gives them the same weights whatever the pooling, the
    stride and the number of classes, so that GAP and GCP can be compared from the same start.
    """
    if backbone not in NETWORKS:
        raise unknown("backbone", backbone, NETWORKS)
    row = NETWORKS[backbone]
    check_pooling(pooling, reduced_channels, dropout)
    check_positive("num_classes", num_classes)
    check_positive("in_channels", in_channels)
    stride = choose_stride(backbone, row, pooling, last_stride)

    stem, features = row.build(in_channels)
    if stride is not None:
        set_last_stride(features, stride)
    width = choose_reduction(pooling, row.channels, reduced_channels)
    options = {"activation": row.activation, **pooling_options}
    head = pooling_head(pooling, row.channels, width, **options)  # type: ignore[arg-type]
    return Network(
        stem, features, head, linear(head.out_features, num_classes, row.dropout if dropout is None else dropout)
    )


def choose_stride(backbone: str, row: Backbone, pooling: str, last_stride: int | None) -> int | None:
    """The stride of the last stage: as asked, else as published; None where the backbone has no such option."""
    if last_stride is not None and row.last_stride is None:
        able = ", ".join(name for name, other in NETWORKS.items() if other.last_stride is not None)
        raise InputError(f"last_stride={last_stride!r}: {backbone} cannot change it (use None); those that can: {able}")
    if last_stride is not None:
        check_stride(last_stride)
        return last_stride
    return None if row.last_stride is None else row.last_stride[0 if pooling == "gap" else 1]


def choose_reduction(pooling: str, channels: int, reduced_channels: int | None) -> int | None:
    """The width of the 1x1 reduction, None for no reduction; see `network` for the rule."""
    if reduced_channels is None:
        return REDUCED_CHANNELS if pooling != "gap" and channels > REDUCED_CHANNELS else None
    return reduced_channels or None


def linear(in_features: int, num_classes: int, dropout: float) -> nn.Module:
    """The linear classifier, after dropout if there is any: `[N, in_features] -> [N, num_classes]`."""
    layer = nn.Linear(in_features, num_classes)
    if dropout == 0:
        return layer
    return nn.Sequential(OrderedDict(dropout=nn.Dropout(dropout), linear=layer))


def check_pooling(pooling: str, reduced_channels: int | None, dropout: float | None) -> None:
    """InputError for an unknown pooling, a negative or fractional width, a dropout outside [0, 1)."""
    if pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    if reduced_channels is not None and reduced_channels != 0:
        check_positive("reduced_channels", reduced_channels, " or 0 (no reduction) or None (automatic)")
    if dropout is not None and not (isinstance(dropout, int | float) and 0.0 <= dropout < 1.0):
        raise InputError(f"dropout {dropout!r}: must be in [0, 1), or None (as published)")


def check_positive(name: str, value: int, otherwise: str = "") -> None:
    """InputError unless the value is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} {value!r}: must be a whole number >= 1{otherwise}")
