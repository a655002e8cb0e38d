"""Layers with very many outputs, of which B is its diagonal: against dense truth, and with every other setting."""

import pytest
import torch
from dense_curvature import blocks, gauss_newton, gradient, optimiser, relative, step
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFAC, STEP_RULES, Damping, Options
from secondorder.kfac.inverses.eigenbasis import Rotated
from secondorder.kfac.options import WIDE_OUTPUT

EXACT = 1e-10


def one_position() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2), nn.Flatten())


def maps() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Conv2d(6, 4, 2, bias=False), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("damped_relatively", [True, False])
@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
@pytest.mark.parametrize("wide_inputs", [2, 4096])
@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(23, 6)), one_position])
def test_squared_error_is_solved_exactly(make, wide_inputs: int, approximation: str, damped_relatively: bool) -> None:
    """The last layer's B is 2 c I, so that diag(B) kron A is its block of the Gauss-Newton matrix; groups make it several."""
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(5, *((23,) if isinstance(model[0], nn.Linear) else (4, 3, 2)), dtype=torch.float64)
    y = torch.randn(5, 6, dtype=torch.float64)
    options = Options(wide_outputs=2, wide_inputs=wide_inputs)
    opt = optimiser(model, "mse", relative=damped_relatively, approximation=approximation, options=options)
    G, g = gauss_newton(model, F.mse_loss, x, y), gradient(model, F.mse_loss, x, y)
    found = step(opt, F.mse_loss, x, y)
    of_group = _group_of(model, 1 if isinstance(model[0], nn.Linear) else 2)
    for part in (of_group == k for k in range(int(of_group.max()) + 1)):  # relative to the scale of each group
        block = G[part][:, part]
        scale = float(block.square().sum() / block.trace()) if damped_relatively else 1.0
        expected = -torch.linalg.solve(block + 0.1 * scale * torch.eye(len(block), dtype=torch.float64), g[part])
        assert relative(found[part], expected) <= EXACT


