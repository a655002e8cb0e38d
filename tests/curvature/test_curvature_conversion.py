"""Twins for BackPACK: same outputs and gradients as the network, the same parameters, nothing left behind."""

import gc
import weakref

import pytest
import torch
import torchvision
from backpack import backpack, extend, extensions
from backpack.context import CTX
from small_networks import CLASSES, built, chain
from torch import Tensor, nn

from secondorder.curvature.backpack.branches import ChannelShuffle
from secondorder.curvature.backpack.conversion import backpack_network
from secondorder.curvature.backpack.twins import TWINS, residual
from secondorder.errors import InputError
from secondorder.networks import NETWORKS, network
from secondorder.pooling import POOLINGS

# Of each family the smallest member; the others differ in depth and width only. The smallest of all takes every head,
# ResNets the two that differ in the last stride.
KINDS = ["mobilenet_v2", "shufflenet_v2_x0_5", "resnet18", "cifar_resnet8", "digits_net"]


def bottlenecks(weights: None, num_classes: int) -> nn.Module:
    """A ResNet of the blocks of ResNet-50, of which one in each stage is enough."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes)


def torchvision_network(name: str) -> nn.Module:
    """torchvision's network in eval mode and float64, with batch-norm statistics and affine maps that are not 0 and 1."""
    made = bottlenecks if name == "bottlenecks" else getattr(torchvision.models, name)
    model = made(weights=None, num_classes=CLASSES).double().eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor in (part.weight, part.bias, part.running_mean):
                    tensor.add_(torch.randn_like(tensor), alpha=0.1)
                part.running_var.mul_(1.0 + 0.5 * torch.rand_like(part.running_var))
    return model


def assert_same_function(model: nn.Module, images: Tensor, tolerance: float = 1e-12) -> None:
    """Outputs and gradients agree, each relative to its largest entry (what is zero but for rounding: to all gradients')."""
    twin = backpack_network(model)
    expected, found = model(images), twin(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))
    named = {
        name: p for name, p in model.named_parameters() if "importance" not in name
    }  # DropCov's, at rest in eval mode
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), list(named.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(named.values()))
    largest = max(b.abs().max() for b in theirs)
    for name, a, b in zip(named, ours, theirs, strict=True):
        assert (a - b).abs().max() <= 10 * tolerance * b.abs().max() + 0.1 * tolerance * largest, name


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["resnet18", "bottlenecks", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_torchvision_networks_are_the_same_function(name: str) -> None:
    assert_same_function(torchvision_network(name), torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("backbone", "pooling"),
    [
        (backbone, pooling)
        for backbone in KINDS
        for pooling in (POOLINGS if backbone == "digits_net" else ("gap", "gcp") if "resnet" in backbone else ("gcp",))
    ],
)
def test_networks_of_every_kind_and_head_are_the_same_function(backbone: str, pooling: str) -> None:
    """The head's own forward is fused; of few positions the logarithm, steep at zero, loses some of the digits."""
    model = built(backbone, pooling, reduced_channels=6)
    size = 64 if backbone.startswith(("mobile", "shuffle")) else 32 if backbone == "resnet18" else 16
    assert_same_function(
        model, torch.randn(2, 3, size, size, dtype=torch.float64), 1e-10 if pooling == "gcp_log" else 1e-12
    )


@pytest.mark.parametrize("backbone", NETWORKS)
def test_every_network_of_the_table_has_a_twin_with_all_its_parameters(backbone: str) -> None:
    with torch.device("meta"):
        model = network(backbone, "gcp", CLASSES).eval()
    twin = backpack_network(model)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in twin.buffers()} == {id(b) for b in model.buffers()}
    assert [twin.names[p] for p in model.parameters()] == [name for name, _ in model.named_parameters()]


