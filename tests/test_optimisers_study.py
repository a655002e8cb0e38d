"""The optimiser study: every optimiser in the training loop, tuning with equal budgets, and verdicts from known tables."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.networks.autoencoder import INCOMING, autoencoder
from secondorder.training import OPTIMIZERS, Run, Trained, initial_network, loop, train
from secondorder.training.optimizer_state import plain, with_objects
from studies.__main__ import main
from studies.optimisers import autoencoder as deep
from studies.optimisers import runs as optimisers_runs
from studies.optimisers import section
from studies.optimisers import study as optimisers
from studies.optimisers.costs import Stepper, slowed, state_bytes
from studies.optimisers.measures import Clock, reached, steps_ratio
from studies.optimisers.settings import ARMS, PRESETS, TUNING_SEED, Tuned, unit_points
from studies.sealed import write_sealed
from studies.settings import Common

SMOKE = ["optimisers", "--preset", "smoke", "--no-progress", "--threads", "1"]
RUN = Run("digits_tiny", "gcp", "digits", epochs=4, batch_size=16, learning_rate=1e-3, schedule="cosine", threads=1)
STEPS = 16


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=70, test_limit=30)


class StoppedError(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop._Training._step

    def stopping(self: Any, *arguments: Any) -> None:
        if self.progress.step == step:
            raise StoppedError
        original(self, *arguments)

    monkeypatch.setattr(loop._Training, "_step", stopping)


# ----------------------------------------------------------------------------------------- optimisers in the training loop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_trains_everything_and_resumes_bit_for_bit(
    optimizer: str, data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(RUN, optimizer=optimizer)
    whole = train(run, data, tmp_path / "whole", progress=False)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), initial_network(run, data).parameters(), strict=True)
    ]
    assert all(moved)
    with monkeypatch.context() as patch:
        stop_at(11, patch)  # in the middle of an epoch, after Shampoo's first preconditioner
        with pytest.raises(StoppedError):
            train(run, data, tmp_path / "stopped", progress=False, checkpoint_every=0)
    resumed: Trained = train(run, data, tmp_path / "stopped", progress=False, resume=True)
    assert resumed.step_losses == whole.step_losses
    state, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_the_curvature_is_updated_before_each_backward_pass(
    data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], bool]] = []

    class Watching(torch.optim.SGD):
        def update_curvature(self, logits: torch.Tensor) -> None:
            gradients = any(p.grad is not None for group in self.param_groups for p in group["params"])
            seen.append((list(logits.shape), gradients))
            torch.autograd.grad(logits.sum(), self.param_groups[0]["params"], retain_graph=True, allow_unused=True)

    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda model, run: Watching(model.parameters(), lr=run.learning_rate))
    train(RUN, data, tmp_path, progress=False)
    assert seen == [([16, 10], False)] * STEPS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_unknown_option_is_named(optimizer: str, data: ImageDataset, tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, optimizer=optimizer, optimizer_options={"no_such_option": 1})
    with pytest.raises(InputError, match="no_such_option"):
        train(run, data, tmp_path, progress=False)


def test_singd_refuses_scaled_losses(data: ImageDataset) -> None:
    run = dataclasses.replace(RUN, optimizer="singd", device="cuda", amp="float16")
    with pytest.raises(InputError, match="cannot be used with amp float16"):
        OPTIMIZERS["singd"](initial_network(dataclasses.replace(run, device="cpu", amp="off"), data), run)


def test_a_state_names_no_foreign_class() -> None:
    from singd.structures.dense import DenseMatrix

    matrix = DenseMatrix(torch.eye(2))
    state = plain({"K": {"layer": matrix}, "steps": 3})
    assert not isinstance(state["K"]["layer"], DenseMatrix)
    again = with_objects(state)
    assert torch.equal(again["K"]["layer"].to_dense(), torch.eye(2))
    assert again["steps"] == 3
    with pytest.raises(ValueError, match="the state names the class subprocess:Popen"):
        with_objects({"object of class": "subprocess:Popen", "attributes": {}})


# --------------------------------------------------------------------------------------------------------- autoencoder


def test_autoencoder_is_mirrored_sparse_and_linear_at_code_and_output() -> None:
    model = autoencoder(64, (40, 20, 5), initialisation="sparse")
    linear = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [40, 20, 5, 20, 40, 64]
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Linear", "Tanh", "Linear", "Tanh", "Linear", "Linear", "Tanh", "Linear", "Tanh", "Linear"]
    for layer in linear:
        counts = (layer.weight != 0).sum(1)
        assert (counts == min(INCOMING, layer.in_features)).all()
        assert not layer.bias.any()
    assert model(torch.rand(3, 64)).shape == (3, 64)
    weight = autoencoder(300, (200,))[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / 500) ** 0.5, rel=0.02)
    assert autoencoder(784, (1000, 500, 250, 30))[-1].out_features == 784


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, (4,), "tanh", "he"), "unknown initialisation 'he'"),
        ((8, (4,), "relu"), "unknown activation 'relu'"),
        ((8, ()), "give at least one"),
        ((8, (0,)), "(0,)"),
    ],
)
def test_autoencoder_refuses(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError) as caught:
        autoencoder(*arguments)
    assert words in str(caught.value)


def test_pixels_are_those_of_the_image(data: ImageDataset) -> None:
    settings = dataclasses.replace(PRESETS["smoke"].autoencoder, image_size=6)
    images = deep.pixels(data, settings)
    expected = data.train.images[:, 0, 1:7, 1:7].flatten(1) / 16  # type: ignore[attr-defined]
    assert torch.allclose(images, expected, atol=1e-6)
    with pytest.raises(InputError, match="only 8 pixels"):
        deep.pixels(data, dataclasses.replace(settings, image_size=9))


def test_autoencoder_loss_is_the_sum_over_pixels() -> None:
    images = torch.rand(5, 7)
    model = torch.nn.Linear(7, 7)
    p = torch.sigmoid(model(images)).double()
    expected = -(images * p.log() + (1 - images) * (1 - p).log()).sum(1).mean().item()
    assert deep.whole_loss(model, images) == pytest.approx(expected, rel=1e-5)
    assert deep.reconstruction_loss(model(images), images).item() * 7 == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- tuning


def test_trials_fill_their_ranges_alike() -> None:
    points = np.array(unit_points(16))
    assert points.shape == (16, 2)
    for column in points.T:  # at least one point in each quarter of the range
        assert set((4 * column).astype(int)) == set(range(4))
    assert unit_points(4) == unit_points(16)[:4]
    assert Tuned("learning_rate", 0.01, 1.0).at(0.5) == pytest.approx(0.1)
    assert Tuned("momentum", 0.9, 0.99).at(0.5) == pytest.approx(1 - 0.1 * 10**-0.5, abs=1e-4)
    for arm in ARMS.values():
        assert arm.optimizer in OPTIMIZERS
        low, high = (arm.settings((u, u)) for u in (0.0, 1.0))
        assert low["learning_rate"] == arm.learning_rate.low
        assert high["learning_rate"] == pytest.approx(arm.learning_rate.high)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    assert main([*SMOKE, "--out", str(folder)]) == 0
    return folder


def test_equal_budgets_and_every_trial_recorded(finished: Path) -> None:
    trials = pd.read_csv(finished / "optimisers_trials.csv")
    for problem, count in (("gap", 2), ("autoencoder", 1)):
        own = trials[trials.problem == problem]
        assert set(own.groupby("arm").size()) == {count}
        assert set(own[own.chosen].groupby("arm").size()) == {1}
        best = own.groupby("arm").train_loss.min()
        assert own[own.chosen].set_index("arm").train_loss.to_dict() == best.to_dict()
    epochs = pd.read_csv(finished / "optimisers.csv")
    assert set(epochs.seed) == {0, 1}
    assert TUNING_SEED not in set(epochs.seed)
    assert set(epochs.arm) == {"sgd", "adamw", "kfac"}
    first = pd.read_csv(finished / "optimisers_curves.csv")
    first = first[(first.problem == "gap") & (first.step == 1)]
    assert (first.groupby("seed").loss.nunique() == 1).all()  # the same weights and batch


def test_costs_and_breakdown_are_whole(finished: Path) -> None:
    costs = pd.read_csv(finished / "optimisers_costs.csv")
    assert set(costs.groupby(["problem", "arm"]).size()) == {4}
    assert (costs.peak_mib > 0).all()
    parts = pd.read_csv(finished / "optimisers_breakdown.csv")
    assert (parts.milliseconds >= 0).all()
    for (problem, arm), some in parts.groupby(["problem", "arm"]):
        timed = costs[(costs.problem == problem) & (costs.arm == arm)].milliseconds.mean()
        # the parts are clocked inside of what is timed; a busy machine may stop the process in between
        assert 0.6 * timed < some.milliseconds.sum() <= timed
    kfac = set(parts[(parts.problem == "gap") & (parts.arm == "kfac")].part)
    assert {"forward and backward", "curvature", "inverses", "preconditioning"} <= kfac


def test_what_is_finished_is_not_trained_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("optimisers", "optimisers_trials", "optimisers_curves", "optimisers_sensitivity")
    before = {name: (finished / f"{name}.csv").read_bytes() for name in names}
    removed = next((finished / "runs" / "optimisers").glob("digits-*/result.json"))
    removed.unlink()
    calls: list[Run] = []

    def counting(run: Run, *arguments: Any, **options: Any) -> Trained:
        calls.append(run)
        return train(run, *arguments, **options)

    def never(*arguments: Any) -> dict[str, Any]:
        raise AssertionError("trained again")

    monkeypatch.setattr(optimisers_runs, "train", counting)
    monkeypatch.setattr(deep, "fit", never)
    assert main([*SMOKE, "--out", str(finished), "--resume"]) == 0
    assert [run.name for run in calls] == [removed.parent.name]
    for name in names[1:]:
        assert (finished / f"{name}.csv").read_bytes() == before[name]
    one, two = (pd.read_csv(finished / "optimisers.csv"), before["optimisers"])
    assert list(one.train_loss) == [float(line.split(",")[5]) for line in two.decode().splitlines()[1:]]


def test_a_trial_that_diverges_counts_and_is_not_chosen(
    data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(PRESETS["smoke"], train_limit=70, batch_size=16, trials=4)
    work = optimisers_runs.Work(Common(preset="smoke", threads=1, progress=False), settings, data, tmp_path)
    hot = dataclasses.replace(ARMS["sgd"], learning_rate=Tuned("learning_rate", 1e-14, 1e36))
    monkeypatch.setitem(ARMS, "sgd", hot)
    limited = load_dataset("digits", limit=70)
    tuning, trials = optimisers_runs.tune(dataclasses.replace(work, data=limited), "gap", "sgd")
    assert len(trials) == 4
    assert trials.diverged.any()
    assert math.isinf(trials[trials.diverged].train_loss.iloc[0])
    assert not trials[trials.diverged].chosen.any()
    assert tuning["learning_rate"] == trials[trials.chosen].first_value.iloc[0]
    monkeypatch.setitem(ARMS, "sgd", dataclasses.replace(hot, learning_rate=Tuned("learning_rate", 1e35, 1e36)))
    with pytest.raises(InputError, match="all 4 trials of sgd on gap diverged"):
        optimisers_runs.tune(dataclasses.replace(work, data=limited), "gap", "sgd")


def test_curve_is_the_mean_of_the_last_half_epoch() -> None:
    losses = [float(n) for n in range(40)]
    points = optimisers_runs.curve(losses, 8)
    assert points[-1] == {"step": 40, "loss": pytest.approx(np.mean(losses[36:40]))}
    assert points[0] == {"step": 4, "loss": pytest.approx(np.mean(losses[:4]))}


def test_stepper_takes_the_optimisers_steps() -> None:
    torch.manual_seed(0)
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    batch = (torch.randn(5, 3), torch.randint(2, (5,)))
    optimizer = torch.optim.Adam(two.parameters())
    stepper = Stepper(one, torch.optim.Adam(one.parameters()), torch.nn.functional.cross_entropy, [batch])
    for _ in range(3):
        stepper()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(two(batch[0]), batch[1]).backward()
        optimizer.step()
    assert torch.equal(one.weight, two.weight)
    assert state_bytes(optimizer.state_dict()) == 4 * (2 * 8 + 2)  # two moments of 8 numbers, two step counts
    assert set(stepper.parts()) == {"forward and backward", "optimiser's step"}


# ------------------------------------------------------------------------------------------------- targets and verdicts


def curves_of(steps_of_kfac: dict[int, int | None]) -> pd.DataFrame:
    """SGD's loss falls from 1 to 0.1 in 100 steps; K-FAC's is 0.1 from the given step of each seed on, or never."""
    rows = []
    for seed, there in steps_of_kfac.items():
        for step in range(10, 101, 10):
            low = there is not None and step >= there
            rows.append({"problem": "gap", "arm": "sgd", "seed": seed, "step": step, "loss": 1.1 - step / 100})
            rows.append({"problem": "gap", "arm": "kfac", "seed": seed, "step": step, "loss": 0.1 if low else 1.0})
    table = pd.DataFrame(rows)
    table.loc[table.step == 100, "loss"] = table[table.step == 100].loss.round(3)
    return table


def costs_of(ratio: float) -> pd.DataFrame:
    """Steps of K-FAC take `ratio` times as long as SGD's, the first two twice that."""
    rows = []
    for step in range(8):
        early = 2.0 if step < 2 else 1.0
        rows.append({"problem": "gap", "arm": "sgd", "step": step, "milliseconds": 10.0})
        rows.append({"problem": "gap", "arm": "kfac", "step": step, "milliseconds": 10.0 * ratio * early})
    return pd.DataFrame(rows)


