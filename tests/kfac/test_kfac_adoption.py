"""A model that changes after the optimiser was made: thawed, new, tied and pruned weights, other number formats."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kfac_training import batches, convnet, same, snapshot, train, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from secondorder.errors import InputError
from secondorder.kfac import KFAC, KFACPreconditioner, Options
from secondorder.kfac.step_rule import STEP_RULES

RULES = ("adam", "natural")
KINDS: dict[str, dict[str, Any]] = {
    **{rule: {"step_rule": rule} for rule in STEP_RULES},
    "ekfac": {"approximation": "ekfac"},
    "empirical": {"fisher": "empirical"},
    "no warm-up": {"options": Options(warm_up=False, stagger=False)},
}


def partly_frozen(seed: int = 0) -> nn.Module:
    """Frozen are the first convolution's bias and the second convolution."""
    model = convnet(seed)
    model[0].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    return model


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, w in weights(model).items() if not torch.equal(w, before[name])}


def treatments(optimizer: KFAC) -> dict[str, str]:
    return {row.parameter: row.treatment for row in optimizer.report().parameters}


def events(optimizer: KFAC) -> str:
    return "; ".join(optimizer.report().events)


# ------------------------------------------------------------------------------------------------------------- unfreezing


@pytest.mark.parametrize("kind", KINDS)
def test_thawed_parameters_are_adopted_with_fresh_statistics(kind: str) -> None:
    """Weights and biases get factors in the next step, and inverses of these; the other layers keep theirs."""
    model = partly_frozen()
    optimizer = KFAC(model, **KINDS[kind])
    train(model, optimizer, batches(12))
    assert not optimizer.factor_step
    assert treatments(optimizer)["3.weight"] == treatments(optimizer)["0.bias"] == "frozen"
    kept = optimizer.preconditioner.statistics["6"]
    model.requires_grad_(True)
    before = weights(model)
    train(model, optimizer, batches(1))
    how = KINDS[kind].get("approximation", "kfac")
    assert treatments(optimizer) == dict.fromkeys(before, how) | dict.fromkeys(("1.weight", "1.bias"), "fallback")
    assert moved(model, before) == set(before)
    assert (
        "found changed in step 12, parameters: 2 adopted (0.bias, 3.weight); 1 treated otherwise (0.weight)"
        in events(optimizer)
    )
    assert optimizer.factor_step
    x, y = batches(2)[1]
    train(model, optimizer, [(x, y)])
    statistics = optimizer.preconditioner.statistics
    assert statistics["6"] is kept
    a = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
    a = F.pad(a, (0, 1), value=1.0)
    torch.testing.assert_close(
        statistics["0"].A, (a.mT @ a / len(a))[None], rtol=1e-10, atol=1e-12
    )  # of this batch only
    assert set(optimizer.preconditioner.blocks.inverses) == {"0", "3", "6"}
    train(model, optimizer, batches(9))
    assert not any("no factors yet" in event and count > 1 for event, count in optimizer.report().events.items())


def test_thawed_norms_get_the_fallback_at_once() -> None:
    models = []
    for thaw in (False, True):
        model = convnet()
        model[1].requires_grad_(not thaw)
        optimizer = KFAC(model)
        model[1].requires_grad_(True)
        train(model, optimizer, batches(5))
        models.append(model)
    assert same(weights(models[0]), weights(models[1]))


def test_settings_and_schedule_of_a_group_act_on_what_is_thawed() -> None:
    model = partly_frozen()
    optimizer = KFAC(model, 0.1, options=Options(groups={"3.*": {"lr": 0.0}}))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1]
    train(model, optimizer, batches(2))
    model[3].requires_grad_(True)
    before = weights(model)
    train(model, optimizer, batches(3))
    assert "3.weight" not in moved(model, before)
    optimizer.param_groups[1]["lr"] = 0.1
    schedule.step()
    train(model, optimizer, batches(1))
    assert "3.weight" in moved(model, before)


