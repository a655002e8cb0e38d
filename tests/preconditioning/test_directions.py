"""K-FAC's direction is the optimiser's, the natural gradient is a dense solve, and both agree where K-FAC is exact."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.errors import InputError, NonFiniteError
from secondorder.kfac import Damping, Fisher, KFACPreconditioner, Options
from secondorder.networks import Network, network
from secondorder.preconditioning import (
    KFACDirections,
    kfac_direction,
    loss_gradient,
    natural_gradient_direction,
    orthogonal_direction,
)
from secondorder.preconditioning import natural_gradient as natural_gradient_module

Batch = tuple[Tensor, Tensor]
CONVOLUTIONS = ["stem.0.weight", "features.0.weight", "features.3.weight"]
LOSSES = {"cross-entropy": F.cross_entropy, "squared error": nn.MSELoss()}


def convnet(pooling: str = "gap") -> Network:
    """A network in eval mode with batch-norm statistics that are not 0 and 1; its classifier has a bias."""
    model = network("digits_tiny", pooling, 3, 1).double().eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
    return model


def batch(n: int = 12, kind: str = "cross-entropy", seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=generator)
    if kind == "squared error":
        return images, torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (n,), generator=generator)


def true_gradient(model: nn.Module, data: Batch, loss: nn.Module, names: list[str]) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    loss(model(data[0]), data[1]).backward()
    return {name: model.get_parameter(name).grad for name in names}


def true_ggn(model: nn.Module, data: Batch, loss: nn.Module, names: list[str]) -> Tensor:
    """J^T H J of some parameters by torch.func."""
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    w = {name: fixed[name] for name in names}
    outputs = lambda v: functional_call(model, {**fixed, **v}, (data[0],))  # noqa: E731
    J = torch.cat([part.flatten(2) for part in jacrev(outputs)(w).values()], 2).flatten(0, 1)
    z = outputs(w)
    H = hessian(lambda f: loss(f.view_as(z), data[1]))(z.flatten())
    return J.mT @ H @ J


def flat(direction: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in direction.values()])


def optimisers_direction(
    model: nn.Module, data: Batch, damping: Damping, kind: str, **options: object
) -> dict[str, Tensor]:
    """What KFACPreconditioner makes of the gradients in its first step."""
    model = copy.deepcopy(model)
    word = "mse" if kind == "squared error" else "cross_entropy"
    fisher = Fisher(str(options.pop("fisher", "exact")), word)
    pre = KFACPreconditioner(model, damping=damping, fisher=fisher, **options)
    logits = model(data[0])
    pre.update_curvature(logits)
    LOSSES[kind](logits, data[1]).backward()
    pre.step()
    return {name: p.grad for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------- K-FAC's direction


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    ("pooling", "relative", "options"),
    [
        ("gcp", True, {}),
        ("gap", False, {}),
        ("gcp", False, {"sharing": "reduce"}),
        ("gap", True, {"fisher": "empirical"}),
    ],
    ids=str,
)
def test_is_the_optimisers_direction(kind: str, pooling: str, relative: bool, options: dict) -> None:
    model, data = convnet(pooling), batch(kind=kind)
    theirs = optimisers_direction(model, data, Damping(0.03, relative=relative), kind, **options)
    ours = kfac_direction(model, data, 0.03, loss=LOSSES[kind], relative=relative, **options)
    assert list(ours) == [*CONVOLUTIONS, "classifier.weight", "classifier.bias"]
    for name, direction in ours.items():
        torch.testing.assert_close(direction, theirs[name], rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("power", "width"), [(0.0, 4), (0.25, 4), (0.5, 4), (1.0, 4), (0.25, 1100), (1.0, 1100)])
def test_powers_are_those_of_the_damped_block(power: float, width: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.Tanh(), nn.Linear(width, 3)).double()
    data, names = batch(), ["3.weight", "3.bias"]
    directions = KFACDirections(model, data, params=names)
    g = {name: torch.randn_like(model.get_parameter(name)) for name in names}  # not only in the range of A
    a = torch.cat([model[:3](data[0]), torch.ones(12, 1, dtype=torch.float64)], 1)
    p = model(data[0]).softmax(1)
    b, V = torch.linalg.eigh((p.diag_embed() - p[:, :, None] * p[:, None]).mean(0))
    alpha, U = torch.linalg.eigh(a.mT @ a / 12)
    added = float(directions.tikhonov(0.2)["3"])
    W = torch.cat([g["3.weight"], g["3.bias"][:, None]], 1)
    expected = V @ ((V.mT @ W @ U) / (b[:, None] * alpha + added) ** power) @ U.mT
    found = directions.direction(g, 0.2, power)
    torch.testing.assert_close(found["3.weight"], expected[:, :-1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found["3.bias"], expected[:, -1], rtol=1e-7, atol=1e-9)


def test_the_orthogonal_direction_has_the_singular_values_1() -> None:
    g = {"conv": torch.randn(4, 3, 2, 2).double(), "tall": torch.randn(6, 2).double()}
    g["poor"] = torch.outer(g["tall"][:, 0], g["tall"][:3, 1])  # of rank 1
    found = orthogonal_direction(g)
    M, G = found["conv"].flatten(1), g["conv"].flatten(1)
    torch.testing.assert_close(M @ M.mT, torch.eye(4).double())
    l, Q = torch.linalg.eigh(G @ G.mT)  # noqa: E741
    torch.testing.assert_close(M, Q @ (l.rsqrt()[:, None] * (Q.mT @ G)))
    torch.testing.assert_close(found["tall"].mT @ found["tall"], torch.eye(2).double())
    torch.testing.assert_close(found["poor"], g["poor"] / g["poor"].norm())
    assert not orthogonal_direction({"w": torch.zeros(3, 2)})["w"].any()
    with pytest.raises(InputError, match=r"the gradient of b has the shape \[3\]: not that of a matrix"):
        orthogonal_direction({"b": torch.zeros(3)})
    with pytest.raises(NonFiniteError, match="the gradient of w contains NaN"):
        orthogonal_direction({"w": torch.full((2, 2), float("nan"))})


def test_wide_layers_as_the_optimiser_keeps_them() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1100), nn.Tanh(), nn.Linear(1100, 3)).double()
    assert model[3].in_features > Options().wide_inputs
    data = batch()
    theirs = optimisers_direction(model, data, Damping(0.1), "cross-entropy")
    for name, direction in kfac_direction(model, data, 0.1).items():
        torch.testing.assert_close(direction, theirs[name], rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_is_the_tikhonov_solve_with_factors_by_hand() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)).double(), batch()
    g = loss_gradient(model, data, params=["3.weight", "3.bias"])
    a = torch.cat([model[:3](data[0]), torch.ones(12, 1, dtype=torch.float64)], 1)
    p = model(data[0]).softmax(1)
    A, B = a.mT @ a / 12, (p.diag_embed() - p[:, :, None] * p[:, None]).mean(0)
    scale = A.square().sum() / A.trace() * B.square().sum() / B.trace()
    W = torch.cat([g["3.weight"], g["3.bias"][:, None]], 1)
    system = torch.kron(B, A) + 0.2 * scale * torch.eye(15, dtype=torch.float64)
    expected = torch.linalg.solve(system, W.flatten()).view(3, 5)
    directions = KFACDirections(model, data, params=["3.weight", "3.bias"])
    found = directions.direction(g, 0.2)
    torch.testing.assert_close(found["3.weight"], expected[:, :4])
    torch.testing.assert_close(found["3.bias"], expected[:, 4])
    assert float(directions.tikhonov(0.2)["3"]) == pytest.approx(0.2 * float(scale))


def test_weight_alone_is_a_block_without_the_bias() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double(), batch()
    nn.init.zeros_(model[1].bias)
    alone = kfac_direction(model, data, 0.1, params=["1.weight"])
    assert list(alone) == ["1.weight"]
    without = nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False)).double()
    without[1].weight = model[1].weight
    gradient = loss_gradient(model, data, params=["1.weight"])
    torch.testing.assert_close(alone, kfac_direction(without, data, 0.1, curvature_batch=data, gradient=gradient))
    both = kfac_direction(model, data, 0.1)
    assert not torch.allclose(both["1.weight"], alone["1.weight"], rtol=1e-3)


def test_factors_of_other_images_and_a_given_gradient() -> None:
    model, data, reference = convnet("gcp"), batch(), batch(300, seed=2)
    g = loss_gradient(model, data, params=CONVOLUTIONS)
    directions = KFACDirections(model, reference, params=CONVOLUTIONS)
    for damping in (0.01, 1.0):
        once = kfac_direction(model, data, damping, params=CONVOLUTIONS, curvature_batch=reference)
        given = kfac_direction(model, reference, damping, gradient=g)
        torch.testing.assert_close(directions.direction(g, damping), once, rtol=1e-12, atol=0)
        torch.testing.assert_close(given, once, rtol=1e-12, atol=0)
    assert not torch.allclose(
        once[CONVOLUTIONS[0]], kfac_direction(model, data, 1.0, params=CONVOLUTIONS)[CONVOLUTIONS[0]]
    )


def test_parts_of_a_batch_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = convnet("gcp"), batch()
    whole = kfac_direction(model, data, 0.01)
    monkeypatch.setattr("secondorder.preconditioning.kfac_directions.CHUNK", 5)
    torch.testing.assert_close(kfac_direction(model, data, 0.01), whole, rtol=1e-9, atol=1e-12)
    model.train()  # batch norm couples the samples: no parts
    calls: list[int] = []
    handle = model.register_forward_hook(lambda m, x, z: calls.append(len(z)))
    KFACDirections(model, data)
    handle.remove()
    assert calls == [12]


def test_gradient_is_that_of_autograd() -> None:
    model, data = convnet("gcp"), batch()
    names = [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(loss_gradient(model, data), true_gradient(model, data, nn.CrossEntropyLoss(), names))


def test_network_is_left_as_it_is() -> None:
    model, data = convnet("gcp").train(), batch()
    model.stem[0].weight.requires_grad_(False)
    F.cross_entropy(model(data[0]), data[1]).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    for fisher in ("exact", "empirical"):
        kfac_direction(model, data, 0.1, params=CONVOLUTIONS, fisher=fisher)
    natural_gradient_direction(model, data, 0.1, params=CONVOLUTIONS[:1], iterations=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if name in gradients)
    assert model.stem[0].weight.grad is None
    assert not model.stem[0].weight.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(part.training for part in model.modules())


def test_large_damping_is_the_gradient_and_no_curvature_is_said() -> None:
    model, data = convnet(), batch()
    directions = KFACDirections(model, data, relative=False)
    g = loss_gradient(model, data, params=directions.names)
    torch.testing.assert_close(flat(directions.direction(g, 1e9)) * 1e9, flat(g), rtol=1e-6, atol=1e-12)
    assert directions.without_curvature == []
    with torch.no_grad():
        model.classifier.weight.zero_()
    dead = KFACDirections(model, data, params=CONVOLUTIONS)
    assert dead.without_curvature == ["stem.0", "features.0", "features.3"]
    some = {name: torch.ones_like(tensor) for name, tensor in g.items() if name in CONVOLUTIONS}
    torch.testing.assert_close(flat(dead.direction(some, 0.5)), 2 * flat(some))


# --------------------------------------------------------------------------------------------------- the natural gradient


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("held", [True, False])
def test_natural_gradient_is_the_dense_solve(kind: str, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not held:
        monkeypatch.setattr(natural_gradient_module, "FACTOR_BYTES", 0)
    model, data, names = convnet("gcp"), batch(6, kind), CONVOLUTIONS[1:]
    G, g = true_ggn(model, data, LOSSES[kind], names), flat(true_gradient(model, data, LOSSES[kind], names))
    found = natural_gradient_direction(model, data, 0.05, loss=LOSSES[kind], params=names, tolerance=1e-10)
    scale = float(G.square().sum() / G.trace())
    assert found.damping == pytest.approx(0.05 * scale, rel=1e-9 if held else 0.5)
    assert found.solution.converged
    expected = torch.linalg.solve(G + found.damping * torch.eye(len(G), dtype=torch.float64), g)
    torch.testing.assert_close(flat(found.direction), expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    assert list(found.direction) == names


def test_images_that_batch_norm_ties_together_take_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: GaussNewtonOperator) -> None:
        raise AssertionError("a backward pass of the whole batch for each image and class")

    monkeypatch.setattr(GaussNewtonOperator, "factored", refuse)
    model, data, names = convnet("gcp").train(), batch(6), CONVOLUTIONS[1:]
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):  # statistics of the batch, none kept: torch.func cannot update them
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
    G, g = true_ggn(model, data, F.cross_entropy, names), flat(true_gradient(model, data, F.cross_entropy, names))
    found = natural_gradient_direction(model, data, 0.05, params=names, tolerance=1e-6, iterations=17)  # of 18 rows
    assert found.solution.converged
    expected = torch.linalg.solve(G + found.damping * torch.eye(len(G), dtype=torch.float64), g)
    torch.testing.assert_close(flat(found.direction), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    with pytest.raises(AssertionError, match="for each image and class"):  # no more rows than products
        natural_gradient_direction(model, data, 0.05, params=names, iterations=18)


@pytest.mark.parametrize("limit", ["FACTOR_BYTES", "EXACT_ROWS"])
def test_estimated_scale_is_right_in_the_mean(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natural_gradient_module, limit, 0)
    monkeypatch.setattr(natural_gradient_module, "PROBES", 300)
    model, data = convnet(), batch(6)
    G = true_ggn(model, data, F.cross_entropy, CONVOLUTIONS[:1])
    exact = float(G.square().sum() / G.trace())
    found = natural_gradient_direction(model, data, 1.0, params=CONVOLUTIONS[:1])
    assert found.damping == pytest.approx(exact, rel=0.1)
    assert found.damping != pytest.approx(exact, rel=1e-6)


def agree(model: nn.Module, data: Batch, loss: object, params: list[str], tolerance: float = 1e-6) -> None:
    for relative in (True, False):
        kfac = kfac_direction(model, data, 0.02, loss=loss, params=params, relative=relative)
        natural = natural_gradient_direction(
            model, data, 0.02, loss=loss, params=params, relative=relative, tolerance=1e-11, iterations=2000
        )
        assert natural.solution.converged
        torch.testing.assert_close(
            flat(kfac), flat(natural.direction), rtol=tolerance, atol=tolerance * float(flat(kfac).norm())
        )


def test_they_agree_for_one_linear_layer_and_squared_error() -> None:
    agree(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double(),
        batch(kind="squared error"),
        nn.MSELoss(),
        ["1.weight", "1.bias"],
    )


def test_they_agree_for_each_layer_of_a_deep_linear_network() -> None:
    layers = [nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)]
    for params in (["1.weight", "1.bias"], ["2.weight"], ["3.weight", "3.bias"]):
        agree(nn.Sequential(*layers).double(), batch(kind="squared error"), nn.MSELoss(), params)


def test_they_agree_for_a_single_image() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for params in (["1.weight", "1.bias"], ["3.weight", "3.bias"]):
        agree(model, batch(1), F.cross_entropy, params)


def test_they_differ_where_kfac_is_no_more_than_an_approximation() -> None:
    with pytest.raises(AssertionError, match="not close"):
        agree(convnet("gcp"), batch(), F.cross_entropy, ["features.3.weight"], 1e-2)


def test_curvature_of_other_images_and_a_given_gradient() -> None:
    model, data, reference = convnet(), batch(), batch(5, seed=3)
    g = loss_gradient(model, data, params=CONVOLUTIONS[:1])
    once = natural_gradient_direction(model, data, 0.1, params=CONVOLUTIONS[:1], curvature_batch=reference)
    given = natural_gradient_direction(model, reference, 0.1, gradient=g)
    torch.testing.assert_close(once.direction, given.direction)
    own = natural_gradient_direction(model, data, 0.1, params=CONVOLUTIONS[:1])
    assert not torch.allclose(flat(own.direction), flat(once.direction), rtol=1e-2)


def test_without_convergence_it_is_said() -> None:
    found = natural_gradient_direction(convnet(), batch(), 1e-6, params=CONVOLUTIONS, iterations=3)
    assert not found.solution.converged
    assert "not converged" in found.solution.status
    assert torch.isfinite(flat(found.direction)).all()


def test_zero_gradient_and_zero_curvature() -> None:
    model, data = convnet(), batch()
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert not flat(kfac_direction(model, data, 0.1, params=CONVOLUTIONS)).any()
    found = natural_gradient_direction(model, data, 0.1, params=CONVOLUTIONS)
    assert found.damping == 0.1
    assert not flat(found.direction).any()


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["stem.0.weight", "stem.1.weight"], r"no factors for stem\.1\.weight \(BatchNorm2d\)"),
        (["stem.1.weight"], "no layer that K-FAC can treat|no factors for stem.1.weight"),
        (["stem.0.weight", "classifier.bias"], r"no factors for classifier\.bias \(the weight beside it is frozen\)"),
        (["nothing"], "unknown parameter 'nothing'"),
        ([], "params is empty"),
    ],
)
def test_parameters_without_factors(params: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        KFACDirections(convnet(), batch(), params=params)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("power", [-0.5, 1.5, float("nan"), True, None])
def test_bad_powers(power: object) -> None:
    directions = KFACDirections(convnet(), batch(), params=CONVOLUTIONS)
    with pytest.raises(InputError, match="power must be a number in \\[0, 1\\]"):
        directions.direction(loss_gradient(convnet(), batch(), params=CONVOLUTIONS), 0.1, power)  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_damping(damping: float) -> None:
    with pytest.raises(InputError, match="damping"):
        kfac_direction(convnet(), batch(), damping)
    if damping != 0:
        with pytest.raises(InputError, match="damping"):
            natural_gradient_direction(convnet(), batch(), damping)


def test_bad_gradients() -> None:
    directions = KFACDirections(convnet(), batch(), params=CONVOLUTIONS)
    g = loss_gradient(convnet(), batch(), params=CONVOLUTIONS)
    with pytest.raises(InputError, match=r"the gradient lacks 'features\.3\.weight'"):
        directions.direction({name: g[name] for name in CONVOLUTIONS[:2]}, 0.1)
    with pytest.raises(InputError, match=r"'classifier\.bias', which is not preconditioned"):
        directions.direction({**g, "classifier.bias": torch.zeros(3)}, 0.1)
    with pytest.raises(InputError, match=r"the gradient of stem\.0\.weight has the shape"):
        directions.direction({**g, "stem.0.weight": torch.zeros(2)}, 0.1)
    with pytest.raises(NonFiniteError, match=r"stem\.0\.weight contains NaN"):
        directions.direction({**g, "stem.0.weight": g["stem.0.weight"] * float("nan")}, 0.1)
    with pytest.raises(NonFiniteError, match=r"stem\.0\.weight contains NaN"):
        natural_gradient_direction(
            convnet(), batch(), 0.1, gradient={"stem.0.weight": g["stem.0.weight"] * float("inf")}
        )


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(torch.ones(3).double()), nn.L1Loss(), F.nll_loss]
)
def test_other_losses(loss: object) -> None:
    with pytest.raises(InputError, match="K-FAC's direction needs the mean cross-entropy"):
        kfac_direction(convnet(), batch(), 0.1, loss=loss)


def test_bad_images_and_weights() -> None:
    images, labels = batch()
    with pytest.raises(NonFiniteError, match="images"):
        kfac_direction(convnet(), (images * float("nan"), labels), 0.1)
    with pytest.raises(InputError, match="one label for each image"):
        kfac_direction(convnet(), (images, labels[:3]), 0.1)
    model = convnet()
    with torch.no_grad():
        model.stem[0].weight.fill_(float("inf"))
    for call in (kfac_direction, natural_gradient_direction):
        with pytest.raises(NonFiniteError):
            call(model, (images, labels), 0.1)


def test_layer_that_is_never_called() -> None:
    model = convnet()
    model.spare = nn.Linear(2, 2).double()
    with pytest.raises(InputError, match="never calls the layer spare"):
        kfac_direction(model, batch(), 0.1)
