"""Embeddings, normalisations and other kinds of layers: blocks against dense truth, and whole trainings of each kind."""

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dense_curvature import blocks, gauss_newton, gradient, optimiser, relative, step
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFAC, STEP_RULES, Fisher, Options
from secondorder.kfac.layers import find_layers
from secondorder.kfac.statistics import LayerStatistics

EXACT = 1e-10
TOKENS = torch.tensor([[0, 3, 3, 1], [2, 1, 3, 0], [1, 1, 1, 1]])


class Channels(nn.Module):
    """Dimensions 1 and 2 exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    """The mean over dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def embedding(padding: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(6, 3, padding_idx=padding), nn.Linear(3, 2), Channels()).double()


@pytest.mark.parametrize("padding", [None, 3])
def test_factors_of_an_embedding_are_those_of_unit_vectors(padding: int | None) -> None:
    """A the counts of the tokens, which autograd finds zero for padding; B from all positions."""
    model, y = embedding(padding), torch.randint(2, (3, 4))
    opt = optimiser(model, lr=0.0)
    step(opt, F.cross_entropy, TOKENS, y)
    held = opt.preconditioner.statistics["0"]
    a = F.one_hot(TOKENS, 6).double().flatten(0, 1)
    if padding is not None:
        a[:, padding] = 0
    assert held.A is not None
    assert held.A.shape == (1, 6)
    assert relative(held.A[0], (a.mT @ a / 12).diagonal()) <= EXACT
    out = model[0](TOKENS).detach().requires_grad_()
    J = torch.stack(
        [torch.autograd.grad(z, out, retain_graph=True)[0] for z in model[1](out).flatten()]
    )  # [N T K, N, T, 3]
    p = model(TOKENS).detach().softmax(1).mT  # [N, T, K]
    H = torch.diag_embed(p) - p[..., None] * p[..., None, :]
    rows = J.view(3, 4, 2, 3, 4, 3)
    B = sum(rows[n, t, :, n, t].mT @ H[n, t] @ rows[n, t, :, n, t] for n in range(3) for t in range(4)) / 12
    assert relative(held.B[0], B) <= EXACT  # type: ignore[index]


@pytest.mark.parametrize(
    ("approximation", "inverse", "relative_damping"),
    [("kfac", "eigen", True), ("kfac", "eigen", False), ("ekfac", "eigen", True), ("kfac", "cholesky", False)],
)
def test_step_of_an_embedding_is_that_of_the_dense_matrix(
    approximation: str, inverse: str, relative_damping: bool
) -> None:
    """Squared error and linear layers: B kron A is the block of the Gauss-Newton matrix."""
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 4)).double()
    x, y = torch.tensor([0, 3, 3, 1, 5]), torch.randn(5, 4).double()
    damping = 1e-14 if inverse == "cholesky" else 0.1
    opt = optimiser(
        model, "mse", damping=damping, relative=relative_damping, inverse=inverse, approximation=approximation
    )
    G, g = gauss_newton(model, F.mse_loss, x, y), gradient(model, F.mse_loss, x, y)
    block = blocks(model)["0"]
    used = torch.isin(torch.arange(6).repeat_interleave(3), x)  # the rows that have curvature
    change = step(opt, F.mse_loss, x, y)[block]
    G, g = G[block, block], g[block]
    scale = float(G.square().sum() / G.trace()) if relative_damping else 1.0
    expected = -torch.linalg.solve(G + damping * scale * torch.eye(len(G)).double(), g)
    assert relative(change[used], expected[used]) <= (1e-4 if inverse == "cholesky" else EXACT)
    assert not change[~used].any()


