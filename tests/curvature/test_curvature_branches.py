"""Sums, concatenations, slices and shuffles: BackPACK's quantities of blocks with branches against torch.func."""

from collections.abc import Callable

import pytest
import torch
from backpack import extensions
from small_networks import CLASSES, batch, flat_parameters, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torchvision.models import mobilenetv2, resnet, shufflenetv2

from secondorder.curvature.backpack.branches import Branches, ChannelShuffle, ChannelSlice, Concatenate, Sum
from secondorder.curvature.backpack.conversion import backpack_network
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.twins import TWINS, residual
from secondorder.errors import InputError
from secondorder.networks.small import ResidualBlock
from secondorder.pooling import pooling_head


class Gate(nn.Module):
    """x + tanh(conv(x)): the nonlinearity sits inside a branch, so that a part of the Hessian begins there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).tanh()


class Nested(nn.Module):
    """conv(x) + gate(gate(x)): branches inside a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.inner = nn.Sequential(Gate(), Gate())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.inner(x)


def shortcut(channels: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "cifar": lambda: ResidualBlock(2, 2, 1),
    "cifar, shortcut": lambda: ResidualBlock(2, 3, 2),
    "BasicBlock": lambda: resnet.BasicBlock(2, 2),
    "Bottleneck, shortcut": lambda: resnet.Bottleneck(2, 1, 2, shortcut(2, 4, 2)),
    "MobileNetV2": lambda: mobilenetv2.InvertedResidual(2, 2, 1, 2),
    "MobileNetV2, no sum": lambda: mobilenetv2.InvertedResidual(2, 3, 2, 2),
    "ShuffleNetV2": lambda: shufflenetv2.InvertedResidual(2, 2, 1),
    "ShuffleNetV2, stride 2": lambda: shufflenetv2.InvertedResidual(2, 4, 2),
    "tanh in a branch": Gate,
    "branches in a branch": Nested,
}


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TWINS, Gate, lambda gate, part: residual(part("conv"), nn.Tanh()))
    monkeypatch.setitem(TWINS, Nested, lambda nested, part: Branches([part("conv"), part("inner")], Sum()))


def block_network(name: str, head: str = "gcp") -> nn.Sequential:
    """1x1 convolution - block - pooling - linear, in float64 and eval mode, with batch-norm statistics that are not 0 and 1."""
    block = BLOCKS[name]()
    channels = block.eval()(torch.zeros(1, 2, 6, 6)).shape[1]
    pooling = pooling_head(head, channels)
    network = (
        nn.Sequential(nn.Conv2d(2, 2, 1), block, pooling, nn.Linear(pooling.out_features, CLASSES)).double().eval()
    )
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.5)
    return network


def joined(network: nn.Module, values: dict[str, Tensor], start: int = 0) -> Tensor:
    """The values of all parameters, flattened from dimension `start`, one after the other in the network's order."""
    assert list(values) == [name for name, _ in network.named_parameters()]
    return torch.cat([value.flatten(start) for value in values.values()], -1)


@pytest.mark.parametrize("head", ["gcp", "gap"])
@pytest.mark.parametrize("name", BLOCKS)
def test_diagonals_and_square_root_equal_torch_func(name: str, head: str) -> None:
    loss = nn.CrossEntropyLoss()
    network, data = block_network(name, head), batch(loss, 2)
    G, H = true_ggn(network, loss, data), true_hessian(network, loss, data)
    diagonal = joined(network, backpack_quantity(network, loss, data, extensions.DiagGGNExact()))
    assert relative(diagonal, G.diagonal()) <= 1e-12
    root = joined(network, backpack_quantity(network, loss, data, extensions.SqrtGGNExact()), 2).flatten(0, 1)
    assert relative(root.mT @ root, G) <= 1e-12
    hessian = joined(network, backpack_quantity(network, loss, data, extensions.DiagHessian()))
    assert relative(hessian, H.diagonal()) <= 1e-12


@pytest.mark.parametrize("name", ["cifar, shortcut", "BasicBlock", "MobileNetV2", "ShuffleNetV2", "tanh in a branch"])
def test_diagonals_of_each_sample_equal_those_of_batches_of_one(name: str) -> None:
    loss = nn.CrossEntropyLoss(reduction="sum")
    network, (images, labels) = block_network(name), batch(loss, 2)
    ggn = joined(network, backpack_quantity(network, loss, (images, labels), extensions.BatchDiagGGNExact()), 1)
    hessian = joined(network, backpack_quantity(network, loss, (images, labels), extensions.BatchDiagHessian()), 1)
    for n in range(2):
        one = images[n : n + 1], labels[n : n + 1]
        assert relative(ggn[n], true_ggn(network, loss, one).diagonal()) <= 1e-12
        assert relative(hessian[n], true_hessian(network, loss, one).diagonal()) <= 1e-12