def test_steps_and_seconds_to_the_target() -> None:
    targets, clock = reached(curves_of({0: 50, 1: 50, 2: 50})), Clock(costs_of(1.5))
    ratio = steps_ratio(targets, "gap", "kfac", "final")
    assert (ratio.interval.estimate, ratio.interval.low, ratio.censored) == (pytest.approx(0.5), pytest.approx(0.5), 0)
    assert clock.seconds("gap", "kfac", 50) == pytest.approx(0.015 * 52)
    assert clock.seconds("gap", "kfac", 1) == pytest.approx(0.030)
    assert clock.step_ratio("gap", "kfac") == pytest.approx(1.5)
    assert steps_ratio(targets, "gap", "kfac", "final", clock).interval.estimate == pytest.approx(0.015 * 52 / 1.0)
    early = targets[(targets.target == "early") & (targets.arm == "sgd")]
    assert set(early.steps) == {50}


def test_seconds_have_the_scatter_of_the_timing_in_their_interval() -> None:
    costs = costs_of(1.5)
    sgd = costs.arm == "sgd"
    costs.loc[sgd, "milliseconds"] *= [math.exp(0.1 * (-1) ** step) for step in costs[sgd].step]
    clock = Clock(costs)
    error = clock.log_error("gap")
    assert error == pytest.approx(0.1 * math.sqrt(4 / 3) * math.sqrt(2 / 4))  # four later steps, 0.1 above and below
    targets = reached(curves_of({0: 50, 1: 50, 2: 50}))
    found = steps_ratio(targets, "gap", "kfac", "final", clock).interval
    assert math.log(found.high / found.estimate) == pytest.approx(1.959964 * error, rel=1e-5)


