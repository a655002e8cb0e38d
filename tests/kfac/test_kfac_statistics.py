"""Sums of a step and averages over steps: counts, bias correction, rows of wide inputs, squared gradients, state."""

import pytest
import torch
from layer_truth import positions_last, weighted
from torch import Tensor, nn

from secondorder.errors import InputError
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


def test_a_batch_with_no_fewer_rows_than_inputs_makes_a_wide_factor_dense() -> None:
    statistics = statistics_of(nn.Linear(12, 2, bias=False), wide=10)
    x = torch.randn(12, 12).double()
    add(statistics, x, torch.zeros(1, 12, 2).double())
    assert statistics.staged_rows().shape == (1, 0, 12)
    statistics.commit(0.9, 1.0)
    torch.testing.assert_close(statistics.A, (x.mT @ x / 12)[None])
    gathered = statistics_of(nn.Linear(12, 2, bias=False), wide=10)
    add(gathered, x[:6], torch.zeros(1, 6, 2).double())
    gathered.staged_tensors()[1].mul_(2)  # another process had six as well
    gathered.replace_staged_rows(x[None])
    gathered.commit(0.9, 1.0)
    torch.testing.assert_close(gathered.A, statistics.A)
    assert gathered.rows is None
    assert gathered.samples == 12


@pytest.mark.parametrize("name", MODULES)
def test_squared_gradients_of_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = MODULES[name]
    module = make().double()
    statistics = statistics_of(module)
    G, D, outputs = statistics.layer.groups, statistics.layer.inputs, statistics.layer.outputs
    Q_A = torch.linalg.qr(torch.randn(G, D, D).double()).Q
    Q_B = torch.linalg.qr(torch.randn(G, outputs, outputs).double()).Q
    (x, g), (y, h) = batch(module, shape), batch(module, shape)

    def rows(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.stack([positions_last(module, gradient) for gradient in g]).unflatten(-1, (G, -1))
        return weighted(module, x, statistics.layer.bias is not None), s

    (a, s), (b, t) = rows(x, g), rows(y, h)
    a, s = torch.cat([a, b], 1), torch.cat([s, t], 2)  # two uses in one forward
    own = torch.einsum("ntgd,vntgo->vngod", a, s)
    truth = torch.einsum("goi,vngod,gdj->vngij", Q_B, own, Q_A).square().sum((0, 1))
    for most in (2**26, 1):
        monkeypatch.setattr("secondorder.kfac.squares.CACHED_BYTES", most)
        monkeypatch.setattr("secondorder.kfac.squares.CHUNK_BYTES", most)
        statistics.bases = (Q_A, Q_B)
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
    with pytest.raises(InputError, match=r"state of layer : (A|rows) has shape \[1, .*, 10\], not \[1, .*, 8\]"):
        statistics_of(nn.Linear(7, 3), wide=wide).load_state_dict(state)
    with pytest.raises(InputError, match=r"B has shape \[1, 3, 3\], not \[1, 2, 2\]"):
        statistics_of(nn.Linear(9, 2), wide=wide).load_state_dict(state)
