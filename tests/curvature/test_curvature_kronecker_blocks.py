"""K-FAC and EKFAC blocks: against curvlinops, against their definition, and where they are exact."""

from collections.abc import Callable

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from small_networks import CLASSES, batch, built, chain, relative, straight, true_ggn
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks, kronecker_parameters
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.errors import InputError

CE, CE_SUM, MSE, MSE_SUM = (
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
)
LOSSES = {"ce": CE, "ce sum": CE_SUM, "mse": MSE, "mse sum": MSE_SUM}
ORACLE = {"exact": "type-2", "empirical": "empirical"}


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), padding=(0, 2), dilation=(1, 2), bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "gap": lambda: chain("gap"),
    "gcp": lambda: chain("gcp"),
    "straight": straight,
    "strided": strided,
}


def made(name: str) -> nn.Module:
    return NETWORKS[name]().double()


def check_blocks(oracle: Tensor, blocks: dict[str, SymmetricOperator], tolerance: float = 1e-12) -> None:
    start = 0
    for block in blocks.values():
        truth = oracle[start : start + block.size, start : start + block.size]
        assert float((block.dense() - truth).abs().max()) <= tolerance * float(truth.abs().max()) + 1e-18
        start += block.size
    assert start == len(oracle)


@pytest.mark.parametrize("fisher", ORACLE)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
# a loss is its columns at the outputs, whatever the network: all of them through one
@pytest.mark.parametrize(
    ("name", "loss"), [*((name, "ce") for name in NETWORKS), *(("gap", loss) for loss in LOSSES if loss != "ce")]
)
def test_kfac_equals_curvlinops(name: str, loss: str, sharing: str, fisher: str) -> None:
    model, data = made(name), batch(LOSSES[loss], 4)
    options = {"fisher_type": ORACLE[fisher], "kfac_approx": sharing, "check_deterministic": False}
    oracle = KFACLinearOperator(model, LOSSES[loss], list(model.parameters()), [data], **options)
    blocks = curvature_blocks(model, LOSSES[loss], data, f"kfac_{sharing}", fisher=fisher)
    D = oracle @ torch.eye(oracle.shape[1]).double()
    if (loss, fisher) == ("mse", "empirical"):  # theirs has gradients of sums of squares, ours of the own means
        D = D / CLASSES
    check_blocks(D, dict(blocks))
    V = torch.randn(len(D), 2).double()
    assert relative(blocks.whole @ V, D @ V) <= 1e-12


@pytest.mark.parametrize("fisher", ORACLE)
@pytest.mark.parametrize("loss", ["ce", "mse sum"])
@pytest.mark.parametrize("name", NETWORKS)
def test_ekfac_equals_curvlinops(name: str, loss: str, fisher: str) -> None:
    model, data = made(name), batch(LOSSES[loss], 4)
    options = {"fisher_type": ORACLE[fisher], "check_deterministic": False}
    oracle = EKFACLinearOperator(model, LOSSES[loss], list(model.parameters()), [data], **options)
    blocks = curvature_blocks(model, LOSSES[loss], data, "ekfac", fisher=fisher)
    # Eigenvectors of eigenvalues that are close: rounding turns them into one another.
    check_blocks(oracle @ torch.eye(oracle.shape[1]).double(), dict(blocks), 1e-11)


@pytest.mark.parametrize("name", ["gap", "gcp", "strided"])
def test_ekfac_is_the_best_diagonal_in_its_basis(name: str) -> None:
    model, data = made(name), batch(CE, 4)
    exact, kfac, ekfac = (curvature_blocks(model, CE, data, q) for q in ("ggn", "kfac_expand", "ekfac"))
    for parameter, block in ekfac.items():
        assert isinstance(block, EigenbasisOperator)
        G = exact[parameter].dense()
        Q = torch.kron(block.gradient_basis, block.input_basis)
        assert relative((Q.mT @ G @ Q).diagonal(), block.scales.flatten()) <= 1e-11
        distance, other = (torch.linalg.matrix_norm(b.dense() - G) for b in (block, kfac[parameter]))
        if parameter.endswith("weight"):
            assert float(distance) < (1 - 1e-6) * float(other)
        else:  # the last layer's bias has the exact block in both
            assert float(distance) <= float(other) + 1e-14 * float(torch.linalg.matrix_norm(G))


