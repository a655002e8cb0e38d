"""Curvature with respect to images and activations, against torch.func in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
from small_networks import CLASSES, batch, chain
from torch import Tensor, nn
from torch.func import hessian, jacrev
from torch.nn import functional as F

from secondorder.curvature import SumOverSamples, activation_curvature, top_eigenvalues
from secondorder.errors import InputError, NonFiniteError

CE = nn.CrossEntropyLoss()
LOSSES = {
    "cross-entropy": CE,
    "weighted": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]).double(), reduction="mean"),
    "squared error": nn.MSELoss(reduction="sum"),
}


def split(model: nn.Sequential, at: str | None) -> tuple[nn.Module, nn.Module]:
    """The network up to a module, and what follows."""
    cut = 0 if at is None else 1 + int(at)
    return model[:cut], model[cut:]


def truth(quantity: str, rest: Callable[[Tensor], Tensor], loss: nn.Module, a: Tensor, labels: Tensor) -> Tensor:
    """d^2 L / da^2 or J^T H J [N D, N D] of L = loss(rest(a), labels)."""
    flat = a.detach().flatten()
    if quantity == "hessian":
        return hessian(lambda v: loss(rest(v.view_as(a)), labels))(flat).detach()
    J = jacrev(lambda v: rest(v.view_as(a)).flatten())(flat).detach()
    z = rest(a).detach()
    H = hessian(lambda v: loss(v.view_as(z), labels))(z.flatten())
    return J.mT @ H @ J


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("quantity", ["ggn", "hessian"])
@pytest.mark.parametrize(
    ("loss", "at"),
    [*(("cross-entropy", at) for at in (None, "0", "3", "6")), ("weighted", None), ("squared error", "3")],
)
def test_the_whole_and_the_blocks_of_samples(loss: str, quantity: str, at: str | None) -> None:
    model, (images, labels) = chain("gcp", nn.Tanh, channels=3), batch(LOSSES[loss], size=4)
    stem, rest = split(model, at)
    a = stem(images).detach()
    found = activation_curvature(model, LOSSES[loss], (images, labels), quantity, at)
    expected = truth(quantity, rest, LOSSES[loss], a, labels)
    assert found.shape == a.shape[1:]
    check(found.whole.dense(), expected)
    D = a[0].numel()
    assert len(found.samples) == len(images)
    for n, block in enumerate(found.samples):
        own = slice(n * D, (n + 1) * D)
        V = torch.randn(D, 2, dtype=torch.float64)
        check(block @ V, expected[own, own] @ V)
    check(found.samples[1].dense(), expected[D : 2 * D, D : 2 * D])


def test_samples_on_their_own_are_their_terms_of_the_mean() -> None:
    model, (images, labels) = chain("gap", nn.Tanh), batch(CE, size=4)
    together = activation_curvature(model, CE, (images, labels), "hessian")
    for n, block in enumerate(together.samples):
        alone = activation_curvature(model, CE, (images[n : n + 1], labels[n : n + 1]), "hessian")
        check(block.dense() * len(images), alone.whole.dense())
        assert len(alone.samples) == 1


@pytest.mark.parametrize("at", [None, "0"])
def test_fishers_and_the_diagonal(at: str | None) -> None:
    model, (images, labels) = chain("gap", nn.Tanh), batch(CE)
    stem, rest = split(model, at)
    a = stem(images).detach().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(rest(a), labels, reduction="sum"), a)[0].flatten(1)
    empirical = activation_curvature(model, CE, (images, labels), "empirical_fisher", at)
    check(empirical.whole.dense(), torch.block_diag(*[torch.outer(g, g) for g in gradient]) / len(images))
    ggn = truth("ggn", rest, CE, a, labels)
    check(activation_curvature(model, CE, (images, labels), "diagonal", at).whole.diagonal(), ggn.diagonal())
    many = activation_curvature(model, CE, (images, labels), "mc_fisher", at, samples=1000, seed=1).whole.dense()
    assert float((many - ggn).norm() / ggn.norm()) < 0.05  # at most 0.015 of three seeds
    few, again, other = (
        activation_curvature(model, CE, (images, labels), "mc_fisher", at, seed=seed).whole.dense()
        for seed in (1, 1, 2)
    )
    assert torch.equal(few, again)
    assert not torch.allclose(few, other)


@pytest.mark.parametrize("quantity", ["ggn", "hessian"])
def test_batch_statistics_couple_samples(quantity: str) -> None:
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)
    model, (images, labels) = nn.Sequential(*layers).double(), batch(CE)
    before = copy.deepcopy(model.state_dict())
    for at in (None, "0", "2"):
        rest = copy.deepcopy(split(model, at)[1])
        rest.apply(lambda m: setattr(m, "track_running_stats", False))
        a = split(copy.deepcopy(model), at)[0](images)
        expected = truth(quantity, rest, CE, a, labels)
        check(activation_curvature(model, CE, (images, labels), quantity, at).whole.dense(), expected)
        coupled = bool(expected[: a[0].numel(), a[0].numel() :].abs().max() > 1e-6)
        assert coupled == (at != "2")
    with pytest.raises(
        InputError, match=r"chunk=1 would change the result: network.1 .BatchNorm2d. uses the statistics"
    ):
        activation_curvature(model, CE, (images, labels), quantity, chunk=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("quantity", ["ggn", "hessian"])
@pytest.mark.parametrize("at", [None, "3"])
def test_parts_of_a_batch_and_losses_of_ones_own(quantity: str, at: str | None) -> None:
    model, (images, labels) = chain("gcp", nn.Tanh, channels=3), batch(CE, n=5, size=4)
    own = SumOverSamples(lambda z, y: F.cross_entropy(z, y, reduction="sum") / 5)
    whole = activation_curvature(model, CE, (images, labels), quantity, at).whole
    V = torch.randn(whole.size, 2, dtype=torch.float64)
    for loss in (CE, own):
        check(activation_curvature(model, loss, (images, labels), quantity, at, chunk=2).whole @ V, whole @ V)
    check(activation_curvature(model, lambda z, y: CE(z, y), (images, labels), quantity, at).whole @ V, whole @ V)


def test_the_gradient_of_an_activation_changes_by_the_hessian() -> None:
    """Along the sharpest direction, an eigenvector of the whole."""
    model, (images, labels) = chain("gcp", nn.Tanh), batch(CE)
    stem, rest = split(model, "1")
    found = activation_curvature(model, CE, (images, labels), "hessian", "1")
    top = top_eigenvalues(found.whole, 1)
    a = stem(images).detach()
    d = top.vectors[:, 0].view(len(images), *found.shape)
    losses = [float(CE(rest(a + step * d), labels).detach()) for step in (-1e-3, 0.0, 1e-3)]
    assert (losses[0] - 2 * losses[1] + losses[2]) / 1e-6 == pytest.approx(float(top.values[0]), rel=1e-4)


class Attending(nn.Module):
    """A transformer layer between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.layer(self.embed(words)).mean(1))


