"""BackPACK's exact quantities through every head against torch.func, in float64: the whole matrix where it is small."""

import doctest
from copy import deepcopy

import pytest
import torch
from backpack import backpack, extend, extensions
from backpack.extensions.backprop_extension import BackpropExtension
from small_networks import batch, chain, relative, straight, true_ggn, true_hessian
from torch import Tensor, nn
from torch.func import vmap

from secondorder.curvature.backpack import registration
from secondorder.curvature.backpack.derivatives.base import Derivatives
from secondorder.curvature.backpack.kinds import kind_of
from secondorder.curvature.backpack.registration import DERIVATIVES, register
from secondorder.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

EXACT = 1e-12
HEADS: dict[str, dict] = {
    "gap": {},
    "covariance": {},
    "gcp": {},
    "gcp_exact": {},
    "gcp_power": {"exponent": 0.3},
    "gcp_log": {},
    "gap_lifted": {},
}
LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss(), nn.MSELoss(reduction="sum")]
ACTIVATIONS = [nn.ReLU, nn.Tanh]
# every loss through one head, every other head under one of them: a head sees no more than the loss's derivatives
CONFIGURATIONS = [
    *(("gcp", loss, ACTIVATIONS[k % 2]) for k, loss in enumerate(LOSSES)),
    *((head, LOSSES[h % 4], ACTIVATIONS[h // 2 % 2]) for h, head in enumerate(HEADS) if head != "gcp"),
    ("gcp_log", nn.MSELoss(), nn.Tanh),
]


def run(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], *extension: BackpropExtension) -> nn.Module:
    """One backward pass with the registered extensions through an extended copy, whose parameters carry the quantities."""
    twin = extend(deepcopy(model))
    with backpack(*(register(e) for e in extension)):
        extend(type(loss)(reduction=loss.reduction))(twin(data[0]), data[1]).backward()
    return twin


def flat(model: nn.Module, field: str, batched: int = 0) -> Tensor:
    """The quantities of all parameters side by side, after `batched` leading dimensions."""
    return torch.cat([getattr(p, field).flatten(batched) for p in model.parameters()], -1)


def blocks(model: nn.Module, matrix: Tensor) -> list[Tensor]:
    """The diagonal block [P, P] of each parameter."""
    sizes = [p.numel() for p in model.parameters()]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [matrix[i : i + n, i : i + n] for i, n in zip(starts, sizes, strict=True)]


def product_error(model: nn.Module, field: str, matrix: Tensor) -> float:
    """The relative error of the products with two random vectors, of all parameters side by side."""
    results, expected = [], []
    for p, block in zip(model.parameters(), blocks(model, matrix), strict=True):
        V = torch.randn(2, *p.shape, dtype=p.dtype)
        with torch.no_grad():
            results.append(getattr(p, field)(V).flatten(1))
        expected.append(V.flatten(1) @ block)
    return relative(torch.cat(results, 1), torch.cat(expected, 1))


def sample_hessians(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """diag of the Hessian of each sample's share of the loss [N, P]."""
    share = 1 if loss.reduction == "sum" else 1 / len(data[0])
    return torch.stack(
        [true_hessian(model, loss, (x[None], y[None])).diagonal() * share for x, y in zip(*data, strict=True)]
    )


@pytest.mark.parametrize(("head", "loss", "activation"), CONFIGURATIONS)
def test_exact_quantities(head: str, loss: nn.Module, activation: type[nn.Module]):
    model, data = chain(head, activation, **HEADS[head]), batch(loss)
    ggn, hessian = true_ggn(model, loss, data), true_hessian(model, loss, data)
    twin = run(
        model, loss, data,
        extensions.DiagGGNExact(), extensions.BatchDiagGGNExact(), extensions.SqrtGGNExact(),
        extensions.DiagHessian(), extensions.GGNMP(), extensions.HMP(),
    )  # fmt: skip
    assert relative(flat(twin, "diag_ggn_exact"), ggn.diagonal()) <= EXACT
    assert relative(flat(twin, "diag_ggn_exact_batch", 1).sum(0), ggn.diagonal()) <= EXACT
    rows = flat(twin, "sqrt_ggn_exact", 2).flatten(0, 1)
    assert relative(rows.mT @ rows, ggn) <= EXACT
    assert relative(flat(twin, "diag_h"), hessian.diagonal()) <= EXACT
    assert product_error(twin, "ggnmp", ggn) <= EXACT
    assert product_error(twin, "hmp", hessian) <= EXACT


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")])
def test_quantities_of_each_sample(loss: nn.Module):
    model, data = chain("gcp", nn.Tanh), batch(loss)
    truth = sample_hessians(model, loss, data)
    twin = run(model, loss, data, extensions.BatchDiagHessian(), extensions.SqrtGGNExact(subsampling=[2, 0]))
    subsampled = flat(twin, "sqrt_ggn_exact", 2)
    assert relative(flat(twin, "diag_h_batch", 1), truth) <= EXACT
    twin = run(model, loss, data, extensions.SqrtGGNExact())
    assert relative(subsampled, flat(twin, "sqrt_ggn_exact", 2)[:, [2, 0]]) <= EXACT


@pytest.mark.parametrize(
    ("head", "options"),
    [*list(HEADS.items())[2:], ("gcp_power", {"exponent": 1}), ("gcp_power", {"exponent": 2})],
)
def test_more_channels_than_positions(head: str, options: dict):
    """6 channels and 4 positions: the covariance has rank 3."""
    loss = nn.CrossEntropyLoss()
    model, data = chain(head, nn.Tanh, channels=6, **options), batch(loss, n=2, size=2)
    twin = run(model, loss, data, extensions.DiagGGNExact(), extensions.DiagHessian(), extensions.HMP())
    hessian = true_hessian(model, loss, data)
    assert relative(flat(twin, "diag_ggn_exact"), true_ggn(model, loss, data).diagonal()) <= EXACT
    assert relative(flat(twin, "diag_h"), hessian.diagonal()) <= EXACT
    assert product_error(twin, "hmp", hessian) <= EXACT


class GramRoot(nn.Module):
    """The exact root of a rank-deficient covariance without its null space: Z = Y K^(-1/2) Y^T, K = Y^T Y of full rank."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        M = x.shape[-1]
        centring = torch.eye(M, dtype=x.dtype) - 1 / M
        Q = torch.linalg.eigh(centring).eigenvectors[:, 1:]  # an orthonormal basis of centred positions
        Y = x @ Q / M**0.5
        K = Y.mT @ Y
        root, inverse = K, torch.eye(M - 1, dtype=x.dtype).expand_as(K)
        for _ in range(12):  # Denman and Beavers
            root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
        return Y @ inverse @ Y.mT


def test_singular_covariance_against_the_space_of_positions():
    """Right to second order where S is singular, by a definition that has no null directions."""
    loss = nn.CrossEntropyLoss()
    model, data = chain("gcp_exact", nn.Tanh, channels=6), batch(loss, n=2, size=2)
    reference = nn.Sequential(*model[:4], GramRoot(), *model[6:])
    hessian = true_hessian(reference, loss, data)
    twin = run(model, loss, data, extensions.DiagHessian(), extensions.HMP())
    assert relative(flat(twin, "diag_h"), hessian.diagonal()) <= EXACT
    assert product_error(twin, "hmp", hessian) <= EXACT


def test_batch_norm_and_average_pooling():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, groups=1, bias=False), nn.BatchNorm2d(3), nn.ReLU6(), nn.AvgPool2d(2),
        nn.Conv2d(3, 6, 1, groups=3), nn.SiLU(), *chain("gcp", channels=6)[4:],
    ).double().eval()  # fmt: skip
    loss, data = nn.CrossEntropyLoss(), batch(nn.CrossEntropyLoss(), size=8)
    with torch.no_grad():
        model[1].running_mean.normal_(0, 0.1)
        model[1].running_var.uniform_(0.5, 1.5)
        model[1].weight.normal_()
    ggn, hessian = true_ggn(model, loss, data), true_hessian(model, loss, data)
    twin = run(
        model, loss, data,
        extensions.DiagGGNExact(), extensions.SqrtGGNExact(), extensions.DiagHessian(),
        extensions.BatchDiagHessian(), extensions.GGNMP(), extensions.HMP(),
    )  # fmt: skip
    assert relative(flat(twin, "diag_ggn_exact"), ggn.diagonal()) <= EXACT
    rows = flat(twin, "sqrt_ggn_exact", 2).flatten(0, 1)
    assert relative(rows.mT @ rows, ggn) <= EXACT
    assert relative(flat(twin, "diag_h"), hessian.diagonal()) <= EXACT
    assert relative(flat(twin, "diag_h_batch", 1), sample_hessians(model, loss, data)) <= EXACT
    assert product_error(twin, "ggnmp", ggn) <= EXACT
    assert product_error(twin, "hmp", hessian) <= EXACT


class Attention(nn.Module):
    """A user's pooling."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return (x * x.mean(1, keepdim=True).softmax(-1)).sum(-1)


def test_a_pooling_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), Attention(), nn.Linear(4, 3)).double()
    loss, data = nn.CrossEntropyLoss(), batch(nn.CrossEntropyLoss())
    with pytest.raises(NotImplementedError, match="Attention"):
        run(model, loss, data, extensions.DiagHessian())
    monkeypatch.setitem(DERIVATIVES, Attention, Derivatives())
    twin = run(model, loss, data, extensions.DiagHessian(), extensions.HMP(), extensions.DiagGGNExact())
    hessian = true_hessian(model, loss, data)
    assert relative(flat(twin, "diag_h"), hessian.diagonal()) <= EXACT
    assert product_error(twin, "hmp", hessian) <= EXACT
    assert relative(flat(twin, "diag_ggn_exact"), true_ggn(model, loss, data).diagonal()) <= EXACT


def test_the_example_of_register(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registration, "DERIVATIVES", dict(DERIVATIVES))
    names = {"torch": torch, "nn": nn, "backpack": backpack, "extend": extend, "DiagHessian": extensions.DiagHessian}
    example = doctest.DocTestFinder().find(register, "register", globs=vars(registration) | names)[0]
    assert len(example.examples) == 5
    assert doctest.DocTestRunner().run(example).failed == 0


def averages(model: nn.Sequential, loss: nn.Module, data: tuple[Tensor, Tensor]) -> list[Tensor]:
    """KFRA by its definition: the averaged loss Hessian, then mean_n J_n^T B J_n module by module from the back."""
    xs = [data[0]]
    for module in model:
        xs.append(module(xs[-1]).detach())
    N = len(data[0])
    per_sample = torch.func.hessian(lambda z, y: loss(z[None], y[None]))
    B = vmap(per_sample)(xs[-1], data[1]).mean(0)
    found = [B]
    for module, x in zip(reversed(model), reversed(xs[:-1]), strict=True):
        J = vmap(torch.func.jacrev(lambda x, m=module: m(x[None])[0]))(x).detach().reshape(N, B.shape[0], -1)
        B = (J.mT @ B @ J).mean(0)
        found.append(B)
    return found[::-1]  # at the input of each module, and at the output of the last


@pytest.mark.parametrize(("head", "groups"), [("gap", 1), ("gcp", 1), ("gcp_exact", 1), ("gcp", 3)])
def test_kfra_is_an_average_at_every_module(head: str, groups: int):
    loss, n, positions = nn.CrossEntropyLoss(), 2, 9
    model, data = chain(head, nn.Tanh, channels=6), batch(loss, n=2, size=3)
    model[2] = nn.Conv2d(3, 6, 3, padding=1, groups=groups).double()
    B = averages(model, loss, data)
    torch.set_default_dtype(torch.float64)  # BackPACK's KFRA allocates in the default type
    try:
        twin = run(model, loss, data, extensions.KFRA())
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative(twin[-1].bias.kfra[0], B[-1]) <= EXACT
    x = model[:-1](data[0]).detach()
    assert relative(twin[-1].weight.kfra[1], x.mT @ x / n) <= EXACT
    for k in (0, 2):
        channels = model[k].out_channels
        H = B[k + 1].view(channels, positions, channels, positions)
        assert relative(twin[k].bias.kfra[0], H.sum((1, 3))) <= EXACT
        a = nn.functional.unfold(model[:k](data[0]).detach(), 3, padding=1)
        gradient, inputs = torch.einsum("itjt->ij", H), torch.einsum("nit,njt->ij", a, a) / (n * positions)
        if model[k].groups > 1:
            gradient, inputs = diagonal_blocks(gradient, groups), diagonal_blocks(inputs, groups)
        assert relative(twin[k].weight.kfra[0], gradient) <= EXACT
        assert relative(twin[k].weight.kfra[1], inputs) <= EXACT


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """[G n, G n] -> [G, n, n]."""
    return torch.stack([rows.chunk(groups, 1)[g] for g, rows in enumerate(matrix.chunk(groups))])


def test_first_order_quantities_need_no_row():
    model, loss, data = chain("gcp"), nn.CrossEntropyLoss(), batch(nn.CrossEntropyLoss())
    twin = run(model, loss, data, extensions.BatchGrad())
    total = sum(p.grad_batch.sum(0).flatten().square().sum() for p in twin.parameters())
    assert relative(total, sum(p.grad.square().sum() for p in twin.parameters())) <= EXACT


def test_registering_twice_changes_nothing():
    first = register(extensions.KFLR())
    assert register(first) is first
    model, loss, data = straight(), nn.CrossEntropyLoss(), batch(nn.CrossEntropyLoss())
    twin = run(model, loss, data, first)
    again = run(model, loss, data, extensions.KFLR())
    assert all(torch.equal(a, b) for a, b in zip(twin[0].weight.kflr, again[0].weight.kflr, strict=True))


def test_refusals():
    with pytest.raises(InputError, match=r"PCHMP is refused.*HMP"):
        register(extensions.PCHMP())
    with pytest.raises(InputError, match="instance"):
        register(extensions.KFAC)
    with pytest.raises(InputError, match="where branches begin"):
        register(extensions.KFRA()).accumulate_backpropagated_quantities(torch.eye(2), torch.eye(2))

    class Unknown(extensions.KFAC.__mro__[2]):
        pass

    with pytest.raises(InputError, match="unknown second-order extension Unknown; supported: KFAC"):
        kind_of(Unknown("field", {}))
