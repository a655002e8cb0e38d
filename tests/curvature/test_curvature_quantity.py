"""`backpack_quantity`: right values under the network's names, chunks that add up, and no trace in the network."""

import copy
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension
from curvlinops import KFACLinearOperator
from quantity_values import EXACT, LOSSES, RANDOM, assert_equal, tensors
from small_networks import CLASSES, batch, built, chain, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torchvision.models import resnet

from secondorder.curvature.backpack.branches import Branches, Sum
from secondorder.curvature.backpack.kronecker import WeightSharingKFLR
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.registration import register
from secondorder.curvature.backpack.twins import TWINS
from secondorder.errors import InputError
from secondorder.pooling import pooling_head


class Fork(nn.Module):
    """conv(x) + x, without batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class MovingAverage(nn.Module):
    """A leaf that writes into its buffer and counts its calls, and whose output shows both."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(), 0.5)
        self.calls += 1
        return self.calls * (x - self.mean)


class CountingFork(Fork):
    """A container that counts its calls and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.detach()
        return super().forward(x)


def forked() -> nn.Sequential:
    pooling = pooling_head("gcp", 3)
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), Fork(), nn.Tanh(), pooling, nn.Linear(pooling.out_features, CLASSES)
    ).double()


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Fork, CountingFork):
        monkeypatch.setitem(TWINS, kind, lambda fork, part: Branches([part("conv"), nn.Sequential()], Sum()))


def test_subsampling_is_of_the_whole_batch() -> None:
    network, loss = chain(), nn.CrossEntropyLoss()
    data = batch(loss, 4)
    some = backpack_quantity(network, loss, data, extensions.SqrtGGNExact(subsampling=[1, 3]))
    every = backpack_quantity(network, loss, data, extensions.SqrtGGNExact())
    for name, value in some.items():
        assert relative(value, every[name][:, [1, 3]]) <= 1e-12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", [lambda: chain(activation=nn.Tanh, channels=2), forked], ids=["chain", "branches"])
def test_products_equal_torch_func(make: Callable[[], nn.Module], loss: str) -> None:
    """With branches the products come from `curvature_blocks`, in BackPACK's calling convention."""
    network, criterion = make(), LOSSES[loss]()
    data = batch(criterion, 3)
    for extension, truth in ((extensions.GGNMP(), true_ggn), (extensions.HMP(), true_hessian)):
        matrix, start = truth(network, criterion, data), 0
        products = backpack_quantity(network, criterion, data, extension)
        for name, parameter in network.named_parameters():
            block = matrix[start : start + parameter.numel(), start : start + parameter.numel()]
            start += parameter.numel()
            mat = torch.randn(2, *parameter.shape, dtype=torch.float64)
            result = products[name](mat)
            assert not result.requires_grad
            assert relative(result.flatten(1), mat.flatten(1) @ block) <= 1e-12, name


