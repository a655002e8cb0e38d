"""The Gauss-Newton optimiser against dense matrices of torch.func, SGD's formula, and in the training loop."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.data import load_dataset
from secondorder.errors import InputError, NonFiniteError
from secondorder.gauss_newton import GaussNewton
from secondorder.gauss_newton.batch_curvature import BatchCurvature
from secondorder.networks import network

Batch = tuple[Tensor, Tensor]
EXACT: dict[str, Any] = {"momentum": 0.0, "clip": None, "tolerance": 1e-12, "iterations": 500}
"""The direction itself, solved to rounding."""
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
}


def convnet(seed: int = 0, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """2 convolutions, a normalisation, an in-place ReLU and a classifier of 3 classes, for [N, 2, 5, 5]; float64."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, 2, bias=False)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()


def batches(count: int, size: int = 12) -> list[Batch]:
    """Random images, and labels that depend on them."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(size, 2, 5, 5, dtype=torch.float64, generator=generator) for _ in range(count)]
    return [(x, x.mean((1, 2))[:, :3].argmax(1)) for x in images]


def dense(model: nn.Module, loss: Callable, batch: Batch) -> Tensor:
    """J^T H J `[P, P]` over all parameters, by torch.func; buffers and random state are left as they are."""
    x, y = batch
    named = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in named.values()])
        own = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(model, own | {name: b.clone() for name, b in model.named_buffers()}, (x.clone(),))

    with torch.random.fork_rng():
        J = jacrev(outputs)(flat(named.values())).flatten(0, -2)
    with torch.random.fork_rng():
        z = outputs(flat(named.values()))
    H = hessian(lambda f: loss(f.view_as(z), y))(z.flatten())
    return J.mT @ H @ J


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return copy.deepcopy(dict(model.state_dict()))


def same(a: Any, b: Any) -> bool:
    """Whether nested states are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, loss: Callable = F.cross_entropy) -> float:
    """One step of the training loop; the loss before it."""
    optimizer.zero_grad()
    logits = model(batch[0])
    if isinstance(optimizer, GaussNewton):
        optimizer.update_curvature(logits)
    value = loss(logits, batch[1])
    value.backward()
    optimizer.step()
    return value.item()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(model: nn.Module, batch: Batch, loss: Callable = F.cross_entropy) -> Tensor:
    twin = copy.deepcopy(model)
    return flat(torch.autograd.grad(loss(twin(batch[0]), batch[1]), list(twin.parameters())))


def scale(G: Tensor, number: int = 0) -> float:
    """|G z|^2 / z^T G z for the signs of a step: the first step's estimate of |G|_F^2 / tr G."""
    z = 2 * torch.randint(2, (len(G),), generator=torch.Generator().manual_seed(number)).to(G) - 1
    return float((G @ z).square().sum() / (z @ G @ z))


