"""Sums of a step and averages over steps: counts, bias correction, rows of wide inputs, squared gradients, state."""

import pytest
import torch
from layer_truth import positions_last, weighted
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.kfac.distributed import Processes
from secondorder.kfac.layers import find_layers
from secondorder.kfac.statistics import LayerStatistics

MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "sequences": (lambda: nn.Linear(4, 3, bias=False), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 2, groups=2), (2, 4, 4)),
    "more outputs than positions": (lambda: nn.Conv2d(2, 24, 2, 2, groups=2), (2, 4, 4)),
    "padded": (lambda: nn.Conv2d(2, 12, 3, 3, (1, 0), 2, bias=False, padding_mode="circular"), (2, 6, 6)),
}


def statistics_of(module: nn.Module, sharing: str = "expand", wide: int = 4096) -> LayerStatistics:
    return LayerStatistics(find_layers(module.double(), "kfac", sharing, wide)[0][0])


def batch(module: nn.Module, shape: tuple[int, ...], N: int = 5, V: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, *shape).double()
    return x, torch.randn(V, *module(x).shape).double()


def add(statistics: LayerStatistics, x: Tensor, g: Tensor) -> None:
    statistics.add_inputs([x])
    statistics.add_gradients([x], [g])


def test_bias_corrected_average() -> None:
    statistics, decay = statistics_of(nn.Linear(4, 3)), 0.9
    inputs, gradients = [], []
    for step in range(4):
        x, g = torch.randn(step + 1, 4).double(), torch.randn(1, step + 1, 3).double()
        add(statistics, x, g)
        statistics.commit(decay, 0.5)
        a = torch.cat([x, torch.ones(len(x), 1).double()], 1)
        inputs.append(a.mT @ a / len(a))
        gradients.append(0.5 * g[0].mT @ g[0])
        weights = torch.tensor([decay ** (step - i) for i in range(step + 1)], dtype=torch.float64)
        weights /= weights.sum()
        for found, news in ((statistics.A, inputs), (statistics.B, gradients)):
            truth = sum(w * new for w, new in zip(weights, news, strict=True))
            torch.testing.assert_close(found[0], truth, rtol=1e-13, atol=1e-14)  # type: ignore[index]
        assert statistics.samples == step + 1


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODULES)
def test_rows_are_a_root_of_the_factor(name: str, sharing: str) -> None:
    make, shape = MODULES[name]
    module = make().double()
    dense, wide = statistics_of(module, sharing), statistics_of(module, sharing, 1)
    wide.layer.__dict__["inputs"] = 1000  # as if there were far more inputs than rows
    for N in (2, 3):
        x, g = batch(module, shape, N)
        add(dense, x, g)
        add(wide, x, g)
    assert len(dense.staged_tensors()) == 3
    assert len(wide.staged_tensors()) == 2
    assert wide.staged_rows().shape[0] == dense.layer.groups
    dense.commit(0.5, 1.0)
    wide.commit(0.5, 1.0)
    assert dense.rows is None
    assert wide.A is None
    torch.testing.assert_close(wide.rows.mT @ wide.rows, dense.A, rtol=1e-13, atol=1e-14)  # type: ignore[union-attr]
    torch.testing.assert_close(wide.B, dense.B, rtol=1e-13, atol=1e-14)


def test_only_the_rows_of_the_last_step_are_kept() -> None:
    statistics = statistics_of(nn.Linear(30, 2, bias=False), wide=10)
    for _ in range(2):
        x = torch.randn(4, 30).double()
        add(statistics, x, torch.zeros(1, 4, 2).double())
        statistics.commit(0.9, 1.0)
    assert statistics.rows is not None
    torch.testing.assert_close(statistics.rows, x[None] / 2)


