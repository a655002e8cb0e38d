"""Exact curvature blocks against torch.func: Gauss-Newton, Hessian, Fisher matrices, diagonals, of many networks."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from curvlinops import EFLinearOperator
from small_networks import around, batch, built, chain, relative, rows, straight, true_ggn, true_hessian
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.sample_gradients import SampleGradients
from secondorder.curvature.operators import DenseOperator, SymmetricOperator
from secondorder.errors import InputError, NonFiniteError
from secondorder.pooling import AdaptiveChannelDropout, pooling_head

CE, CE_SUM, MSE, MSE_SUM = (
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
)


class Tied(nn.Module):
    """One weight in two layers, one layer used twice, and one weight that is read without its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again.weight = self.first.weight
        self.read = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :6]
        x = self.again(self.first(x).tanh()).tanh()
        x = F.linear(x, self.read.weight) + 0.5 * self.read(x)
        return self.last(self.first(x))


class Attention(nn.Module):
    """Linear layers on sequences `[N, T, D]`, a layer norm, and parameters outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.scale, self.last = nn.Parameter(torch.tensor(0.7)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :20].unflatten(1, (5, 4))
        mixed = (self.q(x) @ x.mT * self.scale).softmax(-1) @ self.v(x)
        return self.last(self.norm(mixed + x)).mean(1)


def convolutions() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (3, 1), groups=2, padding="same", bias=False),
        norm,
        nn.ReLU6(inplace=True),
        nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(32, 3),
    ).eval()


def batch_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Tanh(),
        *pooling_head("gcp", 3).chain(),
        nn.Linear(6, 3),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "gap": lambda: chain("gap"),
    "covariance": lambda: chain("covariance"),
    "gcp": lambda: chain("gcp"),
    "gcp tanh": lambda: chain("gcp", nn.Tanh),
    "gcp 3 steps": lambda: chain("gcp", nn.Tanh, num_iter=3),
    "gcp_exact": lambda: chain("gcp_exact", nn.Tanh),
    "gcp_power": lambda: chain("gcp_power", nn.Tanh, exponent=0.7),
    "gcp_log": lambda: chain("gcp_log", nn.Tanh),
    "straight": straight,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 3)),
    "convolutions": convolutions,
    "tied": Tied,
    "attention": Attention,
    "batch statistics": batch_statistics,
}
# a loss is its derivatives at the outputs, whatever the network: each of both on a few
CONFIGURATIONS = [
    *((network, CE) for network in NETWORKS),
    *((network, MSE) for network in ("gap", "gcp tanh", "tied", "batch statistics")),
    ("gcp", CE_SUM),
    ("convolutions", MSE_SUM),
    ("gcp", nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5]).double())),
]


def made(name: str) -> nn.Module:
    return NETWORKS[name]().double()


def block_slices(model: nn.Module) -> dict[str, slice]:
    slices, start = {}, 0
    for name, p in model.named_parameters():
        slices[name] = slice(start, start + p.numel())
        start += p.numel()
    return slices


@pytest.mark.parametrize(("name", "loss"), CONFIGURATIONS)
def test_gauss_newton_equals_torch_func(name: str, loss: nn.Module) -> None:
    model, data = made(name), batch(loss, 4)
    G, blocks = true_ggn(model, loss, data), curvature_blocks(model, loss, data, "ggn")
    v, V = torch.randn(len(G)).double(), torch.randn(len(G), 2).double()
    assert relative(blocks.whole @ v, G @ v) <= 1e-12
    assert relative(blocks.whole @ V, G @ V) <= 1e-12
    assert relative(blocks.whole.dense(), G) <= 1e-12
    assert relative(blocks.whole.factored().dense(), G) <= 1e-12
    assert relative(blocks.whole.diagonal(), G.diagonal()) <= 1e-12
    assert relative(blocks.whole.trace(), G.trace()) <= 1e-12
    assert relative(blocks.whole.frobenius_norm(), torch.linalg.matrix_norm(G)) <= 1e-12
    assert relative(blocks.whole.eigenvalues(), torch.linalg.eigvalsh(G)) <= 1e-12
    assert list(blocks) == [name for name, _ in model.named_parameters()]
    scale = G.abs().max()
    for name, place in block_slices(model).items():
        block = G[place, place]
        assert float((blocks[name].dense() - block).abs().max()) <= 1e-12 * scale
        u = torch.randn(len(block)).double()
        assert float((blocks[name] @ u - block @ u).abs().max()) <= 1e-12 * scale * math.sqrt(len(block))
    diagonal = curvature_blocks(model, loss, data, "diagonal")
    assert relative(torch.cat([block.diagonal() for block in diagonal.values()]), G.diagonal()) <= 1e-12


class PlainNorm(nn.Module):
    """Layer or batch normalisation in plain operations: torch.func's second derivatives of PyTorch's own are wrong."""

    def __init__(self, norm: nn.LayerNorm | nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.dims = [-1] if isinstance(norm, nn.LayerNorm) else [0, 2, 3]
        self.shape = [-1] if isinstance(norm, nn.LayerNorm) else [1, -1, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dims, keepdim=True)
        normed = centred / (centred.square().mean(self.dims, keepdim=True) + self.eps).sqrt()
        return normed * self.weight.view(self.shape) + self.bias.view(self.shape)


def with_plain_norms(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, part in model.named_children():
        if isinstance(part, nn.LayerNorm) or (isinstance(part, nn.BatchNorm2d) and part.running_mean is None):
            setattr(model, name, PlainNorm(part))
    return model


@pytest.mark.parametrize(("name", "loss"), CONFIGURATIONS)
def test_hessian_equals_torch_func(name: str, loss: nn.Module) -> None:
    model, data = made(name), batch(loss, 3)
    H, blocks = true_hessian(with_plain_norms(model), loss, data), curvature_blocks(model, loss, data, "hessian")
    V = torch.randn(len(H), 2).double()
    assert relative(blocks.whole @ V, H @ V) <= 1e-12
    places = block_slices(model)
    smallest = min(places, key=lambda name: places[name].stop - places[name].start)
    for name in (smallest, list(places)[-2], list(places)[-1]):
        block = H[places[name], places[name]]
        assert float((blocks[name].dense() - block).abs().max()) <= 1e-12 * H.abs().max()


def test_gauss_newton_and_hessian_differ_below_a_covariance_head() -> None:
    model, data = made("gcp"), batch(CE)
    G, H = (curvature_blocks(model, CE, data, q)["0.weight"].dense() for q in ("ggn", "hessian"))
    assert relative(G, H) > 0.1


@pytest.mark.parametrize(("backbone", "head"), [("digits_tiny", "gcp"), ("digits_tiny", "gap")])
def test_residual_and_digits_networks(backbone: str, head: str) -> None:
    model, data = built(backbone, head, in_channels=2), batch(CE, 2, size=6)
    G = true_ggn(model, CE, data)
    blocks = curvature_blocks(model, CE, data, "ggn")
    for name, place in block_slices(model).items():
        assert float((blocks[name].dense() - G[place, place]).abs().max()) <= 1e-12 * G.abs().max()


def test_real_resnet() -> None:
    """torchvision's, of which one block in each stage is enough."""
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4, num_classes=3).double().eval()
    images, labels = batch(CE, 2, channels=3, size=32)
    w = {name: p.detach() for name, p in model.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in w.items()}
    truth = ggn_product(lambda w: functional_call(model, w, (images,)), w, v, labels)
    blocks = curvature_blocks(model, CE, (images, labels), "ggn")
    assert relative(blocks.whole @ torch.cat([t.flatten() for t in v.values()]), truth) <= 1e-12
    values = blocks[
        "layer4.0.downsample.0.weight"
    ].eigenvalues()  # 131,072, of which at most N (K - 1) = 4 are not zero
    assert int((values > 1e-10 * values[-1]).sum()) == 4
    assert relative(values.sum(), blocks["layer4.0.downsample.0.weight"].trace()) <= 1e-12