def test_the_model_is_not_touched() -> None:
    model = torchvision_network("resnet18")
    before = [(module, dict(vars(module))) for module in model.modules()]
    parameters = [(p, p.data.clone(), dict(vars(p))) for p in model.parameters()]
    twin = backpack_network(model)
    with torch.no_grad():
        twin(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    for module, attributes in before:
        assert vars(module) == attributes
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            assert not getattr(module, hooks)
    for parameter, value, attributes in parameters:
        assert torch.equal(parameter, value)
        assert vars(parameter) == attributes
    assert any(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))  # as torchvision made them
    assert not set(model.modules()) & set(twin.modules())


def test_twins_are_freed() -> None:
    model, known = chain(), len(CTX.hook_handles)
    twin = weakref.ref(backpack_network(model))
    gc.collect()
    assert twin() is None
    assert len(CTX.hook_handles) == known


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backpack_runs_on_the_twin_and_saves_on_the_users_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    loss = extend(nn.CrossEntropyLoss())
    with backpack(extensions.BatchL2Grad()):
        loss(backpack_network(model)(torch.randn(5, 3)), torch.tensor([0, 1, 0, 1, 1])).backward()
    assert [tuple(p.batch_l2.shape) for p in model.parameters()] == [(5,)] * 4


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_network_that_was_extended_and_run_gets_a_clean_twin() -> None:
    model = extend(chain(activation=nn.ReLU))
    images = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = model(images)
    twin = backpack_network(model)
    assert torch.equal(twin(images), expected) or (twin(images) - expected).abs().max() < 1e-14
    first = next(leaf for _, leaf in twin.leaves())
    assert len(first._forward_hooks) == 1
    assert "input0" in vars(model[0])  # still the user's


def test_dropout_at_rest_and_identities_are_left_out() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3), nn.Dropout(0.5), nn.ReLU()).eval()
    assert [type(leaf) for _, leaf in backpack_network(model).leaves()] == [nn.Linear, nn.ReLU]
    model.train()
    assert [type(leaf) for _, leaf in backpack_network(model).leaves()] == [nn.Linear, nn.Dropout, nn.ReLU]


def test_paths_are_those_of_the_model() -> None:
    twin = backpack_network(torchvision_network("shufflenet_v2_x0_5"))
    paths = [path for path, _ in twin.leaves()]
    assert paths[:4] == ["conv1.0", "conv1.1", "conv1.2", "maxpool"]
    assert next(path for path, leaf in twin.leaves() if isinstance(leaf, ChannelShuffle)) == "stage2.0"
    assert twin.branching() == "stage2.0"
    assert backpack_network(chain()).branching() is None


class Doubled(nn.Module):
    """2 conv(x), a container without a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.conv(x)


def test_a_container_without_a_row_is_named_with_the_way_out() -> None:
    model = nn.Sequential(nn.Sequential(Doubled()), nn.Flatten())
    with pytest.raises(InputError, match=r"'0\.0' \(Doubled\) has no twin; .*Sequential.*TWINS.*curvature_blocks"):
        backpack_network(model)
    with pytest.raises(InputError, match=r"the network itself \(Doubled\) has no twin"):
        backpack_network(Doubled())


def test_a_row_makes_a_container_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TWINS, Doubled, lambda doubled, part: residual(nn.Sequential(part("conv"))))
    model = Doubled()
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(backpack_network(model)(x), x + model.conv(x))


def test_a_subclass_of_a_known_container_is_not_taken_for_it() -> None:
    class Reversed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](self[1](x))

    with pytest.raises(InputError, match=r"\(Reversed\) has no twin"):
        backpack_network(Reversed(nn.Linear(2, 2), nn.ReLU()))


def test_shared_parameters_are_refused_with_both_places() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(InputError, match=r"weight of '2' \(Linear\) is used by '0' too; .*curvature_blocks"):
        backpack_network(nn.Sequential(layer, nn.ReLU(), layer))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].bias = tied[0].bias
    with pytest.raises(InputError, match=r"bias of '1'"):
        backpack_network(tied)


def test_an_activation_may_be_used_twice() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu)
    assert len({id(leaf) for _, leaf in backpack_network(model).leaves()}) == 4
