"""A new pooling head on a model that exists, with its trained weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.errors import InputError, check_whole, short
from secondorder.networks.composition import MOST_CLASSES, Network, linear
from secondorder.networks.heads import Pooling, check_pooling, make_head
from secondorder.networks.split import (
    WAY_OUT,
    ForwardFeatures,
    Split,
    first_convolution,
    last_linear,
    set_last_stride,
    shortened,
    split,
    split_timm,
    without_inplace,
)
from secondorder.optional import is_instance
from secondorder.pooling.layout import channels_first
from secondorder.untouched import undrawn_if_refused

MOST_IMAGE_SIZE = 4096
"""Side of the images of the check, which are computed."""


def replace_pooling(
    model: nn.Module,
    pooling: str | Pooling,
    num_classes: int | None = None,
    reduced_channels: int | None = None,
    *,
    last_stride: int | None = None,
    dropout: float | None = None,
    image_size: int | None = None,
    **pooling_options: object,
) -> Network:
    """A Network with a copy of the model's convolutions, a new pooling head and a new linear classifier.

    Understood are a Network and models of torchvision's and timm's kinds: convolutions in registration order (or one Sequential
    such as `features`), an optional `avgpool` or `global_pool`, then `fc`, `classifier` or `head`. That they do run in this order
    is checked by one forward pass of two random images of `image_size` pixels. Other models of timm (vision transformers) are
    taken by their `forward_features`, without class and register tokens; the head gets the layout that the model declares.

    The model is left as it is: its parts are copied, with weights, BN statistics, device, dtype, train/eval mode and
    `requires_grad`; only in-place activations of the copy become out-of-place. Everything from the pooling on is dropped, hidden
    layers of the classifier (VGG, MobileNetV3) included. Hooks of the parts that stay are kept; a model with hooks that would not
    run any more (its own, those of what is dropped, those of parameters) is refused.

    Args:
        model: a trained network.
        pooling: as in `network`; a head of one's own is moved to the model's device, dtype and mode.
        num_classes: None: as many as the old classifier has.
        reduced_channels: as in `network`.
        last_stride: 1 or 2 for a ResNet's last stage; None: as it is in the model.
        dropout: None: as just before the old classifier's last linear layer.
        image_size: of the images of the check; None: 64, or what a patch embedding is made for.
        pooling_options: options of the pooling head, e.g. `num_iter` of `"gcp"`.

    Raises:
        InputError: for a model that it cannot take apart, and other bad arguments.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model {short(model)}: must be an nn.Module; use `network` to build a backbone by its name")
    size = default_image_size(model) if image_size is None else image_size
    check_whole("image_size", size, most=MOST_IMAGE_SIZE)
    check_pooling("replace_pooling", replace_pooling, pooling, reduced_channels, dropout, pooling_options)
    if num_classes is not None:
        check_whole("num_classes", num_classes, most=MOST_CLASSES)
    parts = checked_parts(model, size)
    stem, features, old = parts.split.stem, parts.split.features, parts.split.classifier
    without_inplace(stem)
    without_inplace(features)
    if last_stride is not None:
        set_last_stride(features, last_stride)
    options = {"activation": activation_after_reduction(features), **pooling_options}
    classes = classes_of(old, model) if num_classes is None else num_classes
    with undrawn_if_refused():
        head, width = make_head(pooling, parts.shape, parts.split.layout, reduced_channels, options)
        classifier = linear(width, classes, last_dropout(old) if dropout is None else dropout)
    weight = next(nn.Sequential(stem, features).parameters(), torch.empty(0))
    for new in (head, classifier):
        new.to(weight.device, weight.dtype).train(model.training)
    net = Network(stem, features, head, classifier, layout=getattr(model, "layout", "NCHW"))
    net.training = model.training  # not net.train(): frozen (eval) batch normalisation stays frozen
    return net


@dataclass(frozen=True)
class CheckedParts:
    """The parts of a copied model and the shape `[2, ...]` of the features of two images."""

    split: Split
    shape: torch.Size


def checked_parts(model: nn.Module, image_size: int) -> CheckedParts:
    """The parts of a copy of the model: by its children in order, else (timm) by its `forward_features`.

    Raises InputError for a model that is understood neither way, with `image_size` pixels a side in the check.
    """
    refusal: InputError | None = None
    for take_apart in (parts_of, split_timm):
        copied = copy_of(model)
        try:
            parts = take_apart(copied)
            if parts is not None:
                return checked(model, copied, parts, image_size)
        except HookError:
            raise
        except InputError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. Raises InputError for a model that torch cannot copy."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0][:120]}); {WAY_OUT}"
        ) from error


def parts_of(model: nn.Module) -> Split:
    """The parts of a Network, or of a model whose children run in order."""
    if isinstance(model, Network):
        return Split(model.stem, model.features, model.head, model.classifier, getattr(model.head, "layout", "NCHW"))
    return split(model)