# ---------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("pooling", ["gap", "covariance", "gcp"])
def test_products_are_those_of_the_curvature_package_in_training_mode(pooling: str) -> None:
    model = network("digits_tiny", pooling, 10, 1, None).double().train()
    x, y = torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.randint(10, (12,))
    curvature = BatchCurvature(model, "cross_entropy")
    expected = curvature_blocks(model, F.cross_entropy, (x, y), "ggn").whole
    curvature.take(model(x))
    names = [name for name, _ in model.named_parameters()]
    with curvature.quietly():
        G = curvature.operator(names)
        v = torch.randn(G.size, dtype=torch.float64)
        assert torch.allclose(G @ v, expected @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_the_dense_solve(norm: str, training: bool) -> None:
    model = convnet(norm=NORMS[norm]).train(training)
    x, y = batches(1)[0]
    G, g, before = dense(model, F.cross_entropy, (x, y)), gradient(model, (x, y)), flat(model.parameters())
    step(model, GaussNewton(model, 0.5, damping=0.1, **EXACT), (x, y))
    damped = G + 0.1 * scale(G) * torch.eye(len(G), dtype=G.dtype)
    expected = before - 0.5 * torch.linalg.solve(damped, g)
    assert torch.allclose(flat(model.parameters()), expected, rtol=1e-8, atol=1e-10)


def test_dropout_has_the_masks_of_the_users_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    torch.manual_seed(5)
    with torch.random.fork_rng():
        G, before = dense(model, F.cross_entropy, (x, y)), flat(model.parameters())
    with torch.random.fork_rng():
        g = gradient(model, (x, y))
    step(model, GaussNewton(model, 1.0, damping=0.1, **EXACT), (x, y))
    damped = G + 0.1 * scale(G) * torch.eye(len(G), dtype=G.dtype)
    assert torch.allclose(flat(model.parameters()), before - torch.linalg.solve(damped, g), rtol=1e-8, atol=1e-10)


def test_one_undamped_step_solves_linear_least_squares() -> None:
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    step(model, GaussNewton(model, 1.0, likelihood="mse", **EXACT | {"damping": 1e-13}), (x, y), F.mse_loss)
    with_one = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(with_one, y).solution
    assert torch.allclose(torch.cat([model.weight, model.bias[:, None]], 1).mT, expected, atol=1e-9)


def test_buffers_change_as_with_sgd_and_random_numbers_too() -> None:
    twins = [nn.Sequential(convnet(norm=nn.BatchNorm2d), nn.Dropout(0.2)) for _ in range(2)]
    optimizers = [GaussNewton(twins[0], 0.0), torch.optim.SGD(twins[1].parameters(), 0.0)]
    for twin, optimizer in zip(twins, optimizers, strict=True):
        torch.manual_seed(3)
        for batch in batches(3):
            step(twin, optimizer, batch)
        twin.register_buffer("drawn", torch.rand(3))
    assert same(weights(twins[0]), weights(twins[1]))
    assert int(twins[0].state_dict()["0.1.num_batches_tracked"]) == 3


# ---------------------------------------------------------------------------------------------- damping, decay, momentum


def test_damping_is_relative_to_running_means_of_one_probe_a_step() -> None:
    model = convnet()
    optimizer = GaussNewton(model, 0.0)
    norms, traces = [], []
    for number, (x, y) in enumerate(batches(3)):
        G = dense(model, F.cross_entropy, (x, y))
        z = 2 * torch.randint(2, (len(G),), generator=torch.Generator().manual_seed(number)).to(G) - 1
        norms.append(float((G @ z).square().sum()))
        traces.append(float(z @ G @ z))
        step(model, optimizer, (x, y))
    w = [0.95**2, 0.95, 1.0]
    expected = sum(a * b for a, b in zip(w, norms, strict=True)) / sum(a * b for a, b in zip(w, traces, strict=True))
    assert optimizer.report().scale == pytest.approx(expected, rel=1e-10)


def test_the_probe_has_the_scale_of_kfacs_damping_in_expectation() -> None:
    x, y = batches(1)[0]
    model = convnet()
    G = dense(model, F.cross_entropy, (x, y))
    optimizer = GaussNewton(model, 0.0, iterations=1)
    Z = 2 * torch.randint(2, (len(G), 2000), generator=torch.Generator().manual_seed(0)).to(G) - 1
    norms, traces = float((G @ Z).square().sum()), float((Z * (G @ Z)).sum())
    for _ in range(60):
        step(model, optimizer, (x, y))
    expected = float(G.square().sum() / G.trace())
    assert norms / traces == pytest.approx(expected, rel=0.05)  # 2,000 draws
    assert optimizer.report().scale == pytest.approx(expected, rel=0.5)  # about 40 draws


def test_weight_decay_is_decoupled_or_in_the_right_side() -> None:
    x, y = batches(1)[0]
    for decoupled in (True, False):
        model = convnet()
        G, g, w = dense(model, F.cross_entropy, (x, y)), gradient(model, (x, y)), flat(model.parameters())
        step(model, GaussNewton(model, 0.5, damping=0.1, weight_decay=0.2, decoupled=decoupled, **EXACT), (x, y))
        damped = G + 0.1 * scale(G) * torch.eye(len(G), dtype=G.dtype)
        b, shrunk = (g, 0.9 * w) if decoupled else (g + 0.2 * w, w)
        assert torch.allclose(flat(model.parameters()), shrunk - 0.5 * torch.linalg.solve(damped, b), atol=1e-9)


def test_with_a_matrix_like_the_identity_it_is_sgd_with_momentum() -> None:
    """x = I, squared error: G = (2 / 4) I at 4 outputs and samples, so d = g / (1/2 + lambda), lambda = damping / 2."""
    model = nn.Linear(4, 4, bias=False).double()
    twin = copy.deepcopy(model)
    x, y = 2 * torch.eye(4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    ours = GaussNewton(model, 0.1, likelihood="mse", damping=0.3, weight_decay=0.0, **EXACT | {"momentum": 0.8})
    eigenvalue = 2 / 16 * 4
    theirs = torch.optim.SGD(twin.parameters(), 0.1 / (1.3 * eigenvalue), momentum=0.8)
    for _ in range(5):
        step(model, ours, (x, y), F.mse_loss)
        step(twin, theirs, (x, y), F.mse_loss)
    assert torch.allclose(model.weight, twin.weight, rtol=1e-10)


def test_the_trust_region_limits_the_quadratic_form_of_the_step() -> None:
    x, y = batches(1)[0]
    model = convnet()
    G, w = dense(model, F.cross_entropy, (x, y)), flat(model.parameters())
    step(model, GaussNewton(model, 2.0, damping=0.1, **EXACT | {"clip": 1e-2}), (x, y))
    moved = flat(model.parameters()) - w
    damped = G + 0.1 * scale(G) * torch.eye(len(G), dtype=G.dtype)
    assert float(moved @ damped @ moved) == pytest.approx((2.0 * 1e-2) ** 2, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ state and report


def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Any) -> None:
    settings = {"momentum": 0.9, "weight_decay": 1e-2}
    whole = convnet(norm=nn.BatchNorm2d)
    optimizer = GaussNewton(whole, 0.1, **settings)
    for batch in batches(3):
        step(whole, optimizer, batch)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for batch in batches(6)[3:]:
        step(whole, optimizer, batch)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = convnet(seed=1, norm=nn.BatchNorm2d)
    resumed.load_state_dict(state["model"])
    again = GaussNewton(resumed, 0.1, **settings)
    again.load_state_dict(state["optimizer"])
    for batch in batches(6)[3:]:
        step(resumed, again, batch)
    assert same(weights(resumed), weights(whole))
    assert same(again.state_dict(), optimizer.state_dict())


def test_the_report_counts_iterations_and_steps_that_ended_early() -> None:
    model = convnet()
    short = GaussNewton(model, 0.1, tolerance=1e-10, iterations=2)
    for batch in batches(2):
        step(model, short, batch)
    report = short.report()
    assert (report.steps, report.iterations, report.unconverged, report.skipped) == (2, 2.0, 1.0, 0)
    assert set(report.seconds) == {"curvature", "conjugate gradients", "update"}
    assert "2 steps of 2.0 iterations on average, 100% ended before the tolerance" in str(report)
    long = GaussNewton(model, 0.1, tolerance=1e-6, iterations=500)
    step(model, long, batches(1)[0])
    assert long.report().unconverged == 0
    assert 2 < long.report().iterations < 500


def test_the_state_of_another_model_is_refused_and_changes_nothing() -> None:
    other = nn.Linear(3, 2).double()
    foreign = GaussNewton(other, 0.1).state_dict()
    model = convnet()
    optimizer = GaussNewton(model, 0.3)
    step(model, optimizer, batches(1)[0])
    before = copy.deepcopy(optimizer.state_dict())
    for state in (foreign, torch.optim.SGD(other.parameters(), 0.1).state_dict()):
        with pytest.raises(InputError, match="not of a GaussNewton with the parameters"):
            optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)


# ------------------------------------------------------------------------------------------------------------ bad input


BAD = {
    "lr": -1.0,
    "momentum": 1.0,
    "weight_decay": float("nan"),
    "damping": 0.0,
    "tolerance": 0.0,
    "iterations": 0,
    "clip": 0.0,
    "likelihood": "poisson",
    "decoupled": None,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_named(name: str) -> None:
    with pytest.raises(InputError, match=name):
        GaussNewton(convnet(), **{"lr": 0.1, name: BAD[name]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": 0.5}, "model float: must be a torch.nn.Module"),
        ({"weight_decay": 1e300}, r"weight_decay 1e\+300: must be a number in \[0, 3.4e\+38\)"),
        ({"weight_decay": 20.0}, "weight_decay 20 with lr 0.1 multiplies the weights by -1 in each step"),
        ({"likelihood": []}, r"unknown likelihood \[\]; choose one of"),
        ({"tolerance": 2.0}, "tolerance 2.0: must be below 1"),
    ],
)
def test_a_bad_value_is_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GaussNewton(**({"model": convnet(), "lr": 0.1} | settings))


@pytest.mark.parametrize("closure", ["x", 3, [], True])
def test_a_closure_that_is_no_function_is_refused(closure: Any) -> None:
    with pytest.raises(InputError, match="the only argument is a function that computes the loss"):
        GaussNewton(convnet(), 0.1).step(closure)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", "x"), ("lr", float("inf")), ("weight_decay", 1e9), ("damping", "1")]
)
def test_settings_that_are_changed_to_nonsense_are_refused(name: str, value: Any) -> None:
    model, data = convnet(norm=NORMS["group"]), batches(1)[0]
    optimizer = GaussNewton(model, 0.1)
    step(model, optimizer, data)
    before = weights(model)
    optimizer.param_groups[0][name] = value
    with pytest.raises(InputError, match=f"^{name} "):
        step(model, optimizer, data)
    assert same(weights(model), before)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    for model in (nn.ReLU(), convnet().requires_grad_(False)):
        with pytest.raises(InputError, match="no trainable parameter"):
            GaussNewton(model, 0.1)


def test_calls_in_another_order_are_explained() -> None:
    model = convnet(norm=NORMS["group"])
    x, y = batches(1)[0]
    optimizer = GaussNewton(model, 0.1)
    before = weights(model)
    with pytest.raises(InputError, match="no parameter of the model has a gradient"):
        optimizer.step()
    with pytest.raises(InputError, match="without a forward pass"):
        optimizer.update_curvature(torch.zeros(12, 3))
    logits = model(x)
    F.cross_entropy(logits, y).backward()
    with pytest.raises(InputError, match="step\\(\\) without update_curvature"):
        optimizer.step()
    optimizer.update_curvature(logits)
    model(x)
    with pytest.raises(InputError, match="twice in a step"):
        optimizer.update_curvature(logits)
    optimizer.zero_grad()
    with pytest.raises(InputError, match=r"logits are \[36\]"):
        optimizer.update_curvature(model(x).flatten())
    with pytest.raises(InputError, match=r"logits are torch\.float64 on meta"):
        optimizer.update_curvature(model(x).to("meta"))
    optimizer.update_curvature(2 * model(x))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(InputError, match="has other outputs"):
        optimizer.step()
    assert same(weights(model), before)
    step(model, optimizer, (x, y))
    with pytest.raises(InputError, match="without a forward pass"):  # the optimiser's own evaluations do not count
        optimizer.update_curvature(logits)


@pytest.mark.parametrize("what", [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn, "meta"])
def test_logits_without_arithmetic_are_refused(what: Any) -> None:
    model = convnet(norm=NORMS["group"])
    x, y = batches(1)[0]
    optimizer = GaussNewton(model, 0.1)
    logits = model(x)
    with pytest.raises(InputError, match=str(what)):
        optimizer.update_curvature(logits.detach().to(what))
    optimizer.update_curvature(model(x))
    F.cross_entropy(logits, y).backward()
    optimizer.step()


def test_a_model_of_two_tensors_is_refused() -> None:
    model = nn.Bilinear(3, 3, 2)
    optimizer = GaussNewton(model, 0.1)
    with pytest.raises(InputError, match="called with 2 arguments"):
        optimizer.update_curvature(model(torch.randn(4, 3), torch.randn(4, 3)))


def test_copies_and_groups_are_refused() -> None:
    optimizer = GaussNewton(convnet(), 0.1)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="cannot be copied or pickled"):
            attempt(optimizer)
    with pytest.raises(InputError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_gradients_that_are_not_finite_change_nothing() -> None:
    model = convnet(norm=NORMS["group"])
    optimizer = GaussNewton(model, 0.1)
    (x, y), other = batches(2)
    step(model, optimizer, (x, y))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    x[0, 0, 0, 0] = float("nan")
    step(model, optimizer, (x, y))
    assert same(weights(model), before)
    assert optimizer.report().skipped == 1
    state["gauss_newton"]["counts"]["skipped"] = 1
    assert same(optimizer.state_dict(), state)
    step(model, optimizer, other)
    assert not same(weights(model), before)


def test_outputs_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).double()
    optimizer = GaussNewton(model, 0.1)
    optimizer.update_curvature(model(torch.full((3, 2), float("inf"), dtype=torch.float64)))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        optimizer.step()


def test_the_model_does_not_keep_the_optimiser_nor_its_hook() -> None:
    model = convnet()
    optimizer = GaussNewton(model, 0.1)
    assert len(model._forward_pre_hooks) == 1
    del optimizer
    gc.collect()
    assert len(model._forward_pre_hooks) == 0


# ------------------------------------------------------------------------------------------------------------- training


def test_it_trains_digits_faster_than_sgd_from_the_same_batches() -> None:
    data = load_dataset("digits", None, download=False, limit=256)
    found = {}
    for name in ("sgd", "gauss_newton"):
        torch.manual_seed(0)
        model = network("digits_tiny", "gap", 10, 1, None)
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(model.parameters(), 0.5, momentum=0.9) if name == "sgd" else GaussNewton(model, 0.1)
        )
        losses = []
        for number in range(20):
            images, labels = data.train.batch(torch.arange(64) + 64 * (number % 4))
            losses.append(step(model, optimizer, (images, labels)))
        found[name] = sum(losses[-4:]) / 4
    assert found["gauss_newton"] < 0.7 * found["sgd"]
