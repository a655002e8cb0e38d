"""Feature pyramids against torchvision's own, the adaptations of GCP ResNets against networks that have the stride."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from secondorder.errors import InputError
from secondorder.networks import network, replace_pooling
from secondorder.transfer import FeaturePyramid


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=5).eval()


@pytest.fixture(scope="module")
def gcp(plain: nn.Module) -> Any:
    """The same weights under GCP, with stride 1 in the last stage as published."""
    return replace_pooling(plain, "gcp", reduced_channels=16, last_stride=1)


@torch.no_grad()
def test_it_is_torchvisions(plain: nn.Module) -> None:
    own = FeaturePyramid(plain, 16).eval()
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    theirs = BackboneWithFPN(copy.deepcopy(plain), layers, [64, 128, 256, 512], 16, LastLevelMaxPool()).eval()
    theirs.fpn.load_state_dict(own.fpn.state_dict())
    x = images(2, 3, 64, 96)
    found, expected = own(x), theirs(x)
    assert list(found) == list(expected) == [*own.names, "pool"]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert own.strides == [4, 8, 16, 32]
    assert own.out_channels == 16


@torch.no_grad()
def test_adaptations(plain: nn.Module, gcp: Any) -> None:
    x = images(2, 3, 64, 64)
    published = FeaturePyramid(plain, 8).eval().maps(x)
    before = gcp(x)
    kept, by_convolution, by_pooling = (
        FeaturePyramid(gcp, 8, adaptation=adaptation).eval() for adaptation in ("none", "gcp_d", "gcp_m")
    )
    assert kept.strides == [4, 8, 16]
    assert by_convolution.strides == by_pooling.strides == [4, 8, 16, 32]
    assert torch.equal(kept.maps(x)["2"], gcp.features(gcp.stem(x)))
    for name, expected in published.items():  # gcp_d undoes what last_stride=1 did
        assert torch.equal(by_convolution.maps(x)[name], expected)
    pooled = nn.functional.max_pool2d(published["2"], 2)
    assert torch.equal(by_pooling.maps(x)["3"], gcp.features.layer4(pooled))
    for pyramid in (kept, by_convolution, by_pooling):
        assert set(gcp.features.state_dict()) == set(pyramid.features.state_dict())
    assert torch.equal(gcp(x), before)


@pytest.mark.parametrize(
    ("name", "pooling", "strides"),
    [
        ("cifar_resnet8", "gcp", [2, 4]),
        ("digits_net", "gcp", [1]),
        ("shufflenet_v2_x0_5", "gap", [4, 8, 16, 32]),
        ("mobilenet_v2_small_images", "gap", [2, 4, 8]),
    ],
)
def test_levels(name: str, pooling: str, strides: list[int]) -> None:
    net = network(name, pooling, 3)
    side = 2 * strides[-1]
    pyramid = FeaturePyramid(net, 4).eval()
    x = images(1, net.in_channels or 3, side, 2 * side)
    assert pyramid.strides == strides
    for stride, found in zip([*strides, 2 * strides[-1]], pyramid(x).values(), strict=True):
        assert found.shape == (1, 4, side // stride, 2 * side // stride)
    with torch.no_grad():
        assert torch.equal(pyramid.maps(x)[pyramid.names[-1]], net.eval().features(net.stem(x)))


def test_a_frozen_one_stays_as_it_is() -> None:
    net = network("cifar_resnet8", "gap", 3)
    made: list[Any] = [FeaturePyramid(net, 4, frozen=frozen).train() for frozen in (True, False)]
    frozen, trained = made
    before = OrderedDict((name, value.clone()) for name, value in frozen.state_dict().items())
    for pyramid in (frozen, trained):
        sum(p.square().sum() for p in pyramid(images(2, 3, 16, 16)).values()).backward()
    assert all(p.grad is None for part in (frozen.stem, frozen.features) for p in part.parameters())
    assert all(p.grad is not None for p in (*frozen.fpn.parameters(), *trained.parameters()))
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())
    assert not torch.equal(trained.stem[1].running_mean, before["stem.1.running_mean"])
    assert frozen.training
    assert net.stem.training


def test_statistics_of_other_images() -> None:
    pyramid: Any = FeaturePyramid(network("cifar_resnet8", "gap", 3), 4, frozen=True)
    x = images(9, 3, 16, 16) + 3
    pyramid.recalibrate(x, batch_size=4)
    outputs = pyramid.stem[0](x[:8]).unflatten(0, (2, 4))
    torch.testing.assert_close(pyramid.stem[1].running_mean, outputs.mean((0, 1, 3, 4)))
    torch.testing.assert_close(pyramid.stem[1].running_var, outputs.transpose(1, 2).flatten(2).var(2).mean(0))
    assert not pyramid.stem[1].training
    assert pyramid.fpn.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptation": "gcp"}, "adaptation 'gcp'"),
        ({"width": 0}, "width must be .* got 0"),
        ({"frozen": 1}, "frozen .*1"),
        ({"adaptation": "gcp_d"}, "has stride 2 already; use 'none'"),
        ({"network": network("mobilenet_v2_small_images", "gap", 3), "adaptation": "gcp_m"}, "only ResNets have one"),
        ({"network": nn.Sequential(nn.Conv2d(3, 4, 3))}, "cannot split Sequential"),
        ({"network": "resnet18"}, "must be an nn.Module"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments = {"network": network("cifar_resnet8", "gap", 3), "width": 4} | change
    with pytest.raises(InputError, match=message):
        FeaturePyramid(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 3, 16), "needs \\[N, C, H, W\\] of at least 4 pixels"), ((3, 16, 16), "\\[3, 16, 16\\]")],
)
def test_images_that_are_too_small(shape: tuple[int, ...], message: str) -> None:
    pyramid = FeaturePyramid(network("cifar_resnet8", "gap", 3), 4)
    with pytest.raises(InputError, match=message):
        pyramid(torch.zeros(shape))
    with pytest.raises(InputError, match="N >= 2"):
        pyramid.recalibrate(torch.zeros(1, 3, 16, 16))