def _group_of(model: nn.Sequential, groups: int) -> Tensor:
    """Of each parameter."""
    parameters = list(model.parameters())
    return torch.cat([torch.arange(groups).repeat_interleave(p.numel() // groups) for p in parameters])


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("wide_inputs", [2, 4096])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_the_block_is_that_of_the_diagonal_of_b(fisher: str, sharing: str, wide_inputs: int, inverse: str) -> None:
    """Positions, groups, layers without bias; the same draws of labels give B whole, and its diagonal."""
    x, y = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.tensor([0, 2, 1])
    held, changes, slopes = [], [], []
    for wide_outputs in (1, 4096):
        torch.manual_seed(1)
        model = maps().double()
        slopes.append(gradient(model, F.cross_entropy, x, y))
        options = Options(wide_outputs=wide_outputs, wide_inputs=wide_inputs)
        opt = optimiser(model, kind=fisher, sharing=sharing, inverse=inverse, options=options)
        changes.append(step(opt, F.cross_entropy, x, y))
        held.append(opt.preconditioner.statistics)
        places = blocks(model)
    for name, layer in opt.preconditioner.layers.items():
        own, whole = (statistics[name] for statistics in held)
        assert own.B is not None
        torch.testing.assert_close(own.B, whole.B.diagonal(dim1=-2, dim2=-1), rtol=1e-12, atol=1e-14)
        A = whole.A if whole.A is not None else whole.rows.mT @ whole.rows
        g = _matrix(layer, slopes[0][places[name]])
        found = _matrix(layer, changes[0][places[name]])
        for k in range(layer.groups):
            truth = -_solved(A[k], own.B[k], g[k], inverse)
            assert relative(found[k], truth) <= 1e-9


def _matrix(layer, vector: Tensor) -> Tensor:
    """`[G, O, D]` of the parameters of a layer in one vector."""
    weight = vector[: layer.weight.numel()].view_as(layer.weight)
    return layer.matrix(weight, None if layer.bias is None else vector[layer.weight.numel() :])


def _solved(A: Tensor, diagonal: Tensor, g: Tensor, inverse: str, damping: float = 0.1) -> Tensor:
    """(diag(B) kron A + lambda I)^-1 g, or with the damping on the factors, as dense matrices."""
    B, eye = torch.diag(diagonal), torch.eye
    if inverse == "eigen":
        block = torch.kron(B, A) + damping * eye(g.numel(), dtype=g.dtype)
    else:
        pi = float((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
        right = A + pi * damping**0.5 * eye(len(A), dtype=g.dtype)
        block = torch.kron(B + damping**0.5 / pi * eye(len(B), dtype=g.dtype), right)
    return torch.linalg.solve(block, g.flatten()).view_as(g)


def wide_classifier(outputs: int = WIDE_OUTPUT + 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, outputs))


def take(model: nn.Module, optimizer: KFAC, outputs: int, samples: int = 8) -> None:
    x, y = torch.randn(samples, 5), torch.randint(outputs, (samples,))
    optimizer.zero_grad()
    z = model(x)
    optimizer.update_curvature(z)
    F.cross_entropy(z, y).backward()
    optimizer.step()


def test_chosen_by_the_width_and_said_in_the_report() -> None:
    model = wide_classifier()
    optimizer = KFAC(model)
    take(model, optimizer, WIDE_OUTPUT + 1)
    rows = {row.parameter: row.gradient_factor for row in optimizer.report().parameters}
    assert rows["2.weight"] == f"{WIDE_OUTPUT + 1} diagonal"
    assert rows["0.weight"] == "4 x 4"
    assert optimizer.preconditioner.blocks.costs["2"] < 1000
    [kept] = [row for row in optimizer.report().parameters if row.parameter == "2.weight"]
    assert kept.factor_bytes + kept.inverse_bytes < 20 * 4 * WIDE_OUTPUT
    edge = wide_classifier(WIDE_OUTPUT)
    assert not KFAC(edge).preconditioner.layers["2"].diagonal_outputs


def test_nothing_as_large_as_the_outputs_squared_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, largest, product = 5000, [], Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: largest.append((found := product(a, b)).numel()) or found)
    for settings in (
        {},
        {"approximation": "ekfac"},
        {"damping": Damping(inverse="cholesky")},
        {"step_rule": "natural"},
    ):
        model = wide_classifier(outputs)
        optimizer = KFAC(model, **settings)  # type: ignore[arg-type]
        for _ in range(2):
            take(model, optimizer, outputs, 4)
        assert max(largest) <= 5 * outputs
        tensors = [*optimizer.preconditioner.blocks.inverses["2"].tensors().values()]
        assert max(t.numel() for t in tensors if isinstance(t, Tensor)) <= 5 * outputs


@pytest.mark.parametrize(("rule", "wide_inputs"), [*((rule, 4096) for rule in STEP_RULES), ("adam", 2), ("natural", 2)])
def test_every_step_rule_works(rule: str, wide_inputs: int) -> None:
    """With Adam in the eigenbasis too: on the side of the outputs it is Adam's own."""
    torch.manual_seed(0)
    model = wide_classifier(7).double()
    options = Options(wide_outputs=3, wide_inputs=wide_inputs)
    optimizer = KFAC(model, step_rule=rule, factor_interval=1, inverse_interval=1, options=options)
    x = torch.randn(64, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 7, dtype=torch.float64)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        z = model(x)
        optimizer.update_curvature(z)
        loss = F.cross_entropy(z, y.argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    inverse = optimizer.preconditioner.blocks.inverses["2"]
    assert isinstance(inverse, Rotated)  # 64 rows are more than 5 inputs
    assert torch.equal(inverse.Q_B, torch.ones(1, 7, dtype=torch.float64))


def test_a_state_of_another_form_is_refused() -> None:
    states = []
    for wide_outputs in (2, 100):
        model = wide_classifier(7)
        optimizer = KFAC(model, options=Options(wide_outputs=wide_outputs))
        take(model, optimizer, 7)
        states.append(optimizer.state_dict())
    with pytest.raises(InputError, match=r"B has shape \[1, 4, 4\], not \[1, 4\]"):
        KFAC(wide_classifier(7), options=Options(wide_outputs=2)).load_state_dict(states[1])
    KFAC(wide_classifier(7), options=Options(wide_outputs=2)).load_state_dict(states[0])
