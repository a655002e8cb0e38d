"""nn.MultiheadAttention: its projections have the factors of the linear layers that they are, and nothing it computes changes."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFAC, STEP_RULES, Fisher
from secondorder.kfac.layers import find_layers

E, HEADS = 4, 2


class Explicit(nn.Module):
    """Attention with a linear layer for each projection, batch first, with the weights of an nn.MultiheadAttention."""

    def __init__(self, given: nn.MultiheadAttention) -> None:
        super().__init__()
        if given.in_proj_weight is not None:
            weights = given.in_proj_weight.detach().chunk(3)
        else:
            weights = [given.q_proj_weight.detach(), given.k_proj_weight.detach(), given.v_proj_weight.detach()]
        bias = given.in_proj_bias is not None
        self.q, self.k, self.v = (nn.Linear(W.shape[1], E, bias).to(W) for W in weights)
        self.out_proj = nn.Linear(E, E, bias).to(weights[0])
        with torch.no_grad():
            for name, W, layer in zip("qkv", weights, (self.q, self.k, self.v), strict=True):
                layer.weight.copy_(W)
                if bias:
                    layer.bias.copy_(given.in_proj_bias.chunk(3)["qkv".index(name)])
            self.out_proj.load_state_dict(given.out_proj.state_dict())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask, padding = options.get("attn_mask"), options.get("key_padding_mask")
        if padding is not None:
            mask = torch.zeros(padding.shape, dtype=q.dtype).masked_fill(padding, float("-inf"))[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class Network(nn.Module):
    """Attention between linear layers; memory: of other tokens, how many, with its own key and value."""

    def __init__(
        self, attention: nn.Module, memory: str, options: dict[str, Any], kdim: int = E, vdim: int = E
    ) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(3, E), attention, nn.Linear(E, 2)
        self.key, self.value = nn.Linear(3, kdim), nn.Linear(3, vdim)
        self.memory, self.options = memory, options
        self.turned = isinstance(attention, nn.MultiheadAttention) and not attention.batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        key = value = h
        if self.memory != "self":
            key = value = torch.tanh(self.key(x[:, :2]))
        if self.memory == "three":
            value = torch.tanh(self.value(x[:, :2]))
        inputs = [h, key, value]
        if self.turned:
            turned = {id(t): t.transpose(0, 1) for t in inputs}
            inputs = [turned[id(t)] for t in inputs]
        out = self.attention(*inputs, **self.options)[0]
        return self.last(torch.tanh(out.transpose(0, 1) if self.turned else out)).mean(1)


@dataclass(frozen=True)
class Case:
    memory: str = "self"
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "self": Case(),
    "positions first": Case(settings={"batch_first": False}),
    "without weights": Case(options={"need_weights": False}),
    "without bias": Case(settings={"bias": False}),
    "memory": Case("cross"),
    "memory, positions first": Case("cross", {"batch_first": False}),
    "key and value differ": Case("three"),
    "other dimensions": Case("three", {"kdim": 3, "vdim": 5}),
    "mask": Case(options={"attn_mask": torch.full((5, 5), float("-inf")).double().triu(1)}),
    "padding": Case(options={"key_padding_mask": torch.arange(5).expand(3, 5) > 3}),
}


def networks(case: Case) -> tuple[Network, Network]:
    """With nn.MultiheadAttention, and the same with linear layers."""
    settings = {"batch_first": True} | case.settings
    attention = nn.MultiheadAttention(E, HEADS, **settings).double()
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    own = Network(attention, case.memory, case.options, settings.get("kdim", E), settings.get("vdim", E)).double()
    explicit = Network(Explicit(attention), case.memory, case.options).double()
    for name in ("first", "last", "key", "value"):
        setattr(explicit, name, copy.deepcopy(getattr(own, name)))
    return own, explicit


def stepped(model: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> tuple[KFAC, Tensor]:
    opt = KFAC(model, 0.0, factor_interval=1, inverse_interval=1, **settings)
    for _ in range(2):  # EKFAC's squares are those of the second step
        opt.zero_grad()
        z = model(x)
        opt.update_curvature(z)
        F.cross_entropy(z, y).backward()
        opt.step()
    return opt, z.detach()


def close(a: Tensor | None, b: Tensor | None) -> None:
    assert a is not None
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("sharing", "fisher"), [("expand", "exact"), ("reduce", "empirical")])
@pytest.mark.parametrize("name", CASES)
def test_projections_have_the_factors_of_linear_layers(name: str, sharing: str, fisher: str) -> None:
    case = CASES[name]
    own, explicit = networks(case)
    x, y = torch.randn(3, 5, 3).double(), torch.tensor([0, 1, 1])
    settings = {"sharing": sharing, "fisher": Fisher(fisher)}
    (opt, z), (reference, truth) = stepped(own, x, y, **settings), stepped(explicit, x, y, **settings)
    close(z, truth)
    found, expected = opt.preconditioner.statistics, reference.preconditioner.statistics
    close(found["attention.out_proj"].A, expected["attention.out_proj"].A)
    close(found["attention.out_proj"].B, expected["attention.out_proj"].B)
    for g, projection in enumerate("qkv"):
        linear = expected[f"attention.{projection}"]
        assert linear.A is not None
        assert linear.B is not None
        if "kdim" in case.settings:  # the biases of all three are one parameter
            held = found[f"attention.{projection}_proj"]
            close(held.A, linear.A[:, :-1, :-1])
            close(held.B, linear.B)
        else:
            held = found["attention.in_proj"]
            assert held.A is not None
            assert held.B is not None
            close(held.A[g], linear.A[0])
            close(held.B[g], linear.B[0])


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", ["self", "memory", "key and value differ"])
def test_steps_are_those_of_linear_layers(name: str, approximation: str) -> None:
    """A natural step, whose damping is relative to each of the three projections' own scale."""
    own, explicit = networks(CASES[name])
    x, y = torch.randn(3, 5, 3).double(), torch.tensor([0, 1, 1])
    settings = {"fisher": "exact", "approximation": approximation, "step_rule": "natural", "clip": None}
    damping = {"damping": 0.1} if approximation != "diagonal" else {}
    (opt, _), (reference, _) = (stepped(model, x, y, **settings, **damping) for model in (own, explicit))
    directions, expected = (
        o.preconditioner.blocks.solve(
            {p: p.grad for p in o.model.parameters() if p.grad is not None}, o.preconditioner.events
        )
        for o in (opt, reference)
    )
    W = torch.cat([expected[getattr(explicit.attention, p).weight] for p in "qkv"])
    b = torch.cat([expected[getattr(explicit.attention, p).bias] for p in "qkv"])
    if approximation == "diagonal":  # one damping for a layer
        held = opt.preconditioner.statistics["attention.in_proj"]
        for g, p in enumerate("qkv"):
            close(held.S[g], reference.preconditioner.statistics[f"attention.{p}"].S[0])
        return
    close(directions[own.attention.in_proj_weight], W)
    close(directions[own.attention.in_proj_bias], b)