def test_a_censored_run_is_a_lower_bound() -> None:
    ratio = steps_ratio(reached(curves_of({0: 50, 1: None, 2: 50})), "gap", "kfac", "final")
    assert ratio.censored == 1
    assert math.isinf(ratio.interval.high)
    assert ratio.interval.estimate == pytest.approx((0.5 * 0.5 * 1.01) ** (1 / 3))


def tables(folder: Path, factor: float, accuracy: float) -> None:
    """A finished smoke study whose K-FAC has `factor` times SGD's loss, steps and updates, and `accuracy` points more."""
    epochs = pd.read_csv(folder / "optimisers.csv")
    epochs = epochs[epochs.arm != "adamw"]
    spread = 1 + 0.01 * epochs.seed
    epochs["train_loss"] = np.where(epochs.arm == "kfac", factor * spread, 1.0)
    epochs["test_top1"] = np.where(epochs.arm == "kfac", 0.9 + accuracy / 100 + 1e-4 * epochs.seed, 0.9)
    epochs.to_csv(folder / "optimisers.csv", index=False)
    rows = [
        {"problem": problem, "arm": arm, "seed": seed, "step": step, "loss": 0.1 if step >= there else 1.0}
        for problem in ("gap", "autoencoder")
        for seed in (0, 1)
        for arm, there in (("sgd", 1000), ("kfac", int(1000 * factor) + seed))
        for step in range(1, max(1000, there) + 1)
    ]
    pd.DataFrame(rows).to_csv(folder / "optimisers_curves.csv", index=False)
    costs = [
        {"problem": p, "arm": a, "step": s, "milliseconds": 10.0, "peak_mib": 1.0, "state_mib": 1.0}
        for p in ("gap", "autoencoder")
        for a in ("sgd", "kfac")
        for s in range(4)
    ]
    pd.DataFrame(costs).to_csv(folder / "optimisers_costs.csv", index=False)


