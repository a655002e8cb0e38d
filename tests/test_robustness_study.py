"""The robustness study: its measures on a real network, its claims on made-up records with arithmetic by hand, its page."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from secondorder.data import load_dataset
from secondorder.errors import InputError
from secondorder.robustness import CORRUPTIONS, SEQUENCES, corrupt
from secondorder.training import Run, snapshot, train
from studies.backbones import evenly_spaced
from studies.engine.records import Origins, frame
from studies.engine.study import Results
from studies.judge import judge
from studies.landscape import DESCENT, FIRST_ORDER
from studies.robustness import claims, measures, page
from studies.robustness.study import BENCHMARK, PERTURBATIONS, STUDY, Settings

RUN = Run("digits_tiny", "gcp", "digits", 1, 32, 0.05, train_limit=96, threads=1)


def test_measures_against_the_network_called_by_hand(tmp_path: Path) -> None:
    data = load_dataset("digits", limit=96)
    train(RUN, data, tmp_path, snapshots=(3,), progress=False)
    with snapshot(RUN, data, tmp_path / "step-3.pt") as at:
        chosen = evenly_spaced(len(data.test), 30)
        (clean,) = measures.measure_clean(at, measures.Chosen("", 30))
        rows = [*measures.measure_corruption(at, measures.Chosen("gaussian_noise", 30))]
        flips, top5 = measures.measure_sequence(at, measures.Chosen("rotate", 5))
        assert at.model.training
        at.model.eval()
        mean, std = data.test.normalisation.mean[0], data.test.normalisation.std[0]
        levels = (data.test.images[chosen] * (255 / 16)).round().to(torch.uint8)
        noisy = corrupt(levels, "gaussian_noise", 4, indices=chosen.tolist())
        for images, value in ((levels, clean["value"]), (noisy, rows[3]["value"])):
            wrong = at.model((images / 255 - mean) / std).argmax(1) != data.test.labels[chosen]
            assert value == pytest.approx(wrong.double().mean().item())
    assert [row["index"] for row in rows] == [1, 2, 3, 4, 5]
    assert 0 <= flips["value"] <= 1
    assert 0 <= top5["value"] <= 15


def records(errors: dict[str, dict[str, float]], clean: dict[str, float], seeds: int = 4, **more: Any) -> pd.DataFrame:
    """FAKE records: `errors` of a head by corruption, the same at every severity, with a little scatter between seeds."""
    rows = []
    for head, by_name in errors.items():
        for seed in range(seeds):
            labels = {"network": "digits_net", "dataset": "digits", "head": head, "trained_under": head, "seed": seed}
            rows.append(labels | {"quantity": measures.CLEAN, "value": clean[head]})
            for name, error in by_name.items():
                value = error + 0.001 * (seed - (seeds - 1) / 2)
                rows += [
                    labels | {"layer": name, "quantity": measures.CORRUPTED, "index": s, "setting": s, "value": value}
                    for s in range(1, 6)
                ]
            for number, name in enumerate(more.get("sequences", ())):
                flips = {"quantity": measures.FLIPS, "layer": name, "value": 0.1 + 0.01 * number + 0.001 * seed}
                rows += [labels | flips, labels | flips | {"quantity": measures.TOP5, "value": 2.0}]
            if more.get("lines"):
                rows.append(labels | {"quantity": "train_loss", "step": 100, "index": 1, "value": 0.1})
                size = (0.5 if head == "gcp" else 1.0) * 1.1**seed
                rows += [
                    labels
                    | {"layer": DESCENT, "quantity": FIRST_ORDER, "index": i, "step": 80, "setting": r, "value": size}
                    for i, r in enumerate((0.1, 0.5))
                ]
    return frame("robustness", rows, {}, "fake")


def mean_of(table: pd.DataFrame) -> dict[str, float]:
    return table.groupby("head").value.mean().to_dict()


def test_relative_errors_are_in_units_of_the_mean_gap_network() -> None:
    fake = records(
        {
            "gap": {"fog": 0.3, "frost": 0.5, "contrast": 0.1, "spatter": 0.9},
            "gcp": {"fog": 0.35, "frost": 0.35, "contrast": 0.9, "spatter": 0.1},
        },
        {"gap": 0.1, "gcp": 0.2},
    )
    assert claims.counted(fake) == ["fog", "frost"]  # GAP loses nothing by contrast; spatter is extra
    by_seed = claims.relative(fake)
    # fog (0.35 - 0.2) / (0.3 - 0.1) = 0.75, frost (0.35 - 0.2) / (0.5 - 0.1) = 0.375
    assert mean_of(by_seed) == pytest.approx({"gap": 1.0, "gcp": 0.5625})
    first = by_seed.set_index(["head", "seed"]).value
    assert first["gap", 0] == pytest.approx(1 - 0.0015 * (1 / 0.2 + 1 / 0.4) / 2)
    assert mean_of(claims.mean(fake, measures.CORRUPTED)) == pytest.approx({"gap": 0.3, "gcp": 1.6 / 3})
    assert mean_of(claims.mean_loss(fake)) == pytest.approx({"gap": 0.2, "gcp": 1 / 3})
    assert mean_of(claims.mean_loss(fake, "digital")) == pytest.approx({"gap": 0.0, "gcp": 0.7}, abs=1e-12)


@pytest.mark.parametrize(("error", "outcome"), [(0.25, "supported"), (0.3, "no effect"), (0.4, "contradicted")])
def test_the_claim_follows_the_loss_of_accuracy(error: float, outcome: str) -> None:
    """GAP loses 0.2 by each corruption; GCP error - 0.1."""
    names = BENCHMARK[:4]
    fake = records({"gap": dict.fromkeys(names, 0.3), "gcp": dict.fromkeys(names, error)}, {"gap": 0.1, "gcp": 0.1})
    judged = judge([STUDY.claims[0]], fake)[0]
    assert judged.outcome == outcome
    assert judged.estimate is not None
    assert judged.estimate.value == pytest.approx((error - 0.1) / 0.2, rel=1e-3)


def test_at_matched_clean_error_only_what_it_does_not_explain_is_left() -> None:
    """Relative mCE = (clean error odds)^-0.5 for both heads, and twice that for the covariance."""
    odds = {"gap": (0.05, 0.08, 0.1), "gcp": (0.02, 0.03, 0.05), "covariance": (0.06, 0.04, 0.09)}
    rows = []
    for head, clean in odds.items():
        for seed, o in enumerate(clean):
            labels = {"network": "n", "dataset": "digits", "head": head, "trained_under": head, "seed": seed}
            size = (2.0 if head == "covariance" else 1.0) * o**-0.5 / 100
            rows.append(labels | {"quantity": measures.CLEAN, "value": o / (1 + o)})
            rows += [
                labels
                | {
                    "layer": "fog",
                    "quantity": measures.CORRUPTED,
                    "index": s,
                    "setting": s,
                    "value": o / (1 + o) + size,
                }
                for s in range(1, 6)
            ]
    found = claims.at_matched_accuracy(frame("robustness", rows, {}, "fake"))
    values = found.set_index(["head", "seed"]).value
    assert values["gcp"].to_numpy() == pytest.approx(np.full(3, values["gap", 0]))
    assert values["covariance"].to_numpy() == pytest.approx(np.full(3, 2 * values["gap", 0]))


def test_the_slope_counts_as_estimated() -> None:
    """Logarithms of the values are jackknife pseudo-values of a least-squares fit with one slope."""
    generator = np.random.default_rng(0)
    x = np.stack([generator.normal(-3, 0.2, 4), generator.normal(-2, 0.2, 4)])
    y = generator.normal(0, 0.3, (2, 4)) - 0.5 * x
    rows = pd.DataFrame(
        [
            {"network": "n", "dataset": "d", "head": head, "seed": seed, "x": x[h, seed], "y": y[h, seed]}
            for h, head in enumerate(("gap", "gcp"))
            for seed in range(4)
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "relative", lambda _: rows[claims.KEYS].assign(value=np.exp(rows.y)))
        patch.setattr(claims, "clean_error", lambda _: rows[claims.KEYS].assign(value=1 / (1 + np.exp(-rows.x))))
        found = claims.at_matched_accuracy(rows).pivot(index="seed", columns="head", values="value")

    def effect(kept: list[int]) -> float:
        head = np.repeat([0.0, 1.0], len(kept))
        design = np.stack([np.ones_like(head), head, x[:, kept].ravel()], axis=1)
        return float(np.linalg.lstsq(design, y[:, kept].ravel(), rcond=None)[0][1])

    seeds = [*range(4)]
    wanted = [4 * effect(seeds) - 3 * effect([s for s in seeds if s != left]) for left in seeds]
    assert np.log(found.gcp / found.gap).to_numpy() == pytest.approx(wanted)


def test_a_gap_network_without_all_corruptions_is_no_reference() -> None:
    """A study that stopped in the middle of a seed: neither its clean error nor its errors enter."""
    names = {"fog": 0.3, "frost": 0.5}
    fake = records({"gap": names, "gcp": names}, {"gap": 0.1, "gcp": 0.1})
    stopped = (fake["head"] == "gap") & (fake.seed == 1)
    partial = fake[~(stopped & (fake.layer == "frost"))].copy()
    partial.loc[partial.index.isin(fake.index[stopped]), "value"] = 0.9
    found = claims.relative(partial)
    alone = claims.relative(fake[~stopped])
    assert len(found) == 7
    pd.testing.assert_frame_equal(found, alone)


@pytest.mark.parametrize("errors", [{"gcp": {"fog": 0.3}}, {"gap": {"spatter": 0.3}, "gcp": {"spatter": 0.3}}])
def test_the_page_without_gap_or_corruptions_of_the_benchmark(errors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "strips", lambda *_, **__: None)
    fake = records(errors, {"gap": 0.1, "gcp": 0.1})
    (fold,) = page.folds(Results(fake, Origins("robustness", asdict(Settings())), judge(STUDY.claims, fake)))
    assert fold.judged[0].outcome == "not measured"


def test_without_gap_or_corruptions_there_is_no_relative_error() -> None:
    fake = records({"gcp": {"fog": 0.3}}, {"gcp": 0.1})
    assert claims.relative(fake).empty
    assert claims.at_matched_accuracy(fake).empty
    assert judge([STUDY.claims[0]], fake)[0].outcome == "not measured"


def test_the_page_of_all_parts() -> None:
    names = {name: 0.2 + 0.01 * number for number, name in enumerate(BENCHMARK)}
    fake = records({"gap": names, "gcp": names}, {"gap": 0.2, "gcp": 0.1}, sequences=PERTURBATIONS, lines=True)
    origins = Origins("robustness", asdict(Settings()))
    folds = page.folds(Results(fake, origins, judge(STUDY.claims, fake)))
    assert [fold.heading for fold in folds] == [
        "robust to corruptions", "Stability along perturbations", "Does a smoother loss predict robustness?"
    ]  # fmt: skip
    assert "by it: digits net: gaussian_noise." in folds[0].sentences[0]
    assert {len(pictures) for pictures in page._corrupted().values()} == {6}
    assert {*page._perturbed()} == {name.replace("_", " ") for name in SEQUENCES}
    few = fake[fake.seed == 0]
    assert len(page.folds(Results(few, origins, judge(STUDY.claims, few)))) == 2  # two points show no correlation


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"corruptions": ("fgo",)}, "fog"),
        ({"corruptions": ()}, "--corruptions"),
        ({"sequences": ("tilt", "tilt")}, "--sequences tilt tilt"),
        ({"sequences": ("tlit",)}, "tilt"),
        ({"images": 0}, "--images 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Settings(**settings)


def test_the_benchmark_has_15_corruptions_and_10_perturbations() -> None:
    assert len(BENCHMARK) == 15
    assert len(PERTURBATIONS) == 10
    assert {CORRUPTIONS[name].group for name in BENCHMARK} == {*claims.GROUPS}