@pytest.mark.parametrize("quantity", ["kfac_expand", "kfac_reduce", "ekfac"])
@pytest.mark.parametrize("loss", [MSE, MSE_SUM], ids=["mean", "sum"])
def test_exact_for_deep_linear_networks_with_squared_error(loss: nn.Module, quantity: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, CLASSES)).double()
    data = batch(loss, 6)
    G, blocks = true_ggn(model, loss, data), curvature_blocks(model, loss, data, quantity)
    start = 0
    for block in blocks.values():
        truth = G[start : start + block.size, start : start + block.size]
        assert relative(block.dense(), truth) <= 1e-12
        start += block.size


def test_reduce_is_zero_and_expand_is_not_below_a_covariance() -> None:
    model, data = straight().double(), batch(CE, 4)
    expand, reduce = (
        curvature_blocks(model, CE, data, f"kfac_{sharing}")["0.weight"] for sharing in ("expand", "reduce")
    )
    exact = curvature_blocks(model, CE, data, "ggn")["0.weight"]
    assert float(reduce.trace()) < 1e-25 * float(exact.trace())
    assert float(expand.trace()) > 1e-3 * float(exact.trace())


def test_monte_carlo_factors_are_unbiased() -> None:
    model, data, S = made("gcp"), batch(CE, 4), 60
    draws = [curvature_blocks(model, CE, data, "kfac_expand", fisher="mc", seed=s)["0.weight"] for s in range(S)]
    B = torch.stack([block.gradient.dense() for block in draws])  # type: ignore[attr-defined]
    exact = curvature_blocks(model, CE, data, "kfac_expand")["0.weight"]
    error = B.mean(0) - exact.gradient.dense()  # type: ignore[attr-defined]
    assert float((error.abs() / (B.std(0) / S**0.5)).max()) < 4
    assert relative(draws[0].input.dense(), exact.input.dense()) <= 1e-14  # type: ignore[attr-defined]


class Shared(nn.Module):
    """One layer used twice, on maps of two sizes, and two layers with one weight."""

    def __init__(self, layer: Callable[[], nn.Module], outputs: int) -> None:
        super().__init__()
        self.twice, self.other, self.last = layer(), layer(), nn.Linear(outputs, CLASSES)
        self.other.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        smaller = self.twice(x).tanh()[..., :4, :]
        return self.last(self.other(self.twice(smaller).tanh()).flatten(1))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "convolution": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "grouped": lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", LAYERS)
def test_uses_of_one_weight_count_as_positions(kind: str, sharing: str) -> None:
    model, data = Shared(LAYERS[kind], 48).double(), batch(CE, 3)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(output)

    handles = [layer.register_forward_hook(keep) for layer in (model.twice, model.other)]
    z = model(data[0])
    for handle in handles:
        handle.remove()
    p = z.softmax(-1).detach()
    root = (torch.eye(CLASSES).double() - p[..., None]) * (p / len(p)).sqrt()[:, None]
    s = [torch.autograd.grad(z, outputs, root[..., k], retain_graph=True) for k in range(CLASSES)]

    def positions(t: Tensor, groups: int) -> Tensor:  # [N, T, G, D]
        return t.flatten(1, -2)[:, :, None] if kind == "linear" else t.flatten(2).mT.unflatten(-1, (groups, -1))

    groups = 2 if kind == "grouped" else 1
    unfold = (lambda x: x) if kind == "linear" else (lambda x: nn.functional.unfold(x, 3, padding=1)[..., None])
    a = torch.cat([positions(unfold(x), groups) for x in inputs], 1)
    S = torch.stack([torch.cat([positions(g, groups) for g in column], 1) for column in s])
    if sharing == "reduce":
        a, S = a.mean(1, keepdim=True), S.sum(2, keepdim=True)
    A = torch.einsum("ntgd,ntge->gde", a, a) / (a.shape[0] * a.shape[1])
    B = torch.einsum("vntgo,vntgp->gop", S, S)
    blocks = curvature_blocks(model, CE, data, f"kfac_{sharing}")
    assert relative(blocks["twice.weight"].dense(), torch.block_diag(*map(torch.kron, B, A))) <= 1e-12
    chunked = curvature_blocks(model, CE, data, f"kfac_{sharing}", chunk=1)
    assert relative(chunked.whole.dense(), blocks.whole.dense()) <= 1e-12


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_ekfac_of_a_weight_that_is_used_more_than_once(kind: str) -> None:
    model, data = Shared(LAYERS[kind], 48).double(), batch(CE, 3)
    exact, ekfac = (curvature_blocks(model, CE, data, quantity) for quantity in ("ggn", "ekfac"))
    for name, block in ekfac.items():
        assert isinstance(block, EigenbasisOperator)
        Q = torch.kron(block.gradient_basis, block.input_basis)
        assert relative(block.scales.flatten(), (Q.mT @ exact[name].dense() @ Q).diagonal()) <= 1e-11