@pytest.mark.parametrize(
    ("factor", "accuracy", "word"), [(0.05, 5.0, "supported"), (2.0, -5.0, "not supported"), (None, 0.0, "undecided")]
)
def test_verdicts_follow_the_numbers(
    finished: Path, tmp_path: Path, factor: float | None, accuracy: float, word: str
) -> None:
    for file in finished.glob("optimisers*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tables(tmp_path, factor or 0.995, accuracy)
    found = section.section(tmp_path).claims
    assert len(found) == 6
    assert {claim.group for claim in found} == {"bar"}
    if factor is not None:
        assert {claim.verdict for claim in found} == {word}
    else:  # level: neither ahead nor behind, and far from a tenth of the updates
        verdicts = [claim.verdict for claim in found]
        assert verdicts[0] == "undecided"
        assert verdicts[3] == "supported"  # accuracy within the point
        assert verdicts[4:] == ["not supported"] * 2


def test_the_report_says_what_limits_the_tuning(finished: Path) -> None:
    words = " ".join(section.section(finished).remarks)
    assert "largest or the smallest of those tried" in words
    assert json.loads((finished / "optimisers.json").read_text())["config"]["tuning_seed"] == TUNING_SEED


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "sgd", "adam"], "unknown arm 'adam'; choose one of: sgd, adamw"),
        (["--arms", "adamw"], "sgd must be among them"),
        (["--arms", "sgd", "sgd"], "name at least one, each once"),
        (["--poolings", "gpc"], "unknown pooling 'gpc'"),
        (["--schedule", "fast"], "unknown schedule 'fast'"),
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--processes", "0"], "--processes 0: at least 1"),
        (["--dampings", "0.1", "0"], "--dampings: every value must be above 0"),
        (["--autoencoder.activation", "relu"], "unknown activation 'relu'"),
        (["--autoencoder.image-size", "28"], "the images have only 8 pixels"),
        (["--autoencoder.batch-size", "500"], "there are only 128 images"),
        (["--batch-size", "4096"], "4096"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, refused: Callable[..., None]) -> None:
    refused(words, *SMOKE, *arguments)


def test_dry_run_states_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMOKE, "--dry-run", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "K-FAC: digits_tiny + gap" in printed
    assert "2 trials and 2 seeds of 3 arms and heads" in printed
    assert not (tmp_path / "none").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "world_size", lambda: 2)
    with pytest.raises(InputError, match="in one process"):
        optimisers.check(Common(preset="smoke"), PRESETS["smoke"])


def test_timed_steps_have_a_small_learning_rate_and_all_else_as_tuned() -> None:
    assert slowed({"learning_rate": 0.5, "momentum": 0.9}) == {"learning_rate": 0.0005, "momentum": 0.9}


def test_the_provenance_names_the_code_that_trained(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    write_sealed(next(tmp_path.glob("runs/optimisers/*/commit")), "0123456789abcdef")
    assert main([*SMOKE, "--out", str(tmp_path), "--resume"]) == 0
    assert "0123456789abcdef" in json.loads((tmp_path / "optimisers.json").read_text())["git_commit"].split()