def test_a_frozen_group_does_not_act_on_the_trust_region() -> None:
    found = []
    for lr in (1e-3, 100.0):
        model = partly_frozen()
        options = Options(groups={"3.*": {"lr": lr}})
        optimizer = KFAC(model, 0.1, step_rule="natural", clip=0.1, options=options)
        train(model, optimizer, batches(3))
        assert optimizer.report().shortened[0]
        found.append(weights(model))
    assert same(*found)


@pytest.mark.parametrize("rule", RULES)
def test_frozen_again_and_thawed_again_keeps_the_statistics(rule: str) -> None:
    model = convnet()
    optimizer = KFAC(model, step_rule=rule, weight_decay=0.1)
    train(model, optimizer, batches(4))
    statistics = optimizer.preconditioner.statistics["0"]
    model[0].requires_grad_(False)
    before = weights(model)
    for x, y in batches(3):
        optimizer.zero_grad(set_to_none=False)  # gradients that are zero, not None
        logits = model(x)
        optimizer.update_curvature(logits)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
    assert {"0.weight", "0.bias"} == set(before) - moved(model, before)
    model[0].requires_grad_(True)
    train(model, optimizer, batches(3))
    assert moved(model, before) == set(before)
    assert optimizer.preconditioner.statistics["0"] is statistics
    assert not optimizer.report().events


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        *(("adam", at) for at in (9, 10, 13)),
        *((kind, at) for kind in ("ekfac", "no warm-up") for at in (9, 13)),
        ("natural", 9),
        ("empirical", 10),
    ],
)
def test_training_resumed_after_an_adoption_is_the_same_bit_for_bit(kind: str, at: int) -> None:
    """In the optimiser of a model that is trainable as a whole, and in one that is thawed only after it was made."""
    data = batches(18)
    model = partly_frozen()
    optimizer = KFAC(model, **KINDS[kind])
    train(model, optimizer, data[:8])
    model.requires_grad_(True)
    train(model, optimizer, data[8:at])
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[at:])
    for made, thawed in ((convnet, False), (partly_frozen, True)):
        again = made(3)
        other = KFAC(again, **KINDS[kind])
        if thawed:
            again.requires_grad_(True)
        again.load_state_dict(state[0])
        other.load_state_dict(copy.deepcopy(state[1]))
        assert same(other.state_dict(), state[1])
        train(again, other, data[at:])
        assert same(weights(again), weights(model))


def test_states_from_before_and_after_an_adoption() -> None:
    """A state of the frozen model fits an optimiser that has not adopted yet; otherwise a message says the way out."""
    model = partly_frozen()
    optimizer = KFAC(model)
    train(model, optimizer, batches(4))
    early, weights_then = snapshot(optimizer.state_dict()), weights(model)
    model.requires_grad_(True)
    train(model, optimizer, batches(4))
    late = snapshot(optimizer.state_dict())
    with pytest.raises(InputError, match=r"0\.bias was frozen, and is kfac now; make the optimiser while the same"):
        optimizer.load_state_dict(early)
    assert same(optimizer.state_dict(), late)
    again = partly_frozen(3)
    other = KFAC(again)
    with pytest.raises(InputError, match=r"0\.bias was kfac, and is frozen now; make the optimiser while the same"):
        other.load_state_dict(late)
    again.requires_grad_(True)
    again.load_state_dict(weights_then)
    other.load_state_dict(early)
    train(again, other, batches(4))
    assert same(weights(again), weights(model))


# ------------------------------------------------------------------------------------------------------- groups, new modules