def test_a_later_forward_does_not_change_a_product() -> None:
    network, loss = chain(), nn.CrossEntropyLoss()
    data = batch(loss, 3)
    product = backpack_quantity(network, loss, data, extensions.GGNMP())["0.weight"]
    mat = torch.randn(1, 3, 2, 3, 3, dtype=torch.float64)
    before = product(mat)
    backpack_quantity(network, loss, batch(loss, 3), extensions.GGNMP())
    network(torch.randn(2, 2, 6, 6, dtype=torch.float64))
    assert torch.equal(product(mat), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
def test_kronecker_factors_with_branches_equal_curvlinops(loss: str, sharing: str) -> None:
    network, criterion = forked(), LOSSES[loss]()
    data = batch(criterion, 3)
    operator = KFACLinearOperator(
        network,
        criterion,
        list(network.parameters()),
        [data],
        fisher_type="type-2",
        kfac_approx=sharing,
        check_deterministic=False,
    )
    oracle = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    start = 0
    for name, factors in backpack_quantity(network, criterion, data, WeightSharingKFLR(sharing)).items():
        block = torch.kron(*factors) if len(factors) == 2 else factors[0]
        rows = slice(start, start + len(block))
        start += len(block)
        assert (block - oracle[rows, rows]).abs().max() <= 1e-12 * oracle[rows, rows].abs().max(), name
    assert start == len(oracle)


@pytest.mark.parametrize("extension", RANDOM)
def test_a_seed_fixes_random_quantities(extension: Callable[[], BackpropExtension]) -> None:
    network, loss = chain(), nn.CrossEntropyLoss()
    data = batch(loss, 3)
    first = backpack_quantity(network, loss, data, extension(), seed=1)
    torch.manual_seed(5)
    assert_equal(backpack_quantity(network, loss, data, extension(), seed=1), first, network, 0.0)
    other = backpack_quantity(network, loss, data, extension(), seed=2)
    assert any(
        not torch.equal(a, b)
        for name, p in network.named_parameters()
        for a, b in zip(tensors(first[name], p.shape), tensors(other[name], p.shape), strict=True)
    )


@pytest.mark.parametrize("extension", [*EXACT, *RANDOM])
def test_nothing_is_left_in_the_network(extension: Callable[[], BackpropExtension]) -> None:
    network = built("cifar_resnet8", "gcp", reduced_channels=3)
    if isinstance(
        extension(), extensions.DiagHessian | extensions.BatchDiagHessian | extensions.HMP | extensions.GGNMP
    ):
        network = chain()
    loss, torch_state = nn.CrossEntropyLoss(), None
    channels = 2 if isinstance(network, nn.Sequential) else 3
    data = batch(loss, 2, channels, 8 if channels == 3 else 6)
    first = next(network.parameters())
    first.user_note = "mine"
    calls: list[Tensor] = []
    first.register_hook(calls.append)
    for index, parameter in enumerate(network.parameters()):
        parameter.grad = torch.randn_like(parameter) if index % 2 else None
    next(iter(network.children())).train(False)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    versions = [tensor._version for tensor in network.state_dict().values()]
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in network.parameters()]
    modules = [(module, dict(vars(module))) for module in network.modules()]
    parameters = [(p, dict(vars(p))) for p in network.parameters()]
    images, extension_instance = data[0].clone(), extension()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backpack_quantity(network, loss, data, extension_instance, seed=3, chunk=1)

    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert random.getstate() == python_state
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(data[0], images)
    assert not calls
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert [tensor._version for tensor in network.state_dict().values()] == versions
    for parameter, (gradient, value) in zip(network.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    for module, attributes in modules:
        assert vars(module) == attributes
    for parameter, attributes in parameters:
        assert vars(parameter) == attributes
    assert not loss._forward_hooks
    assert not extension_instance.saved_quantities._saved_quantities


@pytest.mark.parametrize(
    ("layer", "quantities"),
    [
        (MovingAverage, [extensions.BatchGrad, extensions.Variance]),
        (CountingFork, [extensions.BatchGrad, extensions.DiagGGNExact, extensions.HMP]),
    ],
)
def test_modules_that_change_when_they_run(
    layer: type[nn.Module], quantities: list[Callable[[], BackpropExtension]]
) -> None:
    """They stay as they were, and each chunk starts from there."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3), layer(), nn.Flatten(), nn.Linear(48, CLASSES)).double()
    loss = nn.CrossEntropyLoss()
    data = batch(loss, 2)
    network(data[0])
    buffers = {name: (buffer, buffer.clone(), buffer._version) for name, buffer in network.named_buffers()}
    attributes = dict(vars(network[1]))

    values = [backpack_quantity(network, loss, data, extension()) for extension in quantities]
    parts = backpack_quantity(network, loss, data, extensions.BatchGrad(), chunk=1)

    for name, buffer in network.named_buffers():
        before, value, version = buffers[name]
        assert buffer is before
        assert torch.equal(buffer, value)
        assert buffer._version == version
    assert vars(network[1]) == attributes
    assert network[1].calls == 1
    for found, runs in ((values[0], [slice(0, 2)]), (parts, [slice(0, 1), slice(1, 2)])):
        for run in runs:
            copied = copy.deepcopy(network)
            (loss(copied(data[0][run]), data[1][run]) * len(data[0][run]) / 2).backward()
            for name, parameter in copied.named_parameters():
                assert relative(found[name][run].sum(0), parameter.grad) <= 1e-12, name


def test_nothing_is_left_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    network, loss = chain(), nn.CrossEntropyLoss()
    data = batch(loss, 2)
    extension = register(extensions.DiagGGNExact())

    def broken(*_: object) -> None:
        raise NotImplementedError("no rule for this layer")

    extension.set_module_extension(nn.Conv2d, broken, overwrite=True)
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="DiagGGNExact: no rule for this layer; use curvature_blocks"):
        backpack_quantity(network, loss, data, extension)
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert not extension.saved_quantities._saved_quantities
    assert all(p.grad is None and not vars(p) for p in network.parameters())


def test_names_order_and_frozen_parameters() -> None:
    network, loss = built("cifar_resnet8", "gcp", reduced_channels=3), nn.CrossEntropyLoss()
    network.stem.requires_grad_(False)
    data = batch(loss, 2, 3, 8)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert list(backpack_quantity(network, loss, data, extensions.DiagGGNExact())) == trained
    factors = backpack_quantity(network, loss, data, extensions.KFAC())
    assert list(factors) == [
        name for name in trained if ".bn" not in name and "sample.1" not in name and "tion.1" not in name
    ]
    wrapped = nn.DataParallel(network)
    assert list(backpack_quantity(wrapped, loss, data, extensions.BatchL2Grad())) == [
        f"module.{name}" for name in trained
    ]
    with pytest.raises(InputError, match="no parameter requires gradients"):
        backpack_quantity(network.requires_grad_(False), loss, data, extensions.BatchGrad())


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_default_dtype(dtype: torch.dtype, default: torch.dtype) -> None:
    """BackPACK's pooling and squared error make tensors of the default dtype."""
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)
    ).double()
    images, targets = batch(nn.MSELoss(), 3)
    exact = true_ggn(network, nn.MSELoss(), (images, targets)).diagonal()
    torch.set_default_dtype(default)
    try:
        found = backpack_quantity(
            network.to(dtype), nn.MSELoss(), (images.to(dtype), targets.to(dtype)), extensions.DiagGGNExact()
        )
        assert torch.get_default_dtype() is default
    finally:
        torch.set_default_dtype(torch.float32)
    values = torch.cat([value.flatten() for value in found.values()])
    assert values.dtype is dtype
    assert relative(values.double(), exact) <= (1e-5 if dtype is torch.float32 else 1e-12)


