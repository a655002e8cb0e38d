"""Networks that are called with several tensors, or return several: mappings, tuples, and what a loss reads of them."""

from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from small_networks import CLASSES, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import SumOverSamples, curvature_blocks, kronecker_parameters
from secondorder.errors import InputError

N, T = 5, 4
CE = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.2]).double())
Named = namedtuple("Named", ["logits", "extra"])


@dataclass
class Returned:
    logits: Tensor
    extra: Tensor


RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda z, e: z,
    "mapping": lambda z, e: {"logits": z, "extra": e},
    "tuple": lambda z, e: (z, e),
    "named": Named,
    "dataclass": Returned,
    "nothing beside": lambda z, e: {"logits": z, "cache": None},
    "scalar beside": lambda z, e: {"logits": z, "loss": z.sum()},
    "whole numbers beside": lambda z, e: {"logits": z, "chosen": z.argmax(1)},
    "nested": lambda z, e: {"logits": z, "states": [e, (z.square(),)]},
    "lengths": lambda z, e: (z, e[:1]),
    "formats": lambda z, e: (z, e.float()),
}


class Words(nn.Module):
    """Attention over words, with a mask and a scale, and two outputs."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.embed, self.query = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.last, self.extra = nn.Linear(3, CLASSES), nn.Linear(3, 2)
        self.returns = RETURNS[returns]

    def forward(self, words: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        h = self.embed(words)
        seen = torch.ones_like(words) if mask is None else mask
        a = (self.query(h) @ h.mT).masked_fill(seen[:, None] == 0, -1e9).softmax(-1)
        h = scale * ((a @ h).tanh() * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        return self.returns(self.last(h), self.extra(h))


class Given(nn.Module):
    """A network as a function of one structure, for the truth by torch.func."""

    def __init__(self, network: nn.Module, chosen: Callable[[Any], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.network, self.chosen = network, chosen

    def forward(self, x: Any) -> Tensor:
        return self.chosen(self.network(**x) if isinstance(x, dict) else self.network(*x))


def words() -> tuple[dict[str, Tensor], Tensor]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    return {"words": torch.randint(6, (N, T)), "mask": mask}, torch.tensor([0, 1, 2, 1, 1])


def cut(inputs: Any, labels: Any, sizes: tuple[int, ...] = (2, 2, 1)) -> list[tuple[Any, Any]]:
    """A batch as several."""
    ends = torch.tensor(sizes).cumsum(0).tolist()

    def rows(x: Any, place: slice) -> Any:
        if isinstance(x, dict):
            return {name: rows(t, place) for name, t in x.items()}
        if isinstance(x, tuple | list):
            return type(x)(rows(t, place) for t in x)
        return x[place] if isinstance(x, Tensor) else x

    places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [(rows(inputs, place), rows(labels, place)) for place in places]


def by_mapping(x: dict[str, Tensor]) -> Any:
    return x


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "mapping": by_mapping,
    "own mapping": UserDict,
    "tuple": lambda x: (x["words"], x["mask"]),
    "list": lambda x: [x["words"], x["mask"]],
    "constants": lambda x: {**x, "scale": 1.0},
}


TRUTHS = {"ggn": true_ggn, "hessian": true_hessian}


def problem(returns: str = "tensor") -> tuple[Words, dict[str, Tensor], Tensor]:
    """A network and data with the same numbers each time, whatever it returns."""
    torch.manual_seed(0)
    return Words(returns).double(), *words()


@cache
def true_matrix(quantity: str) -> Tensor:
    """Of the logits."""
    model, x, y = problem()
    return TRUTHS[quantity](Given(model), CE, (x, y))  # type: ignore[arg-type]


@pytest.mark.parametrize(("form", "chunk"), [*((form, None) for form in FORMS), ("mapping", 2), ("tuple", 2)])
def test_inputs_in_a_structure(form: str, chunk: int | None) -> None:
    model, x, y = problem()
    for quantity in TRUTHS:
        expected = true_matrix(quantity)
        one = curvature_blocks(model, CE, (FORMS[form](x), y), quantity, chunk=chunk).whole
        several = [(FORMS[form](part), labels) for part, labels in cut(x, y)]
        data_set = curvature_blocks(model, CE, several, quantity, chunk=chunk).whole
        v = torch.randn(one.size).double()
        for whole in (one, data_set):
            assert relative(whole.dense(), expected) <= 1e-12
            assert relative(whole @ v, expected @ v) <= 1e-12


def test_other_quantities_of_a_structure() -> None:
    model, (x, y) = Words().double(), words()
    fixed = Given(model)
    linear = kronecker_parameters(model)

    class AsTensor(nn.Module):
        """The same network for words alone, of the same length."""

        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, numbers: Tensor) -> Tensor:
            return self.network(numbers[:, :T], numbers[:, T:])

    plain = torch.cat([x["words"], x["mask"]], 1)
    G = true_ggn(fixed, CE, (x, y))  # type: ignore[arg-type]
    diagonal = curvature_blocks(model, CE, cut(x, y), "diagonal").whole
    assert relative(diagonal.diagonal(), G.diagonal()) <= 1e-12
    for quantity in ("empirical_fisher", "mc_fisher", "kfac_expand", "kfac_reduce", "ekfac"):
        names = None if "fisher" in quantity else linear
        truth = curvature_blocks(
            AsTensor(), CE, (plain, y), quantity, names and [f"network.{name}" for name in names]
        ).whole
        for given in ((x, y), cut(x, y)):
            assert relative(curvature_blocks(model, CE, given, quantity, names).whole.dense(), truth.dense()) <= 1e-12


def test_what_lies_deeper_is_passed_on_as_it_is() -> None:
    class OfOneMapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, CLASSES)

        def forward(self, given: dict[str, Any]) -> Tensor:
            return self.layer(torch.cat([given["a"], given["more"][0]], 1)).tanh()

    model, y = OfOneMapping().double(), torch.randint(CLASSES, (N,))
    x = ({"a": torch.randn(N, 3).double(), "more": [torch.randn(N, 2).double()]},)
    truth = true_hessian(Given(model), CE, (x, y))  # type: ignore[arg-type]
    for given in ((x, y), cut(x, y)):
        assert relative(curvature_blocks(model, CE, given, "hessian").whole.dense(), truth) <= 1e-12


CHOICES: list[tuple[str, Any, Callable[[Any], Tensor]]] = [
    ("mapping", "logits", lambda o: o["logits"]),
    ("tuple", 0, lambda o: o[0]),
    ("tuple", -2, lambda o: o[0]),
    ("named", "logits", lambda o: o.logits),
    ("named", 0, lambda o: o.logits),
    ("dataclass", "logits", lambda o: o.logits),
    ("nothing beside", "logits", lambda o: o["logits"]),
    ("scalar beside", "logits", lambda o: o["logits"]),
    (
        "mapping",
        lambda o: torch.cat([o["logits"][:, :1], o["extra"]], 1),
        lambda o: torch.cat([o["logits"][:, :1], o["extra"]], 1),
    ),
]


@pytest.mark.parametrize("choice", range(len(CHOICES)))
def test_the_output_that_a_loss_reads(choice: int) -> None:
    returns, output, chosen = CHOICES[choice]
    model, x, y = problem(returns)
    if callable(output):
        G, H = (truth(Given(model, chosen), CE, (x, y)) for truth in TRUTHS.values())  # type: ignore[arg-type]
    else:
        assert torch.equal(chosen(model(**x)), problem()[0](**x))
        G, H = map(true_matrix, TRUTHS)
    scale = float(G.abs().max())
    for given in ((x, y), cut(x, y)):
        for quantity, truth in (("ggn", G), ("hessian", H), ("diagonal", G.diagonal().diag())):
            whole = curvature_blocks(model, CE, given, quantity, output=output).whole
            assert float((whole.dense() - truth).abs().max()) <= 1e-12 * scale
        ekfac = curvature_blocks(model, CE, given, "ekfac", ["last.bias"], output=output)["last.bias"]
        assert float((ekfac.dense() - truth_of(model, G, "last.bias")).abs().max()) <= 1e-12 * scale


def truth_of(model: nn.Module, G: Tensor, name: str) -> Tensor:
    """A bias's block is dense in an eigenbasis of its own: EKFAC is the block where gradients are the factor's."""
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    start = sum(size for key, size in list(sizes.items())[: list(sizes).index(name)])
    return G[start : start + sizes[name], start : start + sizes[name]]


def both(outputs: Any, y: Any) -> Tensor:
    """A loss of two outputs, a sum over samples."""
    z, extra = (outputs["logits"], outputs["extra"]) if isinstance(outputs, dict) else (outputs[0], outputs[1])
    return F.cross_entropy(z, y, reduction="sum") / N + (z[:, :2] * extra).square().sum() + extra.exp().sum()


@cache
def true_matrix_of_both(quantity: str) -> Tensor:
    """Of both outputs side by side."""
    model, x, y = problem("tuple")

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return both((z[:, :CLASSES], z[:, CLASSES:]), y)

    return TRUTHS[quantity](Given(model, lambda o: torch.cat(o, 1)), loss, (x, y))  # type: ignore[arg-type]


@pytest.mark.parametrize("returns", ["mapping", "tuple", "named"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_loss_of_several_outputs(returns: str, declared: bool) -> None:
    model, x, y = problem(returns)
    for quantity in TRUTHS:
        expected = true_matrix_of_both(quantity)
        for given in ((x, y), cut(x, y)) if declared else ((x, y),):
            ours = curvature_blocks(model, SumOverSamples(both) if declared else both, given, quantity).whole
            V = torch.randn(ours.size, 3).double()  # a loss of one's own has a product for each column of the matrix
            assert relative(ours @ V, expected @ V) <= 1e-12


def test_labels_in_a_mapping() -> None:
    model, (x, y) = Words("mapping").double(), words()
    labels = {"class": y, "point": torch.randn(N, 2).double()}

    def loss(outputs: Any, labels: Any) -> Tensor:
        return (
            F.cross_entropy(outputs["logits"], labels["class"], reduction="sum")
            + (outputs["extra"] - labels["point"]).pow(4).sum()
        )

    def of_tensor(z: Tensor, labels: Any) -> Tensor:
        return loss({"logits": z[:, :CLASSES], "extra": z[:, CLASSES:]}, labels)

    side_by_side = Given(model, lambda o: torch.cat([o["logits"], o["extra"]], 1))
    truth = true_ggn(side_by_side, of_tensor, (x, labels))  # type: ignore[arg-type]
    for given in ((x, labels), cut(x, labels)):
        whole = curvature_blocks(model, SumOverSamples(loss), given, "ggn").whole
        V = torch.randn(whole.size, 3).double()
        assert relative(whole @ V, truth @ V) <= 1e-12


def test_tokens_by_a_function_of_the_outputs() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Embedding(6, 3), nn.Linear(3, CLASSES)

        def forward(self, words: Tensor) -> dict[str, Tensor]:
            return {"logits": self.last(self.embed(words).cumsum(1).tanh())}

    model, (x, _) = Tokens().double(), words()
    x = {"words": x["words"]}
    y = torch.randint(CLASSES, (N, T))
    y[:2, 1:], y[4] = -100, -100
    positions_last = lambda o: o["logits"].transpose(1, 2)  # noqa: E731
    truth = true_ggn(Given(model, positions_last), CE, (x, y))  # type: ignore[arg-type]
    for given in ((x, y), cut(x, y)):
        assert relative(curvature_blocks(model, CE, given, "ggn", output=positions_last).whole.dense(), truth) <= 1e-12


class Two(nn.Module):
    """A function of two inputs, of which the second acts on the first."""

    def __init__(self, acts: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.acts = nn.Linear(3, 4), nn.Linear(4, CLASSES), acts

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.last((self.first(x) * self.acts(other)).tanh())


ACTS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "differentiably": (lambda t: 1 + t.roll(1, 0), torch.arange(N).double()[:, None] / N),
    "faintly": (lambda t: 1 + 1e-9 * t.roll(1, 0), torch.arange(N).double()[:, None] / N),
    "detached": (lambda t: 1 + t.detach().roll(1, 0), torch.arange(N).double()[:, None] / N),
    "whole numbers": (lambda t: 1 + t.flip(0)[:, None] % 3, torch.arange(N)),
    "one on another": (
        lambda t: 1 + ((t.roll(1, 0) % 3) * (torch.arange(len(t)) == 2))[:, None],
        torch.tensor([0, 2, 1, 0, 1]),
    ),
    "yes and no": (lambda t: 1 + t.cumsum(0)[:, None] % 3, torch.tensor([True, False, True, True, False])),
}


@pytest.mark.parametrize("kind", ACTS)
def test_samples_that_act_on_one_another_through_any_input(kind: str) -> None:
    acts, other = ACTS[kind]
    model, x, y = Two(acts).double(), torch.randn(N, 3).double(), torch.randint(CLASSES, (N,))
    truth = true_ggn(Given(model), CE, ((x, other), y))  # type: ignore[arg-type]
    assert relative(curvature_blocks(model, CE, ((x, other), y), "ggn").whole.dense(), truth) <= 1e-12
    with pytest.raises(InputError, match="chunk=2 would change the result: the network lets images act"):
        curvature_blocks(model, CE, ((x, other), y), "ggn", chunk=2)
    with pytest.raises(InputError, match="images act on one another's outputs; over several batches"):
        curvature_blocks(model, CE, cut((x, other), y), "ggn")


def test_derivatives_with_respect_to_one_of_the_inputs() -> None:
    class Slope(nn.Module):
        """u(t, p) and du/dt."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, t: Tensor, p: Tensor) -> Tensor:
            u = self.last(self.first(torch.cat([t, p], 1)).tanh())
            return torch.cat([u, torch.autograd.grad(u.sum(), t, create_graph=True)[0]], 1)

    model, loss = Slope().double(), nn.MSELoss()
    t, p, y = torch.rand(N, 1).double(), torch.rand(N, 2).double(), torch.randn(N, 2).double()

    def outputs(w: Tensor) -> Tensor:
        W, b, V, c = (part.view_as(q) for part, q in zip(w.split([12, 4, 4, 1]), model.parameters(), strict=True))
        h = (torch.cat([t, p], 1) @ W.T + b).tanh()
        return torch.cat([h @ V.T + c, ((1 - h.square()) * W[:, 0]) @ V.T], 1)

    w = torch.cat([q.detach().flatten() for q in model.parameters()])
    truth = torch.func.hessian(lambda w: loss(outputs(w), y))(w)
    whole = ((t.requires_grad_(), p), y)
    several = [
        ((t[rows].detach().requires_grad_(), p[rows]), y[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    for given in (whole, several):
        assert relative(curvature_blocks(model, loss, given, "hessian").whole.dense(), truth) <= 1e-12


MIXED = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([0, 1, 2, 1, 1])
WRONG: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "unknown name": (
        "tensor",
        {"wrds": LABELS},
        {},
        r"cannot be called with inputs \['wrds'\]: \[2\]: .*'words'; a mapping is",
    ),
    "too many": ("tensor", (LABELS[:, None],) * 4, {}, "cannot be called with inputs .*too many positional arguments"),
    "names that are none": ("tensor", {1: LABELS}, {}, r"names must be strings, got \[1\]"),
    "shared": (
        "tensor",
        {"words": LABELS[:, None], "mask": torch.ones(1, 1)},
        {},
        r"inputs\['mask'\] of shape \[1, 1\]: its first dimension must be that of the 5 samples; use .expand",
    ),
    "scalar": ("tensor", (LABELS[:, None], torch.tensor(1.0)), {}, r"inputs\[1\] of shape \[\]: its first dimension"),
    "object": ("tensor", (LABELS[:, None], object()), {}, r"inputs\[1\] is of type object; it must be a tensor"),
    "no tensor": ("tensor", {"scale": 1.0}, {}, "inputs of type dict hold no tensor"),
    "text": ("tensor", "words", {}, r"a batch is a pair \(inputs, labels\).*; the inputs are str"),
    "format": (
        "tensor",
        (LABELS[:, None], torch.ones(N, 1)),
        {},
        "the images are torch.float32, the network is torch.float64",
    ),
    "not finite": ("tensor", (LABELS[:, None], torch.full((N, 1), torch.nan).double()), {}, "the images contain NaN"),
    "unknown key": (
        "mapping",
        None,
        {"output": "logit"},
        r"returns dict, .* no output='logit'; it has \['logits', 'extra'\]",
    ),
    "unknown attribute": ("dataclass", None, {"output": "logit"}, r"returns Returned, .* it has \['logits', 'extra'\]"),
    "index": ("tuple", None, {"output": 2}, "no output=2; an index needs a tuple or list that is long enough"),
    "index of a mapping": ("mapping", None, {"output": 0}, "no output=0; an index needs a tuple"),
    "index of a tensor": ("tensor", None, {"output": 0}, "returns Tensor, of which there is no output=0"),
    "name of a tensor": ("tensor", None, {"output": "data"}, "returns Tensor, of which there is no output='data'"),
    "choice": ("tensor", None, {"output": 1.5}, "output 1.5: must be a key or attribute, an index, or a function"),
    "switch": ("tuple", None, {"output": True}, "output True: must be a key"),
    "no choice, mapping": (
        "mapping",
        None,
        {},
        "CrossEntropyLoss takes one tensor, the network returns several .*output=",
    ),
    "no choice, tuple": ("tuple", None, {}, "CrossEntropyLoss takes one tensor, the network returns several"),
    "no choice, dataclass": ("dataclass", None, {}, r"the network returns Returned for \d samples; .*output="),
    "scalar beside": ("scalar beside", None, {"loss": both}, r"returns torch.float64 of shape \[\] within dict"),
    "whole numbers": ("whole numbers beside", None, {"loss": both}, r"returns torch.int64 of shape \[\d\] within dict"),
    "lengths": ("lengths", None, {"loss": both}, r"returns torch.float64 of shape \[1, 2\] within tuple"),
    "formats": ("formats", None, {"loss": both}, "returns numbers of torch.float32 and torch.float64; choose"),
    "function": ("mapping", None, {"output": lambda o: None}, "the network returns NoneType for"),
    "known losses only": (
        "mapping",
        None,
        {"loss": both, "quantity": "diagonal"},
        "quantity 'diagonal' needs .*, not both",
    ),
    "labels": ("tensor", None, {"labels": {"a": LABELS}}, r"labels \['a'\]: \[5\]: CrossEntropyLoss needs one tensor"),
    "labels of another length": (
        "tensor",
        None,
        {"labels": LABELS[:3]},
        r"images .* and labels \[3\]; a batch needs one label",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused(kind: str) -> None:
    returns, inputs, options, message = WRONG[kind]
    x, y = words()
    options = {"loss": CE, "labels": y, "quantity": "ggn", **options}
    given = (x if inputs is None else inputs, options.pop("labels"))
    loss, quantity = options.pop("loss"), options.pop("quantity")
    with pytest.raises(InputError, match=message) as refused:
        curvature_blocks(Words(returns).double(), loss, given, quantity, **options)
    assert "\n" not in str(refused.value)


def test_a_mistake_within_the_network_goes_through() -> None:
    class Mistaken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, CLASSES).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x, y)

    with pytest.raises(TypeError, match="positional arguments"):
        curvature_blocks(Mistaken(), CE, ((MIXED, MIXED), LABELS), "ggn")
