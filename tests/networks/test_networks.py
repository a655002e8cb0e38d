"""Networks: torchvision's own numbers, published sizes, identical starts, and heads on a user's model."""

import copy

import pytest
import torch
import torchvision
from real_networks import (
    LIGHT,
    SMALL,
    SMALL_IMAGES,
    TORCHVISION,
    backbone_state,
    image_size,
    images,
    num_parameters,
    on_meta,
    torchvision_model,
    with_torchvision_weights,
)
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.networks import NETWORKS, network
from secondorder.pooling import POOLINGS, Covariance, pooling_head


def test_the_table_holds_the_networks_of_the_protocol() -> None:
    resnets = [f"resnet{depth}" for depth in (18, 34, 50, 101)]
    shufflenets = [f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")]
    assert {"mobilenet_v2", *shufflenets, *resnets} == set(TORCHVISION)
    assert {"cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "digits_net"} <= set(SMALL)
    assert {name.removesuffix("_small_images") for name in SMALL_IMAGES} <= set(TORCHVISION)


# Sizes


@pytest.mark.parametrize(
    ("backbone", "millions"), [("resnet18", 19.50), ("resnet34", 29.61), ("resnet50", 32.03), ("resnet101", 51.02)]
)
def test_parameter_counts_of_gcp_resnets(backbone: str, millions: float) -> None:
    net = on_meta(backbone, "gcp", reduced_channels=128)
    assert num_parameters(net) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("backbone", TORCHVISION)
def test_gap_networks_have_torchvisions_size(backbone: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, backbone)(weights=None)
    assert num_parameters(on_meta(backbone, "gap")) == num_parameters(theirs)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46)])
def test_cifar_resnets_have_their_depth_and_published_size(depth: int, millions: float) -> None:
    net = on_meta(f"cifar_resnet{depth}", "gap", 10)
    weights = [name for name, p in net.named_parameters() if p.ndim > 1 and "downsample" not in name]
    assert len(weights) == depth
    shortcuts = sum(p.numel() for name, p in net.named_parameters() if "downsample" in name)
    assert (num_parameters(net) - shortcuts) / 1e6 == pytest.approx(millions, abs=0.005)  # table 6, option A


@pytest.mark.parametrize("pooling", POOLINGS)
def test_digits_net_is_tiny(pooling: str) -> None:
    net = on_meta("digits_net", pooling, 10, in_channels=1)
    assert 20_000 < num_parameters(net) < 50_000
    assert net.feature_shape(8) == (32, 8, 8)


@pytest.mark.parametrize("backbone", NETWORKS)
def test_channels_of_the_table(backbone: str) -> None:
    net = on_meta(backbone, "gcp", 2)
    assert net.feature_shape(image_size(backbone))[0] == NETWORKS[backbone].channels == net.head.in_channels


# Values


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_gap_networks_compute_what_torchvision_does(backbone: str) -> None:
    model = torchvision_model(backbone)
    net = with_torchvision_weights(network(backbone, "gap", 3), model, backbone)
    x = images(backbone).double()
    torch.testing.assert_close(net(x), model(x))


@pytest.mark.parametrize("backbone", ["mobilenet_v2_small_images", "shufflenet_v2_x0_5_small_images"])
def test_networks_for_small_images_are_torchvisions_with_other_strides(backbone: str) -> None:
    """Stride 1 in the stem, in MobileNetV2's last strided stage, and no max-pooling in ShuffleNetV2: 4x4 maps of 32x32 images."""
    published = backbone.removesuffix("_small_images")
    model = torchvision_model(published)
    net = with_torchvision_weights(network(backbone, "gap", 3), model, published)
    if published == "mobilenet_v2":
        model.features[0][0].stride = model.features[14].conv[1][0].stride = (1, 1)
    else:
        model.conv1[0].stride, model.maxpool = (1, 1), nn.Identity()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x), model(x))
    assert net.feature_shape(32) == (NETWORKS[backbone].channels, 4, 4)
    maps = net.features(net.stem(x)).float()
    for pooling in POOLINGS:
        head = pooling_head(pooling, maps.shape[1], 8).eval()
        assert head(maps).shape == (2, head.out_features)


@pytest.mark.parametrize(("backbone", "blocks"), [("resnet18", 2), ("resnet50", 3)])
def test_stride_1_in_the_last_stage_is_torchvisions_stage_made_with_stride_1(backbone: str, blocks: int) -> None:
    model = torchvision_model(backbone)
    net = with_torchvision_weights(network(backbone, "gap", 3, last_stride=1), model, backbone)
    weights = model.layer4.state_dict()
    model.inplanes = {"resnet18": 256, "resnet50": 1024}[backbone]  # channels of layer3
    model.layer4 = model._make_layer(type(model.layer3[0]), 512, blocks, stride=1)
    model.layer4.load_state_dict(weights)
    x = images(backbone).double()
    torch.testing.assert_close(net(x), model.double().eval()(x))


