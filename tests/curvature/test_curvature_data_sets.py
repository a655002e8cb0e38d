"""Curvature of data that are read batch by batch: that of one batch of all, for any loss; what cannot be right is refused."""

import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import CLASSES, By, batch, built, chain, flat_parameters, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from secondorder.curvature import (
    SumOverSamples,
    curvature_blocks,
    damped_inverse,
    fidelity,
    spectral_summary,
    summary_table,
    top_eigenvalues,
)
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.hessian import HessianOperator
from secondorder.errors import InputError

N, F64 = 5, torch.float64
WEIGHT = torch.tensor([1.0, 3.0, 0.2], dtype=F64)
Data = tuple[Tensor, Tensor]


class Tied(nn.Module):
    """One weight in a layer and, transposed, past it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.last = nn.Linear(72, 4), nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.encode(x.flatten(1)).tanh(), self.encode.weight.T))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 1), nn.Tanh(), nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, CLASSES)
    ).double(),
    "gap": lambda: chain("gap", nn.Tanh, channels=2),
    "covariance": lambda: chain("covariance", nn.Tanh, channels=2),
    "gcp": lambda: chain("gcp", nn.Tanh, channels=2),
    "gcp_exact": lambda: chain("gcp_exact", nn.Tanh, channels=2),
    "tied": lambda: Tied().double(),
    "batch norm in eval mode": lambda: (
        nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, CLASSES))
        .double()
        .eval()
    ),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "cross-entropy, sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "class weights": lambda: nn.CrossEntropyLoss(WEIGHT),
    "ignored": lambda: nn.CrossEntropyLoss(ignore_index=-100),
    "weights, ignored, smoothing": lambda: nn.CrossEntropyLoss(WEIGHT, ignore_index=-100, label_smoothing=0.1),
    "probabilities": lambda: nn.CrossEntropyLoss(WEIGHT),
    "squared error": nn.MSELoss,
    "squared error, sum": lambda: nn.MSELoss(reduction="sum"),
    "binary": lambda: nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
}
# losses divide by what all batches have in common, whatever the network: those of the table on the cheapest one
OF_LOSSES = [("perceptron", loss) for loss in LOSSES]
OF_NETWORKS = [(name, "class weights") for name in NETWORKS if name != "perceptron"]
CASES = OF_LOSSES + OF_NETWORKS
KRONECKER = ("kfac_expand", "kfac_reduce", "ekfac")


def data_of(loss: str) -> Data:
    """Images `[5, 2, 6, 6]` and labels; of those that are ignored the first batch has no other."""
    images = batch(nn.CrossEntropyLoss(), N)[0]
    if "squared" in loss:
        return images, torch.randn(N, CLASSES).double()
    if loss in ("binary", "probabilities"):
        return images, torch.rand(N, CLASSES).double().softmax(1)
    labels = torch.tensor([0, 2, 1, 1, 2])
    if "ignored" in loss:
        labels[:2], labels[3] = -100, -100
    return images, labels


def cut(data: Data, sizes: tuple[int, ...] = (2, 2, 1)) -> list[Data]:
    return list(zip(*(t.split(list(sizes)) for t in data), strict=True))


def made(case: tuple[str, str]) -> tuple[nn.Module, nn.Module, Data]:
    return NETWORKS[case[0]](), LOSSES[case[1]](), data_of(case[1])


@pytest.mark.parametrize(
    ("case", "chunk"),
    [*((case, None) for case in CASES), (("gap", "class weights"), 1), (("tied", "squared error"), 1)],
)
def test_matrices_are_those_of_torch_func_for_all_data(case: tuple[str, str], chunk: int | None) -> None:
    model, loss, data = made(case)
    truths = {"ggn": true_ggn(model, loss, data), "hessian": true_hessian(model, loss, data)}
    V = torch.randn(len(truths["ggn"]), 2).double()
    for quantity, truth in truths.items():
        blocks = curvature_blocks(model, loss, cut(data), quantity, chunk=chunk)
        assert relative(blocks.whole @ V, truth @ V) <= 1e-12
        assert relative(blocks.whole.dense(), truth) <= 1e-12
        start = 0
        for block in blocks.values() if case in OF_NETWORKS else ():
            place = slice(start, start := start + block.size)
            assert float((block.dense() - truth[place, place]).abs().max()) <= 1e-12 * truth.abs().max()
    ggn = curvature_blocks(model, loss, cut(data), "ggn", chunk=chunk).whole
    assert isinstance(ggn, GaussNewtonOperator)
    assert relative(ggn.diagonal(), truths["ggn"].diagonal()) <= 1e-12
    scale = truths["ggn"].abs().max()
    assert float((ggn.eigenvalues() - torch.linalg.eigvalsh(truths["ggn"])).abs().max()) <= 1e-12 * scale
    assert relative(ggn.factored().dense(), truths["ggn"]) <= 1e-12
    diagonal = curvature_blocks(model, loss, cut(data), "diagonal", chunk=chunk).whole
    assert relative(diagonal.diagonal(), truths["ggn"].diagonal()) <= 1e-12


FISHERS = {"kfac_expand": ("exact", "mc", "empirical"), "ekfac": ("exact", "empirical")}
"""Quantity -> kinds of columns, of each loss; a network without positions has the same factors by `kfac_reduce`."""


@pytest.mark.parametrize(
    ("case", "quantity"),
    [
        *((case, quantity) for case in CASES for quantity in ("empirical_fisher", "mc_fisher", *FISHERS)),
        *((case, "kfac_reduce") for case in OF_NETWORKS),
    ],
    ids=str,
)
def test_other_quantities_are_those_of_one_batch(case: tuple[str, str], quantity: str) -> None:
    model, loss, data = made(case)
    params = [name for name, _ in model.named_parameters()]
    if quantity in KRONECKER:
        params = [name for name in params if "2." not in name] if "norm" in case[0] else params
        params = ["last.weight", "last.bias"] if case[0] == "tied" else params
    for fisher in FISHERS.get(quantity, ("exact",)) if case in OF_LOSSES else ("exact",):
        options: dict[str, Any] = {"samples": 3, "seed": 5, "fisher": fisher}
        one, several = (
            curvature_blocks(model, loss, given, quantity, params, **options).whole.dense()
            for given in (data, cut(data))
        )
        assert relative(several, one) <= 1e-12


SHARES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda y: torch.full((N,), 1 / N, dtype=F64),
    "cross-entropy, sum": lambda y: torch.ones(N, dtype=F64),
    "class weights": lambda y: WEIGHT[y] / WEIGHT[y].sum(),
    "ignored": lambda y: (y >= 0) / (y >= 0).double().sum(),
}


@pytest.mark.parametrize("name", SHARES)
def test_empirical_fisher_is_a_sum_of_outer_products(name: str) -> None:
    """Sum_n s_n g_n g_n^T with the gradient g_n of a sample's own loss and its share s_n in the loss of all data."""
    model, loss, data = made(("gcp", name))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def own_losses(w: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (data[0],)), data[1], reduction="none")

    g = torch.cat([rows.flatten(1) for rows in jacrev(own_losses)(weights).values()], 1)
    truth = g.mT @ (SHARES[name](data[1])[:, None] * g)
    assert relative(curvature_blocks(model, loss, cut(data), "empirical_fisher").whole.dense(), truth) <= 1e-12