@pytest.mark.parametrize("rule", RULES)
def test_a_group_for_what_is_thawed(rule: str) -> None:
    model = partly_frozen()
    optimizer = KFAC(model, 0.05, step_rule=rule)
    train(model, optimizer, batches(3))
    model[3].requires_grad_(True)
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.0, "damping": 3.0})
    assert optimizer.factor_step
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1]
    before = weights(model)
    train(model, optimizer, batches(2))
    assert "3.weight" not in moved(model, before)
    assert "0.weight" in moved(model, before)
    assert optimizer.preconditioner.blocks.dampings["3"] == 3.0
    optimizer.param_groups[1]["lr"] = 0.05
    train(model, optimizer, batches(1))
    assert "3.weight" in moved(model, before)


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("kind", ["adam", "natural", "ekfac", "empirical"])
def test_a_swapped_head_is_found_and_adopted(kind: str, probe: bool) -> None:
    """In a net whose other layers are trained, and in a linear probe, where nothing is left to train."""
    model = convnet()
    if probe:
        model[:6].requires_grad_(False)
    optimizer = KFAC(model, **KINDS[kind])
    train(model, optimizer, batches(5))
    model[6] = nn.Linear(16, 3).double()
    with pytest.raises(
        InputError, match=r"^module 6 \(Linear\) is trainable and in no .*optimizer\.add_param_group"
    ) as caught:
        train(model, optimizer, batches(1))
    assert "\n" not in str(caught.value)
    optimizer.add_param_group({"params": model[6].parameters(), "lr": 0.01})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    before = weights(model)
    train(model, optimizer, batches(3))
    assert moved(model, before) == ({"6.weight", "6.bias"} if probe else set(before))
    assert "2 adopted (6.weight, 6.bias); 2 no longer in the model (6.weight, 6.bias)" in events(optimizer)
    assert not any("no factors yet" in event for event in optimizer.report().events)  # adopted before a step


def test_two_new_modules_are_added_one_after_the_other() -> None:
    model = convnet()
    optimizer = KFAC(model)
    train(model, optimizer, batches(2))
    model[3], model[6] = nn.Conv2d(4, 4, 3, stride=2).double(), nn.Linear(16, 3).double()
    optimizer.add_param_group({"params": model[6].named_parameters()})
    with pytest.raises(InputError, match=r"module 3 \(Conv2d\) is trainable and in no parameter group"):
        train(model, optimizer, batches(1))
    optimizer.add_param_group({"params": list(model[3].parameters())})
    before = weights(model)
    train(model, optimizer, batches(2))
    assert moved(model, before) == set(before)


