"""A new pooling head on a model that exists, with its trained weights."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import shufflenetv2

from secondorder.errors import InputError
from secondorder.networks.composition import Network, check_pooling, check_positive, choose_reduction, linear
from secondorder.networks.split import (
    WAY_OUT,
    Split,
    first_convolution,
    last_linear,
    set_last_stride,
    split,
    without_inplace,
)
from secondorder.pooling import pooling_head


def replace_pooling(
    model: nn.Module,
    pooling: str,
    num_classes: int | None = None,
    reduced_channels: int | None = None,
    *,
    last_stride: int | None = None,
    dropout: float | None = None,
    image_size: int = 64,
    **pooling_options: object,
) -> Network:
    """A Network with a copy of the model's convolutions, a new pooling head and a new linear classifier.

    Understood are a Network and models of torchvision's kinds: convolutions in registration order (or one Sequential
    such as `features`), an optional `avgpool`, then `fc` or `classifier`. That they do run in this order is checked by
    one forward pass of two random images of `image_size` pixels. The model is left as it is: its parts are copied,
    with weights, BN statistics, device, dtype, train/eval mode and `requires_grad`; only in-place activations of the
    copy become out-of-place. Everything from the pooling on is dropped, hidden layers of the classifier (VGG,
    MobileNetV3) included.

    num_classes: None: as many as the old classifier has.
    reduced_channels: as in `network`.
    last_stride: 1 or 2 for a ResNet's last stage; None: as it is in the model.
    dropout: None: as just before the old classifier's last linear layer.
    image_size: of the images of the check; only models made for one size need it.

    Raises InputError for a model that it cannot take apart.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model {model!r}: must be an nn.Module; use `network` to build a backbone by its name")
    check_positive("image_size", image_size)
    check_pooling(pooling, reduced_channels, dropout)
    if num_classes is not None:
        check_positive("num_classes", num_classes)
    copied = copy.deepcopy(model)
    parts = parts_of(copied)
    channels = checked_channels(copied, parts, image_size)
    stem, features, old = parts.stem, parts.features, parts.classifier
    without_inplace(stem)
    without_inplace(features)
    if last_stride is not None:
        set_last_stride(features, last_stride)
    width = choose_reduction(pooling, channels, reduced_channels)
    options = {"activation": activation_after_reduction(features), **pooling_options}
    head = pooling_head(pooling, channels, width, **options)  # type: ignore[arg-type]
    rate = last_dropout(old) if dropout is None else dropout
    classifier = linear(head.out_features, classes_of(old, model) if num_classes is None else num_classes, rate)
    weight = next(stem.parameters(), torch.empty(0))
    for new in (head, classifier):
        new.to(weight.device, weight.dtype).train(model.training)
    net = Network(stem, features, head, classifier)
    net.training = model.training  # not net.train(): frozen (eval) batch normalisation stays frozen
    return net


def parts_of(model: nn.Module) -> Split:
    """The parts of a Network, or of a model of torchvision's kinds."""
    if isinstance(model, Network):
        return Split(model.stem, model.features, model.head, model.classifier)
    return split(model)


def checked_channels(model: nn.Module, parts: Split, image_size: int) -> int:
    """Channels of the last feature map, after comparing it with what the model itself feeds its pooling or classifier.

    Runs both in eval mode on the same two random images, without gradients or global random numbers.
    """
    convolution = first_convolution(parts.stem)
    target = parts.classifier if parts.pooling is None else parts.pooling
    seen: list[Tensor] = []
    handle = target.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    trunk = nn.Sequential(parts.stem, parts.features)
    modes = [(module, module.training) for module in (*model.modules(), *trunk.modules())]
    try:
        images = random_images(3 if convolution is None else convolution.in_channels, image_size, model)
        with torch.no_grad():
            model.eval()(images)
            maps = trunk.eval()(images)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot run {type(model).__name__} part by part on {image_size}x{image_size} images ({reason}); "
            f"pass the image_size it is made for, or {WAY_OUT}"
        ) from error
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    if not (isinstance(maps, Tensor) and maps.ndim == 4 and len(seen) == 1 and same_features(maps, seen[0])):
        raise InputError(
            f"{type(model).__name__}: its modules in registration order do not give what its own "
            f"forward feeds its {'classifier' if parts.pooling is None else 'pooling'}; {WAY_OUT}"
        )
    return maps.shape[1]


def same_features(maps: Tensor, seen: Tensor) -> bool:
    """Whether `seen` is the feature map `[N, C, H, W]`, or its average over the positions."""
    mine = maps if maps.shape == seen.shape else F.adaptive_avg_pool2d(maps, 1).flatten(1)
    seen = seen if maps.shape == seen.shape else seen.flatten(1)
    if mine.shape != seen.shape:
        return False
    return mine.is_meta or torch.allclose(mine, seen, rtol=1e-2, atol=1e-3 * float(seen.abs().max()), equal_nan=True)


def random_images(channels: int, image_size: int, model: nn.Module) -> Tensor:
    """Two images of white noise on the model's device, in its dtype; the global generator is not used."""
    weight = next(model.parameters(), torch.empty(0))
    images = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return images.to(weight.device, weight.dtype)


def activation_after_reduction(features: nn.Module) -> type[nn.Module]:
    """ReLU6 for MobileNetV2 (its features use it) and ShuffleNetV2, as in NETWORKS, else ReLU."""
    relu6 = any(isinstance(part, nn.ReLU6 | shufflenetv2.InvertedResidual) for part in features.modules())
    return nn.ReLU6 if relu6 else nn.ReLU


def last_dropout(classifier: nn.Module) -> float:
    """The probability of the dropout just before the classifier's last linear layer, 0 if there is none."""
    leaves = [part for part in classifier.modules() if not list(part.children())]
    before = leaves[:-1] if leaves and isinstance(leaves[-1], nn.Linear) else []
    return before[-1].p if before and isinstance(before[-1], nn.Dropout) else 0.0


def classes_of(classifier: nn.Module, model: nn.Module) -> int:
    """The number of outputs of the old classifier; InputError if it has no linear layer to tell."""
    layer = last_linear(classifier)
    if layer is None:
        raise InputError(f"{type(model).__name__} has no linear layer in its classifier: pass num_classes")
    return layer.out_features
