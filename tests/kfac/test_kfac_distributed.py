"""Two processes (gloo, loopback) with DistributedDataParallel take the steps of one with the whole batch."""

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_curvature import relative, weights
from natural import KFAC
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from secondorder.errors import InputError
from secondorder.kfac import Damping, Fisher, LevenbergMarquardt, Options

EXACT = 1e-9
STEPS = 7
STAGGERED = {"factor_interval": 2, "inverse_interval": 3}
ADAPTIVE = Damping(0.3, adapt=LevenbergMarquardt(every=2, factor=0.7))


@dataclass(frozen=True)
class Case:
    """Settings of K-FAC; samples of both processes; take: how a step is taken."""

    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    take: str = "step"
    samples: int = 8


CASES = {
    "exact": Case(STAGGERED, {"warm_up": False}),
    "empirical, cholesky": Case(STAGGERED | {"fisher": "empirical", "damping": Damping(0.1, inverse="cholesky")}),
    "empirical, sum": Case({"fisher": Fisher("empirical", reduction="sum"), "damping": Damping(0.01, relative=False)}),
    "exact, sum, reduce": Case({"fisher": Fisher("exact", reduction="sum"), "sharing": "reduce", "weight_decay": 0.1}),
    "ekfac": Case(  # as many samples as make A of full rank: the bases are unique
        STAGGERED | {"fisher": "empirical", "approximation": "ekfac"}, {"warm_up": False}, samples=16
    ),
    "adam": Case({"step_rule": "adam", "weight_decay": 0.1}, samples=16),
    "wide": Case(STAGGERED, {"wide_inputs": 12}),  # 8 rows of both processes, 13 inputs
    "wide outputs": Case(STAGGERED, {"wide_outputs": 3, "wide_inputs": 12}),
    "rows that become dense": Case({"sharing": "reduce"}, {"wide_inputs": 5}),  # 4 rows of each process, 6 inputs
    "adapted in closures": Case({"damping": ADAPTIVE, "clip": 1e-2}, take="closure"),
    "quadratic steps": Case({"damping": ADAPTIVE, "weight_decay": 1e-3}, take="quadratic"),
    "quadratic steps, sum": Case({"damping": ADAPTIVE, "fisher": Fisher("exact", reduction="sum")}, take="quadratic"),
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 4, 5, stride=3), nn.Tanh(), nn.Conv1d(4, 6, 2, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def batches(samples: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, samples, 1, 11, dtype=torch.float64, generator=generator)
    return [(x, torch.randint(3, (samples,), generator=generator)) for x in inputs]


def made(case: Case, wrap: Callable[[nn.Module], nn.Module]) -> KFAC:
    torch.manual_seed(0)
    settings = {"lr": 0.1, "fisher": "exact", "factor_interval": 1, "inverse_interval": 1} | case.settings
    return KFAC(wrap(network()), options=Options(**case.options), **settings)


def take(opt: KFAC, x: Tensor, y: Tensor, how: str = "step") -> None:
    reduction = opt.preconditioner.fisher.reduction

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(z, labels, reduction=reduction)

    def closure() -> Tensor:
        opt.zero_grad()
        z = opt.model(x)
        opt.update_curvature(z)
        value = loss(z, y)
        value.backward()
        return value

    if how == "quadratic":
        opt.quadratic_step(loss, x, y)
    elif how == "closure":
        opt.step(closure)
    else:
        closure()
        opt.step()


def part_of(rank: int, samples: int = 8) -> slice:
    return slice(rank * samples // 2, (rank + 1) * samples // 2)


def trained(case: Case, part: slice, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """The weights after each step, dampings, and which layers were inverted here at each step."""
    opt, inverted = made(case, wrap), []
    inner = opt.preconditioner.blocks.inverted

    def noted(names: list[str], events: Any) -> Any:
        inverted.append((opt.preconditioner.intervals.step, list(names)))
        return inner(names, events)

    opt.preconditioner.blocks.inverted = noted  # type: ignore[method-assign]
    path, dampings = [], []
    for x, y in batches(case.samples):
        take(opt, x[part], y[part], case.take)
        path.append(weights(opt.model))
        dampings.append(opt.param_groups[0]["damping"])
    return {"path": torch.stack(path), "dampings": dampings, "inverted": inverted}


def whole(model: nn.Module) -> nn.Module:
    return model


@cache
def alone(name: str) -> dict[str, Any]:
    """What one process does with the whole batch."""
    return trained(CASES[name], slice(None), whole)


def with_a_broken_process(rank: int) -> dict[str, Any]:
    """NaN in the input of the second process at step 1, and in its factors at step 3."""
    opt, path, part = made(Case(), DistributedDataParallel), [], part_of(rank)
    for count, (x, y) in enumerate(batches()[:6]):
        x = x[part].clone()
        if rank == 1 and count == 1:
            x[0] = float("nan")
        opt.zero_grad()
        z = opt.model(x)
        opt.update_curvature(z)
        if rank == 1 and count == 3:
            opt.preconditioner.statistics["5"]._staged["B"].fill_(float("nan"))
        F.cross_entropy(z, y[part]).backward()
        opt.step()
        path.append(weights(opt.model))
    factors = {name: held.B for name, held in opt.preconditioner.statistics.items()}
    return {"path": torch.stack(path), "events": dict(opt.report().events), "factors": factors}


def apart(rank: int) -> Tensor:
    """Models of their own: the second process takes more steps, which it could not if they waited for one another."""
    opt = made(Case(options={"synchronise": False}), whole)
    for x, y in batches()[: 3 + 2 * rank]:
        take(opt, x + rank, y)
    return weights(opt.model)


def drawn(rank: int) -> dict[str, Tensor]:
    """Labels are drawn by each process for itself."""
    opt = made(Case({"fisher": "mc"}), DistributedDataParallel)
    for x, y in batches():
        take(opt, x[part_of(rank)], y[part_of(rank)])
    return {"weights": weights(opt.model), "generator": opt.preconditioner.gathering.generator.get_state()}


def sharded() -> list[str]:
    """What K-FAC says to models of which a process has parts only, and to one that is sharded after it was made."""
    mesh = init_device_mesh("cpu", (2,))
    model, later = network(), network()
    optimizer = KFAC(later)
    for module in (model, later[5]):
        fully_shard(module, mesh=mesh)
    one = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    attempts: list[Callable[[], object]] = [lambda: KFAC(model), lambda: KFAC(one), optimizer._follow_model]
    said = []
    for attempt in attempts:
        try:
            attempt()
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said


def thawed(rank: int | None) -> Tensor:
    """Weights when a layer is thawed in the middle."""
    torch.manual_seed(0)
    model = network()
    model[2].requires_grad_(False)
    wrapped = DistributedDataParallel(model) if rank is not None else model
    part = slice(None) if rank is None else part_of(rank)
    opt = KFAC(wrapped, 0.1, fisher="exact", factor_interval=1, inverse_interval=1)
    for i, (x, y) in enumerate(batches()):
        if i == 3:
            model[2].requires_grad_(True)
            if rank is not None:  # a reducer waits for the parameters that were trainable when it was made
                opt.model = DistributedDataParallel(model)
        take(opt, x[part], y[part])
    return weights(model)


def process(out: Path, rank: int) -> None:
    """What each of the two does."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        report(out, rank)
    except BaseException:
        (out / f"{rank}.txt").write_text(traceback.format_exc())
        raise


def report(out: Path, rank: int) -> None:
    """Save all that the tests look at."""
    torch.distributed.init_process_group("gloo", f"file://{out / 'meeting'}", rank=rank, world_size=2)
    found: dict[str, Any] = {
        name: trained(case, part_of(rank, case.samples), DistributedDataParallel) for name, case in CASES.items()
    }
    found |= {"broken": with_a_broken_process(rank), "apart": apart(rank), "drawn": drawn(rank)}
    found |= {"sharded": sharded(), "thawed": thawed(rank)}
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, forkserver: ForkServerContext) -> list[dict[str, Any]]:
    """What both processes report."""
    folder = tmp_path_factory.mktemp("kfac_distributed")
    processes = [forkserver.Process(target=process, args=(folder, rank)) for rank in (0, 1)]
    for each in processes:
        each.start()
    deadline = time.monotonic() + 250
    try:
        while any(each.exitcode is None for each in processes) and not any(each.exitcode for each in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said = "".join(file.read_text() for file in folder.glob("*.txt"))
        assert [each.exitcode for each in processes] == [0, 0], said
    finally:
        for each in processes:
            each.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    own = alone(name)
    first, second = (report[name] for report in found)
    assert torch.equal(first["path"], second["path"])
    torch.manual_seed(0)
    start = weights(network())
    assert relative(first["path"] - start, own["path"] - start) <= EXACT
    assert float((own["path"][-1] - start).abs().max()) > 1e-3
    assert first["dampings"] == second["dampings"] == pytest.approx(own["dampings"], rel=1e-9)
    assert (len(set(own["dampings"])) > 1) == (CASES[name].settings.get("damping") is ADAPTIVE)


@pytest.mark.parametrize("name", CASES)
def test_each_inverse_is_computed_by_one_owner(name: str, found: list[dict[str, Any]]) -> None:
    first, second = (dict(report[name]["inverted"]) for report in found)
    for step, names in alone(name)["inverted"]:
        assert sorted(first.get(step, []) + second.get(step, [])) == sorted(names)
    owned = [{name for names in own.values() for name in names} for own in (first, second)]
    assert owned[0]
    assert owned[1]
    assert not owned[0] & owned[1]


def test_staggered_inversions_are_spread_over_steps(found: list[dict[str, Any]]) -> None:
    """Not a property of several processes; it makes sure that the case tests what it should."""
    steps = dict(alone("exact")["inverted"])
    assert len(steps[0]) == 4
    assert {len(names) for step, names in steps.items() if step > 0} <= {1, 2}


def test_nan_in_one_process_skips_the_step_in_both(found: list[dict[str, Any]]) -> None:
    first, second = (report["broken"] for report in found)
    assert torch.equal(first["path"], second["path"])
    assert first["events"] == second["events"]
    assert first["events"] == {
        "step with gradients that are not finite, skipped": 1,
        "factors that are not finite, dropped": 1,
    }
    steps = first["path"]
    assert bool(steps.isfinite().all())
    assert torch.equal(steps[1], steps[0])
    assert not torch.equal(steps[3], steps[2])
    for name, B in first["factors"].items():
        assert bool(B.isfinite().all())
        assert torch.equal(B, second["factors"][name])


def test_sharded_parameters_are_refused(found: list[dict[str, Any]]) -> None:
    for report in found:
        for message, name in zip(
            report["sharded"], ("parameter 0.weight", "the model", "parameter 5.weight"), strict=True
        ):
            assert message.startswith(f"{name} is sharded over processes")
            assert "use DistributedDataParallel" in message
            assert "\n" not in message


def test_a_layer_that_is_thawed_is_adopted_by_all_processes(found: list[dict[str, Any]]) -> None:
    first, second = (report["thawed"] for report in found)
    assert torch.equal(first, second)
    torch.manual_seed(0)
    start = weights(network())
    assert relative(first - start, thawed(None) - start) <= EXACT


def test_processes_that_stay_apart_train_as_if_alone(found: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert relative(found[rank]["apart"], apart(rank)) <= 1e-12


def test_draws_differ_between_processes_and_weights_do_not(found: list[dict[str, Any]]) -> None:
    first, second = (report["drawn"] for report in found)
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["generator"], second["generator"])
