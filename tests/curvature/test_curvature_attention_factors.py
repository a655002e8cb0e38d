"""Kronecker factors of the projections of nn.MultiheadAttention: those of four linear layers that do the same."""

import pytest
import torch
from small_networks import CLASSES, relative
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks, kronecker_parameters
from secondorder.errors import InputError

WIDTH, HEADS = 4, 2
CE = nn.CrossEntropyLoss()


class Attention(nn.Module):
    """Attention of some positions to these, or to twice as many, between linear layers; inputs `[N, T, 2]`."""

    def __init__(self, cross: bool, part: nn.Module | None = None, **options: int) -> None:
        super().__init__()
        self.embed, self.cross = nn.Linear(2, WIDTH), cross
        self.part = part or nn.MultiheadAttention(WIDTH, HEADS, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(0, 1)
        other = torch.cat([h, h.flip(0)]).sin() if self.cross else h
        part = self.part
        kdim, vdim = getattr(part, "kdim", WIDTH), getattr(part, "vdim", WIDTH)
        return self.head(part(h, other[..., :kdim], other[..., :vdim])[0].mean(0))


class Explicit(nn.Module):
    """The same attention, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        q, k, v = (
            layer(x.transpose(0, 1)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, x in zip((self.query, self.key, self.value), (q, k, v), strict=True)
        )
        share = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return self.out((share @ v).transpose(1, 2).flatten(2)).transpose(0, 1), None


class Own(nn.MultiheadAttention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return 2 * super().forward(q, k, v)[0], None


def made(cross: bool) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Attention, its twin with layers of its own, and a batch."""
    net, twin = Attention(cross).double(), Attention(cross, Explicit()).double()
    part = net.part
    with torch.no_grad():
        part.in_proj_bias.normal_()  # type: ignore[union-attr, operator]
        part.out_proj.bias.normal_()  # type: ignore[union-attr, operator]
    state = {name: w for name, w in net.state_dict().items() if "proj" not in name}
    state |= {f"part.out.{a}": getattr(part.out_proj, a) for a in ("weight", "bias")}
    for a in ("weight", "bias"):
        chunks = getattr(part, f"in_proj_{a}").chunk(3)
        state |= {f"part.{name}.{a}": w for name, w in zip(("query", "key", "value"), chunks, strict=True)}
    twin.load_state_dict(state)
    return net.eval(), twin, (torch.randn(3, 3, 2).double(), torch.randint(CLASSES, (3,)))


@pytest.mark.parametrize("quantity", ["kfac_expand", "kfac_reduce", "ekfac"])
@pytest.mark.parametrize("cross", [False, True])
def test_blocks_are_those_of_linear_layers(cross: bool, quantity: str) -> None:
    net, twin, data = made(cross)
    blocks = curvature_blocks(net, CE, data, quantity, chunk=2)
    truth = curvature_blocks(twin, CE, data, quantity)
    assert list(blocks) == kronecker_parameters(net) == [name for name, _ in net.named_parameters()]
    for a in ("weight", "bias"):
        parts = [truth[f"part.{name}.{a}"].dense() for name in ("query", "key", "value")]
        assert relative(blocks[f"part.in_proj_{a}"].dense(), torch.block_diag(*parts)) <= 1e-10
        assert relative(blocks[f"part.out_proj.{a}"].dense(), truth[f"part.out.{a}"].dense()) <= 1e-10
        assert relative(blocks[f"embed.{a}"].dense(), truth[f"embed.{a}"].dense()) <= 1e-10


def test_in_a_transformer_and_alone() -> None:
    """A layer of its own is recorded without the rest of the module."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 3, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(2 * WIDTH, CLASSES)).double().eval()
    data = torch.randn(2, 2, WIDTH).double(), torch.randint(CLASSES, (2,))
    names = [name for name in kronecker_parameters(net) if "self_attn" in name]
    assert [name.removeprefix("0.self_attn.") for name in names] == [
        *("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    blocks = curvature_blocks(net, CE, data, "kfac_expand", names)
    for name in names:
        alone = curvature_blocks(net, CE, data, "kfac_expand", [name])[name]
        assert relative(alone.dense(), blocks[name].dense()) <= 1e-12
    assert not layer.self_attn._forward_pre_hooks
    assert not layer.self_attn._forward_hooks


def test_what_has_no_factors() -> None:
    """A forward of one's own may do anything with the weights; three weights of other widths have no block of theirs."""
    own, widths = Attention(False, Own(WIDTH, HEADS)), Attention(True, kdim=3, vdim=2)
    rest = ["embed.weight", "embed.bias", "head.weight", "head.bias"]
    assert kronecker_parameters(own) == rest
    assert kronecker_parameters(widths) == [*rest[:2], "part.out_proj.weight", "part.out_proj.bias", *rest[2:]]
    data = torch.randn(2, 3, 2), torch.randint(CLASSES, (2,))
    with pytest.raises(InputError, match=r"no Kronecker structure: part\.in_proj_weight, .*part\.out_proj\.weight"):
        curvature_blocks(own, CE, data, "kfac_expand")
    with pytest.raises(InputError, match=r"no Kronecker structure: part\.q_proj_weight"):
        curvature_blocks(widths, CE, data, "kfac_expand")
    blocks = curvature_blocks(widths, CE, data, "kfac_expand", kronecker_parameters(widths))
    assert blocks["part.out_proj.weight"].dense().isfinite().all()
