"""Pooling heads: literal results, the fused path against the chain of leaf modules, derivatives, difficult and bad input."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from secondorder.errors import InputError
from secondorder.matrix_power import newton_schulz_sqrt
from secondorder.pooling import (
    POOLINGS,
    AdaptiveChannelDropout,
    Covariance,
    MatrixLogarithm,
    MatrixPower,
    MatrixSquareRoot,
    PoolingHead,
    RandomLift,
    UpperTriangle,
    pooling_head,
)

# PyTorch's own forward mode calls its deprecated torch.jit.script on first use
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

F64 = torch.float64
OPTIONS: dict[str, dict[str, Any]] = {
    "gcp": {"num_iter": 3, "method": "newton_schulz"},
    "gcp_power": {"exponent": 0.7},
    "gcp_log": {"eps": 0.1},
    "dropcov": {"kernel_size": 1},
    "gap_lifted": {"seed": 5},
}
CASES = [(name, {}) for name in POOLINGS] + list(OPTIONS.items())


def maps(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


# ----------------------------------------------------------------------------------------------------- literal results


def test_upper_triangle_order_is_frozen() -> None:
    """Trained classifiers depend on it: row by row, with the diagonal."""
    S = torch.arange(16.0).reshape(1, 4, 4)
    assert UpperTriangle()(S).tolist() == [[0, 1, 2, 3, 5, 6, 7, 10, 11, 15]]
    assert UpperTriangle()(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [1, 2, 4]


def test_covariance_divides_by_the_number_of_positions() -> None:
    x = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, 4.0]]]])  # means 4 and 1
    assert Covariance()(x).tolist() == [[[5.0, 3.0], [3.0, 3.0]]]
    torch.testing.assert_close(Covariance()(x), torch.cov(x[0].flatten(1), correction=0)[None])
    assert Covariance("NCL")(x.flatten(2)).equal(Covariance()(x))


def test_gcp_is_five_published_steps() -> None:
    x = maps(2, 6, 3, 3)
    root = newton_schulz_sqrt(Covariance()(x), 5)
    want = torch.stack([root[:, i, j] for i in range(6) for j in range(i, 6)], 1)
    torch.testing.assert_close(pooling_head("gcp", 6)(x), want)


def test_gap_is_the_mean() -> None:
    x = maps(2, 6, 3, 5)
    torch.testing.assert_close(pooling_head("gap", 6)(x), x.mean((2, 3)))


@pytest.mark.parametrize(("layer", "text"), [
    (MatrixSquareRoot(), "MatrixSquareRoot(method=auto, num_iter=5)"),
    (MatrixSquareRoot("eigh"), "MatrixSquareRoot(exact)"),
    (MatrixPower(0.3), "MatrixPower(exponent=0.3)"),
    (MatrixLogarithm(), "MatrixLogarithm(eps=0.001)"),
    (Covariance(), "Covariance(divisor=H*W)"),
    (UpperTriangle(), "UpperTriangle(order=row-major)"),
    (RandomLift(4), "RandomLift(channels=4, out_features=10, seed=0)"),
])  # fmt: skip
def test_layers_say_what_they_do(layer: nn.Module, text: str) -> None:
    assert repr(layer) == text


# ------------------------------------------------------------------------------------------ the two views of one head


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("reduced", [None, 4])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", [2, 4])  # fewer and more positions than channels
def test_fused_head_equals_its_chain(name: str, options: dict, reduced: int | None, training: bool, side: int) -> None:
    """Values, gradients of features and parameters, second derivatives and state."""
    head = pooling_head(name, 6, reduced, **options).double().train(training)
    twin = copy.deepcopy(head)
    x, v = maps(3, 6, side, side).requires_grad_(), maps(3, 6, side, side)
    results = []
    for model, owner in ((head, head), (twin.chain(), twin)):
        torch.manual_seed(3)  # the channels that dropout drops
        y = model(x)
        wanted = [x, *owner.parameters()]
        first = torch.autograd.grad((y**3).sum(), wanted, create_graph=True, allow_unused=True)
        second = torch.autograd.grad((first[0] * v).sum(), wanted, allow_unused=True)
        state = [buffer for buffer in owner.buffers() if buffer.is_floating_point()]
        results.append([y, *first, *second, *state])
        assert y.shape == (3, head.out_features)
    for got, want in zip(*results, strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * float(want.detach().abs().max()))


@pytest.mark.parametrize("name", POOLINGS)
def test_chain_shares_parameters_and_is_made_of_leaves(name: str) -> None:
    head = pooling_head(name, 6, 4)
    chain = head.chain()
    assert list(map(id, chain.parameters())) == list(map(id, head.parameters()))
    assert list(map(id, chain.buffers())) == list(map(id, head.buffers()))
    assert all(not list(module.children()) for module in chain if not isinstance(module, AdaptiveChannelDropout))


@pytest.mark.parametrize("name", POOLINGS)
def test_state_can_be_loaded_into_another_head(name: str) -> None:
    head, other = (pooling_head(name, 6, 4).eval() for _ in range(2))
    other.load_state_dict(head.state_dict())
    x = maps(2, 6, 3, 3, dtype=torch.float32)
    assert other(x).equal(head(x))


def test_reduction() -> None:
    """Convolution without bias, batch normalisation, the activation asked for."""
    head = pooling_head("gcp", 8, 4, activation=nn.ReLU6)
    assert [type(layer) for layer in head.reduction] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU6]
    assert (head.in_channels, head.out_features) == (8, 10)
    assert sum(parameter.numel() for parameter in head.parameters()) == 8 * 4 + 2 * 4
    assert len(pooling_head("gap", 8).reduction) == 0
    assert pooling_head("gap", 8, 4).out_features == 4


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (1, 3, 2, 2)])  # with and without null directions
def test_derivatives_of_heads(name: str, options: dict, shape: tuple[int, ...]) -> None:
    head = pooling_head(name, shape[1], **options).double().eval()
    x = maps(*shape).requires_grad_()
    assert gradcheck(head, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: head(x) ** 2, x)


@pytest.mark.parametrize("name", POOLINGS)
def test_heads_under_func_transforms(name: str) -> None:
    """The Hessian with respect to the reduction's weight, forward over reverse and reverse over reverse."""
    head = pooling_head(name, 3, 2).double().eval()
    x, weight = maps(2, 3, 2, 2), head.reduction[0].weight.detach()

    def loss(weight: Tensor) -> Tensor:
        return (torch.func.functional_call(head, {"reduction.0.weight": weight}, (x,)) ** 2).sum()

    hessian = torch.func.hessian(loss)(weight)
    torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.jacrev(loss))(weight))
    torch.testing.assert_close(hessian.reshape(6, 6), hessian.reshape(6, 6).mT)