def exchange(processes: list[LayerStatistics]) -> None:
    """What several processes do between the passes and the commit."""
    tensors = [one.staged_tensors() for one in processes]
    assert len({len(own) for own in tensors}) == 1  # or they would wait for one another
    for own in zip(*tensors, strict=True):
        total = torch.stack(own).sum(0)
        for tensor in own:
            tensor.copy_(total)
    if not processes[0].dense:
        rows = torch.cat([one.staged_rows() for one in processes], 1)
        for one in processes:
            one.replace_staged_rows(rows)
    assert len({one.dense for one in processes}) == 1


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (14, 2), (5, 0, 9), (15, 0), (4, 3), (7, 0)])
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_wide_factor_is_dense_from_as_many_rows_of_all_processes_as_inputs(
    sizes: tuple[int, ...], forwards: int
) -> None:
    make = lambda: statistics_of(nn.Linear(12, 2, bias=False), wide=10)  # noqa: E731
    processes, truth = [make() for _ in sizes], statistics_of(nn.Linear(12, 2, bias=False))
    for _ in range(2):
        x = torch.randn(sum(sizes), 12).double()
        g = torch.zeros(1, sum(sizes), 2).double()
        add(truth, x, g)
        truth.commit(0.0, 1.0)
        for one, part in zip(processes, x.split(list(sizes)), strict=True):
            for piece in part.chunk(forwards):
                if len(piece):
                    add(one, piece, g[:, : len(piece)])
            held = [*one._staged_rows, *([one._staged["A"]] if "A" in one._staged else [])]
            assert sum(tensor.numel() for tensor in held) <= 12 * 12  # never more than A
        exchange(processes)
        for one in processes:
            one.commit(0.0, 1.0)
            dense = sum(sizes) >= 12
            assert (one.dense, one.rows is None, one.A is None) == (dense, dense, not dense)
            A = one.rows.mT @ one.rows if one.rows is not None else one.A
            torch.testing.assert_close(A, truth.A, rtol=1e-13, atol=1e-14)
            assert one.samples == sum(sizes)


@pytest.mark.parametrize("counts", [(3, 3), (2, 5), (4, 0), (0, 0)])
def test_rows_of_processes_with_unequal_batches(counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = (torch.randn(2, count, 3).double() for count in counts)

    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        """One message of each process, all of one shape."""
        parts[0].copy_(own)
        if own.ndim == 1:
            parts[1].fill_(counts[1])
        else:
            assert own.shape[1] == max(counts)
            parts[1].zero_()[:, : counts[1]] = other

    monkeypatch.setattr(Processes, "world", 2)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    assert torch.equal(Processes(True).gathered(mine), torch.cat([mine, other], 1))


def test_a_step_without_any_use_changes_nothing() -> None:
    for wide in (10, 100):
        statistics = statistics_of(nn.Linear(12, 2, bias=False), wide=wide)
        x, g = torch.randn(4, 12).double(), torch.randn(1, 4, 2).double()
        add(statistics, x, g)
        statistics.commit(0.9, 1.0)
        before = statistics.state_dict()
        exchange([statistics, statistics_of(nn.Linear(12, 2, bias=False), wide=wide)])
        statistics.commit(0.9, 1.0)
        after = statistics.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)


