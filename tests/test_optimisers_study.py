"""The optimiser study: every optimiser in the training loop, tuning, steps to a target, and claims on known records."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from undrawn_figures import undrawn_figures

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.networks.autoencoder import INCOMING, autoencoder
from secondorder.training import OPTIMIZERS, Run, Trained, initial_network, steps, train
from secondorder.training.optimizer_state import plain, with_objects
from studies.__main__ import main
from studies.engine.plan import SMOOTHED, smoothed
from studies.engine.records import COLUMNS, Origins, frame, read_records
from studies.engine.study import Results
from studies.judge import judge
from studies.optimisers import autoencoder as deep
from studies.optimisers.claims import (
    CLAIMS,
    OF_SGD,
    TARGET,
    final,
    seconds_to_targets,
    steps_to,
    time_of,
    to_targets,
    updates,
)
from studies.optimisers.costs import Stepper, state_bytes
from studies.optimisers.folds import folds, interactions, summary, tuning_table
from studies.optimisers.settings import PRESETS, TUNING_SEED
from studies.optimisers.study import tuning_rows
from studies.optimisers.tuning import DEEP_LATTICES, LATTICES, Lattice, Range, Search

SMOKE = ["optimisers", "--preset", "smoke", "--no-progress", "--threads", "1", "--processes", "1"]
RUN = Run("digits_tiny", "gcp", "digits", epochs=4, batch_size=16, learning_rate=1e-3, schedule="cosine", threads=1)
STEPS = 16


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=70, test_limit=30)


class StoppedError(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = steps.Training._step

    def stopping(self: Any, *arguments: Any) -> None:
        if self.progress.step == step:
            raise StoppedError
        original(self, *arguments)

    monkeypatch.setattr(steps.Training, "_step", stopping)


# ----------------------------------------------------------------------------------------- optimisers in the training loop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_trains_everything_and_resumes_bit_for_bit(
    optimizer: str, data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"iterations": 2} if optimizer == "gauss_newton" else {}  # of which each is two passes
    run = dataclasses.replace(RUN, optimizer=optimizer, optimizer_options=options)
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


def test_singd_preconditions_wide_inputs_by_a_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secondorder.training.optimizers.WIDE", 30)
    run = dataclasses.replace(RUN, optimizer="singd")
    model = torch.nn.Sequential(
        torch.nn.Linear(29, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5), torch.nn.BatchNorm1d(5)
    )
    optimizer = OPTIMIZERS["singd"](model, run)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 29)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {*map(id, model.parameters())}
    kinds = [type(K).__name__ for K in optimizer.parts[0].Ks.values()]  # type: ignore[attr-defined]
    assert kinds == ["DenseMatrix", "DiagonalMatrix"]  # 30 and 31 inputs with the bias


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
    for change, words in (({"image_size": 9}, "only 8 pixels"), ({"batch_size": 500}, "only 70 images")):
        with pytest.raises(InputError, match=words):
            deep.pixels(data, dataclasses.replace(settings, **change))


def test_autoencoder_loss_is_the_sum_over_pixels() -> None:
    images = torch.rand(5, 7)
    model = torch.nn.Linear(7, 7)
    p = torch.sigmoid(model(images)).double()
    expected = -(images * p.log() + (1 - images) * (1 - p).log()).sum(1).mean().item()
    assert deep.whole_loss(model, images) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arm", deep.ARMS)
def test_an_autoencoder_is_fitted_in_its_share_of_updates(arm: str) -> None:
    settings = dataclasses.replace(PRESETS["smoke"].autoencoder, updates=40)
    images = torch.rand(128, 16)
    values = DEEP_LATTICES[arm].values((0, 0))
    assert values is not None
    rows = deep.fit(images, settings, arm, values, seed=0)
    assert [rows[0]["step"], rows[-1]["step"]] == [0, round(40 * deep.ARMS[arm].share)]
    assert rows[-1]["value"] < rows[0]["value"]
    assert rows == deep.fit(images, settings, arm, values, seed=0)
    if arm == "sgd":
        lost = deep.fit(images, settings, arm, {"learning_rate": math.inf, "momentum": 0.9}, seed=0)
        assert [row["quantity"] for row in lost] == ["diverged"]


# ------------------------------------------------------------------------------------------------------------- tuning


def walked(loss: Callable[[float, float], float], start: str = "square", stages: int = 20) -> tuple[Search, int]:
    """A search on a function of the logarithms of effective learning rate and 1 - momentum; stages after the first."""
    search = Search(LATTICES["sgd"], start)
    for stage in range(stages):
        if not search.untried:
            return search, stage - 1
        for place in search.untried:
            values = search.lattice.values(place)
            assert values is not None
            rest = 1 - values["momentum"]
            search.losses[place] = loss(math.log2(values["learning_rate"] / rest), math.log2(rest))
    return search, stages


@pytest.mark.parametrize("start", ["cross", "square"])
@pytest.mark.parametrize(("rate", "rest"), [(2.0, -2.3), (-3.0, -3.3), (7.0, -5.2)])
def test_a_search_ends_at_the_minimum_wherever_it_lies(start: str, rate: float, rest: float) -> None:
    search, stages = walked(lambda r, m: (r - rate) ** 2 + (m - rest) ** 2, start)
    values = search.chosen("sgd", extensions=20)
    assert math.log2(values["learning_rate"] / (1 - values["momentum"])) == pytest.approx(rate, abs=0.01)
    assert math.log2(1 - values["momentum"]) == pytest.approx(rest, abs=0.5)
    i, j = search.best
    assert {(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)} <= set(search.losses)
    assert (stages == 0) == (rate == 2.0)


def test_a_winner_at_an_edge_is_refused() -> None:
    search, _ = walked(lambda r, m: -r, stages=3)
    with pytest.raises(InputError, match=r"the best of \d+ trials, learning rate .* still lies at the edge"):
        search.chosen("sgd, gap", extensions=2)
    assert search.chosen("sgd, gap", extensions=0)  # as it is


def test_divergence_sends_a_search_to_smaller_rates_and_is_never_chosen() -> None:
    search, _ = walked(lambda r, m: math.inf if r > -2 else -r + m**2)
    assert math.log2(search.chosen("sgd", 20)["learning_rate"]) < -2
    assert math.isinf(max(search.losses.values()))
    lost, _ = walked(lambda r, m: math.inf, stages=2)
    with pytest.raises(InputError, match=r"sgd, gap: all \d+ trials diverged"):
        lost.chosen("sgd, gap", 2)


def test_a_search_stays_where_settings_are_defined() -> None:
    assert set(LATTICES) == set(OPTIMIZERS)
    assert set(DEEP_LATTICES) == set(deep.ARMS)
    search, _ = walked(lambda r, m: (r - 2) ** 2 - m)  # no momentum would be best
    assert search.chosen("sgd", 20)["momentum"] == pytest.approx(0.2)
    assert Lattice(Range("learning_rate", 1.0), Range("beta2", 0.9, high=0.95)).values((0, 2)) is None


# ---------------------------------------------------------------------------------------------------- steps to a target


def test_the_loss_curve_is_the_mean_of_the_last_half_epoch() -> None:
    training = {"step_losses": [float(n) for n in range(40)], "history": [{"step": 8}, {"step": 16}]}
    rows = {row["step"]: row["value"] for row in smoothed(training, 100)}
    assert list(rows) == list(range(1, 41))
    for step, value in rows.items():
        assert value == pytest.approx(np.mean(training["step_losses"][max(0, step - 4) : step]))
    assert [row["step"] for row in smoothed(training, 4)] == [1, 14, 27, 40]


def test_steps_to_a_level_are_interpolated_and_first() -> None:
    steps = np.arange(1.0, 101.0)
    levels = [2.0, 0.5, 0.2, 1e-3]
    found = steps_to(steps, np.exp(-steps / 50), levels)
    assert math.isnan(found[0])
    assert found[1:3] == pytest.approx([-50 * math.log(level) for level in levels[1:3]])
    assert math.isinf(found[3])
    losses = np.array([1.0, 0.5, *np.linspace(0.9, 0.55, 97), 0.25])
    last, first = steps_to(steps, losses, [0.3, 0.65])
    assert 99.0 < last < 100.0
    assert 1.0 < first < 2.0  # the first time, whatever comes later


HEADS = {"gap": 1.0, "covariance": 1.5, "gcp": 2.0}
SPEEDS = {"sgd": 1.0, "kfac": 2.0, "gauss_newton": 4.0}
TARGETS = (0.5, 0.3)


def made(noise: float = 0.02, seeds: int = 5, **special: float) -> pd.DataFrame:
    """Records of losses exp(-speed step / 50), the speed that of head times optimiser but for cells `head_optimizer`."""
    random = np.random.default_rng(0)
    curves: list[dict[str, Any]] = []
    tunings: list[dict[str, Any]] = []
    for head, of_head in HEADS.items():
        for optimizer, of_optimizer in SPEEDS.items():
            labels = {"network": "net", "head": head, "dataset": "digits", "optimizer": optimizer}
            for seed in range(seeds):
                speed = special.get(f"{head}_{optimizer}", of_head * of_optimizer) * (
                    1 + noise * random.standard_normal()
                )
                losses = [(step, math.exp(-speed * step / 50)) for step in range(1, 101)]
                rows = [{"step": step, "quantity": SMOOTHED, "value": loss} for step, loss in losses]
                for epoch in (1, 2):
                    step, loss = losses[50 * epoch - 1]
                    ends = {"train_loss": loss, "test_top1": 0.5 + 0.1 * epoch}
                    rows += [{"step": step, "index": epoch, "quantity": q, "value": v} for q, v in ends.items()]
                curves += [labels | {"seed": seed, "schedule": "cosine"} | row for row in rows]
            tuned = {
                "names": ["learning_rate", "momentum"],
                "trials": [[0.1, 0.9, 0.5], [1.0, 0.9, math.inf]],
                "edge": False,
            }
            costs = [{"quantity": q, "index": 0, "value": of_optimizer} for q in (OF_SGD, "milliseconds of a step")]
            costs += [{"quantity": q, "value": 1.0} for q in ("peak memory of a step [MiB]", "state [MiB]")]
            tunings += [labels | {"seed": TUNING_SEED} | row for row in (*tuning_rows(tuned), *costs)]
    aims = [{"quantity": TARGET, "index": i, "value": value} for i, value in enumerate(TARGETS)]
    tunings += [{"network": "net", "dataset": "digits", "seed": TUNING_SEED} | row for row in aims]
    return pd.concat([frame("optimisers", curves, {}, "k"), frame("optimisers", tunings, {}, "t")], ignore_index=True)


def without(records: pd.DataFrame, head: str, optimizer: str, seed: int) -> pd.DataFrame:
    """The records when this run has diverged."""
    lost = (records["head"] == head) & (records.optimizer == optimizer) & (records.seed == seed)
    row = records[lost].iloc[:1].assign(quantity="diverged", value=1.0)
    return pd.concat([records[~lost], row], ignore_index=True)


def test_steps_to_the_targets_are_their_geometric_mean() -> None:
    steps = to_targets(made(noise=0.0)).set_index(["head", "optimizer", "seed"])
    expected = [-50 * math.log(target) / 4.0 for target in TARGETS]
    assert steps.loc["gcp", "kfac", 0].value == pytest.approx(math.sqrt(math.prod(expected)))
    assert not steps.censored.any()


def test_later_steps_take_the_time_of_the_last_that_were_timed() -> None:
    times = np.array([5.0, 3.0, *[1.0] * 18, *[1.0, 2.0] * 10])
    steps = [0.5, 1, 1.5, 20, 40, 42]
    assert [time_of(n, times) for n in steps] == pytest.approx([2.5, 5, 6.5, 26, 56, 59])
    assert time_of(3, np.array([2.0])) == 6
    assert math.isnan(time_of(3, np.array([math.nan])))


def test_seconds_are_those_of_the_steps_that_were_taken() -> None:
    records = made(noise=0.0)
    slow = records[(records.quantity == OF_SGD) & (records.optimizer == "kfac")].assign(index=1, value=1.0)
    spent = seconds_to_targets(pd.concat([slow, records])).set_index(["head", "optimizer", "seed"]).value
    steps = [
        -50 * math.log(target) / 4.0 for target in TARGETS
    ]  # the first takes 2, the second 1, and so each later one 1.5
    assert spent["gcp", "kfac", 0] == pytest.approx(math.sqrt(math.prod(3 + 1.5 * (n - 2) for n in steps)))
    taken = to_targets(records).set_index(["head", "optimizer", "seed"]).value
    assert spent["gcp", "sgd", 0] == pytest.approx(taken["gcp", "sgd", 0])
    untimed = records[(records.quantity != OF_SGD) | (records.optimizer != "kfac")]
    assert seconds_to_targets(untimed).set_index("optimizer").value["kfac"].isna().all()


def test_a_run_that_diverges_or_never_gets_there_is_a_bound() -> None:
    steps = (
        to_targets(without(made(gcp_kfac=0.5), "gap", "sgd", 2)).set_index(["head", "optimizer", "seed"]).sort_index()
    )
    assert steps.loc["gap", "sgd", 2].to_dict() == {"network": "net", "value": pytest.approx(101.0), "censored": True}
    assert steps.censored.loc[("gcp", "kfac")].all()
    losses = final(without(made(), "gap", "sgd", 2), "train_loss").set_index(["head", "optimizer", "seed"]).value
    assert math.isinf(losses["gap", "sgd", 2])
    assert losses["gap", "sgd", 1] == pytest.approx(math.exp(-2), rel=0.2)


def test_updates_of_the_autoencoder_are_those_to_sgds_final_loss() -> None:
    parts = []
    for arm, rate in (("sgd", 1.0), ("kfac", 20.0), ("kfac_quadratic", 2.0)):
        total = 100 if arm == "sgd" else 10
        rows = [
            {"step": s, "quantity": "train_loss", "value": math.exp(-rate * s / 50)} for s in range(0, total + 1, 5)
        ]
        parts.append(frame("optimisers", rows, {"network": "autoencoder", "dataset": "digits", "optimizer": arm}, "k"))
    found = updates(pd.concat(parts)).set_index("optimizer")
    assert found.value.to_dict() == pytest.approx({"sgd": 100.0, "kfac": 5.0, "kfac_quadratic": 11.0})
    assert found.censored.to_dict() == {"sgd": False, "kfac": False, "kfac_quadratic": True}


# --------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("speed", "outcome", "words"),
    [
        (2.4, "supported", "K-FAC speeds up GCP less than GAP"),
        (8.0, "contradicted", "K-FAC speeds up GCP more than GAP"),
        (4.0, "no effect", "K-FAC speeds up GCP as much as GAP"),
        (0.5, "undecided", "Censored seeds: 5"),
    ],
)
def test_the_claim_has_the_outcome_that_was_built_in(speed: float, outcome: str, words: str) -> None:
    asked = [claim for claim in CLAIMS if claim.primary or claim.name.startswith("gauss_newton")]
    judged = {case.claim.name: case for case in judge(asked, made(gcp_kfac=speed))}
    claim = judged["second order superfluous"]
    assert claim.outcome == outcome
    assert words in claim.sentence
    assert claim.estimate is not None
    if outcome != "undecided":
        assert claim.estimate.value == pytest.approx(math.log(speed / 4), abs=0.05)
    exact = judged["gauss_newton: steps to the targets, gcp - gap"].estimate
    assert exact is not None
    assert exact.value == pytest.approx(0.0, abs=0.05)


def results(records: pd.DataFrame) -> Results:
    settings = dataclasses.asdict(PRESETS["quick"]) | {"optimizers": list(SPEEDS), "others": []}
    origins = Origins("optimisers", settings, {"label": "made up"})
    return Results(records, origins, judge(CLAIMS, records))


def test_the_interaction_is_drawn_where_all_runs_get() -> None:
    table = interactions(made(noise=0.0, gcp_kfac=2.0))
    assert set(table["head"]) == {"covariance", "gcp"}
    assert table[table["head"] == "gcp"].value.to_numpy() == pytest.approx(math.log(0.5), abs=1e-3)
    assert table.level.min() == pytest.approx(1.001 * math.exp(-2))
    assert interactions(made(gap_sgd=0.001)).empty


def test_controls_that_k_fac_speeds_up_less_still_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.draw.Curves.draw", lambda *_: Figure())  # most of the time
    words = "It speeds up covariance (no root) less still: the effect does not need the root."
    for speed, said in ((1.6, [words]), (1.8, []), (2.4, []), (4.0, [])):
        claim = folds(results(made(gcp_kfac=2.4, covariance_kfac=speed)))[0]
        assert claim.judged[0].outcome == "supported"
        assert claim.sentences[1:-1] == said


@pytest.mark.parametrize("change", [{"gcp_kfac": 2.4}, {"seeds": 1}])
def test_folds_say_what_was_measured(change: dict[str, Any]) -> None:
    shown = folds(results(made(**change)))
    assert [fold.page for fold in shown] == ["index", "index", "performance"]
    claim = shown[0]
    assert claim.pictures[0].name == "optimisers_interaction"
    assert bool(claim.shown_controls) == (change == {"gcp_kfac": 2.4})
    gcp = "83 %" if "gcp_kfac" in change else "50 %"  # at speeds of 2, and of 2.4 or 4
    assert claim.sentences == [
        f"K-FAC reaches the targets in 50 % under GAP and {gcp} under GCP of the steps that SGD takes.",
        "Tuned with 2 to 2 trials each; no chosen setting lies at an edge of what was tried.",
    ]
    assert "Gauss-Newton" in shown[2].sentences[0]
    assert "4 times SGD's" in shown[2].sentences[0]


def test_costs_have_the_later_steps_by_themselves() -> None:
    records = made(seeds=1)
    first = records[(records.quantity == OF_SGD) & (records.optimizer == "kfac")]
    timed = [first.assign(index=i, value=5.0 if i < 20 else 1.0) for i in range(40)]
    table = folds(results(pd.concat([records.drop(first.index), *timed], ignore_index=True)))[-1].tables[0].data
    row = table[(table.problem == "GAP") & (table.optimiser == "K-FAC")].iloc[0]
    assert (row[OF_SGD], row["later steps, of SGD's"]) == (3.0, 1.0)


def test_tables_mark_bounds_and_divergence() -> None:
    records = without(made(noise=0.0, gcp_kfac=0.5), "gap", "gauss_newton", 0)
    table = summary(records).set_index(["head", "optimiser"])
    assert table.loc[("GAP", "K-FAC"), "steps to the targets"] == "0.50"
    assert table.loc[("GAP", "K-FAC"), "seconds to the targets"] == "1.00"
    assert "≥ " in str(table.loc[("GCP (5-step root)", "K-FAC"), "steps to the targets"])
    assert table.loc[("GAP", "Gauss-Newton"), "training loss"] == "diverged"
    slower = records.assign(value=records.value.where((records.quantity != OF_SGD) | (records.optimizer != "sgd"), 2.0))
    again = summary(slower).set_index(["head", "optimiser"])["seconds to the targets"]
    assert (again["GAP", "SGD"], again["GAP", "K-FAC"]) == ("1.00", "0.50")  # in the seconds that SGD itself takes
    tuned = tuning_table(records).iloc[0]
    assert (tuned.tuned, tuned["values"], tuned.trials) == ("learning rate, momentum", "0.1, 0.9", 2)
    again = records[records.layer == "trial"].assign(key="of another machine")
    assert tuning_table(pd.concat([records, again])).equals(tuning_table(records))


# ---------------------------------------------------------------------------------------------------------------- costs


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
    assert set(stepper.milliseconds()) == {"forward and backward", "optimiser's step"}


# -------------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    with undrawn_figures():
        assert main([*SMOKE, "--out", str(folder)]) == 0
    return folder


def test_a_small_run_has_all_cells_and_equal_budgets(finished: Path) -> None:
    records, _ = read_records(finished, "optimisers")
    assert tuple(records.columns) == COLUMNS
    trials = records[records.layer == "trial"]
    losses = trials[trials.quantity == "loss"].groupby(["head", "optimizer"]).value
    cells = {*((h, o) for h in ("gap", "gcp") for o in ("sgd", "kfac", "adamw")), ("", "sgd"), ("", "kfac")}
    assert losses.size().to_dict() == dict.fromkeys(cells, 5)
    curves = records[records.quantity == SMOOTHED]
    assert set(curves.seed) == {0, 1}
    first = curves[curves.step == 1].groupby(["head", "seed"]).value
    assert (first.nunique() == 1).all()  # the same weights and batch
    assert set(curves.groupby(["head", "optimizer"]).groups) == {cell for cell in cells if cell[0]}
    assert (records[records.quantity == OF_SGD].groupby(["head", "optimizer"]).size() == 2).all()
    best = trials[(trials["index"] == 0) & (trials.quantity == "loss")].set_index(["head", "optimizer"]).value
    assert best.to_dict() == losses.min().to_dict()
    page = (finished / "report.md").read_text()
    for words in ("second order superfluous", "The deep autoencoder", "optimisers_all"):
        assert words in page


def test_what_is_finished_is_neither_trained_again_nor_chosen_anew(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in finished.glob("optimisers.csv*")}

    def none(do: Any, todo: list[Any]) -> list[Any]:
        assert todo == []
        return []

    monkeypatch.setattr("studies.engine.command.executor_of", lambda _: nullcontext(none))
    monkeypatch.setattr("studies.program.write_pages", lambda *arguments, **options: ("", ""))
    assert main([*SMOKE, "--out", str(finished)]) == 0
    assert {file: file.read_bytes() for file in finished.glob("optimisers.csv*")} == before


def test_the_dry_run_counts_trials_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMOKE, "--heads", "gap", "gcp", "--others", "--dry-run", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "7 times digits_tiny + gap, kfac" in printed  # 5 trials, 2 seeds
    assert "2 seeds of 4 networks" in printed
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--others", "adam"], "unknown optimizer of --others 'adam'; choose one of: sgd"),
        (["--optimizers", "sgd"], "--optimizers sgd: kfac must be among them"),
        (["--optimizers", "sgd", "kfac", "sgd"], "name at least one, each once"),
        (["--others", "kfac"], "kfac is there already"),
        (["--heads", "gap"], "--heads gap: gcp must be among them"),
        (["--heads", "gap", "gcp", "gpc"], "unknown pooling 'gpc'"),
        (["--targets", "1", "0"], "--targets 0: a training loss is above 0"),
        (["--tuning-seeds", "0"], "--tuning-seeds 0: at least 1"),
        (["--autoencoder.activation", "relu"], "unknown activation 'relu'"),
        (["--autoencoder.arms", "kfac"], "sgd must be among them"),
        (["--autoencoder.arms", "sgd", "adam"], "unknown optimizer of --autoencoder.arms 'adam'"),
        (["--autoencoder.image-size", "28"], "the images have only 8 pixels"),
        (["--autoencoder.images", "0"], "--autoencoder.images 0: at least 1"),
        (["--batch-size", "4096"], "4096"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, refused: Callable[..., None]) -> None:
    refused(words, *SMOKE, *arguments)
