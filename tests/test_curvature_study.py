"""The curvature study: what it measures of a network, its claims on made-up records, its folds, and a smallest run of it all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.func import functional_call

from secondorder.data import load_dataset
from secondorder.networks import network
from secondorder.training import Snapshot
from studies.__main__ import main
from studies.curvature import claims, page
from studies.curvature.claims import ACCURACY, CLAIMS
from studies.curvature.measures import (
    CONDITION,
    EIGENVALUE,
    HEAD,
    HESSIAN,
    KFAC,
    PUT_ON,
    SPREAD,
    SQUARED,
    Limits,
    PutOn,
    drawn,
    measure_blocks,
    measure_hessian,
    measure_put_on,
)
from studies.curvature.study import STUDY, Settings
from studies.engine.records import Origins, frame, read_records
from studies.engine.study import Results
from studies.judge import Claim, judge

ROLES = ("first", "middle", "last")
LIMITS = Limits(images=6, precision="float64")
SMOKE = ["curvature", "--preset", "smoke", "--no-progress", "--threads", "1"]


def at(head: str, seed: int = 0) -> Snapshot:
    """Training of digits_tiny before its first step."""
    torch.manual_seed(seed)
    run = SimpleNamespace(seed=seed, pooling=head, weight_decay=1e-2)
    model = network("digits_tiny", head, 10, 1)
    return cast(Snapshot, SimpleNamespace(run=run, model=model, data=load_dataset("digits", limit=150)))


def values(rows: Any) -> "pd.Series[float]":
    """Of rows of a measurement, by layer, quantity and index."""
    return pd.DataFrame(rows).set_index(["layer", "quantity", "index"]).value.sort_index()


@pytest.mark.parametrize("head", ["gap", "gcp"])
def test_blocks_are_those_of_the_loss_in_training_mode(head: str) -> None:
    snapshot = at(head)
    found = values([*measure_blocks(snapshot, LIMITS), *measure_hessian(snapshot, LIMITS)])
    images, labels = drawn(snapshot, 6)
    name, model = "features.3.weight", snapshot.model.double().requires_grad_(False)
    weight = dict(model.named_parameters())[name].detach().clone()
    rest = {k: v.clone() for k, v in model.state_dict().items() if "num_batches" not in k}

    def logits(w: torch.Tensor) -> torch.Tensor:
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.track_running_stats, part.running_mean, part.running_var = False, None, None
        return functional_call(
            model, {**{k: v for k, v in rest.items() if "running" not in k}, name: w}, (images.double(),)
        )

    def loss(w: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits(w), labels)

    size = weight.numel()
    J = torch.func.jacrev(logits)(weight).reshape(-1, size)
    p = logits(weight).softmax(1)
    middle = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / len(p)
    G = J.mT @ middle @ J
    spectrum = torch.linalg.eigvalsh(G).flip(0)
    assert found["last", CONDITION, -1] == pytest.approx(float(spectrum[0] / spectrum[6 * 9 // 2 - 1]), rel=1e-6)
    assert found["last", SPREAD, -1] == pytest.approx(float(spectrum[0] * 6 * 9 / G.trace()), rel=1e-9)
    for layer, quantity, rank in found.index[found.index.get_level_values("quantity") == EIGENVALUE]:
        assert found[layer, quantity, rank] == pytest.approx(float(spectrum[rank - 1]), rel=1e-5)
    squared = torch.linalg.svdvals(J).square()
    assert found["last", SQUARED, -1] == pytest.approx(float(squared[0] / squared[6 * 10 // 2 - 1]), rel=1e-6)
    H = torch.func.hessian(loss)(weight).reshape(size, size)
    difference = float((H - G).norm() / H.norm())
    assert difference > 0.1  # also under GAP: batch norm makes the loss no linear function of a weight
    assert found["last", HESSIAN, -1] == pytest.approx(difference, rel=0.2)  # eight random vectors
    assert all(0 < found[role, KFAC, -1] < 1 for role in ROLES)
    assert (("", HEAD, -1) in found.index) is (head == "gcp")


def test_a_network_is_measured_without_a_trace() -> None:
    snapshot = at("gcp")
    before = {name: tensor.clone() for name, tensor in snapshot.model.state_dict().items()}
    first, second = list(measure_blocks(snapshot, LIMITS)), list(measure_blocks(snapshot, LIMITS))
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot.model.state_dict().items())
    assert snapshot.model.training


def test_the_precision_of_rows_is_enough() -> None:
    snapshot = at("gcp")
    single, double = (values(measure_blocks(snapshot, Limits(images=6, precision=p))) for p in ("float32", "float64"))
    pd.testing.assert_series_equal(single, double, rtol=1e-3)


def test_images_are_those_of_the_seed() -> None:
    images = [drawn(at(head, seed), 8)[0] for head, seed in (("gap", 0), ("gcp", 0), ("gap", 1))]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert len(drawn(at("gap"), 1000)[0]) == 150


def test_a_head_is_put_on_the_backbone_of_another() -> None:
    snapshot = at("gcp")
    rows = pd.DataFrame(list(measure_put_on(snapshot, PutOn(("gap", "gcp"), LIMITS))))
    assert set(rows["head"]) == {"gap", "gcp"}
    assert set(rows.quantity) == {PUT_ON}
    assert rows.groupby("layer").value.nunique().eq(2).all()
    assert rows.value.gt(1).all()


# ------------------------------------------------------------------------------------------ claims and folds
QUANTITIES = (CONDITION, SPREAD, SQUARED, KFAC)


def records(
    ratio: float = 0.5, *, top1: Mapping[int, float] | None = None, exact: float = 1.0, stated: float = 0.9
) -> pd.DataFrame:
    """Three networks with four seeds whose GCP is `ratio` times its GAP, with little scatter; test accuracy `top1` by seed."""
    found: list[dict[str, Any]] = []
    for place, name in enumerate(("digits_net", "digits_slim", "digits_small")):
        for seed in range(4):
            for head, size in {"gap": 1.0, "gcp": ratio, "gcp_exact": ratio * exact}.items():
                noise = 1 + 0.02 * ((7 * seed + 3 * place + (head == "gcp")) % 5)
                labels = {"network": name, "dataset": "digits", "seed": seed, "head": head}
                rows: list[dict[str, Any]] = [
                    {"layer": layer, "quantity": quantity, "value": 100 * size * noise}
                    for layer in ROLES
                    for quantity in QUANTITIES
                ]
                rows += [{"layer": "last", "quantity": EIGENVALUE, "index": k, "value": 1 / k} for k in (1, 2, 5)]
                rows += [{"quantity": HEAD, "value": 2.0 if head == "gcp_exact" else 200.0}] * (head != "gap")
                rows += [{"quantity": ACCURACY, "value": stated}, {"quantity": "test_top1", "index": 1, "value": 0.1}]
                rows += [{"quantity": "test_top1", "index": 2, "value": (top1 or {}).get(seed, 0.95)}]
                found += [labels | {"trained_under": head, "step": 9} | row for row in rows]
                rows = [{"layer": "last", "quantity": quantity, "value": 2 * size} for quantity in (CONDITION, HESSIAN)]
                found += [labels | row for row in rows]
                if head != "gcp_exact":
                    row = {"layer": "last", "quantity": PUT_ON, "value": 3 * size}
                    found.append(labels | {"trained_under": "gap", "step": 9} | row)
    return frame("curvature", found, {}, "fake")


def results(table: pd.DataFrame, of: Sequence[Claim] = CLAIMS, **changes: Any) -> Results:
    origins = Origins("curvature", asdict(Settings(**changes)) | {"preset": "quick"}, {"label": "Digits (8x8)"})
    return Results(table, origins, judge(of, table))


@pytest.mark.parametrize(
    ("ratio", "outcome"), [(0.5, "supported"), (2.0, "contradicted"), (1.0, "no effect"), (0.8, "undecided")]
)
def test_the_claim_follows_the_numbers(ratio: float, outcome: str) -> None:
    case = judge(CLAIMS[:1], records(ratio))[0]
    assert case.claim.primary == 4
    assert case.outcome == outcome
    assert case.estimate is not None
    assert (case.estimate.networks, case.estimate.n) == (3, 4)
    assert case.estimate.value == pytest.approx(ratio, rel=0.05)


def test_networks_below_the_stated_accuracy_are_left_out_and_counted() -> None:
    table = records(top1={0: 0.89})
    case = judge(CLAIMS[:1], table)[0]
    assert case.estimate is not None
    assert (case.estimate.n, case.estimate.left_out) == (3, 3)  # of each of three networks a seed
    assert 0 not in set(case.estimate.by_seed.seed)
    assert "digits net 9 of 12" in next(page.reached(results(table)))
    none = judge(CLAIMS[:1], records(top1=dict.fromkeys(range(4), 0.5)))[0]
    assert (none.outcome, none.estimate) == ("not measured", None)
    assert "no network was trained to the stated accuracy" in none.sentence


@pytest.mark.parametrize("value", [np.inf, np.nan, 0.0])
def test_a_condition_that_is_no_positive_number_is_left_out(value: float) -> None:
    table = records()
    here = (table.quantity == CONDITION) & (table.seed == 1) & (table.layer == "last") & (table.network == "digits_net")
    table.loc[here & (table.trained_under == "gcp"), "value"] = value
    case = judge(CLAIMS[:1], table)[0]
    assert case.estimate is not None
    assert case.estimate.left_out == 1


def test_values_are_of_the_weights_that_they_say() -> None:
    table = records(1.0)
    means = {name: found(table).value.mean() for name, found in claims.WEIGHTS.items()}
    assert means["after training"] == pytest.approx(104, rel=0.05)
    assert means["initial weights"] == pytest.approx(2)
    assert means["backbone trained under GAP"] == pytest.approx(3)
    assert np.isnan(means["backbone trained under GCP"])


@pytest.mark.parametrize(
    ("exact", "words"),
    [
        (1.0, "the blocks do not follow"),
        (0.5, "the blocks gain less than the head"),
        (0.001, "the blocks gain more than the head"),
        (0.0101, "whether the blocks follow is not decided"),
    ],
)
def test_the_exact_root_is_compared_with_what_it_does_to_the_head(exact: float, words: str) -> None:
    sentence = next(page.exact_root(results(records(exact=exact), [claims.EXACT])))
    assert "100 times better" in sentence
    assert words in sentence


def test_folds_show_every_network_and_every_kind_of_weights() -> None:
    claim, agreement = page.folds(results(records()))
    assert [picture.name for picture in claim.pictures] == ["curvature_4", "curvature_spectra"]
    assert claim.pictures[0].caption.startswith("The GGN blocks of the weights below GCP are better conditioned")
    table = claim.tables[0].data
    assert list(table.network.unique()) == ["digits net", "digits slim", "digits small"]
    assert set(table.weights) == set(claims.WEIGHTS) - {"backbone trained under GCP"}
    assert "K-FAC" in agreement.sentences[0]
    words = " ".join([*claim.sentences, *claim.method, *agreement.sentences])
    assert len(words.split()) < 350


def test_folds_of_few_records() -> None:
    table = records()
    for part in (table[table["head"] == "gcp"], table[table.quantity.isin((ACCURACY, "test_top1"))]):
        claim, _ = page.folds(results(part, put_on=()))
        assert claim.judged[0].outcome == "not measured"


# ----------------------------------------------------------------------------------------------- the study
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study, to be read."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([*SMOKE, "--processes", "1", "--out", str(folder)]) == 0
    return folder


def test_a_smallest_study_measures_all_that_it_says(finished: Path) -> None:
    table, origins = read_records(finished, "curvature")
    explored = table[table.network == "digits_tiny"]
    assert set(explored["head"]) == {"gap", "gcp", "gcp_exact"}
    assert set(table[table.network == "digits_small"]["head"]) == {"gap", "gcp"}
    assert set(table[table.quantity == CONDITION].step) == {0, 3}
    put = table[table.quantity == PUT_ON]
    assert set(zip(put.trained_under, put["head"], strict=True)) == {
        (a, b) for a in ("gap", "gcp") for b in ("gap", "gcp")
    }
    assert set(put.seed) == set(table[table.quantity == HESSIAN].seed) == {0}
    assert table.value.notna().all()
    assert len(origins.trainings) == 2 * (3 + 2)
    report = (finished / "report.md").read_text()
    assert "## 4 · better conditioned weights" in report
    assert "could not be reported" not in report


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--networks", "resnet19"], "unknown network 'resnet19'"),
        (["--networks", "digits_tiny"], "--networks digits_tiny digits_tiny: name at least one, each once"),
        (["--heads", "gpc"], "unknown pooling 'gpc'"),
        (["--put-on", "gpc"], "unknown pooling to put on 'gpc'; choose one of: gap"),
        (["--accuracy", "90"], "accuracy 90: a fraction of the test images"),
        (["--explored-seeds", "-1"], "--explored-seeds -1: at least 0"),
        (["--limits.images", "1"], "images 1: at least 2"),
        (["--limits.probes", "1"], "probes 1: at least 2"),
        (["--weight-decay", "0"], "weight_decay 0.0: a shared backbone needs a positive one"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, refused: Callable[..., None]) -> None:
    refused(words, *SMOKE, *arguments)


def test_presets_are_of_networks_that_are_known() -> None:
    assert {preset: len(settings.networks) + 1 for preset, settings in STUDY.presets.items()}["quick"] == 3
    assert STUDY.presets.keys() == STUDY.seeds.keys()


def test_dry_run_counts_every_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMOKE, "--heads", "gcp_exact", "--dry-run", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "digits_tiny + gcp_exact" in printed
    assert "2 seeds of 3 networks" in printed
    assert not (tmp_path / "none").exists()


def test_every_comparison_has_the_margin_of_the_claim() -> None:
    assert {claim.compare.zone for claim in STUDY.claims} == {(0.8, 1.2)}
