"""Networks: torchvision's own numbers, published sizes, identical starts, and heads on a user's model."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.networks import NETWORKS, Network, network, replace_pooling
from secondorder.pooling import POOLINGS, Covariance

TORCHVISION = [name for name in NETWORKS if hasattr(torchvision.models, name)]
SMALL = [name for name in NETWORKS if name not in TORCHVISION]
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
    return 8 if backbone == "digits_net" else 32 if backbone.startswith("cifar") else 64


def images(backbone: str, n: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, image_size(backbone), image_size(backbone))


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(backbone: str, pooling: str, num_classes: int = 1000, **options: object) -> Network:
    with torch.device("meta"):
        return network(backbone, pooling, num_classes, **options)


def torchvision_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """torchvision's network in eval mode, 3 classes, with batch-norm statistics and affine maps that are not 0 and 1."""
    made = light_vgg() if name == "vgg11_bn" else getattr(torchvision.models, name)(weights=None, num_classes=3)
    model = made.to(dtype).eval()
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


def test_the_table_holds_the_networks_of_the_protocol() -> None:
    resnets = [f"resnet{depth}" for depth in (18, 34, 50, 101)]
    shufflenets = [f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")]
    assert {"mobilenet_v2", *shufflenets, *resnets} == set(TORCHVISION)
    assert {"cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "digits_net"} <= set(SMALL)


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


@pytest.mark.parametrize("backbone", NETWORKS)
@pytest.mark.parametrize("pooling", ["gap", "gcp"])
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
    x = images(backbone, n=4).double()
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
        assert on_meta(backbone, "gcp", 2).feature_shape(64)[1:] == ((4, 4) if "resnet" in backbone else (2, 2))


# Starts: the same seed gives the same backbone


def backbone_state(net: Network) -> dict[str, Tensor]:
    return {k: v for k, v in net.state_dict().items() if k.startswith(("stem.", "features."))}


@pytest.mark.parametrize("backbone", LIGHT)
def test_initial_backbone_depends_on_the_seed_alone(backbone: str) -> None:
    def state(seed: int, pooling: str, num_classes: int = 3, **options: object) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return backbone_state(network(backbone, pooling, num_classes, **options))

    reference = state(5, "gap")
    variants = [state(5, pooling, num_classes=2, reduced_channels=8, dropout=0.5) for pooling in POOLINGS]
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


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101"])
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


@pytest.mark.parametrize("backbone", NETWORKS)
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
    published = [0.2] if backbone == "mobilenet_v2" else []
    assert [part.p for part in net.classifier.modules() if isinstance(part, nn.Dropout)] == published
    given = on_meta(backbone, "gcp", 2, dropout=0.3).classifier
    assert [part.p for part in given.modules() if isinstance(part, nn.Dropout)] == [0.3]
    assert isinstance(on_meta(backbone, "gap", 2, dropout=0.0).classifier, nn.Linear)


def test_pooling_options_reach_the_head() -> None:
    few, many = (network("digits_net", "gcp", 3, 1, num_iter=n) for n in (1, 8))
    many.load_state_dict(few.state_dict())
    x = images("digits_net", channels=1)
    assert not torch.allclose(few(x), many(x))


# A head on a user's model


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


class Twice(torchvision.models.ResNet):
    """Has every attribute of a ResNet, but its forward is another one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2.0 * x + 1.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torchvision.models.resnet.BasicBlock(4, 4), "cannot split BasicBlock with children conv1"),
        (lambda: nn.Linear(2, 2), "children none: expected .* `avgpool`, then `fc` or `classifier`.*by hand"),
        (lambda: torchvision.models.swin_t(num_classes=2), "cannot split SwinTransformer"),
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


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet19"}, "unknown backbone 'resnet19'; choose one of: .*resnet18, resnet34"),
        ({"pooling": "gpc"}, "unknown pooling 'gpc'; choose one of: gap"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"num_classes": 2.5}, "num_classes 2.5"),
        ({"in_channels": 0}, "in_channels 0"),
        ({"reduced_channels": -1}, "reduced_channels -1"),
        ({"last_stride": 3}, "last_stride 3: must be 1, 2 or None"),
        ({"last_stride": True}, "last_stride True: must be 1, 2 or None"),
        ({"backbone": "mobilenet_v2", "last_stride": 1}, "mobilenet_v2 cannot change it .*: resnet18, "),
        ({"backbone": "digits_net", "last_stride": 2}, "digits_net cannot change it"),
        ({"dropout": 1.0}, "dropout 1.0: must be in"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"dropout": float("nan")}, "dropout nan"),
        ({"num_itre": 3}, "num_itre"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        network(**{"backbone": "cifar_resnet8", "pooling": "gcp", "num_classes": 2, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "gpc"}, "unknown pooling"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"reduced_channels": -3}, "reduced_channels -3"),
        ({"last_stride": 3}, "last_stride 3"),
        ({"last_stride": 1}, "only ResNets can change it; these features end in ReLU"),
        ({"dropout": 2.0}, "dropout 2.0"),
        ({"image_size": 0}, "image_size 0"),
    ],
)
def test_bad_arguments_of_replace_pooling(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace_pooling(network("digits_net", "gap", 2), **{"pooling": "gcp", **arguments})


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (0, 3, 8, 8), (2, 3, 8)])
def test_images_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"use \[N, 3, H, W\] with N >= 1"):
        network("digits_net", "gap", 2)(torch.zeros(shape))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_images_that_leave_one_position(pooling: str) -> None:
    net = network("cifar_resnet8", pooling, 2).eval()
    x = torch.randn(2, 3, 4, 4)
    if pooling == "gap":
        assert net(x).shape == (2, 2)
    else:
        assert any(isinstance(part, Covariance) for part in net.head.chain())
        with pytest.raises(InputError, match="last feature map is 1x1"):
            net(x)


def test_feature_shape_of_no_image() -> None:
    with pytest.raises(InputError, match="image_size 0"):
        network("digits_net", "gap", 2).feature_shape(0)
