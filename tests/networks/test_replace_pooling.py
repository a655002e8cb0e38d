"""A head on a user's own model."""

import pytest
import torch
import torchvision
from real_networks import LIGHT, USER_MODELS, backbone_state, image_size, on_meta, torchvision_model
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.networks import network, replace_pooling


@pytest.mark.parametrize("name", USER_MODELS)
def test_replace_pooling_keeps_what_the_model_computes(name: str) -> None:
    model = torchvision_model(name, torch.float32).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inplace = [getattr(part, "inplace", None) for part in model.modules()]
    net = replace_pooling(model, "gcp", reduced_channels=8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [getattr(part, "inplace", None) for part in model.modules()] == inplace
    assert all(part.training for part in (*model.modules(), *net.modules()))
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert net.num_classes == 3

    seen: list[Tensor] = []
    classifier = model.fc if hasattr(model, "fc") else model.classifier
    classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 3, 64, 64)
    model.eval()(x)
    with torch.no_grad():
        stem = net.eval().stem(x)
        kept = stem.clone()
        maps = net.features(stem)
        logits = net.rest(stem)
    assert torch.equal(stem, kept)
    pooled = model.avgpool(maps) if name == "vgg11_bn" else maps.mean((2, 3))
    torch.testing.assert_close(pooled.flatten(1), seen[0].detach(), rtol=1e-4, atol=1e-5)  # float32: half the time
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("backbone", LIGHT)
def test_replace_pooling_on_a_network_gives_the_network_of_that_pooling(backbone: str) -> None:
    old = network(backbone, "gap", 3, in_channels=2, last_stride=1 if "resnet" in backbone else None).eval()
    new = replace_pooling(old, "gcp", image_size=image_size(backbone))
    asked = on_meta(backbone, "gcp", 3, in_channels=2, last_stride=1 if "resnet" in backbone else None)
    assert str(new) == str(asked)
    assert all(torch.equal(v, backbone_state(old)[k]) for k, v in backbone_state(new).items())


def test_replace_pooling_options_and_state() -> None:
    model = torchvision.models.resnet18(num_classes=3).double().train()
    model.bn1.eval().requires_grad_(False)
    torch.manual_seed(1)
    net = replace_pooling(model, "gcp_exact", 5, 16, last_stride=1, dropout=0.25)
    assert net.feature_shape(224) == (512, 14, 14)
    assert replace_pooling(model, "gap").feature_shape(224) == (512, 7, 7)
    assert (net.num_classes, net.head.out_features, net.classifier.dropout.p) == (5, 136, 0.25)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert [name for name, part in net.named_modules() if not part.training] == ["stem.bn1"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["stem.bn1.weight", "stem.bn1.bias"]
    assert not any(part.training for part in replace_pooling(model.eval(), "gap").modules())
    assert replace_pooling(torchvision.models.mobilenet_v2(), "gcp").classifier.dropout.p == 0.2
    squeezenet = replace_pooling(torchvision.models.squeezenet1_1(), "gap", 4)
    assert squeezenet(torch.randn(1, 3, 64, 64)).shape == (1, 4)


def test_channels_last_maps_that_the_model_permutes() -> None:
    """torchvision's Swin: the permutation stands before its pooling, so the head gets maps."""
    model = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [1, 1], [4, 4], num_classes=3)
    net = replace_pooling(model.eval(), "gcp", image_size=32)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        net.features(net.stem(x)).mean((2, 3)), model.avgpool(model.permute(model.norm(model.features(x)))).flatten(1)
    )
    assert net(x).shape == (2, 3)


class Twice(torchvision.models.ResNet):
    """Has every attribute of a ResNet, but its forward is another one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2.0 * x + 1.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torchvision.models.resnet.BasicBlock(4, 4), "cannot split BasicBlock with children conv1"),
        (lambda: nn.Linear(2, 2), "children none: expected .* `avgpool` .*then `fc`, `classifier` or `head`.*by hand"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "cannot split Sequential with children 0, 1: expected"),
        (lambda: Twice(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]), "Twice: its modules .*by hand"),
        (lambda: torchvision.models.inception_v3(num_classes=2, init_weights=False), "cannot run Inception3"),
        (lambda: torchvision.models.squeezenet1_1(), "SqueezeNet has no linear layer.*pass num_classes"),
        (lambda: "resnet18", "'resnet18': must be an nn.Module"),
    ],
)
def test_replace_pooling_refuses_what_it_does_not_understand(model: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        replace_pooling(model(), "gcp")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "gpc"}, "unknown pooling"),
        ({"num_classes": 0}, "num_classes must be .*, got 0"),
        ({"reduced_channels": -3}, "reduced_channels must be .*, got -3"),
        ({"last_stride": 3}, "last_stride 3"),
        ({"last_stride": 1}, "only ResNets can change it; these features end in ReLU"),
        ({"dropout": 2.0}, "dropout must be .*, got 2.0"),
        ({"image_size": 0}, "image_size must be .*, got 0"),
    ],
)
def test_bad_arguments_of_replace_pooling(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace_pooling(network("digits_net", "gap", 2), **{"pooling": "gcp", **arguments})
