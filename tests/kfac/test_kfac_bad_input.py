"""Every InputError of the optimiser says what is wrong and what to do; those of the scaling check are tested with it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kfac_training import batches, convnet, same, train, weights
from natural import KFAC
from torch import nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import Damping, Fisher, KFACPreconditioner, LevenbergMarquardt, Options

NAN = float("nan")
Thing = Callable[[], Any]


def kfac(**settings: Any) -> Thing:
    return lambda: KFAC(convnet(), **{"lr": 0.1, **settings})


VALUES: dict[str, tuple[Thing, str]] = {
    "lr negative": (kfac(lr=-0.1), "lr -0.1: must be a number in [0, 3.4e+38)"),
    "lr nan": (kfac(lr=NAN), "lr nan: must be a number in [0, 3.4e+38)"),
    "lr inf": (kfac(lr=float("inf")), "lr inf: must be a number in [0, 3.4e+38)"),
    "lr text": (kfac(lr="0.1"), "lr '0.1': must be a number in [0, 3.4e+38)"),
    "lr bool": (kfac(lr=True), "lr True: must be a number in [0, 3.4e+38)"),
    "momentum 1": (kfac(momentum=1.0), "momentum 1.0: must be a number in [0, 1)"),
    "momentum negative": (kfac(momentum=-0.1), "momentum -0.1: must be a number in [0, 1)"),
    "weight decay": (kfac(weight_decay=-1e-4), "weight_decay -0.0001: must be a number in [0, 3.4e+38)"),
    "weight decay beyond float32": (kfac(weight_decay=1e300), "weight_decay 1e+300: must be a number in [0, 3.4e+38)"),
    "weight decay that turns": (
        kfac(weight_decay=20.0),
        "weight_decay 20 with lr 0.1 multiplies the weights by -1 in each step; lr * weight_decay must be at most 1",
    ),
    "weight decay of a group that turns": (
        kfac(options=Options(groups={"6.*": {"lr": 1.0, "weight_decay": 2.0}})),
        "weight_decay 2 with lr 1 multiplies the weights by -1",
    ),
    "lr beyond floats": (kfac(lr=10**400), "lr 1000000"),
    "lr of two": (kfac(lr=torch.ones(2)), "lr tensor([1., 1.]): must be a number"),
    "damping zero": (kfac(damping=0), "damping 0: must be above 0; 1e-8 is as good as none"),
    "damping negative": (kfac(damping=-1.0), "damping -1.0: must be a number in [0, 3.4e+38)"),
    "damping nan": (lambda: Damping(NAN), "damping nan: must be a number in [0, 3.4e+38)"),
    "relative": (lambda: Damping(relative="no"), "relative must be True or False, got 'no'"),  # type: ignore[arg-type]
    "adapt": (lambda: Damping(adapt=5), "adapt 5: must be LevenbergMarquardt(...), or None (a fixed damping)"),  # type: ignore[arg-type]
    "inverse of no hash": (lambda: Damping(inverse=[]), "unknown inverse []; choose one of: eigen, cholesky"),  # type: ignore[arg-type]
    "damping text": (kfac(damping="much"), "damping 'much': must be a number in [0, 3.4e+38)"),
    "inverse": (lambda: Damping(inverse="qr"), "unknown inverse 'qr'; choose one of: eigen, cholesky"),
    "ema_decay 1": (kfac(ema_decay=1.0), "ema_decay 1.0: must be a number in [0, 1)"),
    "factor_interval 0": (kfac(factor_interval=0), "factor_interval must be a whole number of at least 1, got 0"),
    "factor_interval negative": (
        kfac(factor_interval=-3),
        "factor_interval must be a whole number of at least 1, got -3",
    ),
    "inverse_interval half": (
        kfac(inverse_interval=2.5),
        "inverse_interval must be a whole number of at least 1, got 2.5",
    ),
    "inverse_interval bool": (
        kfac(inverse_interval=True),
        "inverse_interval must be a whole number of at least 1, got True",
    ),
    "fisher": (kfac(fisher="true"), "unknown fisher 'true'; choose one of: mc, empirical, exact"),
    "fisher None": (kfac(fisher=None), "unknown fisher None; choose one of: mc, empirical, exact"),
    "likelihood": (
        lambda: Fisher(likelihood="nll"),
        "unknown likelihood 'nll'; choose one of: cross_entropy, mse, bce",
    ),
    "reduction": (lambda: Fisher(reduction="none"), "unknown reduction 'none'; choose one of: mean, sum"),
    "samples": (lambda: Fisher(samples=0), "samples must be a whole number of at least 1, got 0"),
    "seed": (lambda: Fisher(seed=0.5), "seed must be a whole number from 0 to 2^63 - 1, got 0.5"),
    "seed negative": (lambda: Fisher(seed=-1), "seed must be a whole number from 0 to 2^63 - 1, got -1"),
    "seed beyond": (
        lambda: Fisher(seed=2**63),
        "seed must be a whole number from 0 to 2^63 - 1, got 9223372036854775808",
    ),
    "decoupled": (lambda: Options(decoupled=None), "decoupled must be True or False, got None"),  # type: ignore[arg-type]
    "groups by number": (
        lambda: Options(groups={3: {"lr": 0.1}}),
        "groups {3: {'lr': 0.1}}: must be settings by pattern",
    ),  # type: ignore[dict-item]
    "policy by number": (kfac(approximation={3: "ekfac"}), "approximation 3: a pattern of names of layers is a text"),
    "grad_scaler": (lambda: Fisher(grad_scaler=65536), "grad_scaler 65536: must be a torch.amp.GradScaler"),
    "approximation": (kfac(approximation="diag"), "unknown approximation 'diag'; choose one of: kfac, ekfac, fallback"),
    "approximation None": (
        kfac(approximation=None),
        "unknown approximation None; choose one of: kfac, ekfac, fallback",
    ),
    "policy of no layer": (kfac(approximation={"head.*": "ekfac"}), "approximation 'head.*' matches no linear layer"),
    "nothing left": (kfac(approximation="fallback"), "approximation leaves every layer to the fallback; use 'kfac' or"),
    "sharing": (kfac(sharing="mean"), "unknown sharing 'mean'; choose one of: expand, reduce"),
    "clip zero": (kfac(clip=0), "clip 0: must be above 0"),
    "clip negative": (kfac(clip=-1.0), "clip -1.0: must be a number in [0, 3.4e+38)"),
    "options": (kfac(options={"fallback": "adam"}), "options {'fallback': 'adam'}: must be Options(...)"),
    "fallback": (lambda: Options(fallback="rprop"), "unknown fallback 'rprop'; choose one of: sgd, adam"),
    "fallback_lr": (lambda: Options(fallback_lr=-1.0), "fallback_lr -1.0: must be a number in [0, 3.4e+38)"),
    "wide_outputs": (lambda: Options(wide_outputs=0), "wide_outputs must be a whole number of at least 1, got 0"),
    "wide_inputs": (lambda: Options(wide_inputs=0), "wide_inputs must be a whole number of at least 1, got 0"),
    "groups": (lambda: Options(groups=[{"lr": 0.1}]), "groups [{'lr': 0.1}]: must be settings by pattern"),  # type: ignore[arg-type]
    "groups of numbers": (
        lambda: Options(groups={"*.bias": 0.1}),
        "groups {'*.bias': 0.1}: must be settings by pattern",
    ),  # type: ignore[dict-item]
    "group of nothing": (
        kfac(options=Options(groups={"head.*": {"lr": 0.1}})),
        "groups: no parameter is named like 'head.*'",
    ),
    "group setting": (
        kfac(options=Options(groups={"6.*": {"nesterov": 1.0}})),
        "unknown setting of a parameter group 'nesterov'; choose one of: lr, momentum, weight_decay, damping",
    ),
    "group value": (kfac(options=Options(groups={"6.*": {"lr": -1.0}})), "lr -1.0: must be a number in [0, 3.4e+38)"),
    "group damping": (kfac(options=Options(groups={"6.*": {"damping": 0.0}})), "damping 0.0: must be above 0"),
    "every": (lambda: LevenbergMarquardt(every=0), "every must be a whole number of at least 1, got 0"),
    "factor": (lambda: LevenbergMarquardt(factor=1.0), "factor 1.0: must be a number in [0, 1)"),
    "factor text": (lambda: LevenbergMarquardt(factor="x"), "factor 'x': must be a number in [0, 1)"),  # type: ignore[arg-type]
    "factor zero": (lambda: LevenbergMarquardt(factor=0.0), "factor 0.0: must lie in (0, 1)"),
    "least text": (lambda: LevenbergMarquardt(least="x"), "least 'x': must be a number in [0, 3.4e+38)"),  # type: ignore[arg-type]
    "least and most": (lambda: LevenbergMarquardt(least=1.0, most=0.1), "least 1.0, most 0.1: must be positive and in"),
    "parameters": (
        lambda: KFAC(convnet().parameters(), 0.1),
        "model generator: must be a torch.nn.Module, the model itself",
    ),  # type: ignore[arg-type]
    "no layer": (
        lambda: KFAC(nn.LayerNorm(3), 0.1),
        "the model has no layer that K-FAC can treat: no Linear, convolution or",
    ),
    "all frozen": (
        lambda: KFAC(convnet().requires_grad_(False), 0.1),
        "the model has no layer that K-FAC can treat",
    ),
    "lazy": (lambda: KFAC(nn.LazyLinear(3), 0.1), "parameter weight is not initialised yet; run the model once before"),
    "meta": (lambda: KFAC(nn.Linear(3, 3, device="meta")), "parameter weight is on the device 'meta', which holds no"),
}


@pytest.mark.parametrize("case", VALUES)
def test_bad_values(case: str) -> None:
    made, message = VALUES[case]
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as caught:
        made()
    assert "\n" not in str(caught.value)


def test_preconditioner_refuses_the_same() -> None:
    for settings, message in (
        ({"damping": -1.0}, "damping"),
        ({"fisher": "f"}, "fisher"),
        ({"factor_interval": 0}, "fac"),
    ):
        with pytest.raises(InputError, match=message):
            KFACPreconditioner(convnet(), **settings)


# ---------------------------------------------------------------------------------------------------- wrong at the time


def setup(**settings: Any) -> tuple[nn.Module, KFAC, torch.Tensor, torch.Tensor]:
    model = convnet()
    x, y = batches(1)[0]
    return model, KFAC(model, 0.1, **settings), x, y


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_step_before_backward(fisher: str) -> None:
    _, optimizer, _, _ = setup(fisher=fisher)
    with pytest.raises(InputError, match=r"step\(\) before backward\(\): no parameter of the model has a gradient"):
        optimizer.step()


def test_forgotten_update_of_the_curvature() -> None:
    model, optimizer, x, y = setup()
    before = weights(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        InputError, match=r"call update_curvature\(logits\) between .* \(fisher 'mc'\), or use fisher='emp"
    ):
        optimizer.step()
    assert same(weights(model), before)
    train(model, optimizer, [(x, y)])  # and goes on


def test_update_of_the_curvature_after_backward() -> None:
    model, optimizer, x, y = setup()
    logits = model(x)
    F.cross_entropy(logits, y).backward()
    with pytest.raises(InputError, match=r"update_curvature\(logits\) after loss\.backward\(\): it needs the graph"):
        optimizer.update_curvature(logits)


def test_update_of_the_curvature_without_a_graph() -> None:
    model, optimizer, x, _ = setup()
    for logits in (model(x).detach(), torch.zeros(12, 3)):
        with pytest.raises(InputError, match="the logits have no graph"):
            optimizer.update_curvature(logits)


def test_update_of_the_curvature_with_an_empty_batch() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"logits \[0, 2\] of an empty batch; leave the batch out"):
        KFAC(model).update_curvature(model(torch.zeros(0, 3)))


def test_update_of_the_curvature_without_a_call_of_the_model() -> None:
    _, optimizer, _, _ = setup()
    with pytest.raises(
        InputError, match="no layer of the model was called since the last step; a compiled model ignores"
    ):
        optimizer.update_curvature(torch.zeros(12, 3, requires_grad=True))


def test_gradients_that_no_layer_made() -> None:
    model, optimizer, _, _ = setup(fisher="empirical", options=Options(check=False))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(InputError, match="no layer was called and had its backward pass since the last step"):
        optimizer.step()


def test_logits_that_do_not_suit_the_likelihood() -> None:
    model, optimizer, x, _ = setup()
    with pytest.raises(InputError, match="cross_entropy needs"):
        optimizer.update_curvature(model(x)[:, 0])


def test_groups_that_cannot_be_added() -> None:
    model, optimizer, x, y = setup()
    train(model, optimizer, [(x, y)])
    before = weights(model), [len(group["params"]) for group in optimizer.param_groups]
    model[6] = nn.Linear(16, 3).double()
    new = list(model[6].parameters())
    for group, message in (
        (
            {"params": [nn.Parameter(torch.zeros(3))]},
            r"parameter \[3\] at place 0 is not of the model: make its module a part",
        ),
        (
            {"params": model[0].weight},
            r"0\.weight is trained in group 0 already; change .* optimizer\.param_groups\[0\]",
        ),
        ({"params": [new[0], new[0]]}, r"parameter 6\.weight is given twice"),
        ({"params": []}, "'params' is empty"),
        ({"params": ["6.weight"]}, "str in 'params' is no parameter"),
        (new, r"must be a dictionary with 'params'"),
        ({"params": new, "lr": -1.0}, r"lr -1\.0: must be a number"),
        ({"params": new, "betas": (0.9, 0.99)}, "unknown setting of a parameter group 'betas'"),
        ({"params": new, "lr": 1.0, "weight_decay": 2.0}, "weight_decay 2 with lr 1 multiplies the weights by -1"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            optimizer.add_param_group(group)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert [len(group["params"]) for group in optimizer.param_groups] == before[1]
    optimizer.add_param_group({"params": new})
    train(model, optimizer, [(x, y)])


TREAT_AS: dict[str, tuple[Any, str]] = {
    "no mapping": ("linear", "treat_as 'linear': must be words by class or pattern"),
    "no class": ({3: "linear"}, "treat_as 3: must be a pattern of module names or a class of modules"),
    "class of something else": ({dict: "linear"}, "treat_as <class 'dict'>: must be a pattern"),
    "word": ({"0": "dense"}, "unknown treat_as 'dense'; choose one of: linear, linear_transposed, conv1d, conv2d"),
    "of no module": ({"head": "linear"}, "treat_as 'head' fits no module; names are those of model.named_modules()"),
    "of no module of a class": ({nn.Bilinear: "linear"}, "treat_as Bilinear fits no module"),
    "no matrix": ({"1": "linear"}, "treat_as 'linear': module 1 (GroupNorm) has a weight [4], not a matrix"),
    "no weight": ({nn.ReLU: "linear"}, "treat_as 'linear': module 2 (ReLU) has no parameter 'weight' of its own"),
    "no convolution": ({"6": "conv2d"}, "treat_as 'conv2d': module 6 (Linear) is no subclass of Conv2d"),
}


@pytest.mark.parametrize("case", TREAT_AS)
def test_declarations_that_cannot_be_right(case: str) -> None:
    treat_as, message = TREAT_AS[case]
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        KFAC(convnet(), options=Options(treat_as=treat_as))


def test_adaptive_damping_needs_two_losses() -> None:
    _, optimizer, _, _ = setup(damping=Damping(adapt=LevenbergMarquardt()))
    with pytest.raises(
        InputError, match=r"Levenberg-Marquardt damping compares two losses: use step\(closure\) or quad"
    ):
        optimizer.step()


def test_damping_that_a_user_sets_to_nonsense() -> None:
    model, optimizer, x, y = setup()
    before = weights(model)
    optimizer.param_groups[0]["damping"] = 0.0
    with pytest.raises(InputError, match=r"damping 0\.0: must be above 0"):
        train(model, optimizer, [(x, y)])
    assert same(weights(model), before)


def test_cross_entropy_of_one_output() -> None:
    model = nn.Linear(3, 1)
    optimizer = KFAC(model, 0.1)
    with pytest.raises(InputError, match=re.escape("use Fisher(likelihood='bce')")):
        optimizer.update_curvature(model(torch.randn(4, 3)))


@pytest.mark.parametrize("closure", ["x", 3, 0, "", [], True, torch.zeros(1)], ids=repr)
def test_a_closure_that_is_no_function(closure: Any) -> None:
    model, optimizer, x, y = setup()
    train(model, optimizer, [(x, y)])
    before = weights(model)
    with pytest.raises(InputError, match="the only argument is a function that computes the loss and its gradients"):
        optimizer.step(closure)
    assert same(weights(model), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", NAN),
        ("lr", "x"),
        ("lr", 1e300),
        ("momentum", 1e300),
        ("weight_decay", 1e300),
        ("weight_decay", 100.0),
        ("weight_decay", ...),
        ("damping", "1"),
    ],
)
def test_settings_that_are_changed_to_nonsense(name: str, value: Any) -> None:
    model, optimizer, x, y = setup()
    train(model, optimizer, [(x, y)])
    before, step = weights(model), optimizer.preconditioner.intervals.step
    optimizer.param_groups[0][name] = value
    with pytest.raises(InputError, match=f"^{name} "):
        train(model, optimizer, [(x, y)])
    assert same(weights(model), before)
    assert optimizer.preconditioner.intervals.step == step


def test_a_closure_without_a_loss() -> None:
    model, optimizer, x, y = setup(damping=Damping(adapt=LevenbergMarquardt(every=1)))

    def closure() -> None:
        optimizer.zero_grad()
        logits = model(x)
        optimizer.update_curvature(logits)
        F.cross_entropy(logits, y).backward()

    before = weights(model)
    with pytest.raises(InputError, match="the closure returned None; Levenberg-Marquardt damping needs the loss"):
        optimizer.step(closure)  # type: ignore[arg-type]
    assert same(weights(model), before)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 0.5, "loss_function 0.5: must be a function"),
        (0, lambda z, y: 1.0, "loss_function must return one number"),
        (0, lambda z, y: F.cross_entropy(z, y, reduction="none"), "loss_function must return one number"),
        (1, "x", "inputs str: must be a tensor"),
        (1, torch.zeros(12, 7, 9), "the model on inputs .* fails: "),
        (2, torch.float32, "targets dtype: must be a tensor"),
        (2, torch.zeros(3, dtype=torch.int64), "the loss of outputs .* fails: "),
    ],
)
def test_quadratic_step_of_something_else(place: int, value: Any, message: str) -> None:
    model, optimizer, x, y = setup()
    before = weights(model)
    given: list[Any] = [F.cross_entropy, x, y]
    given[place] = value
    with pytest.raises(InputError, match=message) as caught:
        optimizer.quadratic_step(*given)
    assert "\n" not in str(caught.value)
    assert same(weights(model), before)