def ggn_product(
    outputs: Callable[[dict[str, Tensor]], Tensor], w: dict[str, Tensor], v: dict[str, Tensor], labels: Tensor
) -> Tensor:
    """J^T H J v by torch.func."""
    z, Jv = jvp(outputs, (w,), (v,))
    HJv = jvp(torch.func.grad(lambda z: CE(z, labels)), (z,), (Jv,))[1]
    return torch.cat([t.flatten() for t in vjp(outputs, w)[1](HJv)[0].values()])


@pytest.mark.parametrize("name", ["gap", "gcp", "convolutions", "tied", "attention"])
@pytest.mark.parametrize("loss", [CE, CE_SUM, MSE, MSE_SUM], ids=["ce", "ce sum", "mse", "mse sum"])
def test_empirical_fisher_equals_its_definition_and_curvlinops(name: str, loss: nn.Module) -> None:
    model, data = made(name), batch(loss, 4)
    N, K = 4, 3
    own = type(loss)(reduction=loss.reduction)  # 1/K of the sum of squares for a mean
    gradients = []
    for image, label in zip(*data, strict=True):
        value = own(model(image[None]), label[None])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    rows = torch.stack(gradients)
    c = {"sum": 1, "mean": N}[loss.reduction]
    whole = curvature_blocks(model, loss, data, "empirical_fisher").whole
    assert relative(whole.dense(), rows.mT @ rows / c) <= 1e-12
    if name != "attention":  # its mean over positions
        oracle = EFLinearOperator(model, loss, list(model.parameters()), [data], check_deterministic=False)
        v = torch.randn(whole.size).double()
        theirs = K if isinstance(loss, nn.MSELoss) and loss.reduction == "mean" else 1  # gradients of sums of squares
        assert relative(theirs * (whole @ v), oracle @ v) <= 1e-12


