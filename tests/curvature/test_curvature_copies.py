"""Numbers depend neither on free memory nor on what is changed after the construction, and the network is left as it was."""

from collections.abc import Callable

import pytest
import torch
from own_functions import BrokenForwardMode, Sine
from small_networks import By, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from secondorder.curvature import curvature_blocks
from secondorder.curvature.operators import SymmetricOperator
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()
F64 = torch.float64


def network(*inside: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), *inside, nn.Tanh(), nn.Linear(8, 3)).double()


def data(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 5, dtype=F64), torch.randint(3, (count,))


# ---------------------------------------------------------------------------------------------------------- random masks


class Noise(nn.Module):
    """Multiplicative noise, from PyTorch's, NumPy's or an own generator."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x)


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "one number for the batch": lambda: Noise(lambda x: torch.rand((), dtype=x.dtype)),
    "randn_like": lambda: Noise(torch.randn_like),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_random_masks_are_those_of_the_batch_whatever_the_memory(kind: str) -> None:
    model, batch = network(RANDOM[kind]()), data()
    state = torch.get_rng_state()
    whole = curvature_blocks(model, CE, batch, "ggn").whole
    again = curvature_blocks(model, CE, batch, "ggn", chunk=6, memory=2**20).whole
    assert torch.equal(state, torch.get_rng_state())
    truth = whole.dense()
    assert relative(again.dense(), truth) <= 1e-12
    assert relative(again @ torch.ones(whole.size, dtype=F64), truth.sum(1)) <= 1e-11
    for little in ({"chunk": 4}, {"memory": 3000}):
        with pytest.raises(InputError, match=r"random numbers \(dropout\).*eval\(\)|.*smaller batch"):
            curvature_blocks(model, CE, batch, "ggn", **little)  # type: ignore[arg-type]
    model.eval()
    if "ropout" in kind:
        parts = [curvature_blocks(model, CE, batch, "ggn", chunk=chunk).whole.dense() for chunk in (1, 4, 6)]
        assert max(relative(part, parts[0]) for part in parts) <= 1e-12


def product(operator: SymmetricOperator) -> Tensor:
    return operator @ torch.ones(operator.size, dtype=F64)


@pytest.mark.parametrize("count", [2, 6, 40])
def test_outputs_that_change_by_themselves_are_refused(count: int) -> None:
    source = torch.Generator().manual_seed(0)
    model, batch = network(Noise(lambda x: torch.rand(x.shape, generator=source, dtype=x.dtype))), data(count)
    for quantity in ("ggn", "hessian", "diagonal"):
        with pytest.raises(InputError, match="outputs differ from one evaluation to the next"):
            product(curvature_blocks(model, CE, batch, quantity).whole)
    blocks = curvature_blocks(model, CE, batch, "ggn")
    for _ in range(2):
        with pytest.raises(InputError, match="outputs differ from one evaluation to the next"):
            blocks.whole.dense()
    with pytest.raises(InputError, match="outputs differ from one evaluation to the next"):
        curvature_blocks(model, CE, batch, "kfac_expand")
    for function in (Sine.apply, BrokenForwardMode.apply):  # products of which are made by other ways
        blocks = curvature_blocks(nn.Sequential(model, By(function)), CE, batch, "ggn")
        with pytest.raises(InputError, match="outputs differ from one evaluation to the next"):
            product(blocks.whole)


# ----------------------------------------------------------------------------------------- nothing is written, or mixed


class Words(nn.Module):
    """The mean of word vectors that have at most a norm, as the forward pass makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4, max_norm=0.5)
        self.words.weight.data[:2] *= 0.01  # shorter than that: nothing is written for the first samples
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.words(x).mean(1).tanh())


