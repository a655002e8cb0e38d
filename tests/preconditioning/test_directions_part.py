"""Two heads on one backbone: the rows are the angles that they say, and the verdicts follow the rows."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.data import load_dataset
from secondorder.kfac import Damping, Fisher, KFACPreconditioner
from secondorder.networks import network
from studies.preconditioning.directions import figures, reading, section
from studies.preconditioning.directions.measure import ALL, NATURAL, WHOLE, every_head, measure
from studies.preconditioning.settings import PRESETS, Settings
from studies.preconditioning.situation import Situation

LAYERS = ["stem.0", "features.0", "features.3"]
HEADS = ["covariance", "gcp", "random", "permuted"]
SETTINGS = dataclasses.replace(PRESETS["smoke"], backbone="digits_tiny", gradient_batches=3, dampings=(0.01, 1.0))


def situation(seed: int = 0, settings: Settings = SETTINGS) -> Situation:
    torch.manual_seed(seed)
    data = load_dataset("digits", limit=256)
    return Situation(network("digits_tiny", "gap", 10, 1, reduced_channels=0), data, settings, seed)


@pytest.fixture(scope="module")
def measured() -> tuple[Situation, pd.DataFrame]:
    torch.manual_seed(0)
    one = situation()
    return one, pd.DataFrame(measure(one))


def value(table: pd.DataFrame, layer: str, head: str, setting: object, name: str, batch: int) -> float:
    at = (table.layer == layer) & (table["head"] == head) & (table.setting == str(setting)) & (table.measure == name)
    [found] = table[at & (table.batch == batch)].value
    return float(found)


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    weights = [model.get_parameter(f"{layer}.weight") for layer in LAYERS]
    return dict(zip(LAYERS, torch.autograd.grad(F.cross_entropy(model(images), labels), weights), strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


# ----------------------------------------------------------------------------------------------------------- measurement


def test_rows(measured: tuple[Situation, pd.DataFrame]) -> None:
    _, table = measured
    angles = table[~table.measure.str.startswith("cg_")]
    settings = ["0.01", "1.0", NATURAL]
    batches = {s: [WHOLE] if s == NATURAL else [0, 1, 2, WHOLE] for s in settings}
    expected = {(layer, h, "", "plain", b) for layer in [*LAYERS, ALL] for h in HEADS for b in [0, 1, 2, WHOLE]}
    for layer, s in itertools.product([*LAYERS, ALL], settings):
        expected |= {(layer, "gap", s, "turn", b) for b in batches[s]}
        expected |= {(layer, h, s, m, b) for h in HEADS for m in ("preconditioned", "partial") for b in batches[s]}
    found = list(angles[["layer", "head", "setting", "measure", "batch"]].itertuples(index=False, name=None))
    assert set(found) == expected
    assert len(found) == len(expected)
    assert angles.value.abs().max() <= 1
    assert list(angles.layer.unique()) == [*LAYERS, ALL]
    assert set(table.part) == {"directions"}


def test_cosines_are_those_of_autograd_and_of_the_optimiser(measured: tuple[Situation, pd.DataFrame]) -> None:
    one, table = measured
    images, labels = one.mini_batches()[1]
    gap = one.training_heads["gap"]
    g_gap = gradient(gap, images, labels)
    optimised = one.with_head("gap").train()
    pre = KFACPreconditioner(optimised, damping=Damping(0.01), fisher=Fisher("exact"))
    pre.update_curvature(optimised(one.reference[0]))
    for name, p in optimised.named_parameters():
        p.grad = g_gap.get(name.removesuffix(".weight"), torch.zeros_like(p)).clone()
    pre.gathering.check = None  # these are gradients of other images than the factors
    pre.step()
    for head in ("covariance", "gcp"):
        g = gradient(one.training_heads[head], images, labels)
        for layer in LAYERS:
            P_g = optimised.get_parameter(f"{layer}.weight").grad
            cos = {"plain": cosine(g[layer], g_gap[layer]), "preconditioned": cosine(g[layer], P_g)}
            assert value(table, layer, head, "", "plain", 1) == pytest.approx(cos["plain"], abs=1e-3)
            assert value(table, layer, head, 0.01, "preconditioned", 1) == pytest.approx(
                cos["preconditioned"], abs=1e-3
            )
            turn = cosine(g_gap[layer], P_g)
            assert value(table, layer, "gap", 0.01, "turn", 1) == pytest.approx(turn, abs=1e-3)
            partial = (cos["preconditioned"] - cos["plain"] * turn) / np.sqrt((1 - cos["plain"] ** 2) * (1 - turn**2))
            assert value(table, layer, head, 0.01, "partial", 1) == pytest.approx(partial, abs=2e-3)


def test_all_is_the_angle_of_all_layers_and_whole_that_of_the_reference_images(
    measured: tuple[Situation, pd.DataFrame],
) -> None:
    one, table = measured
    for batch, (images, labels) in ((2, one.mini_batches()[2]), (WHOLE, one.reference)):
        found = (gradient(one.training_heads[h], images, labels).values() for h in ("gap", "gcp"))
        pair = [torch.cat([t.flatten() for t in each]) for each in found]
        assert value(table, ALL, "gcp", "", "plain", batch) == pytest.approx(cosine(*pair), abs=1e-3)


def test_controls_are_what_they_say(measured: tuple[Situation, pd.DataFrame]) -> None:
    one, table = measured
    heads = every_head(one)
    again = every_head(one)
    true = one.data.train.labels
    for head in HEADS[:3]:
        assert torch.equal(heads[head].labels, true)
    permuted = heads["permuted"]
    assert torch.equal(permuted.labels.sort().values, true.sort().values)
    assert float((permuted.labels == true).double().mean()) < 0.3
    assert torch.equal(permuted.labels, again["permuted"].labels)
    images = one.data.train.plain(range(len(true)))[0]
    accuracies = [
        float((heads[h].network.eval()(images).argmax(1) == heads[h].labels).double().mean()) for h in ("gcp", "random")
    ]
    assert accuracies[0] > 0.6 > 0.35 > accuracies[1]
    fitted, random = heads["gcp"].network.classifier, heads["random"].network.classifier
    torch.testing.assert_close(random.weight.norm(), fitted.weight.norm())
    assert abs(cosine(random.weight, fitted.weight)) < 0.3
    assert not random.bias.any()
    assert torch.equal(random.weight, again["random"].network.classifier.weight)
    # gradients of the permuted head are taken with the permuted labels of the very images
    indices, (images, _) = one.mini_batch_indices()[0], one.mini_batches()[0]
    assert permuted.network.training
    g = gradient(permuted.network, images.float(), permuted.labels[indices])
    g_gap = gradient(one.training_heads["gap"], images, true[indices])
    assert value(table, "stem.0", "permuted", "", "plain", 0) == pytest.approx(
        cosine(g["stem.0"].double(), g_gap["stem.0"]), abs=1e-3
    )


def test_mini_batches_are_those_of_the_indices() -> None:
    one = situation(seed=5)
    for indices, (images, labels) in zip(one.mini_batch_indices(), one.mini_batches(), strict=True):
        assert len(indices.unique()) == SETTINGS.gradient_batch_size
        assert torch.equal(labels, one.data.train.labels[indices])
        assert torch.equal(images.float(), one.data.train.plain(indices)[0])
    assert not torch.equal(indices, situation(seed=6).mini_batch_indices()[-1])


def test_natural_gradient_is_solved_or_left_out(measured: tuple[Situation, pd.DataFrame]) -> None:
    _, table = measured
    residuals = table[table.measure == "cg_residual"]
    assert list(residuals.batch) == [WHOLE]
    assert residuals.value.max() <= 1e-3
    assert list(table[table.measure == "cg_converged"].value) == [1.0]
    assert (table[table.measure == "cg_iterations"].value >= 1).all()
    plain = dataclasses.replace(SETTINGS, natural_gradient=False, dampings=(0.1,))
    assert NATURAL not in set(pd.DataFrame(measure(situation(settings=plain))).setting)


def test_layer_without_gradient_has_no_row() -> None:
    one = situation(settings=dataclasses.replace(SETTINGS, dampings=(0.1,)))
    with torch.no_grad():
        one.backbone.features[0].weight.zero_()
        one.backbone.features[1].weight.zero_()
        one.backbone.features[1].bias.fill_(-1.0)  # dead units: nothing reaches the stem
    table = pd.DataFrame(measure(one))
    assert "stem.0" not in set(table.layer)
    assert "features.0" not in set(table.layer)
    assert np.isfinite(table.value).all()


# --------------------------------------------------------------------------------------------------------------- section


def made(
    gain: float,
    partial: float,
    control: float,
    seeds: int = 3,
    dampings: tuple[str, ...] = ("0.01", "1.0"),
    natural: bool = True,
) -> pd.DataFrame:
    """Rows in which every cosine moves by `gain`, with these partial correlations of GCP and of the controls."""
    random = np.random.default_rng(0)
    rows = []
    settings = ["", *dampings, *([NATURAL] if natural else [])]
    for backbone, seed, layer, batch, setting in itertools.product(
        ("untrained", "gap", "gcp"), range(seeds), ["stem.0", "features.0", ALL], [0, 1, WHOLE], settings
    ):
        for head in ("gap", *HEADS):
            values = {"plain": 0.5} if setting == "" else {"preconditioned": 0.5 + gain}
            if setting:
                values["partial"] = partial if head == "gcp" else control
            if head == "gap":
                values = {"turn": 0.6} if setting else {}
            for name, one in values.items():
                noisy = one + (0.001 * random.standard_normal() if layer != ALL else 7.0)
                rows.append(
                    {"backbone": backbone, "seed": seed, "step": 5, "moment": 1.0, "part": "directions", "layer": layer,
                     "head": head, "setting": setting, "measure": name, "batch": batch, "value": noisy}
                )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time goes into figures."""
    for name in ("by_layer", "sweep"):
        monkeypatch.setattr(figures, name, lambda found: Figure())


