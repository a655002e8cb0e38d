"""Layouts other than maps, empty batches, and weights and masks of positions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from secondorder.errors import InputError
from secondorder.pooling import LAYOUTS, POOLINGS, AsMaps, Covariance, pooling_head

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

F64 = torch.float64
SIZES = {"N": 3, "C": 6, "H": 2, "W": 5, "T": 4, "L": 12}


def features(layout: str) -> Tensor:
    return torch.randn([SIZES[axis] for axis in layout], dtype=F64)


def plain_maps(x: Tensor, layout: str) -> Tensor:
    """The same features as maps `[N, C, M, 1]`, written with einsum."""
    first = "NC" + "".join(axis for axis in layout if axis not in "NC")
    return torch.einsum(f"{layout}->{first}", x).flatten(2)[..., None]


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduced", [None, 4])
def test_heads_of_every_layout(name: str, layout: str, reduced: int | None) -> None:
    head = pooling_head(name, 6, reduced, layout=layout).double()
    plain = pooling_head(name, 6, reduced).double()
    plain.load_state_dict(head.state_dict())
    x = features(layout).requires_grad_()
    results = []
    for run in (lambda: head(x), lambda: plain(plain_maps(x, layout)), lambda: head.chain()(x)):
        torch.manual_seed(1)
        y = run()
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    assert isinstance(head.chain()[0], AsMaps) == (layout != "NCHW")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_covariance_of_every_layout(layout: str) -> None:
    x = features(layout)
    torch.testing.assert_close(Covariance(layout)(x), Covariance()(plain_maps(x, layout)))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_empty_batches(name: str, autocast: bool, training: bool) -> None:
    """No vectors, of the same size and type as of a sample, and gradients of zero; batch statistics stay as they are."""
    head = pooling_head(name, 6, 4).train(training)
    state = {key: value.clone() for key, value in head.state_dict().items()}
    x = torch.randn(2, 6, 3, 3)
    none = x[:0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for model in (head, head.chain()):
            y = model(none)
            y.sum().backward()
            assert y.shape == (0, head.out_features)
            if not training:
                assert y.dtype == model(x).dtype
            assert none.grad is not None
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in head.parameters())
    assert all(value.equal(state[key]) for key, value in head.state_dict().items() if value.is_floating_point())


WEIGHTED = [name for name in POOLINGS if name != "dropcov"]


def weighted_reference(x: Tensor, w: Tensor) -> Tensor:
    """S = sum w (x - mu) (x - mu)^T / sum w in loops over samples and positions."""
    out = []
    for sample, weight in zip(x.flatten(2), w.flatten(1), strict=True):
        mu = sum(weight[m] * sample[:, m] for m in range(len(weight))) / weight.sum()
        terms = (weight[m] * torch.outer(sample[:, m] - mu, sample[:, m] - mu) for m in range(len(weight)))
        out.append(sum(terms) / weight.sum())
    return torch.stack(out)


def test_weighted_covariance_is_its_formula() -> None:
    x, w = features("NCHW"), torch.rand(3, 2, 5, dtype=F64)
    for given in (w, w.flatten(1), 1e30 * w, 1e-300 * w):
        torch.testing.assert_close(Covariance()(x, given), weighted_reference(x, w))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_weights_are_plain_pooling(name: str, layout: str) -> None:
    head, x = pooling_head(name, 6, 4, layout=layout).double().eval(), features(layout)
    shape = [SIZES[axis] for axis in layout if axis != "C"]
    for weights in (torch.ones(shape), 0.3 * torch.ones(shape, dtype=F64), torch.ones(shape, dtype=torch.bool)):
        torch.testing.assert_close(head(x, weights), head(x), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(head(x, weights.flatten(1)), head(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, F64])
def test_a_mask_drops_positions(name: str, dtype: torch.dtype) -> None:
    head = pooling_head(name, 6, 4, layout="NLC").double().eval()
    x = features("NLC")
    lengths = [12, 3, 5]
    mask = torch.stack([torch.arange(12) < length for length in lengths]).to(dtype)
    padded = x.masked_fill(~mask.bool()[..., None], torch.nan) if dtype == torch.bool else x
    want = torch.cat([head(x[n : n + 1, :length]) for n, length in enumerate(lengths)])
    padded = padded.clone().requires_grad_()
    y = head(padded, mask)
    torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-10)
    gradient = torch.autograd.grad(y.square().sum(), padded)[0]
    if (
        dtype != torch.bool
    ):  # of NaN before a convolution there is no gradient for its weight, but one of zero for the position
        assert not gradient[1, 3:].any()
    assert gradient[1, :3].any()


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradient_of_weights(name: str) -> None:
    """Also at a weight of 0."""
    head = pooling_head(name, 3).double().eval()
    x = torch.randn(2, 3, 2, 3, dtype=F64, requires_grad=True)
    w = torch.rand(2, 2, 3, dtype=F64)
    assert gradcheck(head, (x, w.requires_grad_()))
    zero = w.detach().clone()
    zero[0, 0, 0] = 0
    zero.requires_grad_()
    slope = torch.autograd.grad(head(x, zero).square().sum(), zero)[0]
    step = torch.zeros_like(zero)
    step[0, 0, 0] = 1e-6
    change = (head(x, zero.detach() + step).square().sum() - head(x, zero.detach()).square().sum()) / 1e-6
    assert float(slope[0, 0, 0].detach()) == pytest.approx(float(change.detach()), rel=1e-3)


def test_dropcov_with_a_mask_is_that_of_the_positions_left() -> None:
    """The rate and the importance in training see what the mask leaves."""
    head, x = pooling_head("dropcov", 6).double(), features("NCHW")
    mask = torch.tensor([True, True, True, False, False]).expand(3, 2, 5)
    torch.manual_seed(2)
    want = head(x[..., :3])
    torch.manual_seed(2)
    torch.testing.assert_close(head(x, mask), want)


def test_a_layer_before_the_covariance_gets_no_weights() -> None:
    head, x = pooling_head("gcp", 6).double().eval(), features("NCHW")
    head.layers.insert(0, nn.Conv2d(6, 6, 1).double())
    torch.testing.assert_close(head(x, torch.ones(3, 2, 5)), head(x))


X = torch.ones(2, 4, 3, 3)
W = torch.ones(2, 3, 3)
BAD: dict[str, tuple[Any, str]] = {
    "layout": (lambda: pooling_head("gcp", 4, layout="NTC"), "unknown layout 'NTC'; choose one of: NCHW, NHWC"),
    "layout of the layer": (lambda: Covariance(["NLC"]), "unknown layout"),
    "tokens": (lambda: pooling_head("gcp", 4)(X[0]), r'\[N, 4, H, W\]|\[N, C, H, W\], got shape \[4, 3, 3\]; .*layout="NLC"'),
    "video": (lambda: pooling_head("gap", 4)(X[None]), r'layout="NTHWC"'),
    "channels of tokens": (lambda: pooling_head("gcp", 4, layout="NLC")(X[0]), r"\[N, L, 4\], got shape \[4, 3, 3\]"),
    "one token": (lambda: pooling_head("gcp", 4, layout="NLC")(X[:, :1, 0, :1].expand(2, 1, 4)), "single position"),
    "shape": (lambda: pooling_head("gcp", 4)(X, W[:, :2]), r"must be \[N, H, W\] = \[2, 3, 3\] or \[N, M\] = \[2, 9\], got"),
    "one for all samples": (lambda: pooling_head("gcp", 4)(X, W[0]), r"got shape \[3, 3\]"),
    "negative": (lambda: pooling_head("gcp", 4)(X, -W), "finite and at least 0"),
    "NaN": (lambda: pooling_head("gap", 4)(X, W / 0 * 0), "finite and at least 0"),
    "zero": (lambda: pooling_head("gap", 4)(X, W * torch.arange(2)[:, None, None]), "weights of sample 0 are all 0"),
    "complex": (lambda: pooling_head("gap", 4)(X, W.cfloat()), "real numbers or bool, got torch.complex64"),
    "no tensor": (lambda: pooling_head("gap", 4)(X, [1.0]), "must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_layouts_and_weights(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(InputError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) <= 300


def test_weights_that_no_layer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POOLINGS, "positions", lambda channels: [nn.Flatten()])
    with pytest.raises(InputError, match=r"layers \(Flatten\) none pools with weights"):
        pooling_head("positions", 4)(X, W)
