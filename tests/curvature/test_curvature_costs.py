"""Estimates of costs: FLOPs are those that PyTorch counts in the computation itself, memory is near what its allocator counts."""

import re
from copy import deepcopy
from typing import Any

import pytest
import torch
from small_networks import batch, chain
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from secondorder.curvature import curvature_blocks, curvature_costs, spectral_summary
from secondorder.curvature.costs.lanczos import lanczos_counts
from secondorder.curvature.costs.meter import Meter
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.lanczos import SEARCH
from secondorder.errors import InputError
from secondorder.networks import network
from studies.timing import peak_bytes

CE = nn.CrossEntropyLoss()
CPU = torch.device("cpu")


def perceptron(width: int = 20) -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, width), nn.Tanh(), nn.Linear(width, 5))


def encoder() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(32, 5))


def vectors(n: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 30), torch.randint(5, (n,))


CASES: dict[str, tuple[Any, Any, str]] = {
    "perceptron": (perceptron, vectors, "2.weight"),
    "convolutions": (lambda: chain("gap"), lambda: batch(CE, 4), "2.weight"),
    "covariance": (lambda: chain("gcp", num_iter=3), lambda: batch(CE, 4), "2.weight"),
    "attention": (
        encoder,
        lambda: (torch.randn(4, 4, 8), torch.randint(5, (4,))),
        "0.layers.0.self_attn.in_proj_weight",
    ),
}


def counted(action: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def test_products_by_hand() -> None:
    """Outputs F, tangents 2 F more in forward mode, and backwards 2 F but for the images' gradient."""
    N, F, first = 7, 2 * 7 * (30 * 20 + 20 * 5), 2 * 7 * 30 * 20
    costs = curvature_costs(perceptron(), CE, vectors(N), "ggn", flops_per_second=1e6)
    assert costs.whole.product.flops == 5 * F - first
    assert costs.whole.product.seconds == (5 * F - first) / 1e6
    assert (costs.samples, costs.chunk, costs.whole.size) == (7, 7, 30 * 20 + 20 + 20 * 5 + 5)
    assert costs.whole.matrix_bytes == 4 * costs.whole.size**2
    # in parts, outputs are evaluated once more for the graph of each
    assert curvature_costs(perceptron(), CE, vectors(8), "ggn", chunk=2).whole.product.flops == 8 / 7 * (6 * F - first)


@pytest.mark.parametrize(
    ("case", "quantity", "chunk"),
    [
        *(("perceptron", "ggn", 2), ("perceptron", "hessian", 2), ("perceptron", "mc_fisher", 2)),
        *(("covariance", "ggn", None), ("covariance", "hessian", None), ("attention", "ggn", 2)),
    ],
)
def test_products_take_the_flops_that_are_foretold(case: str, quantity: str, chunk: int | None) -> None:
    make, data, name = CASES[case]
    model, data = make(), data()
    every = [name for name, _ in model.named_parameters()]
    names = list(dict.fromkeys((every[0], name, every[-2])))  # the first: gradients of inputs, too
    blocks = curvature_blocks(model, CE, data, quantity, names, chunk=chunk)
    costs = curvature_costs(model, CE, data, quantity, names, chunk=chunk)
    assert list(costs) == list(blocks)
    for block, cost in ((blocks[name], costs[name]), (blocks.whole, costs.whole)):
        v = torch.randn(block.size, dtype=block.dtype)
        block @ v  # what is done once
        assert cost.product.flops == pytest.approx(
            counted(lambda block=block, v=v: block @ v), rel=0.02
        )  # PyTorch skips some zeros


def metered(action: Any) -> int:
    with Meter() as meter:
        action()
    return meter.flops


@pytest.mark.parametrize(
    ("case", "quantity"),
    [
        ("convolutions", "diagonal"),
        ("covariance", "kfac_expand"),
        ("perceptron", "kfac_reduce"),
        ("covariance", "ekfac"),
    ],
)
def test_blocks_take_the_flops_that_are_foretold(case: str, quantity: str) -> None:
    make, data, _ = CASES[case]
    model, data = make(), data()
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    making = metered(lambda: curvature_blocks(model, CE, data, quantity, names))
    costs = curvature_costs(model, CE, data, quantity, names)
    assert costs.making.flops == pytest.approx(making, rel=0.3)  # other trials


def test_matrices_by_hand() -> None:
    """Of a last layer: rows are outer products, of which the matrix is N R; R for each sample, whatever the number of parts."""
    N, R, P = 8, 5, 100
    for chunk, outputs in ((None, 0), (2, 2 * N * (30 * 20 + P))):
        cost = curvature_costs(perceptron(), CE, vectors(N), "ggn", ["2.weight"], chunk=chunk)["2.weight"]
        assert cost.method == "exact"
        assert cost.dense.flops == 2 * N * R * P**2 + outputs
        assert cost.summary.flops == pytest.approx(2 * (N * R) ** 2 * P + 4 / 3 * (N * R) ** 3 + outputs)
        assert cost.summary_most == cost.summary
    hessian = curvature_costs(perceptron(), CE, vectors(N), "hessian", ["2.weight"])["2.weight"]
    assert hessian.dense.flops == P * hessian.product.flops


@pytest.mark.parametrize("case", ["covariance", "attention"])
def test_matrices_take_the_flops_that_are_foretold(case: str) -> None:
    """Also where rows are pulled back sample by sample."""
    make, data, name = CASES[case]
    model, data = make(), data()
    block = curvature_blocks(model, CE, data, "ggn", [name])[name]
    block.dense()  # what is tried once
    cost = curvature_costs(model, CE, data, "ggn", [name])[name]
    assert cost.dense.flops == pytest.approx(metered(block.dense), rel=0.02)


def test_a_data_set_takes_what_its_batches_take() -> None:
    images, labels = vectors(20)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    costs = curvature_costs(perceptron(), CE, loader, "ggn")
    assert (costs.samples, costs.chunk) == (20, 8)
    block = curvature_blocks(perceptron(), CE, loader, "ggn").whole
    block @ torch.ones(block.size)
    assert costs.whole.product.flops == counted(lambda: block @ torch.ones(block.size))
    listed = curvature_costs(perceptron(), CE, [*loader], "ggn")
    assert listed.whole == costs.whole


def test_of_a_loader_one_batch_is_read() -> None:
    class Counting(Dataset[tuple[Tensor, int]]):
        read = 0

        def __len__(self) -> int:
            return 1_000_003

        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            self.read += 1
            return torch.zeros(30), 1

    data, model = Counting(), perceptron()
    state = torch.get_rng_state()
    costs = curvature_costs(model, CE, DataLoader(data, batch_size=64), "kfac_expand")
    assert data.read == 64
    assert (costs.samples, costs.chunk) == (1_000_003, 64)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("backbone", "head", "quantity", "chunk"),
    [
        ("digits_net", "gap", "ggn", 4),
        ("cifar_resnet8", "gcp", "ggn", None),
        ("digits_net", "gap", "hessian", None),
        ("digits_net", "gap", "ekfac", None),
    ],
)
def test_memory_is_near_what_the_allocator_counts(backbone: str, head: str, quantity: str, chunk: int | None) -> None:
    model = network(backbone, head, num_classes=10, **({"num_iter": 2} if head == "gcp" else {})).eval()
    data = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    name = next(n for n, p in model.features.named_parameters(prefix="features") if p.ndim == 4)

    def compute() -> None:
        block = curvature_blocks(model, CE, data, quantity, [name], chunk=chunk)[name]
        block @ torch.ones(block.size)

    costs = curvature_costs(model, CE, data, quantity, [name], chunk=chunk)
    foretold = max(costs.making.nbytes, costs[name].product.nbytes)
    assert foretold == pytest.approx(peak_bytes(compute, CPU), rel=0.3)


