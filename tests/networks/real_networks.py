"""Networks of torchvision with known weights, and images that fit them."""

from functools import cache

import torch
import torchvision
from torch import Tensor, nn

from secondorder.networks import NETWORKS, Network, network

TORCHVISION = [name for name in NETWORKS if hasattr(torchvision.models, name)]
SMALL_IMAGES = [name for name in NETWORKS if name.endswith("_small_images")]
SMALL = [name for name in NETWORKS if name not in (*TORCHVISION, *SMALL_IMAGES)]
LIGHT = ["mobilenet_v2", "shufflenet_v2_x0_5", "resnet18", *SMALL]  # one of each kind
USER_MODELS = [
    "resnet18",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "shufflenet_v2_x0_5",
    "regnet_y_400mf",
    "mnasnet0_5",
    "vgg11_bn",
]


def image_size(backbone: str) -> int:
    return (
        8 if backbone.startswith("digits") else 32 if backbone.startswith("cifar") or backbone in SMALL_IMAGES else 64
    )


def images(backbone: str, n: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, image_size(backbone), image_size(backbone))


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@cache
def on_meta(backbone: str, pooling: str, num_classes: int = 1000, **options: object) -> Network:
    """Shapes without numbers; the same object for every test that asks for it."""
    with torch.device("meta"):
        return network(backbone, pooling, num_classes, **options)


def torchvision_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """torchvision's network in eval mode, 3 classes, with batch-norm statistics and affine maps that are not 0 and 1."""
    made = {"vgg11_bn": light_vgg, "wide_resnet50_2": light_wide_resnet}.get(name)
    model = (made() if made else getattr(torchvision.models, name)(weights=None, num_classes=3)).to(dtype).eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor in (part.weight, part.bias, part.running_mean):
                    tensor.add_(torch.randn_like(tensor), alpha=0.1)
                part.running_var.mul_(1.0 + 0.5 * torch.rand_like(part.running_var))
    return model


def light_vgg() -> nn.Module:
    """torchvision's vgg11_bn with 8 instead of 4,096 hidden units in its classifier (0.5 GB less to initialise)."""
    with torch.device("meta"):
        model = torchvision.models.VGG(nn.Identity(), num_classes=3, init_weights=False)
    model.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 8), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(8, 3))
    return model


def light_wide_resnet() -> nn.Module:
    """torchvision's wide_resnet50_2 with one block in each stage."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1] * 4, num_classes=3, width_per_group=128)


def torchvision_key(name: str, key: str) -> str:
    """The name in torchvision's state dict of a parameter of the same network made here."""
    part, rest = key.split(".", 1)
    if part == "classifier":
        return f"classifier.1.{rest.removeprefix('linear.')}" if name == "mobilenet_v2" else f"fc.{rest}"
    return f"features.{rest}" if name == "mobilenet_v2" else rest


def with_torchvision_weights(net: Network, model: nn.Module, name: str) -> Network:
    state = model.state_dict()
    keys = {key: torchvision_key(name, key) for key in net.state_dict()}
    assert sorted(keys.values()) == sorted(state)
    net.double().load_state_dict({key: state[theirs] for key, theirs in keys.items()})
    return net.eval()


def backbone_state(net: Network) -> dict[str, Tensor]:
    return {k: v for k, v in net.state_dict().items() if k.startswith(("stem.", "features."))}