def test_a_preconditioner_takes_a_new_module_by_itself() -> None:
    """It has no groups; the step in which it finds out has no factors of the new layer."""
    for frozen in (False, True):
        model = convnet()
        if frozen:
            model[:6].requires_grad_(False)
        pre = KFACPreconditioner(model)
        for i, (x, y) in enumerate(batches(6)):
            if i == 2:
                model[6] = nn.Linear(16, 3).double()
            logits = model(x)
            pre.update_curvature(logits)
            model.zero_grad()
            F.cross_entropy(logits, y).backward()
            raw = model[6].weight.grad.clone()
            assert pre.step()
            assert torch.equal(model[6].weight.grad, raw) == (i == 2)
        assert set(pre.layers) == ({"6"} if frozen else {"0", "3", "6"})


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_are_tied_later(rule: str) -> None:
    """The layer with two modules has statistics of both; the weight that has gone leaves its group."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(50, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)
    ).double()
    optimizer = KFAC(model, step_rule=rule)
    train(model, optimizer, batches(3))
    model[5].weight, model[5].bias = model[3].weight, model[3].bias
    train(model, optimizer, batches(4))
    assert set(optimizer.preconditioner.layers) == {"1", "3"}
    assert optimizer.preconditioner.layers["3"].modules == (model[3], model[5])
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.state) == 4
    assert "2 no longer in the model (5.weight, 5.bias)" in events(optimizer)
    assert len(optimizer.state_dict()["state"]) == 4


def test_weights_that_are_pruned_or_parametrised_later() -> None:
    model = convnet()
    optimizer = KFAC(model)
    train(model, optimizer, batches(3))
    prune.l1_unstructured(model[6], "weight", 0.5)
    train(model, optimizer, batches(3))
    assert treatments(optimizer)["6.weight_orig"] == "fallback"
    assert int((model[6].weight == 0).sum()) == 24
    prune.remove(model[6], "weight")
    train(model, optimizer, batches(3))
    assert treatments(optimizer)["6.weight"] == "kfac"
    parametrizations.weight_norm(model[6])
    with pytest.raises(InputError, match=r"module 6\.parametrizations\.weight .*get_submodule\('6\.parametrizations"):
        train(model, optimizer, batches(1))
    optimizer.add_param_group({"params": model.get_submodule("6.parametrizations.weight").parameters()})
    before = weights(model)
    train(model, optimizer, batches(2))
    assert moved(model, before) == set(before)


def test_a_lazy_module_that_is_put_in_has_to_be_initialised() -> None:
    model = convnet()
    optimizer = KFAC(model)
    train(model, optimizer, batches(1))
    model[6] = nn.LazyLinear(3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"parameter 6\.weight is not initialised yet; run the model once"):
        optimizer.add_param_group({"params": model[6].parameters()})
    model(batches(1)[0][0])
    optimizer.add_param_group({"params": model[6].parameters()})
    train(model, optimizer, batches(2))


def test_a_quadratic_step_adopts_before_its_forward_pass() -> None:
    model = partly_frozen()
    optimizer = KFAC(model, step_rule="natural")
    model.requires_grad_(True)
    optimizer.quadratic_step(F.cross_entropy, *batches(1)[0])
    assert set(optimizer.preconditioner.blocks.inverses) == {"0", "3", "6"}


def test_an_unchanged_model_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convnet()
    optimizer = KFAC(model)
    monkeypatch.setattr("secondorder.kfac.model_layers.find_layers", None)
    model.eval()
    copy.deepcopy(model)
    torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
    train(model, optimizer, batches(3))


# ------------------------------------------------------------------------------------------------- number formats, loading


def doubled(state: Any) -> Any:
    """A nested state with all tensors in double precision."""
    if isinstance(state, dict):
        return {key: doubled(value) for key, value in state.items()}
    return state.double() if isinstance(state, Tensor) else state


@pytest.mark.parametrize(
    "settings", [{}, {"step_rule": "natural"}, {"approximation": "ekfac"}, {"fisher": "empirical"}]
)
def test_statistics_and_inverses_follow_a_model_that_becomes_double(settings: dict[str, Any]) -> None:
    """As if its state, in double precision, had been loaded into the optimiser of a model that always was."""
    settings = {"factor_interval": 3, "inverse_interval": 4} | settings
    model = convnet().float()
    optimizer = KFAC(model, 0.01, **settings)
    data = batches(12)
    train(model, optimizer, [(x.float(), y) for x, y in data[:5]])
    twin = copy.deepcopy(model).double()
    other = KFAC(twin, 0.01, **settings)
    other.load_state_dict(doubled(optimizer.state_dict()))
    model.double()
    train(model, optimizer, data[5:])
    train(twin, other, data[5:])
    assert same(weights(model), weights(twin))
    assert "another number format or device since step 5" in events(optimizer)
    state = optimizer.state_dict()
    state["kfac"]["events"] = {}
    assert same(state, other.state_dict())


def test_a_model_that_becomes_half_is_refused_where_squares_underflow() -> None:
    model = convnet().float()
    optimizer = KFAC(model)
    data = [(x.float(), y) for x, y in batches(2)]
    train(model, optimizer, data)
    model.half()
    with pytest.raises(InputError, match=r"0\.weight is float16, whose squares underflow: use float32 with autocast"):
        train(model, optimizer, [(x.half(), y) for x, y in data])
    model.float()
    train(model, optimizer, data)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("place", ["forward", "curvature", "backward"])
def test_a_state_that_is_loaded_in_the_middle_of_a_step(place: str, fisher: str) -> None:
    """The passes before it were those of other weights: the step says so, and a whole step is right."""
    model = convnet()
    optimizer = KFAC(model, fisher=fisher)
    train(model, optimizer, batches(2))
    state = snapshot((model.state_dict(), optimizer.state_dict()))

    def interrupted(load: Callable[[], None]) -> None:
        x, y = batches(1)[0]
        optimizer.zero_grad()
        logits = model(x)
        if place == "forward":
            load()
        optimizer.update_curvature(logits)
        if place == "curvature":
            load()
        F.cross_entropy(logits, y).backward()
        if place == "backward":
            load()
        optimizer.step()

    late = fisher == "mc" and place != "forward"
    message = r"call update_curvature\(logits\) between" if late else r"no layer .* since load_state_dict\(\)"
    with pytest.raises(InputError, match=message):
        interrupted(lambda: optimizer.load_state_dict(state[1]))
    before = weights(model)
    train(model, optimizer, batches(2))
    assert moved(model, before) == set(before)
