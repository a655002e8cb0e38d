"""Networks by name and options, images that they cannot see, and heads on torchvision's models."""

from functools import lru_cache
from random import Random
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from secondorder.networks import NETWORKS, Network, network, replace_pooling
from secondorder.pooling import POOLINGS

from .call import Call, arguments, shown
from .pooling import OPTIONS, options_of, shape_of
from .values import absurd, bad_tensor, named, normal

SMALL = ("digits_net", "digits_tiny", "cifar_resnet8")
MODELS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_0")


def networks(random: Random) -> Call:
    """Any of the kinds below; torchvision's models take longest."""
    kinds = (construction,) * 6 + (forward,) * 4 + (image_size,) * 2 + (replacement,)
    return random.choice(kinds)(random)


def good_settings(random: Random) -> dict[str, Any]:
    """Of a network that can be built."""
    pooling = random.choice(list(POOLINGS))
    return {
        "backbone": random.choice(SMALL),
        "pooling": pooling,
        "num_classes": random.choice((1, 2, 10)),
        "in_channels": random.choice((1, 3)),
        "reduced_channels": random.choice((None, 0, 4)),
    } | options_of(random, pooling)


def construction(random: Random) -> Call:
    """network(...) with one argument that is absurd."""
    settings = good_settings(random)
    own = list(OPTIONS[random.choice(list(OPTIONS))])
    field = random.choice([*settings, "last_stride", "dropout", *own, "no_such_option"])
    value = random.choice(list(NETWORKS)[:4]) if field == "backbone" and random.random() < 0.1 else absurd(random)
    settings[field] = value
    return Call(f"network({arguments(settings)})", lambda: network(**settings), names=(field, named(value)))


def forward(random: Random) -> Call:
    """Images of other shapes and kinds."""
    settings = good_settings(random)
    model = network(**settings).train(random.random() < 0.5)
    good = normal(random, 2, settings["in_channels"], 8, 8, dtype=torch.float32)
    side = random.choice((1, 2, 3, 5, 16))
    small = normal(random, random.choice((1, 2)), settings["in_channels"], side, side, dtype=torch.float32)
    x = random.choice((bad_tensor(random, good), small, good))
    x = good if isinstance(x, Tensor) and x.is_meta else x
    nan = isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta and not bool(x.to_dense().isfinite().all())

    def check(z: Tensor) -> str | None:
        if z.shape != (len(x), settings["num_classes"]):
            return f"logits of shape {list(z.shape)}"
        return None if nan or z.is_meta or z.isfinite().all() else "logits are not finite"

    words = f"network({arguments(settings)}), training {model.training}, on {shape_of(x)}"
    return Call(words, lambda: model(x), watched=(model,), check=check)


def image_size(random: Random) -> Call:
    """check_image_size and feature_shape of any value."""
    model = network(random.choice(SMALL), random.choice(("gap", "gcp")), 3)
    value = random.choice((absurd(random), absurd(random), 8, (8, 9), (0, 3), (8,), (8, 8, 8), [8, 8], (8, "8")))
    method = random.choice((model.check_image_size, model.feature_shape))
    words = f"{method.__name__}({shown(value)})"  # type: ignore[attr-defined]
    return Call(words, lambda: method(value), names=("image", named(value)), watched=(model,), pure=True)  # type: ignore[operator, arg-type]


@lru_cache
def torchvision_model(name: str) -> nn.Module:
    """A model of torchvision, once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=3)
    return model.eval()


def replacement(random: Random) -> Call:
    """replace_pooling of torchvision's models and of things that are none."""
    model: Any = torchvision_model(random.choice(MODELS))
    if random.random() < 0.3:
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        model = random.choice((plain, nn.Linear(3, 2), nn.Sequential(), absurd(random), torchvision.models.resnet18))
    settings: dict[str, Any] = {"pooling": random.choice(list(POOLINGS)), "reduced_channels": 8}
    field = random.choice(
        ("pooling", "num_classes", "reduced_channels", "last_stride", "dropout", "image_size", "none", "num_iter")
    )
    value = random.choice((absurd(random), 1, 2)) if field == "last_stride" else absurd(random)
    if field != "none":
        settings[field] = value
    if field == "image_size" and isinstance(value, int) and 128 < value < 10**6:
        settings[field] = 32

    def check(net: Network) -> str | None:
        return None if isinstance(net, Network) else f"returned {type(net).__name__}"

    return Call(
        f"replace_pooling({type(model).__name__}, {arguments(settings)})",
        lambda: replace_pooling(model, **settings),
        watched=(model,) if isinstance(model, nn.Module) else (),
        check=check,
    )