@pytest.mark.parametrize("loss", [CE, MSE_SUM], ids=["ce", "mse sum"])
def test_monte_carlo_fisher_is_unbiased(loss: nn.Module) -> None:
    model, data, S = made("gap"), batch(loss, 4), 1500
    exact = curvature_blocks(model, loss, data, "ggn")["2.bias"].dense()
    block = curvature_blocks(model, loss, data, "mc_fisher", samples=S)["2.bias"]
    assert isinstance(block, GaussNewtonOperator)
    rows = block.rows().view(4, S, -1) * math.sqrt(S)
    draws = torch.einsum("nsp,nsq->spq", rows, rows)  # what one sample would give, S times
    few = curvature_blocks(model, loss, data, "mc_fisher", samples=20)["2.bias"]
    assert relative(few.rows().mT @ few.rows(), few.dense()) <= 1e-12  # type: ignore[attr-defined]
    error, standard_error = draws.mean(0) - exact, draws.std(0) / math.sqrt(S)
    assert float((error.abs() / standard_error).max()) < 4  # 10 entries
    assert relative(draws.mean(0), exact) < 0.2


def test_monte_carlo_is_seeded() -> None:
    model, data = made("gcp"), batch(CE, 4)
    first, again, other = (
        curvature_blocks(model, CE, data, "mc_fisher", seed=seed).whole.dense() for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("quantity", ["ggn", "hessian", "mc_fisher", "empirical_fisher", "diagonal"])
@pytest.mark.parametrize("name", ["gcp", "tied", "convolutions"])
def test_parts_of_a_batch_give_the_same(name: str, quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made(name), batch(CE, 5)
    at_once = curvature_blocks(model, CE, data, quantity)
    v = torch.randn(at_once.whole.size).double()
    monkeypatch.setattr("secondorder.curvature.blocks.BLOCK_BYTES", 9000)  # single columns and samples
    for chunk in (1, 2):
        parts = curvature_blocks(model, CE, data, quantity, chunk=chunk)
        assert relative(parts.whole @ v, at_once.whole @ v) <= 1e-12
        if isinstance(at_once.whole, GaussNewtonOperator):
            assert relative(parts.whole.rows(), at_once.whole.rows()) <= 1e-12


@pytest.mark.parametrize("loss", [nn.HuberLoss(), nn.BCEWithLogitsLoss(), lambda z, y: (z - y).square().sum() ** 2])
def test_any_loss_has_products(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, (images, _) = made("gcp"), batch(CE, 3)
    data = images, torch.rand(3, 3).double()
    G, H = true_ggn(model, loss, data), true_hessian(model, loss, data)  # type: ignore[arg-type]
    scale = H.abs().max()
    for quantity, truth in {"ggn": G, "hessian": H}.items():
        blocks = curvature_blocks(model, loss, data, quantity)
        v = torch.randn(len(truth)).double()
        assert float((blocks.whole @ v - truth @ v).abs().max()) <= 1e-11 * scale
        assert float((blocks["0.bias"].dense() - truth[54:57, 54:57]).abs().max()) <= 1e-12 * scale
    assert (
        float(abs(curvature_blocks(model, loss, data, "ggn")["0.bias"].trace() - G[54:57, 54:57].trace()))
        <= 1e-12 * scale
    )


def test_outputs_with_positions_go_through_products() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    images, dense_labels = batch(CE, 2)[0], torch.randint(3, (2, 4, 4))
    w = {name: p.detach() for name, p in model.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in w.items()}
    truth = ggn_product(lambda w: functional_call(model, w, (images,)), w, v, dense_labels)
    whole = curvature_blocks(model, CE, (images, dense_labels), "ggn").whole
    assert relative(whole @ torch.cat([t.flatten() for t in v.values()]), truth) <= 1e-12


def test_dropout_masks_are_those_of_the_present_random_state() -> None:
    layers = [nn.Linear(72, 8), nn.Dropout(0.5), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)]
    model, data = nn.Sequential(nn.Flatten(), *layers).double(), batch(CE, 4)
    torch.manual_seed(11)
    mask = 2 * torch.empty(4, 8).double().bernoulli_(0.5)

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * mask

    torch.manual_seed(11)
    blocks = curvature_blocks(model, CE, data, "ggn")
    torch.manual_seed(5)
    fixed = nn.Sequential(*[Fixed() if isinstance(m, nn.Dropout) else m for m in model])
    G = true_ggn(fixed, CE, data)
    v = torch.randn(len(G)).double()
    assert relative(blocks.whole @ v, G @ v) <= 1e-12
    assert relative(blocks.whole @ v, G @ v) <= 1e-12
    assert relative(blocks.whole.dense(), G) <= 1e-12
    assert relative(blocks.whole.factored() @ v, G @ v) <= 1e-12  # rows see the same masks
    with pytest.raises(InputError, match=r"chunk=3 would change the result: .* random numbers \(dropout\)"):
        curvature_blocks(model, CE, data, "ggn", chunk=3)


class Detached(nn.Module):
    """x times a scale that gradients do not see, by no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.square().sum((1, 2, 3), keepdim=True)
        return x * scale


def test_what_no_grad_holds_constant_is_constant_in_forward_mode_too() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), Detached(), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    data = batch(CE, 3)
    blocks = curvature_blocks(model, CE, data, "ggn")
    v = torch.randn(blocks.whole.size).double()
    rows = []
    z = model(data[0])
    for n, F_n in enumerate(_root(z.detach())):
        for column in F_n.mT:
            gradient = torch.autograd.grad(z[n], list(model.parameters()), column, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradient]))
    G = torch.stack(rows).mT @ torch.stack(rows)
    assert relative(blocks.whole @ v, G @ v) <= 1e-12
    assert blocks.whole.jacobian.forward_mode is False
    assert relative(blocks.whole.dense(), G) <= 1e-12


def _root(z: Tensor) -> Tensor:
    """Columns of the cross-entropy's Hessian through its eigenvectors."""
    p = z.softmax(-1)
    values, vectors = torch.linalg.eigh((torch.diag_embed(p) - p[..., None] * p[:, None]) / len(z))
    return vectors * values.clamp_min(0).sqrt()[:, None]


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x.sin()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()  # type: ignore[attr-defined]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoForwardMode.apply(x)  # type: ignore[no-any-return]


class PlainSine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def test_functions_without_forward_mode_go_through_reverse_mode() -> None:
    model, data = nn.Sequential(nn.Conv2d(2, 3, 3), Sine(), nn.Flatten(), nn.Linear(48, 3)).double(), batch(CE, 3)
    plain = nn.Sequential(model[0], PlainSine(), nn.Flatten(), model[3])
    G, blocks = true_ggn(plain, CE, data), curvature_blocks(model, CE, data, "ggn")
    V = torch.randn(len(G), 2).double()
    assert relative(blocks.whole @ V, G @ V) <= 1e-12
    assert relative(blocks["0.weight"] @ V[:54], G[:54, :54] @ V[:54]) <= 1e-12


def test_layers_are_used_where_they_are_right_and_only_there() -> None:
    model, data = made("tied"), batch(CE, 3)
    whole = curvature_blocks(model, CE, data, "ggn").whole
    assert isinstance(whole, GaussNewtonOperator)
    gradients = SampleGradients(whole.jacobian, whole.matrix, whole.names)
    by_layers = gradients.by_layers(next(iter(whole.jacobian.parts())))
    assert by_layers == ["first.weight", "first.bias", "again.bias", "last.weight", "last.bias", "read.bias"]
    model = made("convolutions")
    whole = curvature_blocks(model, CE, data, "ggn").whole
    assert isinstance(whole, GaussNewtonOperator)
    gradients = SampleGradients(whole.jacobian, whole.matrix, whole.names)
    assert gradients.by_layers(next(iter(whole.jacobian.parts()))) == [name for name, _ in model.named_parameters()]


def test_frozen_parameters_have_no_block_unless_named() -> None:
    model, data = made("gcp"), batch(CE)
    G = true_ggn(model, CE, data)
    model[0].weight.requires_grad_(False)
    blocks = curvature_blocks(model, CE, data, "ggn")
    assert list(blocks) == ["0.bias", "2.weight", "2.bias", "7.weight", "7.bias"]
    assert relative(blocks.whole.dense(), G[54:, 54:]) <= 1e-12
    named = curvature_blocks(model, CE, data, "ggn", params=["7.bias", "0.weight"])
    assert list(named) == ["0.weight", "7.bias"]
    both = [*range(54), *range(len(G) - 3, len(G))]
    assert relative(named.whole.dense(), G[both][:, both]) <= 1e-12
    assert not model[0].weight.requires_grad


def test_parameters_that_do_nothing_have_zero_blocks() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(72, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x.flatten(1))

    model, data = Idle().double(), batch(CE)
    for quantity in ("ggn", "hessian"):
        blocks = curvature_blocks(model, CE, data, quantity)
        assert torch.equal(blocks["idle.weight"].dense(), torch.zeros(4, 4).double())
        assert torch.equal(blocks["idle.weight"] @ torch.ones(4).double(), torch.zeros(4).double())
        only = curvature_blocks(model, CE, data, quantity, ["idle.bias"])
        assert torch.equal(only.whole @ torch.ones(2).double(), torch.zeros(2).double())
        assert float(blocks["used.weight"].trace()) > 0


def test_single_precision_agrees_with_double() -> None:
    model, (images, labels) = made("gcp"), batch(CE, 4)
    exact = curvature_blocks(model, CE, (images, labels), "ggn").whole.dense()
    single = curvature_blocks(model.float(), CE, (images.float(), labels), "ggn").whole
    assert single.dtype == torch.float32
    assert relative(single.dense().double(), exact) < 1e-4
    v = torch.randn(len(exact))
    assert relative((single @ v).double(), exact @ v.double()) < 1e-4


USES: dict[str, Callable[[SymmetricOperator], Tensor]] = {
    "product": lambda whole: whole @ torch.ones(whole.size).double(),
    "diagonal": lambda whole: whole.diagonal(),
    "dense": lambda whole: whole.dense(),
    "trace": lambda whole: whole.trace(),
    "eigenvalues": lambda whole: whole.eigenvalues(),
}


@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("quantity", ["ggn", "hessian", "mc_fisher"])
def test_changed_parameters_are_noticed(quantity: str, use: str, chunk: int | None) -> None:
    model, data = around(torch.tanh), rows(3)
    whole = curvature_blocks(model, CE, data, quantity, chunk=chunk).whole
    before = USES[use](whole)
    assert torch.equal(USES[use](whole), before)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(InputError, match=r"parameter 0\.weight has changed"):
        USES[use](whole)


def test_running_statistics_are_those_of_the_time_of_construction() -> None:
    model, data = made("convolutions"), batch(CE)
    G, whole = true_ggn(model, CE, data), curvature_blocks(model, CE, data, "ggn").whole
    assert isinstance(whole, GaussNewtonOperator)
    assert relative(whole.diagonal(), G.diagonal()) <= 1e-12
    model.train()(5 + torch.randn(4, 2, 6, 6).double())
    assert relative(whole.diagonal(), G.diagonal()) <= 1e-12
    assert relative(whole.dense(), G) <= 1e-12
    assert relative(whole.rows().mT @ whole.rows(), G) <= 1e-12


@pytest.mark.parametrize("build", [batch_statistics, lambda: nn.Sequential(AdaptiveChannelDropout(2), convolutions())])
def test_batches_whose_samples_are_coupled_are_never_divided(build: Callable[[], nn.Module]) -> None:
    model, data = build().double(), batch(CE, 4)
    with pytest.raises(InputError, match=r"chunk=2 would change the result.*whole batch"):
        curvature_blocks(model, CE, data, "ggn", chunk=2)
    with pytest.raises(InputError, match="whole batch in training mode, so use a smaller batch"):
        curvature_blocks(model, CE, data, "ggn", memory=20_000)


def test_coupling_by_the_networks_own_code_is_noticed() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model, data = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.Tanh(), Centred()).double(), batch(CE, 4)
    assert relative(curvature_blocks(model, CE, data, "ggn").whole.dense(), true_ggn(model, CE, data)) <= 1e-12
    with pytest.raises(InputError, match="the network lets images act on one another"):
        curvature_blocks(model, CE, data, "ggn", chunk=2)


class Scaled(nn.Module):
    """x over a number that gradients do not see: `by` of the whole batch."""

    def __init__(self, by: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by(x.detach())


@pytest.mark.parametrize("by", [lambda x: x.abs().mean(), lambda x: len(x)])
@pytest.mark.parametrize("more", [[], [nn.Dropout(0.3)]])
def test_coupling_that_gradients_do_not_see_is_noticed(by: Callable[[Tensor], Tensor], more: list[nn.Module]) -> None:
    data = batch(CE, 4)
    model = nn.Sequential(Scaled(by), nn.Flatten(), *more, nn.Linear(72, 3)).double()
    if more and by(data[0]) == len(data[0]):
        model.eval()  # random masks hide what the number of images alone does
    with pytest.raises(InputError, match="the network lets images act on one another"):
        curvature_blocks(model, CE, data, "ggn", chunk=2)
    alone = nn.Sequential(Scaled(lambda x: x.abs().mean((1, 2, 3), keepdim=True)), *model[1:])
    assert (
        curvature_blocks(alone.eval(), CE, data, "ggn", chunk=2).whole.size == 219
    )  # random masks are those of a batch


def test_networks_that_take_no_single_image_are_not_divided() -> None:
    class Squeezed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.squeeze()

    model, data = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), Squeezed()).double(), batch(CE, 3)
    assert relative(curvature_blocks(model, CE, data, "ggn").whole.dense(), true_ggn(model, CE, data)) <= 1e-12
    with pytest.raises(InputError, match="cannot be evaluated for a single image"):
        curvature_blocks(model, CE, data, "ggn", chunk=2)