def sequences(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()


def maps(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()


def frozen(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """In evaluation mode, with statistics that are not those of a batch."""
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    return norm.eval()


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    layer: str = "1"


DIAGONAL = {
    "layer norm": Case(lambda: sequences(nn.LayerNorm(3)), (5, 2, 4)),
    "layer norm of two dimensions": Case(lambda: sequences(nn.LayerNorm((2, 3))), (5, 2, 4)),
    "layer norm without bias": Case(lambda: sequences(nn.LayerNorm(3, bias=False)), (5, 2, 4)),
    "rms norm": Case(lambda: sequences(nn.RMSNorm(3)), (5, 2, 4)),
    "group norm": Case(lambda: maps(nn.GroupNorm(2, 4)), (5, 2, 3, 3)),
    "batch norm": Case(lambda: maps(frozen(nn.BatchNorm2d(4))), (5, 2, 3, 3)),
    "linear": Case(lambda: sequences(nn.Tanh()), (5, 2, 4), "0"),
    "convolution": Case(lambda: maps(nn.Tanh()), (5, 2, 3, 3), "0"),
    "embedding": Case(
        lambda: nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), Mean(), nn.Linear(3, 2)).double(), (5, 6), "0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("most", [1, 2**26])
@pytest.mark.parametrize("kind", DIAGONAL)
def test_diagonal_of_the_gauss_newton_matrix(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The approximation "diagonal" is the exact one, whatever the positions; its step divides by it plus lambda."""
    monkeypatch.setattr("secondorder.curvature.kronecker.squares.CHUNK_BYTES", most)
    case = DIAGONAL[kind]
    model, y = case.model(), torch.tensor([0, 1, 1, 0, 1])
    model.get_submodule(case.layer).weight.data.uniform_(0.5, 1.5)
    x = torch.randint(4, case.shape) if kind == "embedding" else torch.randn(case.shape).double()
    G, g = gauss_newton(model, F.cross_entropy, x, y).diagonal(), gradient(model, F.cross_entropy, x, y)
    opt = optimiser(model, approximation={case.layer: "diagonal"})
    change, block = step(opt, F.cross_entropy, x, y), blocks(model)[case.layer]
    assert relative(change[block], -g[block] / (G[block] + 0.1)) <= EXACT
    layer, held = opt.preconditioner.layers[case.layer], opt.preconditioner.statistics[case.layer]
    weight, bias = layer.parts(held.S)
    found = torch.cat([part.flatten() for part in (weight, bias) if part is not None])
    assert relative(found, G[block]) <= EXACT
    W = layer.matrix(layer.weight, layer.bias)
    form = opt.preconditioner.blocks.quadratic_form({p: p for p in (layer.weight, layer.bias) if p is not None})
    assert relative(form, (held.S * W * W).sum()) <= EXACT


def test_damping_of_a_diagonal_is_one_number() -> None:
    """A channel whose squares are zero is not divided by next to nothing."""
    model = sequences(nn.LayerNorm(3))
    opt = optimiser(model, approximation={"1": "diagonal"}, relative=True, lr=0.0)
    step(opt, F.cross_entropy, torch.randn(5, 2, 4).double(), torch.tensor([0, 1, 1, 0, 1]))
    held, inverse = opt.preconditioner.statistics["1"], opt.preconditioner.blocks.inverses["1"]
    scale = held.S.square().sum() / held.S.sum()
    assert relative(inverse.tikhonov(0.1, True), 0.1 * scale.expand(3, 1, 1)) <= EXACT


def test_batch_norm_in_training_is_normalised_by_the_batch() -> None:
    model, x = maps(nn.BatchNorm2d(4)), torch.randn(5, 2, 3, 3).double()
    layer = find_layers(model, {"1": "diagonal"})[0][1]
    inputs = model[0](x)
    a = layer.kind.input_vectors(inputs)  # [N, C, T, 1]
    expected = (inputs - inputs.mean((0, 2, 3), keepdim=True)) / (
        inputs.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    assert relative(a.flatten(), expected.flatten()) <= EXACT


class Translator(nn.Module):
    """Every kind of layer in one network of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.scale = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.RMSNorm(4)
        self.pool, self.batch = nn.Conv1d(4, 6, 3, 2, 1), nn.BatchNorm1d(6)
        self.back = nn.ConvTranspose1d(6, 4, 2, 2, groups=2)
        self.up = nn.ConvTranspose2d(1, 2, (2, 3), 2, dilation=(1, 2), output_padding=1, bias=False)
        self.cube, self.group = nn.Conv3d(1, 2, 2), nn.GroupNorm(1, 2)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.words(x)).mT
        h = h + self.back(F.gelu(self.batch(self.pool(h))))  # [N, 4, T]
        maps = self.up(h[:, None])[:, :, :8, :8].unsqueeze(1)
        maps = self.group(self.cube(maps)).mean((2, 4))  # [N, 2, 7]
        return self.head(self.scale(h.mT)) + maps.sum(1)[:, None]


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(7, (8, 6), generator=torch.Generator().manual_seed(seed))
    return x, x.roll(1, 1)


def train(opt: KFAC, first: int, steps: int) -> list[float]:
    losses = []
    for seed in range(first, first + steps):
        x, y = tokens(seed)
        opt.zero_grad()
        z = opt.model(x).mT
        opt.update_curvature(z)
        loss = F.cross_entropy(z, y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


NORMS = dict.fromkeys(("norm", "scale", "batch", "group"), "diagonal")
POLICIES = {"kfac": NORMS, "ekfac": NORMS | {"*": "ekfac"}, "diagonal": {"*": "diagonal"}}


@pytest.mark.parametrize(
    ("rule", "policy", "fisher"),
    [(rule, "kfac", "mc") for rule in STEP_RULES]
    + [(rule, p, "empirical") for rule in ("adam", "natural") for p in POLICIES],
)
def test_training_with_every_kind_of_layer(rule: str, policy: str, fisher: str) -> None:
    """The scaling check passes, a resumed training takes the same steps bit for bit, and the report names all."""
    made = [Translator(), Translator()]
    settings = {"step_rule": rule, "approximation": POLICIES[policy], "fisher": Fisher(fisher), "factor_interval": 2}
    opt = KFAC(made[0], inverse_interval=2, **settings)  # type: ignore[arg-type]
    assert all(map(math.isfinite, train(opt, 0, 6)))
    saved = io.BytesIO()
    torch.save({"optimizer": opt.state_dict(), "model": made[0].state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    made[1].load_state_dict(state["model"])
    resumed = KFAC(made[1], inverse_interval=2, **settings)  # type: ignore[arg-type]
    resumed.load_state_dict(state["optimizer"])
    assert train(opt, 6, 4) == train(resumed, 6, 4)
    rows = {row.parameter: row for row in opt.report().parameters}
    assert {row.treatment for row in rows.values()} <= {"kfac", "ekfac", "diagonal"}
    assert {rows[name].reason for name in ("words.weight", "norm.bias", "cube.weight", "back.weight")} == {
        "Embedding", "LayerNorm", "Conv3d", "ConvTranspose1d",
    }  # fmt: skip
    assert "7 diagonal" in str(opt.report())


def test_a_large_vocabulary_has_no_matrix() -> None:
    """A, its eigenvectors and all else of an embedding are as many numbers as its tokens."""
    model = nn.Sequential(nn.Embedding(50_000, 4), nn.Linear(4, 3))
    opt = KFAC(model, approximation={"0": "ekfac"})
    for _ in range(3):
        opt.zero_grad()
        z = model(torch.randint(50_000, (64,)))
        opt.update_curvature(z)
        F.cross_entropy(z, torch.randint(3, (64,))).backward()
        opt.step()
    row = opt.report().parameters[0]
    assert row.factor_bytes < 10 * 50_000 * 4
    assert row.inverse_bytes < 10 * 50_000 * 4


def test_an_output_size_given_in_the_call_is_refused() -> None:
    class Unpooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose1d(2, 2, 2, stride=2), nn.Linear(2, 3)

        def forward(self, x: Tensor, size: int) -> Tensor:
            return self.head(self.up(x, output_size=[size]).mean(2))

    model = Unpooled()
    opt = KFAC(model, options=Options())
    opt.update_curvature(model(torch.randn(2, 2, 4), 8))
    with pytest.raises(
        InputError, match=r"ConvTranspose1d called with an output_size that is not that of its output_padding"
    ):
        model(torch.randn(2, 2, 4), 9)
    assert isinstance(opt.preconditioner.statistics["up"], LayerStatistics)


def doubled(state: Any) -> Any:
    """A state in double precision."""
    if isinstance(state, dict):
        return {key: doubled(value) for key, value in state.items()}
    if isinstance(state, list):
        return [doubled(value) for value in state]
    return state.double() if isinstance(state, Tensor) else state


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", ["adam", "natural"])
def test_every_kind_of_layer_is_adopted_and_follows_its_model(rule: str, policy: str) -> None:
    """Thawed, all get factors and move; in another number format, statistics, inverses and momenta are those of their state."""
    model = Translator()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    settings = {"step_rule": rule, "approximation": POLICIES[policy], "factor_interval": 2}
    opt = KFAC(model, inverse_interval=2, **settings)  # type: ignore[arg-type]
    train(opt, 0, 4)
    model.requires_grad_(True)
    before = [p.clone() for p in model.parameters()]
    train(opt, 4, 6)
    assert {row.treatment for row in opt.report().parameters} <= {"kfac", "ekfac", "diagonal"}
    assert not [name for (name, p), old in zip(model.named_parameters(), before, strict=True) if torch.equal(p, old)]
    twin = copy.deepcopy(model).double()
    other = KFAC(twin, inverse_interval=2, **settings)  # type: ignore[arg-type]
    other.load_state_dict(doubled(opt.state_dict()))
    model.double()
    assert train(opt, 10, 4) == train(other, 10, 4)