@pytest.mark.parametrize("unit_vectors", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_squared_gradients_of_samples(name: str, unit_vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors of the outputs that are the unit vectors, of a diagonal B, are `[G, O]`."""
    make, shape = MODULES[name]
    module = make().double()
    statistics = statistics_of(module)
    G, D, outputs = statistics.layer.groups, statistics.layer.inputs, statistics.layer.outputs
    Q_A = torch.linalg.qr(torch.randn(G, D, D).double()).Q
    Q_B = torch.linalg.qr(torch.randn(G, outputs, outputs).double()).Q
    if unit_vectors:
        Q_B = torch.eye(outputs).double().expand(G, outputs, outputs)
    (x, g), (y, h) = batch(module, shape), batch(module, shape)

    def rows(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.stack([positions_last(module, gradient) for gradient in g]).unflatten(-1, (G, -1))
        return weighted(module, x, statistics.layer.bias is not None), s

    (a, s), (b, t) = rows(x, g), rows(y, h)
    a, s = torch.cat([a, b], 1), torch.cat([s, t], 2)  # two uses in one forward
    own = torch.einsum("ntgd,vntgo->vngod", a, s)
    truth = torch.einsum("goi,vngod,gdj->vngij", Q_B, own, Q_A).square().sum((0, 1))
    for most in (2**26, 1):
        monkeypatch.setattr("secondorder.curvature.kronecker.squares.CACHED_BYTES", most)
        monkeypatch.setattr("secondorder.curvature.kronecker.squares.CHUNK_BYTES", most)
        statistics.bases = (Q_A, Q_B.diagonal(dim1=1, dim2=2) if unit_vectors else Q_B)
        statistics.add_inputs([x, y])
        statistics.add_gradients([x, y], [g, h])
        assert len(statistics.staged_tensors()) == 4
        statistics.commit(0.9, 0.25)
        torch.testing.assert_close(statistics.squares, 0.25 * truth, rtol=1e-12, atol=1e-12)


def test_staged_tensors_add_over_processes() -> None:
    module = nn.Conv2d(2, 4, 2).double()
    whole, here, there, idle = (statistics_of(module) for _ in range(4))
    x, g = batch(module, (2, 4, 4))
    add(whole, x, g)
    add(here, x[:2], g[:, :2])
    add(there, x[2:], g[:, 2:])
    tensors = [s.staged_tensors() for s in (here, there, idle)]  # one process without any use
    for mine, *others in zip(*tensors, strict=True):
        mine.add_(others[0]).add_(others[1])
    assert here.staged_samples == 5.0
    here.commit(0.9, 0.2)
    whole.commit(0.9, 0.2)
    torch.testing.assert_close(here.A, whole.A)
    torch.testing.assert_close(here.B, whole.B)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["inputs", "gradients", "rows"])
def test_not_finite(where: str, bad: float) -> None:
    statistics = statistics_of(nn.Linear(9, 3), wide=5 if where == "rows" else 100)
    assert bool(statistics.is_finite())
    x, g = torch.randn(4, 9).double(), torch.randn(1, 4, 3).double()
    add(statistics, x, g)
    assert bool(statistics.is_finite())
    (g if where == "gradients" else x).view(-1)[5] = bad
    add(statistics, x, g)
    assert not bool(statistics.is_finite())
    statistics.discard()
    assert not statistics.used
    statistics.commit(0.9, 1.0)
    assert statistics.A is None
    assert statistics.B is None
    assert statistics.rows is None


@pytest.mark.parametrize("wide", [5, 100])
def test_state(wide: int, tmp_path: object) -> None:
    module = nn.Linear(9, 3)
    one, other = statistics_of(module, wide=wide), statistics_of(module, wide=wide)
    x, g = torch.randn(4, 9).double(), torch.randn(1, 4, 3).double()
    add(one, x, g)
    one.commit(0.9, 1.0)
    torch.save(one.state_dict(), f"{tmp_path}/state")
    other.load_state_dict(torch.load(f"{tmp_path}/state", weights_only=True))
    for _ in range(2):
        for name in ("A", "B", "rows"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
        assert one.nbytes == other.nbytes > 0
        for statistics in (one, other):
            add(statistics, 2 * x, 3 * g)
            statistics.commit(0.9, 1.0)
    state = one.state_dict()
    with pytest.raises(InputError, match=r"statistics\..*\.(A|rows) has shape \[1, .*, 10\], not \[1, .*, 8\]"):
        statistics_of(nn.Linear(7, 3), wide=wide).load_state_dict(state)
    with pytest.raises(InputError, match=r"B has shape \[1, 3, 3\], not \[1, 2, 2\]"):
        statistics_of(nn.Linear(9, 2), wide=wide).load_state_dict(state)