def refused(**changes: object) -> dict[str, object]:
    images, labels = batch(CE)
    return {"loss": CE, "batch": (images, labels), "quantity": "ggn"} | changes


def broken(images: Tensor) -> Tensor:
    return images.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(math.nan).double())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantity": "gnn"}, "unknown quantity 'gnn'; choose one of: ggn, hessian"),
        ({"quantity": "kfac_expand", "fisher": "type-2"}, "unknown fisher 'type-2'"),
        ({"params": ["0.wieght"]}, r"unknown parameter '0\.wieght'; choose one of: 0\.weight"),
        ({"params": []}, "params is empty"),
        ({"batch": (torch.zeros(0, 2, 6, 6).double(), torch.zeros(0).long())}, "at least one"),
        (
            {"batch": (torch.zeros(2, 2, 6, 6).double(), torch.zeros(3).long())},
            r"images \[2, 2, 6, 6\] and labels \[3\]",
        ),
        ({"batch": torch.zeros(2, 2, 6, 6)}, "a pair"),
        (
            {"batch": (torch.zeros(2, 2, 6, 6), torch.zeros(2).long())},
            r"images are torch\.float32, the network is torch",
        ),
        ({"batch": (broken(torch.ones(3, 2, 6, 6).double()), torch.zeros(3).long())}, "images contain NaN"),
        ({"batch": (torch.ones(3, 2, 6, 6).double(), torch.tensor([0, 3, 0]))}, "label 3 is out of range"),
        (
            {"loss": nn.HuberLoss(), "quantity": "mc_fisher"},
            "'mc_fisher' needs cross-entropy, .* or squared error.*HuberLoss",
        ),
        ({"loss": nn.HuberLoss(), "quantity": "diagonal"}, "'diagonal' needs.*use quantity 'ggn' or 'hessian'"),
        ({"loss": nn.HuberLoss(), "quantity": "kfac_expand"}, "'kfac_expand' needs"),
        ({"loss": nn.HuberLoss(), "chunk": 2}, "HuberLoss is not known to be a sum"),
        ({"samples": 0, "quantity": "mc_fisher"}, "samples must be .*, got 0"),
        ({"samples": 10**400, "quantity": "mc_fisher"}, "samples must be .* from 1 to 2147483647, got 1000"),
        (
            {"samples": 10**8, "quantity": "mc_fisher", "memory": 10**8},
            "samples=100000000 needs about .* GiB.*; use fewer",
        ),
        ({"chunk": 0}, "chunk must be .*, got 0"),
        ({"chunk": 2.5}, r"chunk must be .*, got 2\.5"),
        ({"memory": -1}, "memory must be .*, got -1"),
        ({"loss": None}, r"loss None: must be a function .* nn\.CrossEntropyLoss\(\)"),
        ({"loss": nn.CrossEntropyLoss}, "loss <class .*: must be a function"),
        (
            {"batch": (torch.ones(3, 5, 6, 6).double(), torch.zeros(3).long())},
            r"the network fails for images \[3, 5, 6, 6\]: Given groups=1",
        ),
        ({"batch": (torch.ones(3, 72).double(), torch.zeros(3).long())}, r"the network fails for images \[3, 72\]: "),
    ],
)
def test_bad_input_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        curvature_blocks(made("gcp"), **refused(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantity", ["ggn", "hessian", "kfac_expand", "diagonal"])
def test_short_numbers_are_refused(quantity: str, dtype: torch.dtype) -> None:
    images, labels = batch(CE)
    with pytest.raises(InputError, match=rf"parameter 0\.weight is {dtype}, .*; use network\.float\(\)"):
        curvature_blocks(made("gcp").to(dtype), CE, (images.to(dtype), labels), quantity)
    with pytest.raises(InputError, match=rf"an operator of {dtype} is too short"):
        DenseOperator(torch.eye(3, dtype=dtype))


def test_networks_that_cannot_be_measured_are_refused() -> None:
    data = batch(CE)
    with pytest.raises(InputError, match="has no parameters"):
        curvature_blocks(nn.Flatten(), CE, data, "ggn")
    with pytest.raises(InputError, match="no parameter requires gradients"):
        curvature_blocks(made("gcp").requires_grad_(False), CE, data, "ggn")
    with pytest.raises(InputError, match=r"returns torch.float64 of shape \[1, 2, 3\] within tuple for 2 samples"):
        curvature_blocks(nn.Sequential(nn.Flatten(2), nn.GRU(36, 3)).double(), CE, data, "ggn")
    with pytest.raises(KeyError, match=r"no block for '1\.weight'; there are: 0\.weight"):
        curvature_blocks(made("gcp"), CE, data, "ggn")["1.weight"]
    with pytest.raises(InputError, match="closed form"):
        curvature_blocks(made("gcp"), nn.HuberLoss(), (data[0], torch.zeros(3, 3).double()), "ggn").whole.rows()  # type: ignore[attr-defined]


def test_the_first_module_with_nan_is_named() -> None:
    model, data = made("gcp"), batch(CE)
    with torch.no_grad():
        model[2].bias[1] = math.inf
    with pytest.raises(NonFiniteError, match="the output of 2 contains NaN or infinity"):
        curvature_blocks(model, CE, data, "ggn")
    assert not any(module._forward_hooks for module in model.modules())


class Constant(nn.Sequential):
    """A network whose outputs depend on no parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize("quantity", ["ggn", "hessian", "diagonal", "mc_fisher", "kfac_expand", "ekfac"])
def test_a_detached_network_has_no_curvature(quantity: str) -> None:
    network = Constant(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
    assert not curvature_blocks(network, nn.CrossEntropyLoss(), batch, quantity, memory=10**400).whole.dense().any()


def test_images_of_eight_bits_and_of_numbers_without_squares() -> None:
    network, labels = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"the images are torch.float8_e4m3fn, the network is torch.float32"):
        curvature_blocks(network, nn.CrossEntropyLoss(), (torch.ones(2, 3).to(torch.float8_e4m3fn), labels), "ggn")
    with pytest.raises(NonFiniteError, match=r"a Kronecker factor \[\d, \d\] .* has no eigenbasis in torch.float32"):
        curvature_blocks(network, nn.CrossEntropyLoss(), (torch.full((2, 3), 1e30), labels), "ekfac")
