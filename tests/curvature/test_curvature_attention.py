"""Attention: products, diagonals and spectra against backward passes through PyTorch's math kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import CLASSES, relative, reverse_ggn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from secondorder.curvature import curvature_blocks, spectral_summary, top_eigenvalues

WIDTH, HEADS, POSITIONS = 4, 2, 3
CE = nn.CrossEntropyLoss()
CAUSAL = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)


class Around(nn.Module):
    """A linear layer, something with attention, the mean over positions, another linear layer; inputs `[N, T, 2]`."""

    def __init__(self, part: nn.Module | None = None, batch_first: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.embed, self.part, self.head = nn.Linear(2, WIDTH), part, nn.Linear(WIDTH, CLASSES)
        self.batch_first, self.arguments = batch_first, arguments

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        return self.head(self.attend(h).mean(1 if self.batch_first else 0))

    def attend(self, h: Tensor) -> Tensor:
        return self.part(h, **self.arguments)


class Multihead(Around):
    def __init__(self, cross: bool = False, arguments: dict[str, Any] | None = None, **options: Any) -> None:
        attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
        super().__init__(attention, options.get("batch_first", True), **(arguments or {}))
        self.cross = cross

    def attend(self, h: Tensor) -> Tensor:
        other = torch.cat([h, h.flip(1)], 1).sin() if self.cross else h
        return self.part(h, other[..., : self.part.kdim], other[..., : self.part.vdim], **self.arguments)[0]


class Functional(Around):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(nn.Linear(WIDTH, 3 * WIDTH), **arguments)

    def attend(self, h: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.part(h).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, **self.arguments).transpose(1, 2).flatten(2)


class Checkpointed(Around):
    def attend(self, h: Tensor) -> Tensor:
        return checkpoint(self.part, h, use_reentrant=False)


class Padded(Around):
    def attend(self, h: Tensor) -> Tensor:
        padded = torch.zeros(h.shape[:2], dtype=torch.bool)
        padded[:, -1] = True
        return self.part(h, src_key_padding_mask=padded)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2, **{"dropout": 0.0, "batch_first": True, **options})


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "weights": lambda: Multihead(),
    "no weights": lambda: Multihead(arguments={"need_weights": False}, dropout=0.5).eval(),
    "mask": lambda: Multihead(arguments={"need_weights": False, "attn_mask": CAUSAL}),
    "time first": lambda: Multihead(arguments={"need_weights": False}, batch_first=False),
    "cross": lambda: Multihead(True, {"need_weights": False}, add_bias_kv=True, add_zero_attn=True),
    "other widths": lambda: Multihead(True, {"need_weights": False}, kdim=3, vdim=2, bias=False),
    "function": lambda: Functional(),
    "causal": lambda: Functional(is_causal=True),
    "encoder": lambda: Around(layer()).eval(),
    "encoder, training": lambda: Around(layer(activation="gelu", norm_first=True)),
    "encoder, mask": lambda: Around(layer(), src_mask=CAUSAL).eval(),
    "checkpoint": lambda: Checkpointed(layer()),
}


def made(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    net = NETWORKS[name]().double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)  # none of them zero
    return net, (torch.randn(2, POSITIONS, 2).double(), torch.randint(CLASSES, (2,)))


def true_product(net: nn.Module, data: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
    """H v by differentiating the gradient, with the math kernel."""
    parameters = list(net.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(CE(net(data[0]), data[1]), parameters, create_graph=True, materialize_grads=True)
        flat = torch.cat([t.flatten() for t in g])
        return torch.cat([t.flatten() for t in torch.autograd.grad(flat @ v, parameters, materialize_grads=True)])


@pytest.mark.parametrize("name", NETWORKS)
def test_products_and_diagonals(name: str) -> None:
    net, data = made(name)
    with sdpa_kernel(SDPBackend.MATH):
        G = reverse_ggn(net, CE, data)
    v = torch.randn(len(G)).double()
    ggn, hessian = (curvature_blocks(net, CE, data, quantity) for quantity in ("ggn", "hessian"))
    for _ in range(2):
        assert relative(ggn.whole @ v, G @ v) <= 1e-10
        assert relative(hessian.whole @ v, true_product(net, data, v)) <= 1e-10
    assert relative(ggn.whole.diagonal(), G.diagonal()) <= 1e-10
    start = 0
    for block in ggn.values():
        rows = slice(start, start + block.size)
        assert (block @ v[rows] - G[rows, rows] @ v[rows]).abs().max() <= 1e-10 * G.abs().max()
        start += block.size


def test_padding_is_not_cut_out_where_gradients_are_off() -> None:
    """A stack of layers in eval mode has a fast path that returns zeros there, which is another network."""
    net = Padded(nn.TransformerEncoder(layer(), 1)).double().eval()
    data = torch.randn(2, POSITIONS, 2).double(), torch.randint(CLASSES, (2,))
    G = reverse_ggn(net, CE, data)
    v = torch.randn(len(G)).double()
    ggn = curvature_blocks(net, CE, data, "ggn").whole
    assert relative(ggn @ v, G @ v) <= 1e-10
    assert ggn.jacobian.forward_mode  # type: ignore[attr-defined]
    assert not ggn.jacobian.coupled  # type: ignore[attr-defined]


def test_spectra_and_fishers() -> None:
    net, data = made("no weights")
    names = ["part.in_proj_weight"]
    with sdpa_kernel(SDPBackend.MATH):
        G = reverse_ggn(net, CE, data)
    size = net.part.in_proj_weight.numel()  # type: ignore[union-attr, operator]
    start = net.embed.weight.numel() + net.embed.bias.numel()  # type: ignore[union-attr, operator]
    ggn = curvature_blocks(net, CE, data, "ggn", names)[names[0]]
    truth = torch.linalg.eigvalsh(G[start : start + size, start : start + size])
    assert relative(ggn.eigenvalues()[-2:], truth[-2:]) <= 1e-10
    assert spectral_summary(ggn).trace.value == pytest.approx(float(truth.sum()), rel=1e-10)
    assert top_eigenvalues(ggn, 1).values[0] == pytest.approx(float(truth[-1]), rel=1e-6)
    v = torch.randn(size).double()
    for quantity in ("mc_fisher", "empirical_fisher"):
        fisher = curvature_blocks(net, CE, data, quantity, names)[names[0]]
        assert relative(fisher @ v, fisher.dense() @ v) <= 1e-10


def test_the_settings_of_attention_are_as_before() -> None:
    net, data = made("no weights")
    settings = lambda: (  # noqa: E731
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
    before = settings()
    curvature_blocks(net, CE, data, "hessian").whole @ torch.ones(sum(p.numel() for p in net.parameters())).double()
    assert settings() == before