@pytest.mark.parametrize("quantity", ["ggn", "hessian"])
def test_embedded_words_of_a_transformer(quantity: str) -> None:
    model = Attending().double().eval()
    words, labels = torch.randint(7, (3, 2)), torch.arange(3) % CLASSES
    found = activation_curvature(model, CE, (words, labels), quantity, "embed")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        rest = lambda a: model.last(model.layer(a).mean(1))  # noqa: E731
        check(found.whole.dense(), truth(quantity, rest, CE, model.embed(words), labels))
    with pytest.raises(InputError, match=r"the images are torch.int64; curvature needs floating-point numbers"):
        activation_curvature(model, CE, (words, labels), quantity)


class Slope(nn.Module):
    """The derivative of a network with respect to its images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)[0]


def test_networks_that_differentiate_with_respect_to_images() -> None:
    model, x, y = Slope(), torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    loss = nn.MSELoss()
    slope = lambda a: jacrev(lambda b: model.inner(b).sum())(a)  # noqa: E731
    for quantity in ("ggn", "hessian"):
        found = activation_curvature(model, loss, (x, y), quantity)
        check(found.whole.dense(), truth(quantity, slope, loss, x, y))


def test_networks_without_parameters_and_outputs_as_activations() -> None:
    model, (images, labels) = nn.Sequential(nn.Flatten(), nn.Softplus()), (torch.randn(3, 4).double(), torch.arange(3))
    found = activation_curvature(model, CE, (images, labels), "hessian")
    check(found.whole.dense(), truth("hessian", model, CE, images, labels))
    logits = activation_curvature(model, CE, (images, labels), "ggn", "")
    check(logits.whole.dense(), truth("ggn", lambda z: z, CE, model(images), labels))


def test_nothing_is_left_behind() -> None:
    model, (images, labels) = chain("gcp", nn.ReLU), batch(CE)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    kept, state = images.clone(), torch.get_rng_state()
    found = activation_curvature(model, CE, (images, labels), "hessian", "1")
    v = torch.randn(found.whole.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = found.whole @ v
    assert torch.equal(images, kept)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    assert bool((model[0].weight.grad == 1).all())
    assert not model[2].weight.requires_grad
    images.zero_()  # the batch was copied
    assert torch.equal(found.whole @ v, product)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(InputError, match=r"parameter network.0.weight has changed"):
        found.whole @ v


class Odd(nn.Module):
    """Modules that are not called once, and one that puts out a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)
        self.mean = nn.Flatten(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        self.mean(x)
        return self.pair(x[:, None])[0][:, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": "twice"}, "module 'twice' is called 2 times; name one that is called once"),
        ({"at": "never"}, "module 'never' is called 0 times"),
        ({"at": "pair"}, r"module 'pair' puts out tuple for 2 images; name one that puts out a tensor \[N, ...\]"),
        ({"at": "mean"}, r"module 'mean' puts out shape \[8\] for 2 images"),
        ({"at": "layer9"}, "unknown module 'layer9'; choose one of: "),
        ({"at": 3}, "unknown module 3"),
        ({"quantity": "kfac_expand"}, "unknown quantity 'kfac_expand'; choose one of: ggn, hessian, empirical_fisher"),
        ({"network": 3}, "network int: must be a torch.nn.Module"),
        ({"batch": 3}, "a batch is a pair"),
        ({"batch": (torch.zeros(2, 4).double(), torch.zeros(3))}, "a batch needs one label for each image"),
        (
            {"batch": (torch.zeros(2, 4), torch.zeros(2).long())},
            "the images are torch.float32, the network is torch.float64",
        ),
        ({"batch": (torch.full((2, 4), torch.nan).double(), torch.zeros(2).long())}, "the images contain NaN"),
        (
            {"batch": (torch.zeros(2, 5).double(), torch.zeros(2).long()), "at": "pair"},
            r"the network for images \[2, 5\] fails",
        ),
        ({"batch": (torch.zeros(2, 5).double(), torch.zeros(2).long())}, "the network fails for images"),
        ({"loss": 3}, "loss"),
        ({"chunk": 0}, "chunk must be a whole number"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    data = torch.randn(2, 4).double(), torch.tensor([0, 2])
    good = {"network": Odd().double(), "loss": CE, "batch": data, "quantity": "ggn"}
    with pytest.raises(InputError, match=message) as error:
        activation_curvature(**(good | change))  # type: ignore[arg-type]
    assert isinstance(error.value, NonFiniteError) == ("NaN" in message)