def verdicts(found: section.Part) -> dict[str, set[str]]:
    """By kind of claim."""
    kinds = {
        "gain": "gain in cosine",
        "partial": "partial correlation, gradient",
        "control": "partial correlation, GCP −",
    }
    return {kind: {c.verdict for c in found.claims if c.quantity.startswith(start)} for kind, start in kinds.items()}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.2, 0.3, 0.1), ("supported", "supported", "supported")),
        ((-0.2, -0.3, 0.1), ("not supported", "not supported", "not supported")),
        ((-0.2, 0.3, 0.5), ("not supported", "supported", "not supported")),
        ((0.0, 0.0, 0.0), ("undecided", "undecided", "undecided")),
    ],
)
def test_verdicts_follow_the_numbers(numbers: tuple[float, float, float], words: tuple[str, str, str]) -> None:
    found = section.part(made(*numbers))
    for kind, word in zip(("gain", "partial", "control"), words, strict=True):
        assert word in verdicts(found)[kind]
        if word != "undecided":
            assert verdicts(found)[kind] == {word}
    assert all(claim.meaning and claim.group == section.GROUP and claim.claimed == "above" for claim in found.claims)
    assert len(found.claims) >= 3 * (2 * 2 + 3)


@pytest.mark.usefixtures("undrawn")
def test_values_are_means_over_layers_of_the_reference_gradient_or_of_batches() -> None:
    found = section.part(made(0.2, 0.3, 0.1))
    gains = [c for c in found.claims if c.quantity.startswith("gain") and "damping 0.01" in c.quantity]
    assert [round(c.interval.estimate, 2) for c in gains] == [0.2] * len(gains)
    assert all(c.interval.n == 3 for c in gains)
    table = made(0.2, 0.3, 0.1)
    table.loc[table.batch == WHOLE, "value"] = 0.75
    readings = reading.Readings(table)
    assert set(readings.rows("gap", "partial", "gcp", 0.01).batch) == {0, 1}
    assert readings.average("gap", "partial", "gcp", 0.01, batches=True) == pytest.approx(0.3, abs=0.01)
    assert readings.average("gap", "partial", "gcp", 0.01) == 0.75


