"""Heads of one's own in `network` and `replace_pooling`, input of other layouts, empty batches, and types of images."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from secondorder.errors import InputError
from secondorder.networks import Network, network, replace_pooling
from secondorder.pooling import Covariance, UpperTriangle, pooling_head


def covariances(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 1), Covariance(), UpperTriangle())


HEADS: dict[str, Callable[[], object]] = {
    "head": lambda: pooling_head("gcp", 64, 4),
    "module": lambda: covariances(64),
    "function": lambda: covariances,
    "partial": lambda: partial(pooling_head, "gcp", reduced_channels=4),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_of_ones_own(case: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    for makes in (
        lambda pooling: network("cifar_resnet8", pooling, 3).double().eval(),
        lambda pooling: replace_pooling(network("cifar_resnet8", "gap", 3).double().eval(), pooling),
    ):
        pooling = HEADS[case]()
        net = makes(pooling)
        assert net.classifier.in_features == 10
        assert net(x.double()).shape == (2, 3)
        assert net.head is pooling or not isinstance(pooling, nn.Module)
        assert not any(part.training for part in net.modules())
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": pooling_head("gcp", 32)}, "the head is for 32 channels, the features have 64"),
        ({"pooling": pooling_head("gcp", 64, layout="NHWC")}, "has layout 'NHWC', the features have 'NCHW'"),
        ({"pooling": "gcp", "layout": "NLC"}, "has layout 'NLC', the features have 'NCHW'"),
        ({"pooling": nn.Conv2d(64, 4, 1)}, r"Conv2d as pooling makes \[2, 4, 4, 4\] .* end in Flatten"),
        ({"pooling": nn.Sequential(nn.Conv2d(32, 4, 1))}, "Sequential as pooling fails for features"),
        ({"pooling": lambda channels: None}, "pooling made NoneType of 64 channels"),
        ({"pooling": covariances, "num_iter": 3}, "'num_iter' with a head of one's own"),
        ({"pooling": covariances, "reduced_channels": 3}, "'reduced_channels' with a head of one's own"),
        ({"pooling": ["gcp"]}, "unknown pooling \\['gcp'\\]"),
        ({"pooling": None}, "unknown pooling None"),
        ({"backbone": ["resnet18"]}, "unknown backbone \\['resnet18'\\]"),
        ({"reduce_channels": 3}, r"'reduce_channels' of pooling 'gcp'; allowed: num_iter, method; .* mean reduced_ch"),
        ({"num_class": 3}, r"network has no option of this name either, did you mean num_classes\?"),
        ({"num_classes": -(10**400)}, r"num_classes must be .*, got -1000"),
    ],
)  # fmt: skip
def test_bad_heads(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        network(**{"backbone": "cifar_resnet8", "pooling": "gcp", "num_classes": 2, **arguments})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


def test_a_misspelled_option_of_replace_pooling() -> None:
    with pytest.raises(InputError, match=r"replace_pooling has no option .* mean reduced_channels"):
        replace_pooling(network("digits_tiny", "gap", 2), "gcp", reduce_channels=3)


# Input of other layouts

STEMS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "NCL": (nn.Conv1d, (9,)),
    "NCHW": (nn.Conv2d, (5, 6)),
    "NCTHW": (nn.Conv3d, (3, 4, 5)),
}


@pytest.mark.parametrize("layout", STEMS)
def test_networks_of_sequences_and_video(layout: str) -> None:
    convolution, size = STEMS[layout]
    stem, features = convolution(2, 4, 1), convolution(4, 6, 1)
    net = Network(stem, features, pooling_head("gcp", 6, layout=layout), nn.Linear(21, 3), layout=layout)
    x = torch.randn(2, 2, *size)
    assert net.in_channels == 2
    assert net(x).shape == (2, 3)
    torch.testing.assert_close(net(x), net.classifier(net.head(features(stem(x)))))
    assert net.feature_shape(size) == (6, *size)
    assert net.feature_shape(4) == (6, *[4] * len(size))
    with pytest.raises(InputError, match=r"the last feature map is 1.*, its covariance is always zero"):
        net(x[..., :1] if layout == "NCL" else x[..., :1, :1][:, :, :1])
    with pytest.raises(InputError, match=rf"use \[N, 2, {', '.join(layout[2:])}\]"):
        net(x[0])


def test_networks_of_tokens() -> None:
    net = Network(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), pooling_head("gcp", 8, layout="NCL"), nn.Linear(36, 3))
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    assert net.feature_shape(8) == (8, 4)


# Batches


@pytest.mark.parametrize("pooling", ["gap", "gcp", "dropcov"])
def test_empty_batches_in_evaluation(pooling: str) -> None:
    net = network("digits_tiny", pooling, 3, 1).eval()
    x = torch.zeros(0, 1, 8, 8, requires_grad=True)
    y = net(x)
    y.sum().backward()
    assert y.shape == (0, 3)
    assert x.grad is not None


def test_one_image_with_a_single_position_in_training() -> None:
    """Of batch normalisation in the features, and in the reduction of the head."""
    with pytest.raises(InputError, match="batch normalisation in training gets one value per channel"):
        network("cifar_resnet8", "gap", 2)(torch.randn(1, 3, 4, 4))
    net = network("digits_tiny", "gap", 2, 1, 4)
    net.features.eval()
    net.stem.eval()
    with pytest.raises(InputError, match="reduction's batch normalisation one value per channel"):
        net(torch.randn(1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_images_of_other_types(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"images of type {dtype}.*255"):
        network("digits_tiny", "gap", 2, 1)(torch.ones(2, 1, 8, 8).to(dtype))


# Hooks in replace_pooling


def small_model() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


LOST: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "model": (lambda m: m.register_forward_hook(lambda *_: None), "hooks of the ResNet itself would not run"),
    "pooling": (lambda m: m.avgpool.register_forward_pre_hook(lambda *_: None), "hooks of avgpool would"),
    "classifier": (lambda m: m.fc.register_full_backward_hook(lambda *_: None), "hooks of fc would"),
    "parameter": (lambda m: m.conv1.weight.register_hook(lambda g: 0 * g), r"hooks of conv1\.weight would"),
    "accumulation": (
        lambda m: m.bn1.weight.register_post_accumulate_grad_hook(lambda p: None), r"hooks of bn1\.weight would",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_hooks_that_would_be_lost_are_named(case: str) -> None:
    model = small_model()
    LOST[case][0](model)
    with pytest.raises(InputError, match=LOST[case][1]) as error:
        replace_pooling(model, "gcp", reduced_channels=4)
    assert "\n" not in str(error.value)


def test_hooks_of_the_convolutions_are_kept() -> None:
    model, called = small_model(), []
    model.layer4.register_forward_hook(lambda *_: called.append("layer4"))
    model.layer1.register_full_backward_hook(lambda *_: called.append("layer1"))
    net = replace_pooling(model, "gcp", reduced_channels=4)
    called.clear()
    net(torch.randn(2, 3, 64, 64)).sum().backward()
    assert called == ["layer4", "layer1"]


def test_a_model_that_cannot_be_copied() -> None:
    model = small_model()
    model.last = model.conv1.weight * 2
    with pytest.raises(InputError, match="ResNet cannot be copied") as error:
        replace_pooling(model, "gcp")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300