@pytest.mark.parametrize("quantity", KRONECKER)
@pytest.mark.parametrize("loss", ["squared error", "squared error, sum"])
def test_kronecker_factors_are_exact_where_they_are_for_one_batch(quantity: str, loss: str) -> None:
    """Of a linear network under squared error the blocks are B kron A."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4, bias=False), nn.Linear(4, CLASSES, bias=False)).double()
    data = data_of(loss)
    G = true_ggn(model, LOSSES[loss](), data)
    blocks = curvature_blocks(model, LOSSES[loss](), cut(data), quantity)
    first, last = (block.dense() for block in blocks.values())
    assert relative(first, G[:288, :288]) <= 1e-12
    assert relative(last, G[288:, 288:]) <= 1e-12


def test_factors_are_averages_over_the_data_set() -> None:
    """Of the last layer: A = mean of a a^T, B = sum of the samples' M with weights w_n / sum w."""
    model, loss, (x, y) = made(("tied", "class weights"))
    with torch.no_grad():
        a, p = F.linear(model.encode(x.flatten(1)).tanh(), model.encode.weight.T), model(x).softmax(1)  # type: ignore[operator, union-attr, arg-type]
    c = WEIGHT[y] / WEIGHT[y].sum()
    B = torch.einsum("n,nij->ij", c, torch.diag_embed(p) - p[:, :, None] * p[:, None])
    block = curvature_blocks(model, loss, cut((x, y)), "kfac_expand", ["last.weight"])["last.weight"]
    assert relative(block.dense(), torch.kron(B, a.mT @ a / N)) <= 1e-12