@pytest.mark.usefixtures("undrawn")
def test_best_damping_is_chosen_for_the_claim_and_said() -> None:
    table = made(-0.2, -0.1, 0.0, natural=False)
    better = (table.setting == "1.0") & (table.measure == "preconditioned") & (table["head"] == "gcp")
    table.loc[better, "value"] += 0.5
    found = section.part(table)
    gains = [c for c in found.claims if c.quantity.startswith("gain")]
    assert [c.verdict for c in gains] == ["not supported", "supported", "not supported"] * 3
    assert "default damping 0.01" in gains[0].quantity
    assert "damping 1, the best of 2, which is generous to the claim" in gains[1].quantity
    assert "damping 1)" in found.pictures[1].caption


@pytest.mark.usefixtures("undrawn")
def test_less_unlike_than_a_control_is_no_likeness() -> None:
    found = section.part(made(-0.2, -0.1, -0.3))
    controls = [c for c in found.claims if c.quantity.startswith("partial correlation, GCP −")]
    assert {c.verdict for c in controls} == {"supported"}
    assert {c.meaning for c in controls} == {section.NO_LIKENESS}


@pytest.mark.parametrize(
    "options", [{"seeds": 1}, {"natural": False}, {"dampings": ("0.5",)}, {"dampings": ("10.0", "0.001")}]
)
def test_smaller_tables(options: dict) -> None:
    found = section.part(made(0.2, 0.3, 0.1, **options))
    if options.get("seeds") == 1:
        assert {c.verdict for c in found.claims} == {"undecided"}
    assert not found.tables[0].data.drop(columns="partial, GCP, mini-batches", errors="ignore").isna().any(axis=None)
    assert not any("nan" in picture.caption for picture in found.pictures)
    if options.get("seeds") == 1:
        for picture in found.pictures:
            FigureCanvasAgg(picture.figure).draw()


