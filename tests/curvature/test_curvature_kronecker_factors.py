"""The factors A and B of linear layers and convolutions against their definitions, one patch at a time."""

import copy

import pytest
import torch
from torch import Tensor, nn

from secondorder.curvature.kronecker import factors as kronecker_factors
from secondorder.curvature.kronecker.autocorrelation import autocorrelation_applies, autocorrelation_factor
from secondorder.curvature.kronecker.factors import gradient_factor, input_factor, input_rows
from secondorder.curvature.kronecker.layer_kinds import layer_kind
from secondorder.curvature.kronecker.weight_sharing import LayerKind
from secondorder.errors import InputError

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "5x5": {"kernel_size": 5, "padding": 2},
    "1x1": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "no padding": {"kernel_size": 3},
    "uneven": {"kernel_size": (3, 1), "padding": (2, 0), "stride": (1, 2)},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
}


def by_autograd(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the weight multiplies `[N, T, G, D]`: the derivative of each group's first output with respect to its weight."""
    per_group = layer.out_channels // layer.groups

    def first_outputs(weight: Tensor) -> Tensor:
        out = torch.func.functional_call(layer, {"weight": weight}, (x,)).flatten(2)
        return out[:, ::per_group].transpose(1, 2)  # [N, T, G]

    J = torch.func.jacrev(first_outputs)(layer.weight.detach()).unflatten(3, (layer.groups, per_group))[..., 0, :, :, :]
    return torch.stack([J[:, :, g, g].flatten(2) for g in range(layer.groups)], 2)


def expected(a: Tensor, s: Tensor, sharing: str) -> tuple[Tensor, Tensor]:
    """A and B by their definition, sample by sample, from a `[N, T, G, D]` and s `[V, N, T, G, O]`."""
    N, _, G, _ = a.shape
    A = [torch.zeros(a.shape[-1], a.shape[-1]).double() for _ in range(G)]
    B = [torch.zeros(s.shape[-1], s.shape[-1]).double() for _ in range(G)]
    for g in range(G):
        for n in range(N):
            rows = a[n, :, g] if sharing == "expand" else a[n, :, g].mean(0, keepdim=True)
            A[g] += sum(torch.outer(r, r) for r in rows) / (N * len(rows))
            for v in range(len(s)):
                rows = s[v, n, :, g] if sharing == "expand" else s[v, n, :, g].sum(0, keepdim=True)
                B[g] += sum(torch.outer(r, r) for r in rows)
    return torch.stack(A), torch.stack(B)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind: str, sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(4, 6 if kind != "depthwise" else 8, bias=False, **CONVOLUTIONS[kind]).double()
    x = torch.randn(5, 4, 7, 6).double()
    out = layer(x)
    s = torch.randn(2, *out.shape).double()
    positions_last = s.flatten(3).unflatten(2, (layer.groups, -1))
    A, B = expected(by_autograd(layer, x), positions_last.permute(0, 1, 4, 2, 3), sharing)
    A, B = (A[0], B[0]) if layer.groups == 1 else (A, B)
    torch.testing.assert_close(input_factor(layer, x, sharing), A, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient_factor(layer, s, sharing), B, rtol=1e-13, atol=1e-12)
    rows = input_rows(layer, x, sharing)
    torch.testing.assert_close(rows.mT @ rows, A, rtol=1e-13, atol=1e-14)
    for name in ("UNFOLDED_BYTES", "CACHED_BYTES"):
        monkeypatch.setattr(kronecker_factors, name, 1)  # one image at a time
    torch.testing.assert_close(input_factor(layer, x, sharing), A, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient_factor(layer, s, sharing), B, rtol=1e-13, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("size", [(20, 18), (9, 7)])  # rows are copied where they are long
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_patches_are_what_the_weight_multiplies(kind: str, size: tuple[int, int]) -> None:
    layer = nn.Conv2d(4, 8, bias=False, **CONVOLUTIONS[kind]).double()
    x = torch.randn(3, *size, 4).double().permute(0, 3, 1, 2)  # channels last
    weight = layer.weight.reshape(layer.groups, -1, layer.weight[0].numel())
    found = weight @ kronecker_factors.patches(layer, x)
    torch.testing.assert_close(found.flatten(1, 2), layer(x).flatten(2), rtol=1e-13, atol=1e-13)


GRADIENTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    kind: (nn.Conv2d(4, 8, **options), (4, 7, 6)) for kind, options in CONVOLUTIONS.items()
} | {
    "1d": (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 7)),
    "3d, replicated": (nn.Conv3d(2, 3, (2, 3, 1), (1, 2, 1), 1, padding_mode="replicate"), (2, 4, 5, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 0), dilation=(1, 3)), (4, 5, 6)),
    "transposed 3d": (nn.ConvTranspose3d(2, 4, 1, 2, groups=2), (2, 3, 2, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_of_a_weight_is_that_of_autograd_and_of_the_patches(name: str, bias: bool) -> None:
    layer, shape = copy.deepcopy(GRADIENTS[name][0]).double(), GRADIENTS[name][1]
    x = torch.randn(3, *shape).double()
    out = layer(x)
    g = torch.randn_like(out)
    of_weight, of_bias = torch.autograd.grad((out * g).sum(), [layer.weight, layer.bias])
    kind = layer_kind(layer)
    found = kind.weight_gradient(x, g, bias)
    if bias:
        torch.testing.assert_close(found[..., -1].flatten(), of_bias, rtol=1e-12, atol=1e-12)
    matrix = found[..., :-1] if bias else found
    torch.testing.assert_close(kind.weight(matrix), of_weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, LayerKind.weight_gradient(kind, x, g, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("extra", [(), (3,), (2, 3)])
def test_linear(extra: tuple[int, ...], sharing: str) -> None:
    layer = nn.Linear(4, 2).double()
    x, s = torch.randn(5, *extra, 4).double(), torch.randn(3, 5, *extra, 2).double()
    a = x.reshape(5, -1, 1, 4)
    A, B = expected(a, s.reshape(3, 5, -1, 1, 2), sharing)
    torch.testing.assert_close(input_factor(layer, x, sharing), A[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient_factor(layer, s, sharing), B[0], rtol=1e-13, atol=1e-14)
    rows = input_rows(layer, x, sharing)
    torch.testing.assert_close(rows.mT @ rows, A[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", [(8, 8), (5, 3), (2, 1), (1, 1), (1, 4)])
def test_autocorrelation_equals_im2col(size: tuple[int, int]) -> None:
    layer = nn.Conv2d(3, 2, 3, padding=1).double()
    x = torch.randn(4, 3, *size).double()
    a = kronecker_factors.patches(layer, x)[:, 0]
    torch.testing.assert_close(autocorrelation_factor(x), torch.einsum("ndt,net->de", a, a), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_autocorrelation_is_used_only_where_it_holds(kind: str) -> None:
    assert autocorrelation_applies(nn.Conv2d(4, 8, **CONVOLUTIONS[kind])) is (kind == "3x3")


def test_a_convolution_before_the_covariance_has_a_gradient_factor_of_zero_only_without_positions() -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    s = torch.randn(1, 4, 3, 5, 5).double()
    s -= s.mean((-2, -1), keepdim=True)  # what covariance pooling sends back
    assert gradient_factor(layer, s, "reduce").abs().max() < 1e-25
    assert gradient_factor(layer, s, "expand").diagonal().min() > 1.0


@pytest.mark.parametrize("call", [input_factor, input_rows, gradient_factor])
def test_unknown_sharing(call: object) -> None:
    with pytest.raises(InputError, match="unknown weight sharing 'kfc'; choose one of: expand, reduce"):
        call(nn.Linear(2, 2), torch.ones(1, 1, 2), "kfc")  # type: ignore[operator]