@pytest.mark.parametrize("name", ["covariance", "gcp"])
def test_first_use_inside_a_transform_or_inference_leaves_nothing_behind(name: str) -> None:
    """Cached index tensors of a transform would escape it; those of inference mode cannot be saved for backward."""
    head = pooling_head(name, 11).double()  # a size that no other test uses, so that nothing is cached yet
    x = maps(2, 11, 2, 2)
    torch.func.hessian(lambda s: head(s * x).sum())(torch.tensor(1.0, dtype=F64))
    torch.func.vmap(head)(x[None])
    with torch.inference_mode():
        y = head(x)
    x.requires_grad_()
    torch.testing.assert_close(head(x), y)
    head(x).sum().backward()
    assert x.grad is not None


# ------------------------------------------------------------------------------------------------------ difficult inputs


def scaled(scales: list[float]) -> Tensor:
    return maps(len(scales), 6, 3, 3, dtype=torch.float32).relu() * torch.tensor(scales)[:, None, None, None]


DIFFICULT: dict[str, Callable[[], Tensor]] = {
    "tiny": lambda: scaled([1e-12, 1e-12]),
    "huge": lambda: scaled([1e6, 1e6]),
    "mixed with a zero sample": lambda: scaled([1.0, 0.0, 1e-12, 1e6]),
    "constant": lambda: torch.ones(2, 6, 3, 3),
    "two positions": lambda: maps(2, 6, 1, 2, dtype=torch.float32),
    "dead and equal channels": lambda: scaled([1.0, 1.0])[:, [0, 0, 1, 1, 2, 2]] * torch.arange(6).lt(4)[:, None, None],
    "more channels than positions": lambda: maps(2, 6, 2, 2, dtype=torch.float32),
    "repeated eigenvalues": lambda: torch.eye(9)[None, :6].reshape(1, 6, 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize(
    ("case", "autocast"),
    [
        *((case, None) for case in DIFFICULT),
        ("mixed with a zero sample", torch.bfloat16),  # autocast acts on the number format alone
        *((case, torch.float16) for case in ("mixed with a zero sample", "constant")),
    ],
)
def test_finite_for_difficult_features(name: str, case: str, autocast: torch.dtype | None) -> None:
    """Value, gradient and Hessian-vector product in float32, and under autocast, of head and chain."""
    head = pooling_head(name, 6)
    for model in (head, head.chain()):
        x = DIFFICULT[case]().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = model(x)
        scale = float(y.detach().abs().max().clamp_min(1e-30))
        gradient = torch.autograd.grad((y / scale).square().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(gradient.sum(), x)[0]
        assert all(tensor.isfinite().all() for tensor in (y, gradient, second))
        assert y.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- DropCov


def test_dropcov_is_plain_covariance_in_evaluation() -> None:
    x = maps(2, 6, 3, 3)
    assert pooling_head("dropcov", 6).double().eval()(x).equal(pooling_head("covariance", 6)(x))


def test_dropout_rate_is_the_published_formula() -> None:
    """rate = 1 - 10 / log2(C) mean_n cos(omega_n, S_n 1), S_n of the reweighted sample, in plain loops; at any scale."""
    dropout = AdaptiveChannelDropout(16).double()
    x = maps(5, 16, 3, 3) * torch.arange(16)[:, None, None].eq(3).add(0.05)  # one channel stands out: cos is small
    omega = torch.stack(
        [nn.functional.conv1d(m.mean((1, 2))[None], dropout.importance.weight, padding=1)[0] for m in x]
    )
    omega = omega.softmax(1)
    cosines = []
    for sample, weight in zip(x, omega, strict=True):
        pi = torch.cov((1 + weight)[:, None] * sample.flatten(1), correction=0).sum(1)
        cosines.append(weight @ pi / (weight.norm() * pi.norm()))
    want = 1 - 10 / 4 * torch.stack(cosines).mean()
    assert 0 < want < 1
    y = (1 + omega)[..., None] * x.flatten(2)
    for scale in (1.0, 1e-9, 1e9):
        torch.testing.assert_close(dropout.rate(scale * y, omega), want.detach())


def test_dropcov_is_the_same_in_half_precision() -> None:
    """The rate of large features overflows in float16; it is computed in float32."""
    x = 30 * torch.rand(4, 64, 7, 7)
    outputs = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(1)
        head = pooling_head("dropcov", 64)
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            outputs.append(head(x))
    assert outputs[0].abs().max() > 1
    torch.testing.assert_close(outputs[1], outputs[0])


def test_dropout_keeps_the_mean_and_drops_whole_channels() -> None:
    dropout = AdaptiveChannelDropout(64)
    x = torch.rand(400, 64, 2, 2)
    features = x.flatten(2)
    omega = dropout.importance(features.mean(-1)[:, None]).softmax(-1)[:, 0]
    rate = float(dropout.rate((1 + omega)[..., None] * features, omega))
    assert 0.05 < rate < 0.95
    y = dropout(x)
    dropped = (y == 0).all(-1).all(-1)
    assert ((y != 0).all(-1).all(-1) | dropped).all()
    # 25600 draws: 5 standard deviations of the rate are at most 0.016
    assert float(dropped.float().mean()) == pytest.approx(rate, abs=0.016)
    want = (x * (1 + omega)[..., None, None] / (1 - rate))[~dropped]
    torch.testing.assert_close(y[~dropped], want)


def test_dropout_learns_its_importance_and_survives_zero_samples() -> None:
    head = pooling_head("dropcov", 8)
    x = torch.rand(4, 8, 3, 3) * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None, None]
    head(x).square().sum().backward()
    weight = head.layers[0].importance.weight
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().sum() > 0
    assert head(torch.zeros_like(x)).abs().sum() == 0


# ----------------------------------------------------------------------------------------------------------- random lift


def test_the_lift_is_the_mean_and_products_of_its_projections() -> None:
    x = maps(2, 5, 3, 4)
    z, y = x.mean((2, 3)), pooling_head("gap_lifted", 5)(x)
    u = [z @ direction.double() for direction in RandomLift(5).rotation]
    products = [u[i] * u[j] for i in range(5) for j in range(i + 1, 5)]
    scale = (4 * torch.pi * (torch.pi - 2) / 5) ** 0.5
    torch.testing.assert_close(y, torch.cat([z, scale * torch.stack(products, 1)], 1))


def test_directions_depend_on_channels_and_seed_alone() -> None:
    torch.manual_seed(1)
    state, Q = torch.get_rng_state(), RandomLift(8, 2).rotation
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.set_default_dtype(F64)
    try:
        other = RandomLift(8, 2).rotation
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.dtype == F64
    assert other.equal(Q.double())
    torch.testing.assert_close(Q @ Q.T, torch.eye(8), atol=1e-6, rtol=0)
    assert not torch.allclose(RandomLift(8, 3).rotation, Q, atol=0.1)
    # of PyTorch's generator, whose numbers trained classifiers depend on
    drawn = torch.tensor(
        [[0.911135, 0.075130, 0.405202], [0.336093, -0.704463, -0.625119], [0.238484, 0.705753, -0.667112]]
    )
    torch.testing.assert_close(RandomLift(3).rotation, drawn, atol=1e-5, rtol=0)


def test_the_lift_is_no_parameter_and_is_kept_with_the_weights() -> None:
    head, other = pooling_head("gap_lifted", 8), pooling_head("gap_lifted", 8, seed=1)
    assert not list(head.parameters())
    assert list(head.state_dict()) == ["layers.2.rotation"]
    other.load_state_dict(head.state_dict())
    x = maps(2, 8, 3, 3)
    assert other(x).equal(head(x))


@pytest.mark.parametrize("channels", [32, 64, 256])
def test_the_lift_is_as_large_as_gcp_for_rectified_normal_features(channels: int) -> None:
    """Less than the root's Frobenius norm, of which a triangle has the entries off the diagonal once, not twice."""
    x = maps(8, channels, 32, 32, dtype=torch.float32).relu()
    lifted, root = (pooling_head(name, channels)(x).norm(dim=1).mean() for name in ("gap_lifted", "gcp_exact"))
    assert float(lifted / root) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lift_in_16_bits_is_computed_in_32(dtype: torch.dtype) -> None:
    z = maps(4, 16, dtype=dtype)
    lift = RandomLift(16)
    y = lift(z)
    assert y.dtype == dtype
    assert y.equal(lift(z.float()).to(dtype))
    with torch.autocast("cpu", dtype):
        assert lift(z).equal(lift(z.float()))


# ------------------------------------------------------------------------------------------------------------- bad input

X = torch.ones(2, 4, 3, 3)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "pooling": (lambda: pooling_head("gpc", 4), "unknown pooling 'gpc'; choose one of: gap, covariance, gcp,"),
    "option": (lambda: pooling_head("gcp", 4, iterations=3), "'iterations' of pooling 'gcp'; allowed: num_iter, method"),
    "option of none": (lambda: pooling_head("gap", 4, num_iter=3), "'num_iter' of pooling 'gap'; allowed: none"),
    "channels option": (lambda: pooling_head("gcp", 4, channels=3), "'channels' of pooling"),
    "num_iter": (lambda: pooling_head("gcp", 4, num_iter=-2), "got -2"),
    "method": (lambda: pooling_head("gcp", 4, method="svd"), "unknown method 'svd'"),
    "exponent": (lambda: pooling_head("gcp_power", 4, exponent=float("nan")), "got nan"),
    "eps": (lambda: pooling_head("gcp_log", 4, eps=-1), "got -1"),
    "seed": (lambda: pooling_head("gap_lifted", 4, seed=-1), "seed must be a whole number from 0 to .*, got -1"),
    "seed of 10^30": (lambda: pooling_head("gap_lifted", 4, seed=10**30), "seed must be a whole number from 0 to "),
    "lift of 10^6 channels": (lambda: pooling_head("gap_lifted", 10**6), "channels must be .* to 2048, got 1000000"),
    "lift of other channels": (lambda: RandomLift(4)(X[:, :3, 0, 0]), r"vectors \[N, 4\], got shape \[2, 3\]"),
    "lift of maps": (lambda: RandomLift(4)(X), r"vectors \[N, 4\], got shape \[2, 4, 3, 3\]"),
    "lift of integers": (lambda: RandomLift(4)(X[..., 0, 0].long()), r"random lift needs real numbers .*got torch\.int64"),
    "kernel size": (lambda: pooling_head("dropcov", 4, kernel_size=2), "odd whole number .* got 2"),
    "in_channels": (lambda: pooling_head("gcp", 0), "in_channels must be .* got 0"),
    "reduced_channels": (lambda: pooling_head("gcp", 4, 0), "reduced_channels must be .* got 0"),
    "other channels": (lambda: pooling_head("gcp", 5)(X), r"\[N, 5, H, W\], got shape \[2, 4, 3, 3\]"),
    "dimensions": (lambda: pooling_head("gap", 4)(X[0]), r"got shape \[4, 3, 3\]"),
    "no channels": (lambda: pooling_head("gap", 4)(X[:, :0]), r"got shape \[2, 0, 3, 3\]"),
    "single position": (lambda: pooling_head("gcp", 4)(X[..., :1, :1]), "single position gives zeros .*larger inputs"),
    "single position, dropcov": (lambda: pooling_head("dropcov", 4)(X[..., :1, :1]), "single position"),
    "single position, layer": (lambda: Covariance()(X[..., :1, :1]), "single position gives zeros"),
    "one value": (lambda: pooling_head("gap", 4, 2)(X[:1, :, :1, :1]), r"one value per channel in training.*or eval\(\)"),
    "bool": (lambda: pooling_head("gap", 4)(X.bool()), "got torch.bool"),
    "complex": (lambda: pooling_head("gcp", 4)(X.cfloat()), "float32 or float64, got torch.complex64"),
    "float8": (lambda: pooling_head("gcp_exact", 4)(X.to(torch.float8_e4m3fn)), "got torch.float8_e4m3fn"),
    "float8 for dropout": (lambda: AdaptiveChannelDropout(4)(X.to(torch.float8_e5m2)), "got torch.float8_e5m2"),
    "float8 for a root": (lambda: MatrixSquareRoot()(X[..., :3, :3].to(torch.float8_e5m2)), "got torch.float8_e5m2"),
    "no tensor": (lambda: pooling_head("gap", 4)([1.0]), "needs a tensor, got list"),
    "misspelled reduction": (lambda: pooling_head("gcp", 4, reduce_channels=2), "did you mean reduced_channels"),
    "misspelled option": (lambda: pooling_head("gcp", 4, num_itr=2), "allowed: num_iter, method; .*did you mean num_iter"),
    "unhashable pooling": (lambda: pooling_head(["gcp"], 4), r"unknown pooling \['gcp'\]; choose one of"),
    "pooling of 400 letters": (lambda: pooling_head("g" * 400, 4), "unknown pooling 'ggg"),
    "a number for a pooling": (lambda: pooling_head(0.5, 4), "unknown pooling 0.5; choose one of"),
    "a tensor for a pooling": (lambda: pooling_head(torch.tensor([1.0]), 4), r"unknown pooling tensor\(\[1.\]\)"),
    "too many steps": (lambda: pooling_head("gcp", 4, num_iter=2**63), "num_iter must be .* to 1000, got 9223372"),
    "exponent beyond float": (lambda: pooling_head("gcp_power", 4, exponent=10**400), "exponent must be .* got 1000"),
    "exponent beyond float32": (lambda: pooling_head("gcp_power", 4, exponent=1e300), "exponent must be .* 1000\\], got 1e"),
    "eps beyond float": (lambda: pooling_head("gcp_log", 4, eps=10**400), "eps must be a finite number .* got 1000"),
    "kernel of 10^30": (lambda: pooling_head("dropcov", 4, kernel_size=10**30), "kernel_size must be .* to 1048577, got"),
    "dropout of no channels": (lambda: AdaptiveChannelDropout("x"), "channels must be .* got 'x'"),
    "in_channels of 10^30": (lambda: pooling_head("gap", 10**30), "in_channels must be .* to 1048576, got"),
    "reduced_channels of 2^62": (lambda: pooling_head("gap", 4, 2**62), "reduced_channels must be .* to 1048576, got"),
    "activation": (lambda: pooling_head("gap", 4, 2, activation=3), "activation 3: must make an nn.Module"),
    "integers of bool": (lambda: pooling_head("gcp", True), "got True"),
    "in_channels of 400 digits": (lambda: pooling_head("gcp", -(10**400)), r"got -1000\S*\.\.\."),
    "no positions": (lambda: pooling_head("gcp", 4)(X[..., :0]), r"got shape \[2, 4, 3, 0\]"),
    "integers": (lambda: pooling_head("covariance", 4)(X.long()), "int64"),
    "covariance": (lambda: Covariance()(X[0, 0]), r"got shape \[3, 3\]"),
    "covariance of tokens": (lambda: Covariance()(X[0]), r"needs features \[N, C, H, W\].*layout=\"NLC\""),
    "dropout of tokens": (lambda: AdaptiveChannelDropout(4)(X[0]), r"got shape \[4, 3, 3\].*layout"),
    "triangle": (lambda: UpperTriangle()(X[0, 0, :2]), r"got shape \[2, 3\]"),
    "square root": (lambda: MatrixSquareRoot()(X[..., :2]), r"\[2, 4, 3, 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(InputError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) <= 300


def test_a_refused_head_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    for options in ({"num_iter": 0}, {"method": "svd"}):
        with pytest.raises(InputError):
            pooling_head("gcp", 8, 4, **options)
    with pytest.raises(InputError):
        pooling_head("dropcov", 8, 4, kernel_size=2)
    assert torch.equal(torch.get_rng_state(), before)


REFUSED_IN_TRAINING: dict[str, Callable[[PoolingHead], object]] = {
    "single position": lambda head: head(X[..., :1, :1]),
    "weights of another shape": lambda head: head(X, torch.ones(3)),
    "negative weights": lambda head: head(X, -torch.ones(2, 9)),
}


@pytest.mark.parametrize("case", REFUSED_IN_TRAINING)
def test_refused_features_leave_the_batch_statistics(case: str) -> None:
    head = pooling_head("gcp", 4, 2)
    with pytest.raises(InputError):
        REFUSED_IN_TRAINING[case](head)
    _, normalisation, _ = head.reduction
    assert int(normalisation.num_batches_tracked) == 0
    assert torch.equal(normalisation.running_mean, torch.zeros(2))


def test_constant_features_have_covariance_zero_however_their_mean_rounds() -> None:
    """Else a small power would make numbers of the rounding error of a mean, a negative one large ones."""
    x = torch.full((2, 3, 5, 3), 1e-15) * torch.tensor([1.0, 0.3])[:, None, None, None]
    assert (x.mean((2, 3), keepdim=True) != x).any(), "the mean of this example is exact: choose another"
    for head in (pooling_head("gcp_power", 3, exponent=0.1), pooling_head("covariance", 3), pooling_head("gcp", 3)):
        for layers in (head, head.chain()):
            assert layers(x).abs().max() == 0


def test_a_pooling_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POOLINGS, "positions", lambda channels: [nn.Flatten()])
    head = pooling_head("positions", 3)
    assert head(maps(2, 3, 4, 4)).shape == (2, head.out_features) == (2, 48)
    monkeypatch.setitem(POOLINGS, "maps", lambda channels: [nn.ReLU()])
    monkeypatch.setitem(POOLINGS, "none", lambda channels: [])
    with pytest.raises(InputError, match=r"not \[N, F\]; end in Flatten"):
        pooling_head("maps", 3)
    with pytest.raises(InputError, match="pooling 'none' has no layers"):
        pooling_head("none", 3)


def test_every_pooling_has_a_documented_head() -> None:
    for name, layers in POOLINGS.items():
        assert layers.__doc__
        assert isinstance(pooling_head(name, 4), PoolingHead)