def default_image_size(model: nn.Module) -> int:
    """64, or the size that the model's patch embedding is made for."""
    made_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return made_for[0] if isinstance(made_for, tuple) and isinstance(made_for[0], int) else 64


def checked(model: nn.Module, copied: nn.Module, parts: Split, image_size: int) -> CheckedParts:
    """The parts, after comparing their features with what the model itself feeds its pooling or classifier.

    Runs both in eval mode on the same two random images, without gradients or global random numbers.
    """
    first = first_convolution(parts.stem) or first_convolution(parts.features)
    trunk = nn.Sequential(parts.stem, parts.features)
    images = random_images(3 if first is None else first.in_channels, image_size, model)
    modes = [(module, module.training) for module in (*copied.modules(), *trunk.modules())]
    try:
        with torch.no_grad(), calls(copied) as by_model, inputs(parts, copied) as seen:
            copied.eval()(images)
        with torch.no_grad(), calls(copied) as by_trunk:
            maps = trunk.eval()(images)
    except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"cannot run {type(model).__name__} part by part on {image_size}x{image_size} images ({reason}); "
            f"pass the image_size it is made for, or {WAY_OUT}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    if isinstance(parts.features, ForwardFeatures):
        parts.features.without_head(by_trunk)
        if isinstance(maps, Tensor):
            parts = replace(parts, layout=parts.features.layout(maps.shape))
    elif isinstance(maps, Tensor) and maps.ndim != len(parts.layout):
        seen.clear()
    if not (isinstance(maps, Tensor) and len(seen) == 1 and same_features(maps, seen[0], parts)):
        raise InputError(
            f"{type(model).__name__}: its modules in registration order do not give what its own "
            f"forward feeds its {'classifier' if parts.pooling is None else 'pooling'}; {WAY_OUT}"
        )
    check_hooks(model, copied, by_model - by_trunk)
    return CheckedParts(parts, maps.shape)


@contextmanager
def calls(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules of the model that are called inside."""
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.modules()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs(parts: Split, model: nn.Module) -> Iterator[list[Tensor]]:
    """What the model feeds its pooling or classifier inside; of a ForwardFeatures, what its `forward_features` give."""
    seen: list[Tensor] = []
    if isinstance(parts.features, ForwardFeatures):
        own = model.forward_head
        model.forward_head = lambda x, *args, **options: own(seen.append(x.detach().clone()) or x, *args, **options)  # type: ignore[assignment, operator, func-returns-value]
        try:
            yield seen
        finally:
            del model.forward_head
        return
    target = parts.classifier if parts.pooling is None else parts.pooling
    handle = target.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


class HookError(InputError):
    """A model with hooks that would be lost."""


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_hooks(model: nn.Module, copied: nn.Module, dropped: set[nn.Module]) -> None:
    """HookError for a model with hooks on modules (of its copy) that are `dropped`, or on parameters, which copies lose."""
    modules = [
        name or f"the {type(model).__name__} itself"
        for (name, own), twin in zip(model.named_modules(), copied.modules(), strict=True)
        if twin in dropped and any(getattr(own, kind) for kind in HOOKS)
    ]
    parameters = [
        name
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    if lost := modules + parameters:
        raise HookError(
            f"hooks of {shortened(lost)} would not run in the new network; remove them, and register them there again"
        )


def same_features(maps: Tensor, seen: Tensor, parts: Split) -> bool:
    """Whether `seen` is the features, or the average of feature maps `[N, C, H, W]` over the positions."""
    if isinstance(parts.features, ForwardFeatures):
        seen = seen[:, -maps.shape[1] :] if parts.features.prefixed else seen
    first = channels_first(maps, parts.layout) if maps.ndim == 4 else maps
    mine = maps if maps.shape == seen.shape else F.adaptive_avg_pool2d(first, 1).flatten(1)
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
    for part in features.modules():
        if isinstance(part, nn.ReLU6) or is_instance(part, "torchvision.models.shufflenetv2", "InvertedResidual"):
            return nn.ReLU6
    return nn.ReLU


def last_dropout(classifier: nn.Module) -> float:
    """The probability of the dropout just before the classifier's last linear layer, 0 if there is none."""
    leaves = [part for part in classifier.modules() if not list(part.children())]
    before = leaves[:-1] if leaves and isinstance(leaves[-1], nn.Linear) else []
    return before[-1].p if before and isinstance(before[-1], nn.Dropout) else 0.0


def classes_of(classifier: nn.Module, model: nn.Module) -> int:
    """The number of outputs of the old classifier, else (timm) what the model says; InputError if neither can tell."""
    layer, declared = last_linear(classifier), getattr(model, "num_classes", None)
    if layer is not None:
        return layer.out_features
    if isinstance(declared, int) and declared > 0 and hasattr(model, "get_classifier"):
        return declared
    raise InputError(f"{type(model).__name__} has no linear layer in its classifier: pass num_classes")
