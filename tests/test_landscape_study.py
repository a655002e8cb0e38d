"""The landscape study: its lines against the training's own numbers and autograd, its claims on made-up records, its page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from secondorder.data import load_dataset
from secondorder.training import Run, snapshot, train
from studies import landscape
from studies.engine.records import Origins, frame
from studies.engine.study import Results
from studies.judge import judge

RUN = Run("digits_tiny", "gcp", "digits", 2, 32, 0.05, train_limit=96, dropout=0.3, threads=1)


def test_lines_start_at_the_loss_of_the_step_and_the_network_stays(tmp_path: Path) -> None:
    """Same batch, same weights, training mode, same dropout masks."""
    data = load_dataset("digits", limit=96)
    trained = train(RUN, data, tmp_path, snapshots=range(6), progress=False)
    for step, loss in enumerate(trained.step_losses):
        with snapshot(RUN, data, tmp_path / f"step-{step}.pt") as at:
            state = {name: value.clone() for name, value in at.model.state_dict().items()}
            rows = pd.DataFrame(landscape.measure_published(at, landscape.Lines(eta_points=2)))
            assert rows[rows.quantity == "loss at origin"].value.to_numpy() == pytest.approx([loss, loss], rel=1e-6)
            assert all(torch.equal(value, state[name]) for name, value in at.model.state_dict().items())


def test_the_descent_line_against_autograd(tmp_path: Path) -> None:
    run, data, rho = replace(RUN, dropout=0.0), load_dataset("digits", limit=96), (0.1, 0.5)
    train(run, data, tmp_path, snapshots=(3,), progress=False)
    with snapshot(run, data, tmp_path / "step-3.pt") as at:
        rows = pd.DataFrame(landscape.measure_descent(at, rho)).set_index(["quantity", "setting"]).value
        x = at.model.stem(at.images).detach().requires_grad_()
        loss = F.cross_entropy(at.model.rest(x), at.labels)
        (g,) = torch.autograd.grad(loss, x)
        for share in rho:
            eta = share * loss.detach() / g.square().sum()
            y = (x - eta * g).detach().requires_grad_()
            there = F.cross_entropy(at.model.rest(y), at.labels)
            (h,) = torch.autograd.grad(there, y)
            improvement = eta * g.square().sum()
            error = ((there - loss + improvement).abs() / improvement).item()
            assert rows["first-order error", share] == pytest.approx(error, rel=1e-3)
            assert rows["gradient change", share] == pytest.approx(((h - g).norm() / g.norm()).item(), rel=1e-4)


def made_up(ratio: float, scatter: float = 0.02, seeds: int = 8) -> pd.DataFrame:
    """Fake records of all heads, in which every quantity of GCP is `ratio` times GAP's."""
    random, rows = np.random.default_rng(0), []
    for head in ("gap", "gap_lifted", "covariance", "gcp", "gcp_exact"):
        for seed in range(seeds):
            labels = {"network": "digits_net", "dataset": "digits", "head": head, "trained_under": head, "seed": seed}
            rows.append(labels | {"quantity": "train_loss", "step": 100, "index": 1, "value": 0.1})
            for step in (0, 40, 80):
                size = (ratio if head == "gcp" else 1.0) * np.exp(scatter * random.normal())
                for layer, quantities in {
                    landscape.DESCENT: (landscape.FIRST_ORDER, landscape.CHANGE),
                    landscape.PUBLISHED: ("loss", "gradient distance", "beta"),
                    landscape.STEP: ("loss",),
                }.items():
                    for quantity in quantities:
                        at = labels | {"layer": layer, "quantity": quantity, "step": step}
                        rows += [at | {"index": i, "setting": e, "value": size * e} for i, e in enumerate((0.1, 0.5))]
                rows.append(
                    labels | {"layer": landscape.PUBLISHED, "quantity": "gradient norm", "step": step, "value": size}
                )
    return frame("landscape", rows, {}, "fake")


@pytest.mark.parametrize(("ratio", "outcome"), [(0.8, "supported"), (1.25, "contradicted"), (1.0, "no effect")])
def test_primary_claims_follow_the_ratio(ratio: float, outcome: str) -> None:
    judged = {case.claim.name: case for case in judge(landscape.CLAIMS, made_up(ratio))}
    for name in landscape.PRIMARY:
        assert judged[name].outcome == outcome
        assert judged[name].estimate is not None
        assert judged[name].estimate.value == pytest.approx(ratio, rel=0.03)
    assert all(case.estimate is not None for case in judged.values())
    assert judged["loss variation along +g: gcp / gap"].outcome == ""  # exploratory


def test_only_the_later_half_counts_and_what_diverges_does_not_look_smooth() -> None:
    records = made_up(0.8)
    early = records.step < 50
    changed = records.assign(value=records.value.where(~early, 7.0))
    late = landscape.late(changed, landscape.DESCENT, landscape.FIRST_ORDER)
    pd.testing.assert_frame_equal(late, landscape.late(records, landscape.DESCENT, landscape.FIRST_ORDER))
    first = records.index[
        (records.quantity == landscape.FIRST_ORDER) & (records["head"] == "gcp") & (records.step == 80)
    ][0]
    records.loc[first, "value"] = np.inf
    late = landscape.late(records, landscape.DESCENT, landscape.FIRST_ORDER)
    assert np.isinf(late.value).sum() == 1
    case = judge(landscape.CLAIMS[:1], records)[0]
    assert case.estimate is not None
    assert case.estimate.left_out == 1


def test_the_loss_variation_is_the_width_of_the_band() -> None:
    records = made_up(1.0, scatter=0.0, seeds=1)
    assert landscape.by_step(records, landscape.PUBLISHED, "loss").value.to_numpy() == pytest.approx(0.4)
    points = landscape.by_step(records, landscape.DESCENT, landscape.CHANGE)
    assert points.value.to_numpy() == pytest.approx(np.sqrt(0.1 * 0.5))


def test_folds_of_whatever_came_out() -> None:
    settings: dict[str, Any] = {
        "training": {
            "network": "n",
            "dataset": "d",
            "epochs": 1,
            "batch_size": 2,
            "learning_rate": 0.1,
            "schedule": "s",
        },
        "lines": {"eta_points": 4, "eta_low": 0.1, "eta_high": 75.0, "step_low": 0.5, "step_high": 4.0},
        "measure_every": 40,
        "rho": [0.1],
    }
    records = made_up(0.8)
    judged = judge(landscape.CLAIMS, records)
    folds = landscape.folds(Results(records, Origins("landscape", settings), judged))
    assert [fold.judged[0].claim.primary for fold in folds[:2]] == [1, 2]
    assert len(folds[0].shown_controls) == len(landscape.PAIRS)
    assert "correlate at 1.0000" in folds[2].sentences[0]
    assert sum(len(fold.pictures) for fold in folds) == 5
    published = records[records.layer != landscape.DESCENT]  # of a table that lacks the line along -g
    judged = judge(landscape.CLAIMS, published)
    folds = landscape.folds(Results(published, Origins("landscape", settings), judged))
    assert [len(fold.pictures) for fold in folds] == [0, 0, 1]
    assert folds[0].judged[0].outcome == "not measured"