@pytest.mark.usefixtures("undrawn")
def test_without_controls_or_rows() -> None:
    table = made(0.2, 0.3, 0.1)
    only = section.part(table[table["head"].isin(["gap", "gcp"]) & (table.backbone == "gap")])
    assert {c.quantity.split(",")[0] for c in only.claims} == {"gain in cosine", "partial correlation"}
    for empty in (table[:0], table[table.measure == "plain"]):
        found = section.part(empty)
        assert not found.claims
        assert not found.pictures
        assert "nothing was measured" in found.remarks[0]


def test_from_rows_to_report_by_way_of_csv(measured: tuple[Situation, pd.DataFrame], tmp_path: Path) -> None:
    _, rows = measured
    both = [rows.assign(backbone=b, seed=s, step=0, moment=0.0) for b in ("untrained", "gap") for s in (0, 1)]
    pd.concat(both).to_csv(tmp_path / "rows.csv", index=False)
    found = section.part(pd.read_csv(tmp_path / "rows.csv").fillna({"setting": ""}))
    assert "4 systems" in found.remarks[1]
    first = found.pictures[0].figure
    FigureCanvasAgg(first).draw()
    assert [text.get_text() for text in first.axes[-1].get_xticklabels()] == LAYERS
    lines = {line.get_label() for line in first.axes[2].lines}
    assert set(figures.HEADS.values()) <= lines