@pytest.mark.parametrize("name", CASES)
def test_nothing_it_computes_changes(name: str) -> None:
    """Outputs are the same bit for bit, gradients but for rounding, also with dropout; no hook or mode is left."""
    own, _ = networks(CASES[name])
    own.attention.dropout = 0.5
    x, results = torch.randn(3, 5, 3).double(), []
    for watched in (False, True):
        opt = KFAC(own) if watched else None
        torch.manual_seed(5)
        z = own(x)
        results.append([z.detach(), *torch.autograd.grad(z.sum(), list(own.parameters()), allow_unused=True)])
        if opt is not None:
            opt.preconditioner.gathering.capture.stop()
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert not own.attention._forward_hooks
    assert not own.attention._forward_pre_hooks
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_forward_that_fails_leaves_no_mode() -> None:
    own, _ = networks(CASES["self"])
    opt = KFAC(own)
    with pytest.raises(Exception, match="embedding dimension"):
        own.attention(*(torch.randn(2, 3, E + 1).double() for _ in range(3)))
    assert not torch.overrides._get_current_function_mode_stack()
    assert opt.factor_step


@pytest.mark.parametrize("rule", STEP_RULES)
def test_transformer_of_torch(rule: str) -> None:
    """Encoder and decoder layers as they come: all but the norms have factors; a resumed training takes the same steps."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)

    def train(model: nn.Module, opt: KFAC, steps: range) -> list[float]:
        losses = []
        for step in steps:
            torch.manual_seed(step)
            x, y = torch.randn(4, 5, 8), torch.randn(4, 3, 8)
            opt.zero_grad()
            z = model(x, y)
            opt.update_curvature(z)
            loss = F.mse_loss(z, y)
            loss.backward()
            opt.step()
            losses.append(float(loss.detach()))
        return losses

    settings = {"step_rule": rule, "fisher": Fisher(likelihood="mse"), "factor_interval": 2, "inverse_interval": 2}
    model, twin = made(), made()
    opt, resumed = KFAC(model, **settings), KFAC(twin, **settings)
    train(model, opt, range(4))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert train(model, opt, range(4, 8)) == train(twin, resumed, range(4, 8))
    fallbacks = {row.reason for row in opt.report().parameters if row.treatment == "fallback"}
    assert fallbacks == {"LayerNorm"}


def test_what_stays_a_fallback() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3), "b": Own(4, 2)})
    table = {t.name: (t.how, t.why, t.layer) for t in find_layers(model)[1]}
    assert table["a.k_proj_weight"] == ("kfac", "MultiheadAttention", "a.k_proj")
    assert table["a.in_proj_bias"] == table["a.bias_k"] == ("fallback", "MultiheadAttention", None)
    assert table["a.out_proj.bias"] == ("kfac", "NonDynamicallyQuantizableLinear", "a.out_proj")
    own = ("fallback", "Own uses its weights without calling its layers", None)
    assert table["b.in_proj_weight"] == table["b.out_proj.weight"] == own
    with pytest.raises(InputError, match="matches no linear layer"):
        find_layers(model, {"b": "kfac"})