@pytest.mark.parametrize("name", ["BasicBlock", "MobileNetV2", "ShuffleNetV2", "branches in a branch"])
def test_squared_error_and_one_sample(name: str) -> None:
    """One sample: a channel slice without memory of its own would share the address of its input."""
    loss = nn.MSELoss()
    network, data = block_network(name), batch(loss, 1)
    ggn = joined(network, backpack_quantity(network, loss, data, extensions.DiagGGNExact()))
    hessian = joined(network, backpack_quantity(network, loss, data, extensions.DiagHessian()))
    assert relative(ggn, true_ggn(network, loss, data).diagonal()) <= 1e-12
    assert relative(hessian, true_hessian(network, loss, data).diagonal()) <= 1e-12


@pytest.mark.parametrize("name", BLOCKS)
def test_individual_gradients_equal_torch_func(name: str) -> None:
    loss = nn.CrossEntropyLoss()
    network, (images, labels) = block_network(name), batch(loss, 2)
    w, unflatten = flat_parameters(network)

    def losses(v: Tensor) -> Tensor:
        outputs = functional_call(network, unflatten(v), (images,))
        return nn.functional.cross_entropy(outputs, labels, reduction="none") / 2

    gradients = joined(network, backpack_quantity(network, loss, (images, labels), extensions.BatchGrad()), 1)
    assert relative(gradients, jacrev(losses)(w)) <= 1e-12


def test_branches_from_the_images() -> None:
    """Nothing is propagated to the images themselves, so the first fork has no quantity."""
    loss = nn.CrossEntropyLoss()
    network = nn.Sequential(Gate(), nn.Flatten(), nn.Linear(72, CLASSES)).double()
    data = batch(loss, 2)
    values = joined(network, backpack_quantity(network, loss, data, extensions.DiagHessian()))
    assert relative(values, true_hessian(network, loss, data).diagonal()) <= 1e-12


def test_modules_compute_what_their_names_say() -> None:
    x = torch.arange(24.0).view(1, 6, 2, 2)
    assert torch.equal(Sum()(x, 2 * x, 3 * x), 6 * x)
    assert torch.equal(Concatenate()(x[:, :2], x[:, 2:]), x)
    assert torch.equal(ChannelSlice(2, 5)(x), x[:, 2:5])
    assert torch.equal(ChannelShuffle(2)(x), shufflenetv2.channel_shuffle(x, 2))
    assert torch.equal(ChannelShuffle(3)(x), shufflenetv2.channel_shuffle(x, 3))
    assert torch.equal(Branches([nn.Sequential(), nn.ReLU()], Sum())(x - 9), (x - 9) + (x - 9).relu())


def test_a_slice_of_one_sample_has_memory_of_its_own() -> None:
    x = torch.zeros(1, 4, 2, 2)
    assert ChannelSlice(0, 2)(x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sum()(torch.zeros(2, 1), torch.zeros(2, 3)), r"one shape, got \[\[2, 1\], \[2, 3\]\]"),
        (lambda: Sum()(torch.zeros(2, 1)), "two or more"),
        (lambda: ChannelSlice(2, 2), "0 <= start < stop"),
        (lambda: ChannelSlice(0, 5)(torch.zeros(1, 4, 2, 2)), "got 4 channels"),
        (lambda: ChannelShuffle(2)(torch.zeros(1, 5, 2, 2)), "5 channels"),
    ],
)
def test_wrong_shapes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_every_module_of_a_twin_is_used_once() -> None:
    twin = backpack_network(block_network("BasicBlock"))
    runs: dict[nn.Module, int] = {}
    for _, leaf in twin.leaves():
        leaf.register_forward_hook(lambda module, args, out: runs.update({module: runs.get(module, 0) + 1}))
    twin(torch.zeros(1, 2, 6, 6, dtype=torch.float64))
    assert set(runs.values()) == {1}
    assert sum(isinstance(module, nn.ReLU) for module in runs) == 2  # torchvision's block calls one object twice