def test_parameters_and_images_count_once() -> None:
    """Where they are most of it."""
    model = nn.Sequential(nn.Linear(2000, 500), nn.Tanh(), nn.Linear(500, 5))
    data = torch.randn(30, 2000), torch.randint(5, (30,))

    def compute() -> None:
        block = curvature_blocks(model, CE, data, "ggn", ["2.weight"])["2.weight"]
        block @ torch.ones(block.size)

    costs = curvature_costs(model, CE, data, "ggn", ["2.weight"])
    assert max(costs.making.nbytes, costs["2.weight"].product.nbytes) == pytest.approx(
        peak_bytes(compute, CPU), rel=0.15
    )


def test_images_that_act_on_one_another_take_a_pull_back_for_each_column_of_each() -> None:
    model, data = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 5)), vectors(8)
    for quantity, fisher in (("kfac_expand", "exact"), ("ekfac", "empirical")):
        options: dict[str, Any] = {"params": ["0.weight"], "fisher": fisher}
        making = metered(lambda: curvature_blocks(model, CE, data, quantity, **options))  # noqa: B023
        costs = curvature_costs(model, CE, data, quantity, **options)
        assert costs.making.flops == pytest.approx(making, rel=0.3)


def test_nothing_is_allocated_and_shapes_are_enough() -> None:
    with torch.device("meta"):
        model = network("resnet18", "gap", num_classes=1000).eval()
        data = torch.empty(64, 3, 224, 224), torch.empty(64, dtype=torch.long)
    name = next(n for n, p in model.named_parameters() if p.shape[0] == 256 and p.ndim == 4)
    found: list[Any] = []
    held = peak_bytes(
        lambda: found.append(curvature_costs(model, CE, data, "ggn", [name], chunk=32, memory=2**40)), CPU
    )
    assert held < 32 * 2**20
    assert found[0][name].product.nbytes > 2**28
    assert found[0][name].product.flops > 64 * 3 * 3.6e9  # an image takes 3.6 GFLOPs


def test_numbers_make_no_difference() -> None:
    model, data = chain("gcp").float(), batch(CE, 6)
    data = data[0].float(), data[1]
    with_numbers, without = (
        curvature_costs(deepcopy(model).to(device), CE, tuple(t.to(device) for t in data), "ggn", ["2.weight"])
        for device in ("cpu", "meta")
    )
    assert without.whole == with_numbers.whole


