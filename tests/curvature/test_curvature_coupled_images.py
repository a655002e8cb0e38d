"""Networks in which images act on one another, in one direction only or hidden from gradients: right at once, never divided."""

from collections.abc import Callable

import pytest
import torch
from small_networks import By, batch, chain, relative, reverse_ggn, rows
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.curvature.matrix_free.batch_parts import probed
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.sample_coupling import splits
from secondorder.errors import InputError
from secondorder.pooling import POOLINGS

CE = nn.CrossEntropyLoss()


class TimeMajor(nn.Module):
    """A recurrent network that takes the images for moments in time."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def lagged(x: Tensor, lag: int) -> Tensor:
    return torch.cat([x[:lag], x[lag:] + x[:-lag]])


def centred_gradient(x: Tensor) -> Tensor:
    """The identity, but for its derivative."""
    return x + x.mean(0) - x.mean(0).detach()


def unseen(x: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        scale = 1 + by(x).square()
    return x / scale


COUPLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda x: x.cumsum(0),
    "sum of the later": lambda x: x.flip(0).cumsum(0).flip(0),
    "attention": lambda x: (x @ x.T).softmax(-1) @ x,
    "sort": lambda x: x.sort(0).values,
    "roll": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0),
    "maximum": lambda x: x / x.amax(0),
    "first": lambda x: x - x[:1],
    "last": lambda x: x * x[-1:],
    "pairs": lambda x: x - x.view(len(x) // 2, -1, 4).mean(1).repeat_interleave(x.view(len(x) // 2, -1, 4).shape[1], 0),
    "lag 2": lambda x: lagged(x, 2),
    "lag 3": lambda x: lagged(x, 3),
    "gradient only": centred_gradient,
    "unseen mean": lambda x: unseen(x, lambda x: x.mean(0)),
    "unseen cumsum": lambda x: unseen(x, lambda x: x.cumsum(0) - x),
    "unseen neighbour": lambda x: unseen(x, lambda x: x.roll(-1, 0)),
}


@pytest.mark.parametrize("coupling", [*COUPLINGS, "recurrent", "cumsum, dropout"])
def test_coupled_images_are_evaluated_together(coupling: str) -> None:
    layer = TimeMajor() if coupling == "recurrent" else By(COUPLINGS[coupling.split(",")[0]])
    dropout = [nn.Dropout(0.3)] if "dropout" in coupling else []
    model, data = nn.Sequential(nn.Linear(6, 4), layer, nn.Tanh(), *dropout, nn.Linear(4, 3)).double(), rows(6)
    data[0][:2], data[0][5] = 0, 1e4 * data[0][5]
    torch.manual_seed(3)
    blocks = curvature_blocks(model, CE, data, "ggn")
    torch.manual_seed(3)
    G = reverse_ggn(model, CE, data)
    v = torch.randn(len(G)).double()
    assert relative(blocks.whole @ v, G @ v) <= 1e-12
    assert relative(blocks.whole.dense(), G) <= 1e-12
    assert relative(blocks.whole.rows().mT @ blocks.whole.rows(), G) <= 1e-12  # type: ignore[attr-defined]
    for quantity in ("ggn", "hessian", "mc_fisher", "diagonal"):
        with pytest.raises(InputError, match=r"chunk=2 would change the result: the network .*; use chunk=None"):
            curvature_blocks(model, CE, data, quantity, chunk=2)


@pytest.mark.parametrize("coupling", ["cumsum", "sum of the later", "flip"])
def test_tokens_have_no_gradient_but_company(coupling: str) -> None:
    layers = nn.Embedding(10, 4), By(COUPLINGS[coupling]), nn.Linear(4, 3)
    data = torch.arange(6), torch.randint(3, (6,))
    for model in (nn.Sequential(*layers), nn.Sequential(layers[0], layers[2])):
        G = reverse_ggn(model.double(), CE, data)
        assert relative(curvature_blocks(model, CE, data, "ggn").whole.dense(), G) <= 1e-12
    assert relative(curvature_blocks(model, CE, data, "ggn", chunk=2).whole.dense(), G) <= 1e-12
    with pytest.raises(InputError, match="chunk=2 would change the result"):
        curvature_blocks(nn.Sequential(*layers), CE, data, "ggn", chunk=2)


ALONE: dict[str, Callable[[], nn.Module]] = {head: lambda head=head: chain(head).eval() for head in POOLINGS} | {
    "recurrent": lambda: nn.Sequential(nn.Flatten(2), nn.LSTM(36, 3, batch_first=True), By(lambda out: out[0][:, -1])),
    "norm of zero": lambda: nn.Sequential(
        nn.Flatten(), By(lambda x: x * x.norm(dim=1, keepdim=True)), nn.Linear(72, 3)
    ),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    "pooling": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Softmax(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALONE)
def test_images_that_do_not_act_on_one_another_may_be_divided(name: str, dtype: torch.dtype) -> None:
    model, x = ALONE[name]().to(dtype), batch(CE, 6)[0].to(dtype)
    x[0], x[2] = 0, 1e3 * x[2]
    assert probed(FrozenNetwork(model), x)[0].coupling is None


def test_networks_that_take_no_other_number_of_images() -> None:
    model = nn.Sequential(
        nn.Linear(6, 4), By(lambda x: x.view(-1, 2, 4).flip(1).flatten(0, 1)), nn.Linear(4, 3)
    ).double()
    data = rows(10)
    model.insert(2, By(lambda x: x if len(x) in (2, 10) else x.view(len(x), 5)))
    assert relative(curvature_blocks(model, CE, data, "ggn").whole.dense(), reverse_ggn(model, CE, data)) <= 1e-12
    with pytest.raises(
        InputError, match="chunk=2 would change the result: the network cannot be evaluated for 4 images"
    ):
        curvature_blocks(model, CE, data, "ggn", chunk=2)


def test_every_two_places_are_separated_by_their_digits() -> None:
    for count in range(2, 12):
        every = [torch.tensor(stay) for stay in splits(count)]
        some = every[:2]
        assert all(stay.any() and not stay.all() for stay in every)
        apart = torch.stack([stay[:, None] & ~stay for stay in every]).any(0)
        assert bool((apart | torch.eye(count).bool()).all())
        assert all(bool((some[0] ^ some[0].roll(-1))[n]) for n in range(0, count - 1, 2))
