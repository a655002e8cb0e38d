"""The convergence study: epochs and rates of every schedule, shared networks, claims on made-up records, costs, its page."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from undrawn_figures import undrawn_figures

from secondorder.errors import InputError
from secondorder.kfac.step_rule import as_step_rule
from studies import landscape
from studies.__main__ import main
from studies.convergence import study
from studies.convergence.claims import CLAIMS, MATCHED, final, matching
from studies.convergence.costs import FLOPS, PARAMETERS, PEAK, measure_costs
from studies.convergence.page import folds, summary
from studies.convergence.study import STUDY, Settings, family_of, under
from studies.engine.plan import EPOCH, Computed, Trained
from studies.engine.records import Origins, frame, read_records
from studies.engine.study import Results
from studies.judge import Judged, judge
from studies.settings import Common
from studies.training import Training

SMOKE = ["convergence", "--preset", "smoke", "--no-progress", "--processes", "1", "--threads", "1"]

# ------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize(
    ("network", "norm", "fast", "adju"),
    [
        ("resnet18", 100, 53, 50),
        ("mobilenet_v2", 400, 100, 150),
        ("shufflenet_v2_x1_0", 240, 60, 100),
        ("digits_net", 10, 5, 5),
        ("cifar_resnet8", 16, 8, 8),
        ("mobilenet_v2_small_images", 16, 4, 6),
        ("shufflenet_v2_x0_5_small_images", 16, 4, 7),
        ("digits_tiny", 1, 1, 1),
    ],
)
def test_epochs_of_the_schedules(network: str, norm: int, fast: int, adju: int) -> None:
    training = Training(network, epochs=norm)
    assert [under(training, kind)["epochs"] for kind in study.KINDS] == [norm, fast, adju]


def test_rates_relate_to_lrnorm_as_published() -> None:
    rates = {name: [under(Training(name, learning_rate=0.045), kind)["learning_rate"] for kind in study.KINDS] for name in
             ("mobilenet_v2", "resnet18", "shufflenet_v2_x1_0")}  # fmt: skip
    assert rates == {"mobilenet_v2": [0.045, 0.06, 0.06], "resnet18": [0.045] * 3, "shufflenet_v2_x1_0": [0.045] * 3}
    assert (
        under(Training("mobilenet_v2"), "fast", rate=0.06)["learning_rate"] == 0.08
    )  # K-FAC's, in the same proportion
    assert {name: as_step_rule(rule).learning_rate for name, rule in
            (("kfac_adam", "adam"), ("kfac", "natural"), ("ekfac", "natural"))} == study.KFAC_RATES  # fmt: skip


def test_further_networks_have_the_rates_and_lengths_of_their_family() -> None:
    names = ("cifar_resnet20", "mobilenet_v2", "shufflenet_v2_x1_0")
    first = Training("cifar_resnet8", batch_size=128, epochs=16, learning_rate=0.2)
    found = Settings(training=first, networks=names, network_limit=500).trainings
    assert [t.network for t in found] == ["cifar_resnet8", *names]
    assert [t.learning_rate for t in found] == [0.2, 0.2, 0.045, 0.0625]  # 0.5 was published for batches of 1,024
    assert [t.weight_decay for t in found] == [1e-4, 1e-4, 4e-5, 4e-5]
    assert [(t.train_limit, t.epochs, t.batch_size) for t in found] == [(None, 16, 128), *[(500, 16, 128)] * 3]
    published = Settings(training=first, networks=names, published=True).trainings
    assert [(t.epochs, t.batch_size, t.learning_rate) for t in published[1:]] == [
        (100, 256, 0.2), (400, 96, 0.045), (240, 1024, 0.5)]  # fmt: skip


def tasks(settings: Settings, seeds: int, **common: Any) -> tuple[list[Trained], list[Computed]]:
    context = STUDY.context(Common(seeds=seeds, **common), settings)
    (stage,) = STUDY.plan(context)
    return [t for t in stage if isinstance(t, Trained)], [t for t in stage if isinstance(t, Computed)]


def test_quick_shares_its_networks_under_lrnorm_with_the_landscape_study() -> None:
    trained, _ = tasks(STUDY.presets["quick"], STUDY.seeds["quick"])
    other = landscape.STUDY
    theirs = {t.subject.name for t in next(other.plan(other.context(Common(), other.presets["quick"])))}
    runs = [t.subject for t in trained if t.subject.run.schedule == "resnet_norm" and t.subject.run.optimizer == "sgd"]
    heads = [subject.run.pooling for subject in runs]
    assert {head: heads.count(head) for head in heads} == {"gap": 4, "gcp": 4, "gap_lifted": 2, "covariance": 2}
    assert {subject.name for subject in runs} <= theirs


def test_every_network_is_wanted_with_its_seeds_and_gap_with_the_stride_of_gcp() -> None:
    first = Training("resnet18", "fake", image_size=32, batch_size=2, stride="published")
    settings = Settings(
        ("gap", "gcp", "covariance"), first, ("shufflenet_v2_x0_5_small_images",), 1, kfac_seeds=1, adju_seeds=1
    )
    trained, costs = tasks(settings, 3, dry_run=True)
    counts: dict[tuple[str, str, str], int] = {}
    for task in trained:
        run = task.subject.run
        stride = "" if run.last_stride is None else f"{run.pooling} {run.last_stride}"
        key = (run.backbone[:7], stride or run.pooling, f"{run.optimizer} {run.schedule.split('_')[1]}")
        counts[key] = counts.get(key, 0) + 1
        assert task.history.of_training
        assert (task.history.name == "training") is (run.last_stride is None)
    sgd = ("sgd norm", "sgd fast", "sgd adju")
    assert counts == {
        **{("resnet1", head, kind): n for head in ("gap", "gcp") for kind, n in zip(sgd, (3, 3, 1), strict=True)},
        **{
            ("resnet1", head, kind): n
            for head in ("covariance", "gap 1")
            for kind, n in zip(sgd, (2, 2, 1), strict=True)
        },
        **{("resnet1", head, f"kfac_adam {kind}"): 1 for head in ("gap", "gcp") for kind in study.KINDS},
        **{("shuffle", head, kind): 1 for head in ("gap", "gcp") for kind in sgd},
    }
    assert len(costs) == 8
    assert not [t for t in tasks(replace(settings, training=replace(first, stride="same")), 1, dry_run=True)[0]
                if t.history.name != "training"]  # fmt: skip
    training = {"history": [dict.fromkeys(("epoch", "step", *EPOCH), 1.0)]}
    assert {row["layer"] for row in study.matched(training)} == {MATCHED}


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--heads gap covariance", "--heads gap covariance: gcp must be among them"),
        ("--heads gap gcp gpc", "unknown pooling 'gpc'; choose one of: gap"),
        ("--network resnet19", "unknown network 'resnet19'; choose one of: mobilenet_v2"),
        ("--networks digits_tiny", "--networks digits_tiny digits_tiny: name at least one, each once"),
        ("--epochs 0", "epochs must be a whole number from 1"),
        ("--epochs -3", "epochs must be a whole number from 1"),
        ("--schedule cosine", "--schedule cosine: this study trains under all three"),
        ("--kfac muon", "unknown optimizer of --kfac 'muon'; choose one of: kfac_adam, kfac, ekfac"),
        ("--kfac-seeds -1", "--kfac-seeds -1: at least 0"),
        ("--network-limit 0", "--network-limit 0: at least 1"),
    ],
)
def test_bad_input_is_one_line(flags: str, words: str, refused: Any) -> None:
    refused(words, *SMOKE, *flags.split())


def test_a_network_without_schedules_is_named_with_those_that_have_some() -> None:
    assert [family_of(name) for name in ("cifar_resnet20", "digits_slim", "mobilenet_v2_small_images")] == [
        "resnet", "resnet", "mobilenet"]  # fmt: skip
    with pytest.raises(
        InputError, match=r"network 'vgg': no schedules were published.*resnet: resnet, cifar_resnet, digits"
    ):
        family_of("vgg")


# ------------------------------------------------------------------------------------------ claims on made-up records


def made_up(curves: dict[tuple[str, ...], list[list[float]]], dataset: str = "digits") -> pd.DataFrame:
    """Fake records of trainings (network, head, schedule, perhaps optimizer, layer) -> for each seed its accuracies by epoch."""
    rows = []
    for (network, head, schedule, *rest), seeds in curves.items():
        optimizer, layer = (*rest, *("sgd", "")[len(rest) :])
        labels = {"network": network, "head": head, "trained_under": head, "schedule": schedule, "optimizer": optimizer}
        for seed, accuracies in enumerate(seeds):
            at = labels | {"seed": seed, "dataset": dataset, "layer": layer}
            if not accuracies:
                rows.append(at | {"quantity": "diverged", "layer": "the loss is nan", "value": 1.0})
            for epoch, top1 in enumerate(accuracies, start=1):
                step = at | {"index": epoch, "step": 10 * epoch}
                values = {"test_top1": top1, "test_top5": (1 + top1) / 2, "seconds": 2.0 * epoch, "train_loss": 0.1}
                rows += [step | {"quantity": name, "value": value} for name, value in values.items()]
        costs = labels | {"seed": 0, "dataset": dataset, "layer": layer, "trained_under": ""}
        rows += [costs | {"quantity": name, "value": 2e6} for name in (PARAMETERS, FLOPS, PEAK)]
    return frame("convergence", rows, {}, "fake")


CURVES: dict[tuple[str, ...], list[list[float]]] = {
    ("digits_net", "gap", "resnet_norm"): [[0.5, 0.7, 0.9, 0.8], [0.4, 0.6, 0.6, 0.7]],
    ("digits_net", "gap", "resnet_fast"): [[0.5, 0.6], [0.4, 0.5]],
    ("digits_net", "gcp", "resnet_norm"): [[0.6, 0.8, 0.9, 0.9], [0.6, 0.7, 0.8, 0.9]],
    ("digits_net", "gcp", "resnet_fast"): [[0.7, 0.9], [0.6, 0.65]],
    ("mobilenet_v2", "gap", "mobilenet_norm"): [[0.2, 0.5], [0.3, 0.5]],
    ("mobilenet_v2", "gcp", "mobilenet_fast"): [[0.6], [0.4]],
    ("digits_net", "gap_lifted", "resnet_fast"): [[0.6, 0.9]],
    ("digits_net", "gcp", "resnet_fast", "kfac_adam"): [[0.9, 1.0], []],
}


def test_the_claim_is_the_last_epoch_of_gcp_lrfast_less_that_of_gap_lrnorm_in_every_family() -> None:
    records = made_up(CURVES)
    (case,) = judge(CLAIMS[:1], records)
    assert case.claim.primary == 7
    assert case.estimate is not None
    assert (case.estimate.networks, case.estimate.n, case.estimate.left_out) == (2, 2, 0)
    effects = case.estimate.by_seed.set_index(["network", "seed"]).effect
    center = np.mean([logit(0.8), logit(0.7), logit(0.5), logit(0.5)])
    for place, of, to in (
        (("digits_net", 0), 0.9, 0.8),
        (("digits_net", 1), 0.65, 0.7),
        (("mobilenet_v2", 1), 0.4, 0.5),
    ):
        assert effects[place] == pytest.approx(expit(center + logit(of) - logit(to)) - expit(center), rel=1e-9)


@pytest.mark.parametrize(("fast", "outcome"), [(0.93, "supported"), (0.85, "contradicted"), (0.9, "no effect")])
def test_outcomes(fast: float, outcome: str) -> None:
    def ends(level: float) -> list[list[float]]:
        return [[0.3, level + 0.001 * math.sin(9 * level + seed)] for seed in range(6)]

    curves = {("digits_net", "gap", "resnet_norm"): ends(0.9), ("digits_net", "gcp", "resnet_fast"): ends(fast)}
    (case,) = judge(CLAIMS[:1], made_up(curves))
    assert case.outcome == outcome
    assert case.sentence.startswith("Under the fast schedule GCP ends ")


@cache
def judged_curves() -> list[Judged]:
    return judge(CLAIMS, made_up(CURVES))


def test_controls_and_kfac_are_compared_on_the_seeds_that_they_have() -> None:
    judged = {case.claim.name: case.estimate for case in judged_curves() if case.estimate is not None}
    control = judged["final top-1: gap_lifted, LRfast - gap, LRnorm"]
    assert (control.n, control.left_out, control.value) == (1, 0, pytest.approx(0.1))  # 0.9 - 0.8, one seed
    lifted = judged["final top-1: gcp, LRfast - gap_lifted, LRfast"]
    assert (lifted.n, lifted.left_out, lifted.value) == (1, 0, pytest.approx(0.0, abs=1e-12))  # 0.9 - 0.9
    kfac = judged["final top-1: gcp, LRfast, kfac - gcp, LRfast"]
    assert (kfac.n, kfac.left_out, kfac.value) == (1, 1, pytest.approx(0.1))  # 1.0 - 0.9; the other seed diverged
    assert "final top-1: gcp, LRadju - gap, LRnorm" not in judged


def test_gap_with_the_stride_of_gcp_is_a_network_of_its_own() -> None:
    more = {("digits_net", "gap", f"resnet_{kind}", "sgd", MATCHED): [[0.75, 0.85]] for kind in ("norm", "fast")}
    with_it, without = made_up(CURVES | more), made_up(CURVES)
    for one, other in zip(judge(CLAIMS[:1], with_it), judge(CLAIMS[:1], without), strict=True):
        assert (one.estimate.value, one.estimate.n) == (other.estimate.value, other.estimate.n)
    judged = {case.claim.name: case.estimate for case in judge(CLAIMS, with_it) if case.estimate is not None}
    assert judged["final top-1: gcp, LRfast - gap, stride of GCP, LRnorm"].value == pytest.approx(0.05)  # 0.9 - 0.85
    assert judged["final top-1: gap, stride of GCP, LRfast - gap, LRnorm"].value == pytest.approx(0.05)  # 0.85 - 0.8
    assert "GAP, stride of GCP" in set(summary(with_it)["head"])


def test_matching_epochs_and_those_that_never_come() -> None:
    table = matching(made_up(CURVES)).set_index(["network", "head", "optimizer", "schedule", "seed"]).sort_index()
    expected = {  # of GAP, LRnorm, digits_net the last epochs are 0.8 and 0.7, of MobileNetV2 0.5 and 0.5
        ("digits_net", "gap", "sgd", "norm"): [(3, False), (4, False)],
        ("digits_net", "gap", "sgd", "fast"): [(3, True), (3, True)],
        ("digits_net", "gcp", "sgd", "norm"): [(2, False), (2, False)],
        ("digits_net", "gcp", "sgd", "fast"): [(2, False), (3, True)],
        ("mobilenet_v2", "gcp", "sgd", "fast"): [(1, False), (2, True)],
    }
    for place, seeds in expected.items():
        found = table.loc[place]
        assert [(value, censored) for value, censored in zip(found.value, found.censored, strict=True)] == seeds
        assert found.seconds.tolist() == pytest.approx([math.nan if c else 2.0 * e for e, c in seeds], nan_ok=True)
    judged = {case.claim.name: case.estimate for case in judged_curves()}
    norm = judged["matching epoch: gcp, LRnorm"]
    assert norm is not None
    assert norm.value == pytest.approx(0.5)  # epoch 2 of 4, both seeds
    fast = judged["matching epoch: gcp, LRfast"]
    assert fast is not None
    assert (fast.censored, fast.has_interval) == (2, False)


def test_the_table_and_the_page() -> None:
    records = made_up(CURVES)
    table = summary(records)
    row = table[(table["head"] == "GCP (5-step root)") & (table.schedule == "LRfast") & (table.network == "digits net")]
    sgd, kfac = row.to_dict("records")
    assert kfac["optimiser"] == "K-FAC"
    assert (sgd["optimiser"], sgd["epochs"], sgd["seeds"], sgd["never"]) == ("SGD", 2, 2, "1 of 2")
    assert (sgd["top-1 [%]"], sgd["± seeds"]) == (77.5, 17.6777)  # of 90 and 65
    assert sgd["top-5 [%]"] == sgd["best top-5"] == 88.75
    assert (sgd["matching epoch"], sgd["seconds to it"]) == ("never", "never")  # the median of 2 and never
    assert (kfac["top-1 [%]"], kfac["matching epoch"], kfac["seconds to it"]) == (100, "1", "2")
    gap = table[(table["head"] == "GAP") & (table.schedule == "LRnorm")].iloc[0]
    assert (gap["top-1 [%]"], gap["best top-1"]) == (75.0, 80.0)  # the best are 90 and 70
    assert (gap["matching epoch"], gap["seconds to it"], gap.never) == ("3.5", "7", "0 of 2")
    training = {"network": "digits_net", "dataset": "digits", "epochs": 4, "batch_size": 2, "learning_rate": 0.1}
    training |= {"schedule": "", "train_limit": None}  # that of the family is told
    settings = {"training": training, "networks": ["mobilenet_v2"], "network_limit": 500, "kfac": "kfac_adam"}
    (fold,) = folds(Results(records, Origins("convergence", settings), judged_curves()))
    assert fold.number == 7
    assert fold.sentences[0].endswith("under LRnorm in 2 of 2, under LRfast in 2 of 4 trainings.")
    assert {picture.name for picture in fold.pictures} == {
        "convergence_digits_net", "convergence_mobilenet_v2", "convergence_kfac"}  # fmt: skip
    assert "ends +10.0 to +10.0 points" in fold.pictures[-1].caption
    shown = [case.claim.name for case in (*fold.controls, *fold.exploratory)]
    assert "matching epoch: gcp, LRnorm" in shown
    assert "matching epoch: gcp, LRfast" not in shown  # censored in two seeds
    assert "final top-1: covariance, LRfast - gap, LRnorm" not in shown  # not measured
    assert "learning rate 0.1 (resnet_norm); three schedules" in fold.method[0]
    assert "Other networks (500 images)" in fold.method[0]
    assert any("chosen on the test images" in words for words in fold.method)
    accuracy, costs, published = (part.data for part in fold.tables)
    assert len(accuracy) == len(costs) + 2 == 8
    assert costs[PARAMETERS].eq(2_000_000).all()
    assert published.shape == (6, 6)


# ------------------------------------------------------------------------------------------ measured


def test_costs_of_a_network_are_those_by_hand() -> None:
    values = {}
    for head in ("gap", "gcp"):
        run = Training("digits_tiny").run(Common(threads=1), head, 0, batch_size=16)
        rows = measure_costs({"run": run.to_dict(), "classes": 10, "device": "cpu"})
        values[head] = {row["quantity"]: row["value"] for row in rows}
    assert values["gap"][PARAMETERS] == 608 + 70
    convolutions = 2 * 9 * 64 * (1 * 4 + 4 * 6 + 6 * 6)
    assert values["gap"][FLOPS] == convolutions + 2 * 6 * 10
    assert values["gcp"][PARAMETERS] == 608 + 220
    covariance, root, classifier = 2 * 6 * 64 * 6, 15 * 2 * 6**3, 2 * 21 * 10
    assert values["gcp"][FLOPS] == convolutions + covariance + root + classifier
    activations = 16 * 64 * 4 * (4 + 6 + 6)  # bytes of the convolutions' outputs, kept for the backward pass
    for found in values.values():
        assert activations / 2**20 < found[PEAK] < 10 * activations / 2**20


@undrawn_figures()
def test_the_study_end_to_end(tmp_path: Path) -> None:
    flags = ["--seeds", "1", "--heads", "gap", "gcp", "--adju-seeds", "0", "--out", str(tmp_path)]
    assert main([*SMOKE, *flags]) == 0
    records = read_records(tmp_path, "convergence")[0]
    ends = final(records).set_index(["head", "optimizer", "schedule"]).value
    assert set(ends.index) == {(h, o, s) for h in ("gap", "gcp") for o in ("sgd", "kfac") for s in ("norm", "fast")}
    epochs = records[records.quantity == "test_top1"].groupby(["schedule", "optimizer", "head"])["index"].max()
    assert epochs.groupby("schedule").unique().map(list).to_dict() == {"resnet_fast": [2], "resnet_norm": [3]}
    table = pd.read_csv(tmp_path / "convergence_accuracy.csv")
    row = table[(table["head"] == "GAP") & (table.schedule == "LRfast") & (table.optimiser == "SGD")].iloc[0]
    assert row["top-1 [%]"] == pytest.approx(100 * ends["gap", "sgd", "fast"], rel=1e-5)
    assert "converges under rapid decay" in (tmp_path / "index.html").read_text()
