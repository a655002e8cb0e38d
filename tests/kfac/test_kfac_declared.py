"""Modules of other classes that compute what a Linear or a convolution does, and those that only look like it."""

from typing import Any

import pytest
import torch
from kfac_training import KINDS, same, train
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFAC, Options
from secondorder.kfac.layers import find_layers
from secondorder.kfac.step_rule import STEP_RULES


class Conv1D(nn.Module):
    """Hugging Face's layer of GPT-2: x W + b with W `[D, O]`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Tokens(nn.Module):
    """Two layers on `[N, T, 6]`, the mean over T, and a classifier without bias."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = made(5, 6), made(4, 5), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


class Named(nn.Linear):
    """A subclass that computes what its parent does."""


class Scaled(nn.Linear):
    """A subclass that does not."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Dressed(nn.Linear):
    """One that does, in words of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Padded(nn.Conv2d):
    """A convolution with a forward of its own that is its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def tokens(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 9, 2, 6, dtype=torch.float64, generator=generator)
    return [(x, x.mean(1)[:, :3].argmax(1)) for x in inputs]


def pair() -> tuple[nn.Module, nn.Module]:
    """The same network with weights [O, D] and [D, O]."""
    torch.manual_seed(0)
    ours = Tokens(Conv1D).double()
    theirs = Tokens(lambda outputs, inputs: nn.Linear(inputs, outputs)).double()
    theirs.load_state_dict({name: w.mT if name in TRANSPOSED else w for name, w in ours.state_dict().items()})
    return ours, theirs


TRANSPOSED = ("first.weight", "second.weight")


CASES: dict[str, dict[str, Any]] = {
    **{
        f"natural, {kind}": {"step_rule": "natural"} | settings
        for kind, settings in KINDS.items()
        if "wide" not in kind
    },
    "natural, wide": {"step_rule": "natural", "options": Options(wide_inputs=3)},
    **{f"rule {rule}": {"step_rule": rule} for rule in STEP_RULES},
}


@pytest.mark.parametrize("case", CASES)
def test_transposed_weights_take_the_steps_of_linear_layers(case: str) -> None:
    settings = {"lr": 0.05, "factor_interval": 2, "inverse_interval": 3} | CASES[case]
    options = settings.pop("options", Options())
    ours, theirs = pair()
    declared = Options(**{**vars(options), "treat_as": {Conv1D: "linear_transposed"}})
    one, two = KFAC(ours, options=declared, **settings), KFAC(theirs, options=options, **settings)
    train(ours, one, tokens(7))
    train(theirs, two, tokens(7))
    for name, w in theirs.named_parameters():
        own = ours.get_parameter(name)
        torch.testing.assert_close(own.mT if name in TRANSPOSED else own, w)
    rows = {row.parameter: row for row in one.report().parameters}
    assert rows["first.weight"].reason == "Conv1D, treated as linear_transposed"
    assert rows["first.weight"].gradient_factor == "5 x 5"
    again = KFAC(pair()[0], options=declared, **settings)
    again.load_state_dict(one.state_dict())
    assert same(again.state_dict(), one.state_dict())


def test_what_is_not_declared_has_the_stated_fallback() -> None:
    model = nn.ModuleDict({"a": Named(3, 3), "b": Dressed(3, 3), "c": Conv1D(3, 3), "d": Padded(1, 2, 3)})
    table = {t.name: (t.how, t.why) for t in find_layers(model)[1]}
    assert table["a.weight"] == ("kfac", "Named")
    assert table["b.weight"] == ("fallback", "Dressed, with a forward of its own")
    assert table["c.weight"] == ("fallback", "Conv1D")
    assert table["d.weight"] == ("fallback", "Padded, with a forward of its own")
    treat_as = {Dressed: "linear", "c": "linear_transposed", "*": "conv2d"}
    with pytest.raises(InputError, match=r"treat_as 'conv2d': module a \(Named\) is no subclass of Conv2d"):
        find_layers(model, treat_as=treat_as)
    treat_as = {Dressed: "linear", "c": "linear_transposed", "d": "conv2d"}
    table = {t.name: (t.how, t.why) for t in find_layers(model, treat_as=treat_as)[1]}
    assert table["b.weight"] == ("kfac", "Dressed, treated as linear")
    assert table["c.bias"] == ("kfac", "Conv1D, treated as linear_transposed")
    assert table["d.weight"] == ("kfac", "Padded, treated as conv2d")


@pytest.mark.parametrize(("kind", "word"), [(Scaled, "linear"), (Conv1D, "linear")])
def test_a_wrong_declaration_is_found_in_the_first_step(kind: type[nn.Module], word: str) -> None:
    """Also one of a square weight that is the wrong way round."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = KFAC(model, options=Options(treat_as={kind: word}))
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    with pytest.raises(
        InputError,
        match=rf"layer 0: the gradient of its weight is .* is it '{word}', as Options\(treat_as=\.\.\.\) says\?",
    ):
        train(model, optimizer, [(x, y)])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("change", ["padded", "strided", "cut", "turned"])
def test_a_declared_convolution_that_is_another_one_is_refused(change: str, padding: int) -> None:
    """By the size of its output; where that is the same, the gradient tells."""

    class Other(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(x, (1, 1, 1, 1)) if change == "padded" else x[..., :3, :3] if change == "cut" else x
            x = x.mT if change == "turned" else x
            return F.conv2d(x, self.weight, self.bias, 2 if change == "strided" else 1, self.padding)

    torch.manual_seed(0)
    model = nn.Sequential(Other(1, 2, 3, padding=padding), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    optimizer = KFAC(model, options=Options(treat_as={"0": "conv2d"}))
    with pytest.raises(InputError, match=r"Other gives an output of another size .* as Options\(treat_as=...\) says"):
        train(model, optimizer, [(torch.randn(9, 1, 6, 7), torch.randint(3, (9,)))])


def test_a_convolution_with_a_forward_of_its_own_is_checked_and_used() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Padded(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3)).double()
    optimizer = KFAC(model, options=Options(treat_as={"0": "conv2d"}))
    train(model, optimizer, [(torch.randn(9, 1, 4, 4).double(), torch.randint(3, (9,))) for _ in range(3)])
    assert set(optimizer.preconditioner.blocks.inverses) == {"0", "2"}
