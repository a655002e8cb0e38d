"""The state of KFAC: a resumed training is the same bit for bit, a state that does not fit changes nothing."""

import copy
import io
import math
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from kfac_training import KINDS, batches, convnet, same, snapshot, train, weights
from natural import KFAC
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as checkpoint_state
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.gauss_newton import GaussNewton
from secondorder.kfac import KFACPreconditioner, Options

STEPS = 14
MID_INTERVAL: dict[str, Any] = {"factor_interval": 3, "inverse_interval": 4}


def saved(state: Any) -> Any:
    """What torch.load makes of a state, the safe way."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("kind", "at"),
    [*((kind, 10) for kind in KINDS), *((kind, at) for kind in ("kfac", "ekfac", "adam fallback") for at in (0, 1))],
)  # the first steps are the same in the other kinds
def test_resumed_training_is_the_same_bit_for_bit(kind: str, at: int) -> None:
    settings = {"momentum": 0.8, **MID_INTERVAL, **KINDS[kind]}
    data = batches(STEPS)
    model = convnet()
    optimizer = KFAC(model, 0.03, **settings)
    train(model, optimizer, data[:at])
    state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, data[at:])

    again = convnet(seed=5)
    other = KFAC(again, 1.0, **settings)
    train(again, other, batches(3, 6))  # of another training, which the state replaces
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    assert same(other.state_dict(), state["optimizer"])
    assert other.factor_step == (at != 10)
    train(again, other, data[at:])
    assert same(weights(again), weights(model))
    assert same(other.state_dict(), optimizer.state_dict())


def test_a_state_is_of_its_moment_and_loading_does_not_tie_optimisers_together() -> None:
    """Momentum buffers aside, which torch's state_dict shares with the optimiser."""
    model = convnet()
    optimizer = KFAC(model, 0.1, approximation="ekfac")
    train(model, optimizer, batches(2))
    state = optimizer.state_dict()
    before = snapshot(state["kfac"])
    other = KFAC(copy.deepcopy(model), 0.1, approximation="ekfac")
    other.load_state_dict(state)
    train(model, optimizer, batches(3))
    assert same(state["kfac"], before)
    assert same(other.state_dict()["kfac"], before)


@pytest.mark.parametrize("rule", ["natural", "adam", "natural_adam"])
def test_momenta_are_not_those_of_the_optimiser_that_the_state_came_from(rule: str) -> None:
    """Copies train side by side, and a state that was kept can be loaded again."""
    data = batches(6)
    model = convnet()
    optimizer = KFAC(model, 0.1, step_rule=rule)
    train(model, optimizer, data[:2])
    other_model = copy.deepcopy(model)
    other = KFAC(other_model, 0.1, step_rule=rule)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, data[2:])
    train(other_model, other, data[2:])
    assert same(weights(other_model), weights(model))


def test_hyper_parameters_and_schedulers_are_resumed() -> None:
    def made() -> tuple[nn.Module, KFAC, Any]:
        model = convnet()
        optimizer = KFAC(model, 0.1, options=Options(groups={"6.*": {"lr": 0.01, "damping": 1.0}}))
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)

    def run(model: nn.Module, optimizer: KFAC, scheduler: Any, steps: slice) -> None:
        for batch in batches(STEPS)[steps]:
            train(model, optimizer, [batch])
            scheduler.step()

    whole = made()
    run(*whole, slice(0, 6))
    state = saved([part.state_dict() for part in whole])
    run(*whole, slice(6, STEPS - 1))
    resumed = made()
    for part, content in zip(resumed, state, strict=True):
        part.load_state_dict(content)
    run(*resumed, slice(6, STEPS - 1))
    assert same(weights(resumed[0]), weights(whole[0]))


def test_preconditioner_alone() -> None:
    def run(model: nn.Module, pre: KFACPreconditioner, sgd: torch.optim.Optimizer, steps: slice) -> None:
        for x, y in batches(STEPS)[steps]:
            sgd.zero_grad()
            logits = model(x)
            pre.update_curvature(logits)
            F.cross_entropy(logits, y).backward()
            assert pre.step()
            sgd.step()

    model, again = convnet(), convnet(3)
    pre, other = (KFACPreconditioner(m, **MID_INTERVAL) for m in (model, again))
    sgd, sgd_again = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, again))
    run(model, pre, sgd, slice(0, 5))
    state = saved(pre.state_dict())
    again.load_state_dict(model.state_dict())
    run(model, pre, sgd, slice(5, STEPS))
    other.load_state_dict(state)
    run(again, other, sgd_again, slice(5, STEPS))
    assert same(weights(again), weights(model))