DEEPER = ("resnet34", "resnet101", "shufflenet_v2_x1_5")  # than others of the same blocks, and no more


@pytest.mark.parametrize(
    ("backbone", "pooling"),
    [
        *((name, "gcp") for name in NETWORKS if name not in DEEPER),
        *((name, "gap") for name in LIGHT),
    ],
)
def test_forward_and_backward(backbone: str, pooling: str) -> None:
    net = network(backbone, pooling, 3, reduced_channels=None if backbone in SMALL or pooling == "gap" else 16)
    logits = net(images(backbone))
    assert logits.shape == (2, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(part(net).weight.grad.abs().sum() > 0 for part in (first_convolution, last_linear))


def first_convolution(net: nn.Module) -> nn.Conv2d:
    return next(part for part in net.modules() if isinstance(part, nn.Conv2d))


def last_linear(net: nn.Module) -> nn.Linear:
    return [part for part in net.modules() if isinstance(part, nn.Linear)][-1]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backbone", ["digits_net", "cifar_resnet8"])
def test_small_networks_take_every_pooling(backbone: str, pooling: str) -> None:
    net = network(backbone, pooling, 4, in_channels=1)
    x = images(backbone, n=3, channels=1)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(net.rest(net.stem(x)), net(x))


@pytest.mark.parametrize("pooling", ["gap", "gcp"])
@pytest.mark.parametrize("backbone", LIGHT)
def test_channels_last_gives_the_same_logits(backbone: str, pooling: str) -> None:
    net = network(backbone, pooling, 3, reduced_channels=8, dropout=0.0).double().train()
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x = images(backbone).double()
    torch.testing.assert_close(twin(x.to(memory_format=torch.channels_last)), net(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backbone", LIGHT)
def test_other_input_channels_change_the_first_convolution_alone(backbone: str) -> None:
    one, three = network(backbone, "gap", 3, in_channels=1), network(backbone, "gap", 3)
    differ = [k for k, v in three.state_dict().items() if v.shape != one.state_dict()[k].shape]
    assert len(differ) == 1
    old, new = first_convolution(three), first_convolution(one)
    assert (new.in_channels, new.out_channels, new.stride, new.padding) == (
        1,
        old.out_channels,
        old.stride,
        old.padding,
    )
    spread = (
        3**0.5 if backbone.startswith("shufflenet") else 1.0
    )  # PyTorch's default goes with fan_in, fan_out does not
    sampling = 4.0 * (1.0 / new.weight.numel()) ** 0.5
    assert (new.weight.std() / old.weight.std()).item() == pytest.approx(spread, rel=sampling)
    assert one(images(backbone, channels=1)).shape == (2, 3)


@pytest.mark.parametrize("backbone", NETWORKS)
def test_feature_shape_is_that_of_the_features_and_computing_it_changes_nothing(backbone: str) -> None:
    if backbone in LIGHT:
        net = network(backbone, "gcp", 2).train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        shape = net.feature_shape((image_size(backbone), 2 * image_size(backbone)))
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        x = torch.randn(2, 3, image_size(backbone), 2 * image_size(backbone))
        assert net.features(net.stem(x)).shape[1:] == shape
    else:
        side = 8 if backbone in SMALL_IMAGES else 4 if "resnet" in backbone else 2
        assert on_meta(backbone, "gcp", 2).feature_shape(64)[1:] == (side, side)


# Starts: the same seed gives the same backbone


@pytest.mark.parametrize("backbone", LIGHT)
def test_initial_backbone_depends_on_the_seed_alone(backbone: str) -> None:
    def state(seed: int, pooling: str, num_classes: int = 3, **options: object) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return backbone_state(network(backbone, pooling, num_classes, **options))

    reference = state(5, "gap")
    # a head is made without knowing its backbone: all of them on the small networks
    poolings = POOLINGS if backbone in SMALL else ("gap", "gcp")
    variants = [state(5, pooling, num_classes=2, reduced_channels=8, dropout=0.5) for pooling in poolings]
    if NETWORKS[backbone].last_stride is not None:
        variants += [state(5, "gap", last_stride=stride) for stride in (1, 2)]
    for other in variants:
        assert other.keys() == reference.keys()
        assert all(torch.equal(other[k], reference[k]) for k in reference)
    assert any(not torch.equal(v, reference[k]) for k, v in state(6, "gap").items())


@pytest.mark.parametrize("backbone", SMALL)
def test_small_networks_start_from_kaiming_fan_out(backbone: str) -> None:
    torch.manual_seed(0)
    for part in network(backbone, "gap", 3).modules():
        if isinstance(part, nn.Conv2d) and part.weight.numel() > 2_000:
            fan_out = part.out_channels * part.kernel_size[0] * part.kernel_size[1]
            assert part.weight.var().item() == pytest.approx(2.0 / fan_out, rel=0.1)  # sampling error below 4 %


# Nothing in place


@pytest.mark.parametrize("backbone", LIGHT)
def test_features_leave_the_stems_output_alone(backbone: str) -> None:
    net = network(backbone, "gcp", 3)
    with torch.no_grad():
        x = torch.randn_like(net.stem(images(backbone)))  # negative values too: a ReLU in place would change them
        before = x.clone()
        net.rest(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backbone", NETWORKS)
def test_no_module_works_in_place(backbone: str) -> None:
    assert not [name for name, part in on_meta(backbone, "gcp", 2).named_modules() if getattr(part, "inplace", False)]


@pytest.mark.parametrize("backbone", SMALL)
def test_small_networks_use_every_leaf_once(backbone: str) -> None:
    net = network(backbone, "gap", 3)
    calls = {name: 0 for name, part in net.named_modules() if not list(part.children()) and "head" not in name}
    for name, part in net.named_modules():
        if name in calls:
            part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    net(images(backbone))
    assert set(calls.values()) == {1}


# Options


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])  # one of each block
def test_last_stride_of_resnets(backbone: str) -> None:
    assert on_meta(backbone, "gap", 2).feature_shape(224)[1:] == (7, 7)
    assert on_meta(backbone, "gcp", 2).feature_shape(224)[1:] == (14, 14)
    assert on_meta(backbone, "gap", 2, last_stride=1).feature_shape(224)[1:] == (14, 14)
    assert on_meta(backbone, "gcp", 2, last_stride=2).feature_shape(224)[1:] == (7, 7)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_but_gap_keeps_stride_1(pooling: str) -> None:
    assert on_meta("resnet18", pooling, 2).feature_shape(224) == (512, *((7, 7) if pooling == "gap" else (14, 14)))


def test_last_stride_of_cifar_resnets_is_the_same_for_all_poolings() -> None:
    for pooling in POOLINGS:
        assert on_meta("cifar_resnet8", pooling, 2).feature_shape(32) == (64, 8, 8)
        assert on_meta("cifar_resnet8", pooling, 2, last_stride=1).feature_shape(32) == (64, 16, 16)


OF_CHANNELS = {row.channels: name for name, row in reversed(NETWORKS.items())}
"""Number of channels -> the first network of the table that has it."""


@pytest.mark.parametrize("backbone", OF_CHANNELS.values())
def test_reduction_to_256_channels_unless_told_otherwise(backbone: str) -> None:
    channels = NETWORKS[backbone].channels
    for reduced, gap, gcp in [
        (None, channels, min(channels, 256)),
        (0, channels, channels),
        (16, 16, 16),
    ]:
        assert on_meta(backbone, "gap", 2, reduced_channels=reduced).head.out_features == gap
        if gcp <= 256:  # the triangle of 2,048 channels has 2 million entries
            net = on_meta(backbone, "gcp", 2, reduced_channels=reduced)
            assert net.head.out_features == gcp * (gcp + 1) // 2


@pytest.mark.parametrize("backbone", NETWORKS)
def test_relu6_and_dropout_as_published(backbone: str) -> None:
    mobile = backbone.startswith(("mobilenet", "shufflenet"))
    net = on_meta(backbone, "gcp", 2, reduced_channels=16)
    assert [type(part) for part in net.head.reduction] == [
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU6 if mobile else nn.ReLU,
    ]
    published = [0.2] if backbone.startswith("mobilenet") else []
    assert [part.p for part in net.classifier.modules() if isinstance(part, nn.Dropout)] == published
    given = on_meta(backbone, "gcp", 2, dropout=0.3).classifier
    assert [part.p for part in given.modules() if isinstance(part, nn.Dropout)] == [0.3]
    assert isinstance(on_meta(backbone, "gap", 2, dropout=0.0).classifier, nn.Linear)


def test_pooling_options_reach_the_head() -> None:
    few, many = (network("digits_net", "gcp", 3, 1, num_iter=n) for n in (1, 8))
    many.load_state_dict(few.state_dict())
    x = images("digits_net", channels=1)
    assert not torch.allclose(few(x), many(x))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet19"}, "unknown backbone 'resnet19'; choose one of: .*resnet18, resnet34"),
        ({"pooling": "gpc"}, "unknown pooling 'gpc'; choose one of: gap"),
        ({"num_classes": 0}, "num_classes .*, got 0"),
        ({"num_classes": 2.5}, "num_classes .*, got 2.5"),
        ({"in_channels": 0}, "in_channels .*, got 0"),
        ({"reduced_channels": -1}, "reduced_channels .*, got -1"),
        ({"last_stride": 3}, "last_stride 3: must be 1, 2 or None"),
        ({"last_stride": True}, "last_stride True: must be 1, 2 or None"),
        ({"backbone": "mobilenet_v2", "last_stride": 1}, "mobilenet_v2 cannot change it .*: resnet18, "),
        ({"backbone": "digits_net", "last_stride": 2}, "digits_net cannot change it"),
        ({"dropout": 1.0}, "dropout must be a number in .*, got 1.0"),
        ({"dropout": -0.1}, "dropout .*, got -0.1"),
        ({"dropout": float("nan")}, "dropout .*, got nan"),
        ({"num_itre": 3}, "num_itre"),
        ({"num_iter": 0}, "num_iter must be .* got 0"),
        ({"method": torch.ones(2)}, r"unknown method tensor\(\[1., 1.\]\)"),
        ({"pooling": 0.5}, "unknown pooling 0.5"),
        ({"pooling": nn.ReLU(), "reduced_channels": 3}, r"head of one's own, ReLU\(\)"),
        ({"num_classes": 10**30}, "num_classes must be .* to 16777216, got 1000"),
        ({"in_channels": 2**63}, "in_channels must be .* to 65536, got 9223372036854775808"),
        ({"reduced_channels": 10**400}, "reduced_channels must be .* to 1048576, got 1000"),
        ({"reduced_channels": torch.zeros(0)}, r"reduced_channels must be a whole number .*, got tensor\(\[\]\)"),
        ({"num_classes": 2**24, "reduced_channels": 64}, "has more than 2147483647 weights"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=message) as error:
        network(**{"backbone": "cifar_resnet8", "pooling": "gcp", "num_classes": 2, **arguments})
    assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["check_image_size", "feature_shape"])
@pytest.mark.parametrize(
    "size", [{}, "", (8,), (8, 8, 8), (8, "8"), 2.5, float("nan"), nn.ReLU(), None, 0, True, 10**30]
)
def test_sizes_that_are_none(method: str, size: object) -> None:
    with pytest.raises(InputError, match="image_size"):
        getattr(network("digits_tiny", "gap", 3), method)(size)


INPUTS: dict[str, tuple[object, str]] = {
    "list": ([[1.0]], r"images must be a tensor, got \[\[1.0\]\] of type list"),
    "text": ("x", "images must be a tensor, got 'x'"),
    "meta": (torch.zeros(2, 3, 8, 8, device="meta"), "images on the device meta, the network on cpu"),
    "double": (torch.zeros(2, 3, 8, 8).double(), "images of type torch.float64, the network of torch.float32"),
    "one value": (torch.zeros(1, 3, 1, 1), "one value per channel"),
    "one position": (torch.zeros(2, 3, 4, 4), "last feature map is 1x1"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_a_refused_batch_leaves_no_trace_in_training(case: str) -> None:
    x, message = INPUTS[case]
    net = network("cifar_resnet8", "gcp", 2, reduced_channels=4, dropout=0.5)
    for good in ((), (2, 3, 16, 16)):  # as the first batch, and after one of another size
        if good:
            net(torch.rand(good))
        before, drawn = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
        with pytest.raises(InputError, match=message):
            net(x)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (0, 3, 8, 8), (2, 3, 8)])
def test_images_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"use \[N, 3, H, W\] with N >= 1"):
        network("digits_net", "gap", 2)(torch.zeros(shape))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_images_that_leave_one_position(pooling: str) -> None:
    net = network("cifar_resnet8", pooling, 2).eval()
    x = torch.randn(2, 3, 4, 4)
    if pooling in ("gap", "gap_lifted"):
        assert net(x).shape == (2, 2)
    else:
        assert any(isinstance(part, Covariance) for part in net.head.chain())
        with pytest.raises(InputError, match="last feature map is 1x1"):
            net(x)


def test_feature_shape_of_no_image() -> None:
    with pytest.raises(InputError, match=r"image_size .*, got 0"):
        network("digits_net", "gap", 2).feature_shape(0)