def test_grouped_convolutions_have_a_pair_of_factors_for_each_group() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)).double()
    data = batch(CE, 3)
    blocks = curvature_blocks(model, CE, data, "kfac_expand")
    weight, bias = blocks["0.weight"], blocks["0.bias"]
    assert isinstance(weight, BlockDiagonalOperator)
    assert isinstance(bias, BlockDiagonalOperator)
    for g, (block, B) in enumerate(zip(weight.blocks, bias.blocks, strict=True)):
        assert isinstance(block, KroneckerOperator)
        a = nn.functional.unfold(data[0][:, g : g + 1], 3).mT.flatten(0, 1)
        assert relative(block.input.dense(), a.mT @ a / len(a)) <= 1e-12
        assert relative(block.gradient.dense(), B.dense()) <= 1e-14
    exact = curvature_blocks(model, CE, data, "ggn")["0.weight"].dense()
    ekfac = curvature_blocks(model, CE, data, "ekfac")["0.weight"]
    assert isinstance(ekfac, BlockDiagonalOperator)
    assert relative(ekfac.trace(), exact.trace()) <= 1e-12  # in any basis of each group


@pytest.mark.parametrize("quantity", ["kfac_expand", "kfac_reduce", "ekfac"])
@pytest.mark.parametrize(
    ("name", "fisher"), [("strided", "exact"), ("strided", "mc"), ("strided", "empirical"), ("gcp", "exact")]
)
def test_parts_of_a_batch_give_the_same(name: str, quantity: str, fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made(name), batch(CE, 5)
    at_once = curvature_blocks(model, CE, data, quantity, fisher=fisher, samples=2)
    monkeypatch.setattr("secondorder.curvature.blocks.BLOCK_BYTES", 3000)
    for chunk in (2, 5):
        parts = curvature_blocks(model, CE, data, quantity, fisher=fisher, samples=2, chunk=chunk)
        for parameter, block in parts.items():
            assert relative(block.dense(), at_once[parameter].dense()) <= 1e-10


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_wide_inputs_keep_rows_instead_of_a_factor(sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made("gcp"), batch(CE, 4)
    dense = curvature_blocks(model, CE, data, f"kfac_{sharing}")
    monkeypatch.setattr("secondorder.curvature.kronecker.blocks.WIDE_INPUT", 8)
    for chunk in (1, 4):
        wide = curvature_blocks(model, CE, data, f"kfac_{sharing}", chunk=chunk)
        last = wide["7.weight"]
        assert isinstance(last, KroneckerOperator)
        assert isinstance(last.input, FactoredOperator)
        assert last.input.rows.shape == (4, 10)
        for parameter, block in wide.items():
            assert relative(block.dense(), dense[parameter].dense()) <= 1e-12
            assert relative(block.eigenvalues(), dense[parameter].eigenvalues()) <= 1e-12


@pytest.mark.parametrize(("width", "samples", "kept"), [(1025, 1024, True), (1025, 1025, False), (1024, 2, False)])
def test_fewer_rows_than_inputs_are_kept_above_1024(width: int, samples: int, kept: bool) -> None:
    model, data = nn.Linear(width, 2), (torch.randn(samples, width), torch.randint(2, (samples,)))
    block = curvature_blocks(model, CE, data, "kfac_expand")["weight"]
    assert isinstance(block, KroneckerOperator)
    assert isinstance(block.input, FactoredOperator) is kept


def test_the_classifier_of_a_256_channel_head_stays_small() -> None:
    width = 256 * 257 // 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(width, CLASSES))
    data = torch.randn(4, width), torch.tensor([0, 1, 2, 0])
    for quantity in ("kfac_expand", "ekfac"):
        block = curvature_blocks(model, CE, data, quantity)["1.weight"]
        exact = curvature_blocks(model, CE, data, "ggn")["1.weight"]
        V = torch.randn(block.size, 2)
        if quantity == "ekfac":
            assert isinstance(block, EigenbasisOperator)
            assert block.input_basis.shape == (width, 4)
            assert float(block.trace()) == pytest.approx(float(exact.trace()), rel=1e-4)
        else:
            assert isinstance(block, KroneckerOperator)
            assert isinstance(block.input, FactoredOperator)
            B, a = block.gradient.dense(), data[0]
            truth = torch.einsum("op,nd,ne,pek->odk", B, a, a / 4, V.view(CLASSES, width, 2)).reshape(-1, 2)
            assert relative(block @ V, truth) < 1e-4


def test_conv_and_linear_parameters_are_named_and_the_others_refused() -> None:
    model, data = built("digits_net", "gcp", in_channels=1), batch(CE, 3, channels=1, size=8)
    with pytest.raises(
        InputError, match=r"no Kronecker structure: stem\.1\.weight, .* more; use params=kronecker_param"
    ):
        curvature_blocks(model, CE, data, "kfac_expand")
    names = kronecker_parameters(model)
    assert names == [name for name, p in model.named_parameters() if p.ndim > 1 or name == "classifier.bias"]
    blocks = curvature_blocks(model, CE, data, "kfac_expand", names)
    assert list(blocks) == names
    oracle = KFACLinearOperator(
        model,
        CE,
        [p for name, p in model.named_parameters() if name in names],
        [data],
        fisher_type="type-2",
        check_deterministic=False,
    )
    V = torch.randn(blocks.whole.size, 2).double()
    assert relative(blocks.whole @ V, oracle @ V) <= 1e-12


def test_layers_that_are_not_called_or_changed_are_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(72, CLASSES), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x.flatten(1))

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    data = batch(CE, 3)
    with pytest.raises(InputError, match=r"never calls the layer of idle\.weight"):
        curvature_blocks(Idle().double(), CE, data, "kfac_expand")
    changed = nn.Sequential(nn.Flatten(), Scaled(72, CLASSES)).double()
    assert kronecker_parameters(changed) == []
    with pytest.raises(InputError, match=r"no Kronecker structure: 1\.weight, 1\.bias"):
        curvature_blocks(changed, CE, data, "ekfac")


def test_frozen_layers_are_left_out() -> None:
    model, data = made("gcp"), batch(CE, 3)
    everything = curvature_blocks(model, CE, data, "kfac_expand")
    model[2].requires_grad_(False)
    rest = curvature_blocks(model, CE, data, "kfac_expand")
    assert list(rest) == ["0.weight", "0.bias", "7.weight", "7.bias"]
    assert all(relative(block.dense(), everything[name].dense()) <= 1e-14 for name, block in rest.items())
    assert isinstance(rest["7.bias"], DenseOperator)


class Rows(nn.Module):
    """Another shape for the samples."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(2, self.shape) if len(self.shape) > 1 else x.flatten(2)


@pytest.mark.parametrize("quantity", ["kfac_expand", "kfac_reduce", "ekfac"])
@pytest.mark.parametrize(
    ("kind", "kernel", "shape"), [(nn.Conv1d, (3,), (36,)), (nn.Conv3d, (1, 1, 3), (1, 1, 36))], ids=["1d", "3d"]
)
def test_convolutions_of_other_dimensions(
    kind: type[nn.Module], kernel: tuple[int, ...], shape: tuple[int, ...], quantity: str
) -> None:
    """Those of a 2d convolution on maps of one row."""
    conv = nn.Conv2d(2, 4, (1, 3), (1, 2), groups=2).double()
    rest = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(4 * 17, CLASSES)).double()
    other = kind(2, 4, kernel, 2, groups=2).double()
    with torch.no_grad():
        other.weight.copy_(conv.weight.view(other.weight.shape))
        other.bias.copy_(conv.bias)  # type: ignore[arg-type]
    data = batch(CE)
    expected = curvature_blocks(nn.Sequential(Rows(1, 36), conv, *rest), CE, (data[0].flatten(2), data[1]), quantity)
    model = nn.Sequential(Rows(*shape), other, *rest)
    assert kronecker_parameters(model) == [name for name, _ in model.named_parameters()]
    found = curvature_blocks(model, CE, (data[0].flatten(2), data[1]), quantity)
    for name, block in expected.items():
        assert relative(found[name].dense(), block.dense()) <= 1e-12