def test_networks_of_the_table() -> None:
    model, loss = built("digits_tiny"), nn.CrossEntropyLoss()
    data = torch.randn(5, 3, 8, 8).double(), torch.randint(CLASSES, (5,))
    for quantity in ("ggn", "hessian"):
        one, several = (curvature_blocks(model, loss, given, quantity).whole for given in (data, cut(data)))
        V = torch.randn(one.size, 2).double()
        assert relative(several @ V, one @ V) <= 1e-12


def test_a_sum_over_samples_of_ones_own() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 1), nn.Tanh(), nn.Linear(1, CLASSES)).double()
    data = data_of("squared error")
    loss = SumOverSamples(lambda z, y: F.huber_loss(z, y, reduction="sum") / N)
    for quantity, truth in (("ggn", true_ggn), ("hessian", true_hessian)):
        expected = truth(model, loss, data)  # type: ignore[arg-type]
        for sizes in ((2, 2, 1), (1,) * N):
            whole = curvature_blocks(model, loss, cut(data, sizes), quantity).whole
            V = torch.randn(whole.size, 3).double()  # a product for each column
            assert relative(whole @ V, expected @ V) <= 1e-12


def test_segmentation_is_divided_by_the_labels_that_count() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1)).double()
    x, y = batch(nn.CrossEntropyLoss(), N)[0], torch.randint(CLASSES, (N, 6, 6))
    y[:2, :5], y[3] = -100, -100
    loss = nn.CrossEntropyLoss(WEIGHT)
    assert (
        relative(curvature_blocks(model, loss, cut((x, y)), "ggn").whole.dense(), true_ggn(model, loss, (x, y)))
        <= 1e-12
    )
    for quantity in ("mc_fisher", "kfac_expand", "empirical_fisher"):
        one, several = (curvature_blocks(model, loss, d, quantity).whole.dense() for d in ((x, y), cut((x, y))))
        assert relative(several, one) <= 1e-12


@pytest.mark.parametrize(
    "kind", ["loader", "workers", "lists", "two batches", "own class", "iterable data set", "sampler"]
)
def test_anything_that_gives_the_same_batches_again(kind: str) -> None:
    model, loss, data = made(("gcp", "class weights"))
    kept = TensorDataset(*data)

    class Own:
        def __iter__(self) -> Iterator[Data]:
            return iter(cut(data))

    class Streamed(IterableDataset):
        def __iter__(self) -> Iterator[Data]:
            return iter(kept[n] for n in range(N))

    given: dict[str, Callable[[], Any]] = {
        "loader": lambda: DataLoader(kept, 2),
        "workers": lambda: DataLoader(kept, 2, num_workers=1),
        "lists": lambda: [list(pair) for pair in cut(data)],
        "two batches": lambda: cut(data, (3, 2)),
        "own class": Own,
        "iterable data set": lambda: DataLoader(Streamed(), 2),
        "sampler": lambda: DataLoader(kept, 2, sampler=list(reversed(range(N)))),
    }
    whole = curvature_blocks(model, loss, given[kind](), "ggn").whole
    v = torch.randn(whole.size).double()
    assert relative(whole @ v, true_ggn(model, loss, data) @ v) <= 1e-12


