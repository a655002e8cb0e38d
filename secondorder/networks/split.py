"""Cutting an image classifier into stem, features, pooling and classifier, without rewriting any of its modules.

The stem ends where the landscape study takes its activation: after the first convolution with the normalisation,
activation and max-pooling that directly follow it (ResNet, ShuffleNetV2, DenseNet: conv-BN-ReLU-maxpool; MobileNetV2,
EfficientNet: conv-BN-activation). The features are everything from there to the last feature map `[N, C, H, W]`.

timm's models whose forward is more than their children in order (vision transformers, Swin) come with the features as one module,
`ForwardFeatures`, and no stem.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, short
from secondorder.optional import is_instance

POOLING_NAMES = ("avgpool", "global_pool")
CLASSIFIER_NAMES = ("fc", "classifier", "head")
WAY_OUT = "build secondorder.networks.Network(stem, features, head, classifier) by hand"


@dataclass(frozen=True)
class Split:
    """The parts of a classifier; they are the model's own modules (shared), except for the two containers."""

    stem: nn.Module
    features: nn.Module
    pooling: nn.Module | None  # None: the model pools inside its forward
    classifier: nn.Module
    layout: str = "NCHW"  # of the features: a key of pooling.LAYOUTS


class ForwardFeatures(nn.Module):
    """The features of a timm model, its `forward_features`, without class and register tokens: `[N, L, C]` or maps.

    What only the model's `forward_head` uses (its norm after the pooling, its classifier) is taken out of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """The features of images `[N, C, H, W]`."""
        features = self.model.forward_features(x)  # type: ignore[operator]
        return features[:, self.model.num_prefix_tokens :] if self.prefixed else features

    @property
    def prefixed(self) -> bool:
        """Whether the first tokens are no positions of the image."""
        return getattr(self.model, "num_prefix_tokens", 0) > 0

    def layout(self, shape: torch.Size) -> str:
        """The layout of features of this shape, by timm's convention; maps are channels-first unless the model says otherwise."""
        return "NLC" if len(shape) == 3 else declared_layout(self.model)

    def without_head(self, called: set[nn.Module]) -> None:
        """Take out every child of which no part was called for the features."""
        for name, child in list(self.model.named_children()):
            if not called & set(child.modules()):
                setattr(self.model, name, nn.Identity())


def declared_layout(model: nn.Module) -> str:
    """The layout of a model's last maps: that which timm's models with the channels last declare, else "NCHW"."""
    return "NHWC" if getattr(model, "output_fmt", None) == "NHWC" else "NCHW"


def split_timm(model: nn.Module) -> Split | None:
    """A timm model in three: no stem, its `forward_features`, its classifier; None for a model that is none of timm's."""
    if not all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head", "get_classifier")):
        return None
    classifier = model.get_classifier()  # type: ignore[operator]
    if isinstance(classifier, tuple):  # one for each of several class tokens
        classifier = nn.ModuleList(classifier)
    if not isinstance(classifier, nn.Module):
        return None
    stem = nn.Identity()
    stem.training = model.training
    return Split(stem, ForwardFeatures(model), None, classifier)


def split(model: nn.Module) -> Split:
    """Stem, features, pooling and classifier of a model whose children run in the order in which they are registered.

    A pooling inside the classifier (timm's `head.global_pool`) is found there. Raises InputError for a model without
    `fc`/`classifier`/`head`, or with nothing before it. That the children do run in
    order is not visible from here: `replace_pooling` checks it by running the model.
    """
    children = dict(model.named_children())
    classifier = next((name for name in CLASSIFIER_NAMES if name in children), None)
    pooling = next((name for name in POOLING_NAMES if name in children), None)
    trunk: list[tuple[str, nn.Module]] = []
    for name, child in children.items():
        if name in (classifier, pooling):
            break
        trunk.append((name, child))
    if len(trunk) == 1 and isinstance(trunk[0][1], nn.Sequential):  # VGG, MobileNet: everything in `features`
        trunk = list(trunk[0][1].named_children())
    if is_instance(model, "torchvision.models", "DenseNet"):
        trunk.append(("relu", nn.ReLU()))  # the last activation is a function call in DenseNet's forward
    if classifier is None or len(trunk) < 2:
        raise InputError(
            f"cannot split {type(model).__name__} with children {shortened(children)}: expected the convolutions, an optional "
            f"`avgpool` or `global_pool`, then `fc`, `classifier` or `head`; otherwise {WAY_OUT}"
        )
    cut = stem_length([child for _, child in trunk])
    stem, features = nn.Sequential(OrderedDict(trunk[:cut])), nn.Sequential(OrderedDict(trunk[cut:]))
    stem.training = features.training = model.training  # of the containers alone: frozen parts stay in eval mode
    own_pooling = getattr(children[classifier], "global_pool", None) if pooling is None else children[pooling]
    return Split(stem, features, own_pooling, children[classifier], declared_layout(model))


def shortened(names: Iterable[str]) -> str:
    """Names for a message, at most some 100 characters of them."""
    text = ", ".join(names) or "none"
    return text if len(text) <= 100 else f"{text[:97]}..."


def stem_length(trunk: list[nn.Module]) -> int:
    """How many modules make the stem: the first, and the normalisation, activation and pooling leaves right after."""
    cut = 1
    while cut < len(trunk) - 1 and not list(trunk[cut].children()) and not isinstance(trunk[cut], nn.Conv2d):
        cut += 1
    return cut


def without_inplace(module: nn.Module) -> None:
    """Make every activation (and dropout) write to a new tensor.

    An in-place first activation of the features would overwrite the stem's output, which the landscape study moves
    along and BackPACK keeps; backward hooks refuse in-place changes of a hooked output altogether.
    """
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]


def set_last_stride(features: nn.Module, stride: int) -> None:
    """Give the last stage of a ResNet the stride 1 or 2: first block's 3x3 convolution and its shortcut.

    Raises InputError where the last stage does not begin with a residual block that has a shortcut convolution.
    """
    check_stride(stride)
    stage = next(reversed(list(features.children())), features)
    block = next(stage.children(), stage)
    main = getattr(block, "conv2" if hasattr(block, "conv3") else "conv1", None)  # bottlenecks stride in their 3x3
    shortcut = first_convolution(getattr(block, "downsample", None))
    if not (isinstance(main, nn.Conv2d) and isinstance(shortcut, nn.Conv2d) and main.stride == shortcut.stride):
        raise InputError(f"last_stride={stride}: only ResNets can change it; these features end in {stage_name(stage)}")
    main.stride = shortcut.stride = (stride, stride)
    block.stride = stride  # type: ignore[assignment]  # torchvision's blocks carry it for information


def check_stride(stride: int) -> None:
    """InputError unless the stride is 1 or 2."""
    if type(stride) is not int or stride not in (1, 2):
        raise InputError(f"last_stride {short(stride)}: must be 1, 2 or None (network: as published; else: as it is)")


def stage_name(stage: nn.Module) -> str:
    """The class of the module, and for a container the class of its first child: `Sequential(Conv2d, ...)`."""
    children = [type(child).__name__ for child in stage.children()]
    return type(stage).__name__ + (f"({children[0]}, ...)" if children else "")


def first_convolution(module: nn.Module | None) -> nn.Conv1d | nn.Conv2d | nn.Conv3d | None:
    """The first convolution in registration order, None if there is none."""
    parts = [] if module is None else module.modules()
    return next((part for part in parts if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)


def last_linear(module: nn.Module) -> nn.Linear | None:
    """The last linear layer in registration order, None if there is none."""
    return next((part for part in reversed(list(module.modules())) if isinstance(part, nn.Linear)), None)