def test_each_gradient_of_a_grouped_convolution_takes_as_much_as_the_convolution() -> None:
    x, w = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    with Meter() as meter:
        y = nn.functional.conv2d(x, w, groups=8, padding=1)
        assert meter.flops == 2 * 2 * 8 * 9 * 25
        y.sum().backward()
    assert meter.flops == 3 * 2 * 2 * 8 * 9 * 25


def test_vectors_and_steps_of_lanczos_by_hand() -> None:
    with Meter() as meter:
        torch.randn(3, 4) @ torch.randn(4)
    assert meter.flops == 2 * 3 * 4
    least = lanczos_counts(400, 10**6)[0]
    assert least.single == sum(k + 1 + SEARCH + k for k in (10, 1, 1))  # with k residuals


def test_columns_of_a_part_share_its_graph() -> None:
    model, data = perceptron(), vectors(8)
    block = curvature_blocks(model, CE, data, "hessian", ["2.bias"], chunk=4)["2.bias"]
    block @ torch.ones(5)
    cost = curvature_costs(model, CE, data, "hessian", ["2.bias"], chunk=4)["2.bias"]
    assert cost.dense.flops == pytest.approx(counted(block.dense), rel=0.02)
    assert cost.dense.flops < 5 * cost.product.flops


class Counting(SymmetricOperator):
    """A diagonal that counts the vectors it multiplies."""

    def __init__(self, entries: Tensor) -> None:
        super().__init__(len(entries), entries.dtype, entries.device)
        self.entries, self.vectors = entries, 0

    def _matmat(self, V: Tensor) -> Tensor:
        self.vectors += V.shape[1]
        return self.entries[:, None] * V


@pytest.mark.parametrize("spectrum", ["gaps", "flat", "decay"])
def test_a_summary_takes_no_fewer_products_than_the_least_and_no_more_than_the_most(spectrum: str) -> None:
    P = 400
    entries = {
        "gaps": torch.cat([torch.arange(10, 32), torch.linspace(0, 0.1, P - 22)]),
        "flat": torch.linspace(0.99, 1, P),
        "decay": torch.logspace(0, -12, P),
    }[spectrum]
    operator = Counting(entries.double())
    spectral_summary(operator, "lanczos")
    least, most = lanczos_counts(P, 10**6)
    assert least.products <= operator.vectors <= most.products
    assert lanczos_counts(P, 84)[0].nbytes < least.nbytes / 8  # one probe at a time
    assert lanczos_counts(P, 84)[0].products == least.products


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Branching(), {}, r"^network or loss depend on numbers.*DataDependentOutput.*time products with few samples"),
        (perceptron(), {"flops_per_second": 0}, r"flops_per_second must be a finite number above 0, got 0; or None"),
        (perceptron(), {"flops_per_second": "fast"}, r"flops_per_second must be a finite number above 0, got 'fast'"),
        (perceptron(), {"quantity": "gnn"}, r"unknown quantity 'gnn'; choose one of: ggn"),
        (perceptron(), {"params": ["3.weight"]}, r"unknown parameter '3.weight'; choose one of: 0.weight"),
        (perceptron(), {"chunk": 0}, r"chunk must be a whole number"),
        (perceptron(), {"memory": 1000}, r"needs about .* GiB, 9.31e-07 GiB are available"),
        (perceptron(), {"batch": (torch.randn(7, 31), torch.zeros(7).long())}, r"the network fails for images \[7, 31\]"),
        (perceptron(), {"batch": (torch.randn(7, 30), torch.zeros(6).long())}, r"needs one label for each image"),
        (perceptron(), {"batch": []}, r"the data set has no batches"),
        (nn.Sequential(nn.BatchNorm1d(30), nn.Linear(30, 5)), {"chunk": 2}, r"chunk=2 would change the result: 0 "),
        (nn.Sequential(nn.Dropout(), nn.Linear(30, 5)), {"chunk": 2}, r"chunk=2 would change the result: the network draws"),
        (perceptron(), {"loss": nn.L1Loss(), "quantity": "diagonal"}, r"quantity 'diagonal' needs cross-entropy.*not L1Loss"),
    ],
)  # fmt: skip
def test_what_has_no_estimate_is_refused_in_one_line(model: nn.Module, options: dict[str, Any], message: str) -> None:
    given = {"loss": CE, "batch": vectors(), "quantity": "ggn"} | options
    with pytest.raises(InputError) as caught:
        curvature_costs(model, given.pop("loss"), given.pop("batch"), given.pop("quantity"), **given)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_costs_in_words() -> None:
    costs = curvature_costs(perceptron(), CE, vectors(), "ggn", flops_per_second=1e9)
    assert re.fullmatch(r"\S+ FLOPs, \S+ GiB, \S+ s", str(costs.making))
    assert re.fullmatch(r"725 rows; a product .* s; dense .* s; summary \(exact\) .* s", str(costs.whole))
    assert "lanczos" in str(curvature_costs(perceptron(400), CE, vectors(700), "hessian").whole)