def test_averages_in_float64() -> None:
    """BackPACK's KFRA makes matrices of the default dtype in squared error and max-pooling; of one sample it is exact."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)).double()
    data = batch(nn.MSELoss(), 1)
    factors = backpack_quantity(network, nn.MSELoss(), data, extensions.KFRA())
    G, size = true_ggn(network, nn.MSELoss(), data), network[0].weight.numel()
    assert relative(factors["0.bias"][0], G[size : size + 3, size : size + 3]) <= 1e-12
    assert relative(torch.kron(*(f.contiguous() for f in factors["3.weight"])), G[-39:-3, -39:-3]) <= 1e-12


def test_works_without_gradients_and_under_autocast() -> None:
    network, loss = chain(), nn.CrossEntropyLoss()
    data = batch(loss, 2)
    expected = backpack_quantity(network, loss, data, extensions.DiagGGNExact())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_equal(backpack_quantity(network, loss, data, extensions.DiagGGNExact()), expected, network, 0.0)


def test_label_smoothing_moves_the_gradient_only() -> None:
    network, loss = chain(activation=nn.Tanh), nn.CrossEntropyLoss(label_smoothing=0.2)
    data = batch(loss, 3)
    for extension, truth in ((extensions.DiagGGNExact(), true_ggn), (extensions.DiagHessian(), true_hessian)):
        values = backpack_quantity(network, loss, data, extension)
        found = torch.cat([value.flatten() for value in values.values()])
        assert relative(found, truth(network, loss, data).diagonal()) <= 1e-12


def test_a_twin_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TWINS, Fork, lambda fork, part: part("conv"))
    with pytest.raises(InputError, match="twin of this Sequential gives other outputs; check the rows of TWINS"):
        backpack_quantity(forked(), nn.CrossEntropyLoss(), batch(nn.CrossEntropyLoss(), 2), extensions.BatchGrad())


def test_resnet_blocks_in_float32() -> None:
    """The same quantity in single precision, to its rounding."""
    network = nn.Sequential(
        resnet.BasicBlock(2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, CLASSES)
    ).eval()
    images, labels = batch(nn.CrossEntropyLoss(), 2)
    single = backpack_quantity(network, nn.CrossEntropyLoss(), (images.float(), labels), extensions.DiagGGNExact())
    double = backpack_quantity(network.double(), nn.CrossEntropyLoss(), (images, labels), extensions.DiagGGNExact())
    for name, value in single.items():
        assert relative(value.double(), double[name]) <= 1e-4