class Compiled(nn.Module):
    """What torch.compile makes of the names of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._orig_mod(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "module.": nn.DataParallel,
    "_orig_mod.": Compiled,
    "module._orig_mod.": lambda model: nn.DataParallel(Compiled(model)),
    "_orig_mod.module.": lambda model: Compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("after", WRAPPERS)
@pytest.mark.parametrize("before", ["bare", "module._orig_mod."])
def test_wrappers_do_not_matter(before: str, after: str) -> None:
    options = Options(groups={"0.*": {"lr": 0.05}})
    inner, inner_again = convnet(), convnet()
    model, again = WRAPPERS[before](inner), WRAPPERS[after](inner_again)
    optimizer = KFAC(model, 0.1, options=options)
    data = batches(6)
    train(model, optimizer, data[:4])
    inner_again.load_state_dict(inner.state_dict())
    other = KFAC(again, 0.1, options=options)
    other.load_state_dict(saved(optimizer.state_dict()))
    train(model, optimizer, data[4:])
    train(again, other, data[4:])
    assert same(weights(inner_again), weights(inner))


# ---------------------------------------------------------------------------------------------------- a killed process


def process_of_its_own(path: Path, die: int) -> None:
    """Train on from the checkpoint at `path`; in step `die` wait, half done, for the end."""
    torch.set_num_threads(1)
    model = convnet()
    optimizer = KFAC(model, 0.03, approximation={"0": "ekfac"}, **MID_INTERVAL)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step, (x, y) in enumerate(batches(STEPS)):
        if step < first:
            continue
        logits = model(x)
        optimizer.update_curvature(logits)
        if step == die:
            path.with_suffix(".half").touch()
            time.sleep(600)
        train(model, optimizer, [(x, y)])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def test_killed_and_resumed_in_another_process(
    tmp_path: Path, forkserver: ForkServerContext, killed: Callable[..., None]
) -> None:
    path = tmp_path / "checkpoint.pt"
    killed(path.with_suffix(".half").exists, path, 8, target=process_of_its_own)
    assert torch.load(path, weights_only=True)["step"] == 8
    process = forkserver.Process(target=process_of_its_own, args=(path, -1))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    process_of_its_own(tmp_path / "whole.pt", die=-1)
    resumed, whole = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("checkpoint", "whole"))
    assert same(resumed, whole)


# ----------------------------------------------------------------------------------------- torch.distributed.checkpoint


Checkpointed = Callable[[nn.Module, KFAC, Path], Callable[[nn.Module, KFAC], None]]
"""Saves a model and its optimiser; returns a function that loads into others."""


def optimizer_state(model: nn.Module, optimizer: KFAC, folder: Path) -> Callable[[nn.Module, KFAC], None]:
    state = saved([model.state_dict(), checkpoint_state.get_optimizer_state_dict(model, optimizer)])

    def load(other_model: nn.Module, other: KFAC) -> None:
        other_model.load_state_dict(state[0])
        checkpoint_state.set_optimizer_state_dict(other_model, other, state[1])

    return load


def both_states(model: nn.Module, optimizer: KFAC, folder: Path) -> Callable[[nn.Module, KFAC], None]:
    options = checkpoint_state.StateDictOptions(cpu_offload=True)
    state = snapshot(checkpoint_state.get_state_dict(model, optimizer, options=options))

    def load(other_model: nn.Module, other: KFAC) -> None:
        found = {"model_state_dict": state[0], "optim_state_dict": state[1]}
        checkpoint_state.set_state_dict(other_model, other, **found)

    return load


def files_of_states(model: nn.Module, optimizer: KFAC, folder: Path) -> Callable[[nn.Module, KFAC], None]:
    names = ("model", "optimizer")
    content = dict(zip(names, checkpoint_state.get_state_dict(model, optimizer), strict=True))
    checkpoint.save(content, checkpoint_id=folder, no_dist=True)

    def load(other_model: nn.Module, other: KFAC) -> None:
        content = dict(zip(names, checkpoint_state.get_state_dict(other_model, other), strict=True))
        checkpoint.load(content, checkpoint_id=folder, no_dist=True)
        found = {"model_state_dict": content["model"], "optim_state_dict": content["optimizer"]}
        checkpoint_state.set_state_dict(other_model, other, **found)

    return load


def files_of_the_optimizer(model: nn.Module, optimizer: KFAC, folder: Path) -> Callable[[nn.Module, KFAC], None]:
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, no_dist=True)
    return lambda other_model, other: checkpoint.load(
        {"model": other_model, "optimizer": other}, checkpoint_id=folder, no_dist=True
    )


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
@pytest.mark.parametrize(("at", "rule"), [(0, "natural"), (5, "natural"), (5, "adam")])
@pytest.mark.parametrize(
    "checkpointed", [optimizer_state, both_states, files_of_states, files_of_the_optimizer], ids=lambda f: f.__name__
)
def test_distributed_checkpoints_are_whole(checkpointed: Checkpointed, at: int, rule: str, tmp_path: Path) -> None:
    settings = {
        "step_rule": rule,
        "approximation": {"0": "ekfac"},
        "options": Options(groups={"*.bias": {"lr": 0.01}}),
        **MID_INTERVAL,
    }
    model, again = convnet(), convnet(3)
    optimizer, other = KFAC(model, 0.03, **settings), KFAC(again, 0.5, **settings)
    data = batches(10)
    train(model, optimizer, data[:at])
    load = checkpointed(model, optimizer, tmp_path)
    before = snapshot(optimizer.state_dict())
    train(model, optimizer, data[at:])
    load(again, other)
    assert same(other.state_dict(), before)
    train(again, other, data[at:])
    assert same(weights(again), weights(model))


# ------------------------------------------------------------------------------------------------ states that do not fit


def wider() -> nn.Module:
    model = convnet()
    model[6] = nn.Linear(16, 4).double()
    return model


def deeper() -> nn.Module:
    model = convnet()
    model.append(nn.Linear(3, 3).double())
    return model


def frozen() -> nn.Module:
    model = convnet()
    model[0].requires_grad_(False)
    return model


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {k: v for k, v in state.items() if k != key}


def with_other_factor(state: dict[str, Any]) -> dict[str, Any]:
    state["kfac"]["statistics"]["6"]["A"] = torch.eye(3)[None]
    return state


def with_other_version(state: dict[str, Any]) -> dict[str, Any]:
    state["kfac"]["version"] = 0
    return state


def with_unknown_inverse(state: dict[str, Any]) -> dict[str, Any]:
    state["kfac"]["inverses"]["6"]["kind"] = "magic"
    return state


CHANGES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "more classes": (
        wider,
        {},
        lambda s: s,
        r"another architecture: 6\.weight is \[4, 16\] in the state and \[3, 16\] in",
    ),
    "one layer more": (
        deeper,
        {},
        lambda s: s,
        r"another architecture: 7\.weight is \[3, 3\] in the state and missing in",
    ),
    "frozen": (frozen, {}, lambda s: s, r"other settings: 0\.weight was frozen, and is kfac now"),
    "ekfac": (
        convnet,
        {"approximation": {"6": "ekfac"}},
        lambda s: s,
        r"other settings: 6\.weight was ekfac, and is kfac",
    ),
    "reduce": (
        convnet,
        {"sharing": "reduce"},
        lambda s: s,
        "other settings: sharing was 'reduce', and is 'expand' now",
    ),
    "groups": (
        convnet,
        {"options": Options(groups={"*.bias": {"lr": 0.1}})},
        lambda s: s,
        r"other parameter groups: group 0 was \['0\.weight', .* and is \['0\.weight'",
    ),
    "not of KFAC": (convnet, {}, without("kfac"), "without the entry 'kfac'"),
    "other version": (convnet, {}, with_other_version, "not a state of K-FAC in version 1"),
    "other factor": (convnet, {}, with_other_factor, r"statistics\.6\.A has shape \[1, 3, 3\], not \[1, 17, 17\]"),
    "unknown inverse": (convnet, {}, with_unknown_inverse, "unknown kind of inverse 'magic'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_does_not_fit_changes_nothing(change: str) -> None:
    other_model, settings, edit, message = CHANGES[change]
    theirs = other_model()
    state = KFAC(theirs, 0.5, **settings)
    train(theirs, state, batches(2))
    model, twin = convnet(), convnet()
    optimizer, other = KFAC(model, 0.1), KFAC(twin, 0.1)
    data = batches(3)
    train(model, optimizer, data[:2])
    train(twin, other, data[:2])
    before = snapshot(optimizer.state_dict())
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(edit(copy.deepcopy(state.state_dict())))
    assert same(optimizer.state_dict(), before)
    train(model, optimizer, data[2:])
    train(twin, other, data[2:])
    assert same(weights(model), weights(twin))


def entries(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a nested state."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, content in items:
        yield (*path, key)
        yield from entries(content, (*path, key))


def wrong(value: Any) -> list[Any]:
    """What an entry may not be."""
    if isinstance(value, Tensor):
        broken = value.clone(memory_format=torch.contiguous_format)
        broken.view(-1)[-1] = torch.nan
        others = [value.flatten()[:-1], value[None], value.to(torch.int64), value.float(), value.to(torch.complex128)]
        return [broken, value * torch.inf, *others, value.tolist(), None, "x"]
    if isinstance(value, dict):
        return [None, "x", [], 1, {**value, "surplus": 1}, {**value, 17: 1}]
    if isinstance(value, list):
        return [None, "x", {}, 1, [*value, "surplus"], value[:-1]]
    if isinstance(value, bool):
        return [None, "x", 2, []]
    return (
        [None, "y", [], {}, torch.zeros(2), -math.inf, float("nan")]
        if isinstance(value, int | float)
        else [None, 1, []]
    )


def may_be_missing(path: tuple[Any, ...]) -> bool:
    """Counts of events, and what a parameter without gradients does not have."""
    return path[:2] == ("kfac", "events") or (path[0] == "state" and len(path) > 1)


def may_have_more(path: tuple[Any, ...]) -> bool:
    """A schedule adds settings to a group; the names of events depend on what went wrong."""
    return path[0] == "param_groups" or path == ("kfac", "events")


MISSING = object()


def refused_entries(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> int:
    """Try every entry of a state missing or wrong: each is refused and changes nothing; how many there were."""
    before, tried = snapshot(optimizer.state_dict()), 0
    changed = snapshot(state)
    for path in entries(state):
        place = changed
        for key in path[:-1]:
            place = place[key]
        value = place[path[-1]]
        values = [v for v in wrong(value) if not (may_have_more(path) and isinstance(v, dict) and v)]
        if isinstance(place, dict) and not may_be_missing(path):
            values.append(MISSING)
        for wrong_value in values:
            place[path[-1]] = wrong_value
            if wrong_value is MISSING:
                del place[path[-1]]
            with pytest.raises(InputError) as caught:
                optimizer.load_state_dict(changed)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) <= 300
            tried += 1
        place[path[-1]] = value
        assert same(optimizer.state_dict(), before)
    return tried


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "cholesky", "wide", "wide cholesky", "adam fallback"])
def test_no_entry_can_be_missing_or_wrong_and_nothing_is_half_loaded(kind: str) -> None:
    settings = {"momentum": 0.8, **KINDS[kind]}
    model, theirs = convnet(), convnet(1)
    optimizer, other = KFAC(model, 0.1, **settings), KFAC(theirs, 0.1, **settings)
    train(model, optimizer, batches(2))
    train(theirs, other, batches(3))
    state = snapshot(other.state_dict())
    assert refused_entries(optimizer, state) > 300
    optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), state)


def test_no_entry_of_gauss_newton_can_be_missing_or_wrong() -> None:
    model, theirs = convnet(), convnet(1)
    optimizer, other = GaussNewton(model, 0.1, momentum=0.8), GaussNewton(theirs, 0.1, momentum=0.8)
    train(model, optimizer, batches(2))  # type: ignore[arg-type]
    train(theirs, other, batches(3))  # type: ignore[arg-type]
    state = snapshot(other.state_dict())
    assert refused_entries(optimizer, state) > 100
    optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), state)
    with pytest.raises(InputError, match=r"step\('x'\): the only argument is a function"):
        optimizer.step("x")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "cholesky", "wide", "wide cholesky", "adam fallback"])
def test_a_whole_state_of_every_number_format_is_loaded(kind: str, dtype: torch.dtype) -> None:
    model = convnet().to(dtype)
    optimizer = KFAC(model, 0.1, **KINDS[kind])
    train(model, optimizer, [(x.to(dtype), y) for x, y in batches(2)])
    again = KFAC(convnet().to(dtype), 0.1, **KINDS[kind])
    again.load_state_dict(saved(optimizer.state_dict()))
    assert same(again.state_dict(), optimizer.state_dict())


def test_a_closure_is_a_function_and_settings_fit_into_float32() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1)
    for closure in ("x", 1, batches(1)):
        with pytest.raises(InputError, match=r"step\(.*the only argument is a function"):
            optimizer.step(closure)  # type: ignore[arg-type]
    for name, value in (("weight_decay", 1e300), ("weight_decay", 10**400), ("lr", 1e300), ("damping", 1e300)):
        with pytest.raises(InputError, match=name):
            KFAC(model, **{"lr": 0.1, name: value})


def test_state_of_another_optimiser() -> None:
    model = convnet()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match="not of a KFAC optimiser"):
        KFAC(model, 0.1).load_state_dict(sgd.state_dict())
    with pytest.raises(InputError, match="not of a KFAC optimiser"):
        KFAC(model, 0.1).load_state_dict({"kfac": KFACPreconditioner(model).state_dict()} | sgd.state_dict())
    with pytest.raises(InputError, match="not a state of K-FAC"):
        KFACPreconditioner(model).load_state_dict(sgd.state_dict())