class Clamped(nn.Module):
    """A layer that clamps its weight in every forward pass, as critics of Wasserstein networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.mul_(0.5)
        return self.layer(x)


@pytest.mark.parametrize("build", [Words, Clamped])
def test_the_forward_pass_writes_into_no_parameter(build: Callable[[], nn.Module]) -> None:
    model = build().double()
    words = torch.cat([torch.randint(2, (2, 3)), torch.randint(10, (4, 3))])
    batch = (words if build is Words else torch.randn(6, 5, dtype=F64)), torch.randint(3, (6,))
    before = {name: (p.clone(), p._version) for name, p in model.named_parameters()}
    found = {}
    for quantity in ("ggn", "hessian"):
        found[quantity] = curvature_blocks(model, CE, batch, quantity).whole.dense()
        for chunk in (None, 2):
            whole = curvature_blocks(model, CE, batch, quantity, chunk=chunk).whole
            v = torch.randn(whole.size, dtype=F64)
            for _ in range(2):
                assert relative(whole @ v, found[quantity] @ v) <= 1e-11
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p._version == before[name][1]
    # as for the network that a forward pass leaves behind
    with torch.no_grad():
        model(batch[0])
    if isinstance(model, Words):
        model.words.max_norm = None
    plain = model if isinstance(model, Words) else nn.Sequential(model.layer)  # type: ignore[arg-type]
    assert relative(found["ggn"], true_ggn(plain, CE, batch)) <= 1e-12
    assert relative(found["hessian"], true_hessian(plain, CE, batch)) <= 1e-11


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("quantity", ["ggn", "hessian", "empirical_fisher"])
def test_what_is_changed_unnoticed_later_has_no_part(quantity: str, chunk: int | None) -> None:
    model, (images, labels) = network(nn.LayerNorm(8)), data()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64))
    blocks = curvature_blocks(model, loss, (images, labels), quantity, ["0.weight", "3.bias"], chunk=chunk)
    truth = curvature_blocks(model, loss, (images, labels), quantity, ["0.weight", "3.bias"]).whole.dense()
    v = torch.randn(len(truth), dtype=F64)
    assert relative(blocks.whole @ v, truth @ v) <= 1e-12
    for p in model.parameters():  # also those that were not chosen
        p.data.mul_(1.3)
    images.mul_(2)
    labels.add_(1).remainder_(3)
    assert loss.weight is not None
    loss.weight.mul_(3)
    assert relative(blocks.whole @ v, truth @ v) <= 1e-12
    assert relative(blocks.whole.dense(), truth) <= 1e-12
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(InputError, match=r"parameter 0\.weight has changed"):
        blocks.whole @ v


# ---------------------------------------------------------------------------------------------------------------- memory


def peak(work: Callable[[], object]) -> int:
    """The most bytes that tensors made in a call take at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("quantity", "outputs"),
    [("ggn", 5_000), ("hessian", 5_000), ("mc_fisher", 20_000), ("diagonal", 150), ("kfac_expand", 150)],
)
@pytest.mark.parametrize("loss", [CE, nn.MSELoss()], ids=["ce", "mse"])
def test_many_outputs_stay_in_the_budget(loss: nn.Module, quantity: str, outputs: int) -> None:
    N, K = 64, outputs
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, K))
    batch = torch.randn(N, 3), torch.randint(K, (N,)) if loss is CE else torch.randn(N, K)
    memory = (
        (400 if K < 1000 else 160) * 4 * K
    )  # numbers like the outputs of a sample; of all at once there are 9 N = 576

    def work() -> None:
        whole = curvature_blocks(model, loss, batch, quantity, ["0.weight"], memory=memory).whole
        whole @ torch.ones(whole.size)

    model(batch[0][:2])  # what libraries allocate once
    assert peak(work) <= memory


def test_a_loss_that_cannot_be_divided_says_what_its_outputs_take() -> None:
    N, K = 24, 1000
    model, batch = nn.Sequential(nn.Linear(3, K)), (torch.randn(N, 3), torch.randint(K, (N,)))
    with pytest.raises(InputError, match=r"is not known to be a sum over the samples .*, so use a smaller batch"):
        curvature_blocks(model, lambda z, y: F.cross_entropy(z, y), batch, "ggn", memory=4 * 12 * N * K)