def test_a_data_set_of_one_batch_is_that_batch() -> None:
    """Also what depends on how data are cut: batch norm in training mode, a loss that is no sum."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.BatchNorm1d(3)).double()
    x, y = data_of("cross-entropy")
    loss = lambda z, y: F.cross_entropy(z, y).square()  # noqa: E731
    w, unflatten = flat_parameters(model)
    # by reverse mode twice: torch.func's forward mode over it gives batch norm a Hessian that is not symmetric
    truth = torch.autograd.functional.hessian(lambda w: loss(functional_call(model, unflatten(w), (x,)), y), w)
    assert relative(curvature_blocks(model, loss, [(x, y)], "hessian").whole.dense(), truth) <= 1e-12


def test_spectra_inverses_and_fidelity_are_those_of_one_batch() -> None:
    model, loss, data = made(("gcp", "class weights"))
    name = "0.weight"
    of = {
        key: [curvature_blocks(model, loss, given, key, [name]) for given in (data, cut(data))]
        for key in ("ggn", "hessian", "kfac_expand")
    }
    one, several = (blocks[name] for blocks in of["ggn"])
    v = torch.randn(one.size).double()
    assert relative(damped_inverse(several, 0.1) @ v, damped_inverse(one, 0.1) @ v) <= 1e-6
    assert relative(top_eigenvalues(several, 3).values, top_eigenvalues(one, 3).values) <= 1e-10
    for key in ("ggn", "hessian"):
        a, b = (spectral_summary(blocks[name]) for blocks in of[key])
        assert b.trace.value == pytest.approx(a.trace.value, rel=1e-10)
        assert b.condition.value == pytest.approx(a.condition.value, rel=1e-8)
    a, b = (fidelity(k[name], g[name]).cosine for k, g in zip(of["kfac_expand"], of["ggn"], strict=True))
    assert b.value == pytest.approx(a.value, rel=1e-10)
    tables = [summary_table(blocks) for blocks in of["ggn"]]
    assert tables[1]["trace"].iloc[0] == pytest.approx(tables[0]["trace"].iloc[0], rel=1e-10)


@pytest.mark.parametrize(
    ("quantity", "memory"), [("ggn", 40_000), ("hessian", 60_000), ("mc_fisher", 60_000), ("kfac_expand", 80_000)]
)
def test_little_memory_divides_the_batches(quantity: str, memory: int) -> None:
    model, loss, data = made(("gcp", "squared error"))
    whole, divided = (
        curvature_blocks(model, loss, cut(data, (4, 1)), quantity, memory=bytes_).whole for bytes_ in (None, memory)
    )
    if isinstance(divided, GaussNewtonOperator | HessianOperator):
        assert divided.jacobian.chunk == 2
    assert relative(divided.dense(), whole.dense()) <= 1e-12
    with pytest.raises(InputError, match="with 1 of 4 samples at a time needs about"):
        curvature_blocks(model, loss, cut(data, (4, 1)), quantity, memory=20_000)


def test_few_batches_are_held_at_a_time() -> None:
    alive: set[int] = set()
    most = 0

    class Counted:
        def __iter__(self) -> Iterator[Data]:
            nonlocal most
            for number in range(9):
                source = torch.Generator().manual_seed(number)
                x, y = (
                    torch.randn(4, 2, 6, 6, generator=source).double(),
                    torch.randint(CLASSES, (4,), generator=source),
                )
                alive.add(id(x))
                weakref.finalize(x, alive.discard, id(x))
                most = max(most, len(alive))
                yield x, y

    whole = curvature_blocks(chain("gcp"), nn.CrossEntropyLoss(), Counted(), "mc_fisher").whole
    whole.dense()
    whole @ torch.randn(whole.size).double()
    assert most <= 2  # the present batch, and the next while it is made


def test_nothing_of_the_user_changes() -> None:
    model, loss, data = made(("gcp", "class weights"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]  # noqa: NPY002
    whole = curvature_blocks(model, loss, DataLoader(TensorDataset(*data), 2), "hessian").whole
    product = whole @ torch.ones(whole.size).double()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[arg-type]  # noqa: NPY002
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.rand(3)
    assert torch.equal(whole @ torch.ones(whole.size).double(), product)


def test_changes_after_the_construction() -> None:
    """The loss's weights have no part in it; data and parameters are refused."""
    model, loss, data = made(("gcp", "class weights"))
    batches = cut(data)
    whole = curvature_blocks(model, loss, batches, "ggn").whole
    v = torch.randn(whole.size).double()
    before = whole @ v
    loss.weight.mul_(torch.tensor([1.0, 2.0, 3.0]).double())  # type: ignore[operator, union-attr]
    loss.label_smoothing = 0.5  # type: ignore[assignment]
    assert torch.equal(whole @ v, before)
    batches[1][0][0, 0, 0, 0] += 1e-9
    with pytest.raises(InputError, match="batch 1 differs from one pass over the data to the next"):
        whole @ v
    batches[1][0].copy_(data[0][2:4])
    model, loss, data = made(("gcp", "cross-entropy"))
    whole = curvature_blocks(model, loss, cut(data), "ggn").whole
    with torch.no_grad():
        model[0].weight.mul_(2)  # type: ignore[index, union-attr, operator]
    with pytest.raises(InputError, match=r"parameter 0\.weight has changed since"):
        whole @ v


def test_the_weights_of_binary_labels_by_sample_are_refused() -> None:
    model, _, (x, _) = made(("gcp", "binary"))
    loss = nn.BCEWithLogitsLoss(weight=torch.rand(2, 1).double())
    with pytest.raises(InputError, match=r"weight of shape \[2, 1\] is that of single samples"):
        curvature_blocks(model, loss, cut((x[:4], torch.rand(4, CLASSES).double()), (2, 2)), "ggn")


class Noisy(Dataset):
    """Images that are drawn anew each time."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return N

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        return torch.full((2, 6, 6), n + self.draw(), dtype=F64), n % CLASSES


class Passes:
    """Batches that depend on the number of the pass."""

    def __init__(self, batches: Callable[[int], list[Data]]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Data]:
        self.passes += 1
        return iter(self.batches(self.passes))


DATA = data_of("cross-entropy")
STORED = TensorDataset(*DATA)
ONCE = iter(cut(DATA))
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "shuffled": (lambda: DataLoader(STORED, 2, shuffle=True), r"at random \(RandomSampler\); use shuffle=False"),
    "drawn": (
        lambda: DataLoader(STORED, 2, sampler=torch.utils.data.WeightedRandomSampler([1.0] * N, N)),
        r"at random \(WeightedRandomSampler\)",
    ),
    "distributed": (
        lambda: DataLoader(STORED, 2, sampler=DistributedSampler(STORED, 2, 0, shuffle=False)),
        "DistributedSampler: a part of the data",
    ),
    "torch noise": (lambda: DataLoader(Noisy(lambda: float(torch.rand(()))), 2), "batch 0 differs from one pass"),
    "numpy noise": (lambda: DataLoader(Noisy(np.random.rand), 2), "batch 0 differs from one pass"),
    "python noise": (lambda: DataLoader(Noisy(random.random), 2), "batch 0 differs from one pass"),
    "noise of workers": (
        lambda: DataLoader(Noisy(lambda: float(torch.rand(()))), 2, num_workers=1),
        "batch 0 differs .*; use shuffle=False and no random transforms, or list",
    ),
    "shuffles itself": (lambda: Passes(lambda p: cut(DATA)[:: (-1) ** p]), "batch 0 differs"),
    "other order within": (
        lambda: Passes(lambda p: [*cut(DATA)[:2], tuple(t[-1:] * p for t in DATA)]),
        "batch 2 differs",
    ),
    "other labels": (
        lambda: Passes(lambda p: [*cut(DATA)[:2], (DATA[0][4:], (DATA[1][4:] + p) % 3)]),
        "batch 2 differs",
    ),
    "more": (lambda: Passes(lambda p: cut(DATA) + cut(DATA)[: p - 1]), "had 3 batches at first, and has more now"),
    "fewer": (lambda: Passes(lambda p: cut(DATA)[: 4 - p]), "had 3 batches at first, and 2 in a later pass"),
    "one iterator": (
        lambda: type("One", (), {"__iter__": lambda self: ONCE})(),
        "3 batches at first, and 0 in a later",
    ),
    "generator": (lambda: (pair for pair in cut(DATA)), r"a generator can be read once, .*; use list\(batches\)"),
    "zip": (lambda: zip(*(t.split(2) for t in DATA), strict=True), "a zip can be read once"),
    "empty": (list, "the data set has no batches"),
    "empty loader": (lambda: DataLoader(TensorDataset(DATA[0][:0], DATA[1][:0])), "the data set has no batches"),
    "empty batch": (
        lambda: [*cut(DATA), (DATA[0][:0], DATA[1][:0])],
        r"images \[0, 2, 6, 6\] and labels \[0\]; a batch",
    ),
    "data set": (lambda: STORED, r"TensorDataset gives samples, no batches; use DataLoader\(dataset, batch_size"),
    "samples": (lambda: DataLoader(STORED, batch_size=None), r"images \[2, 6, 6\] and labels \[\]; a batch needs"),
    "number": (lambda: 3, "data are an iterable of such batches; got int"),
    "text": (lambda: "batches", "data are an iterable of such batches; got str"),
    "texts": (lambda: ["one", "two"], r"a batch is a pair \(inputs, labels\).*not str"),
    "triples": (
        lambda: [(*pair, pair[1]) for pair in cut(DATA)],
        r"a batch is a pair \(inputs, labels\).*not tuple of 3",
    ),
    "mappings": (lambda: [{"x": x, "y": y} for x, y in cut(DATA)], "a batch is a pair .*not dict"),
    "two mappings": (
        lambda: [{"x": x, "y": y} for x, y in cut(DATA)[:2]],
        "two mappings with the same names: take the labels out of each batch",
    ),
    "tuple of two": (lambda: tuple(cut(DATA)[:2]), r"the labels are tuple \(several batches go in a list\)"),
    "sparse": (lambda: [(x.to_sparse(), y) for x, y in cut(DATA)], "sparse or nested tensors; use .to_dense"),
    "other shape": (lambda: [cut(DATA)[0], (DATA[0][2:, :, :5], DATA[1][2:])], "batch 1 has samples of another shape"),
    "other format": (
        lambda: [cut(DATA)[0], (DATA[0][2:].float(), DATA[1][2:])],
        "the images are torch.float32, the network",
    ),
    "not finite": (lambda: [cut(DATA)[0], (DATA[0][2:] / 0, DATA[1][2:])], "the images contain NaN or infinity"),
    "gradients": (
        lambda: [cut(DATA)[0], (DATA[0][2:].clone().requires_grad_(), DATA[1][2:])],
        "the images of batch 1 require gradients",
    ),
    "wrong label": (lambda: [cut(DATA)[0], (DATA[0][2:], DATA[1][2:] + CLASSES)], "label .* is out of range"),
    "all ignored": (lambda: [(x, y * 0 - 100) for x, y in cut(DATA)], "no label counts: all are ignored"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("quantity", ["hessian", "kfac_expand"])
def test_what_cannot_be_right_is_refused(kind: str, quantity: str) -> None:
    global ONCE
    ONCE = iter(cut(DATA))
    given, message = WRONG[kind]
    with pytest.raises(InputError, match=message) as refused:
        curvature_blocks(chain("gap"), nn.CrossEntropyLoss(), given(), quantity)
    assert "\n" not in str(refused.value)


def test_a_data_set_that_shuffles_later_is_refused_then() -> None:
    data = Passes(lambda p: cut(DATA)[:: -1 if p == 4 else 1])
    whole = curvature_blocks(chain("gap"), nn.CrossEntropyLoss(), data, "hessian").whole
    v = torch.ones(whole.size).double()
    before = whole @ v
    with pytest.raises(InputError, match="batch 0 differs from one pass"):
        whole @ v
    assert torch.equal(whole @ v, before)


DEPENDENT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.BatchNorm1d(3)),
        nn.CrossEntropyLoss(),
        r"2 \(BatchNorm1d\) uses the statistics .*how the data are cut; use eval\(\), or give one batch of all data",
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(72, 3)),
        nn.CrossEntropyLoss(),
        "the network draws random numbers .*how the data are cut",
    ),
    "sums over samples": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3), By(lambda x: x.cumsum(0))),
        nn.CrossEntropyLoss(),
        "images act on one another's outputs; over several batches",
    ),
    "dropout of some": (
        lambda: nn.Sequential(
            nn.Flatten(), By(lambda x: F.dropout(x) if float(x.detach().abs().max()) < 1e-3 else x), nn.Linear(72, 3)
        ),
        nn.CrossEntropyLoss(),
        "the network draws random numbers for some of the data",
    ),
    "a mean of ones own": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)),
        lambda z, y: F.cross_entropy(z, y),
        "is not known to be a sum over the samples, .*several batches; use SumOverSamples",
    ),
    "a mean declared a sum": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3)),
        SumOverSamples(lambda z, y: F.cross_entropy(z, y)),
        "no sum over samples; divide a sum by a number of your own",
    ),
}


@pytest.mark.parametrize("kind", DEPENDENT)
@pytest.mark.parametrize("sizes", [(2, 2, 1), (1,) * N])
def test_what_depends_on_how_data_are_cut_is_refused(kind: str, sizes: tuple[int, ...]) -> None:
    network, loss, message = DEPENDENT[kind]
    images = torch.cat([DATA[0], torch.full((9, 2, 6, 6), 1e-4).double()])
    data = images, torch.cat([DATA[1], DATA[1][:1].expand(9)])
    with pytest.raises(InputError, match=message):
        curvature_blocks(network().double(), loss, cut(data, (*sizes, 9)), "hessian").whole.dense()
