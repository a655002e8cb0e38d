"""The curvature study: what it measures of a network, its runs, and its resumption."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from undrawn_figures import undrawn_figures

from secondorder.networks import network
from studies.__main__ import main
from studies.curvature import study as curvature
from studies.curvature.measures import Limits, block_names, measure
from studies.curvature.settings import PRESETS, Scale
from studies.frozen_statistics import frozen_at
from studies.settings import Common

SMOKE = ["curvature", "--preset", "smoke", "--no-progress", "--threads", "1"]
SMALLEST = [*SMOKE, "--seeds", "1", "--small.images", "4", "--limits.whole", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study, to be read or copied."""
    folder = tmp_path_factory.mktemp("finished")
    with undrawn_figures():
        assert main([*SMALLEST, "--out", str(folder)]) == 0
    return folder


def rows_of(model: nn.Module, limits: Limits, **options: object) -> pd.Series:
    images, labels = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    rows = pd.DataFrame(measure(model, images, labels, limits, **options))  # type: ignore[arg-type]
    return rows[rows.measure != "eigenvalue"].set_index(["block", "matrix", "measure"]).value


@pytest.mark.parametrize("pooling", ["gap", "gcp"])
def test_measures_against_torch_func(pooling: str) -> None:
    model = network("digits_tiny", pooling, 10, 1)
    images, labels = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    rows = pd.DataFrame(measure(model, images, labels, Limits()))
    found = rows[rows.measure != "eigenvalue"].set_index(["block", "matrix", "measure"]).value
    frozen = frozen_at(model, images, torch.float64).requires_grad_(False)
    named = dict(frozen.named_parameters())

    def logits(weight: torch.Tensor) -> torch.Tensor:
        return functional_call(frozen, {"features.3.weight": weight}, (images.double(),))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits(weight), labels)

    weight = named["features.3.weight"].detach()
    size = weight.numel()
    H = hessian(loss)(weight).reshape(size, size)
    J = torch.func.jacrev(logits)(weight).reshape(-1, size)
    p = logits(weight).detach().softmax(1)
    middle = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / len(p)
    G = J.mT @ middle @ J
    for name, matrix in (("GGN", G), ("Hessian", H)):
        values = torch.linalg.eigvalsh(matrix)
        top = values.abs().max()
        kept = values.abs()[values.abs() > 1e-5 * top]
        assert found["last", name, "largest"] == pytest.approx(float(values[-1]), rel=1e-9)
        assert found["last", name, "trace"] == pytest.approx(float(matrix.trace()), rel=1e-9)
        assert found["last", name, "condition"] == pytest.approx(float(top / kept.min()), rel=1e-5)
        listed = rows[(rows.block == "last") & (rows.matrix == name) & (rows.measure == "eigenvalue")]
        assert len(listed) > 20
        for rank, value in zip(listed["rank"], listed.value, strict=True):
            assert value == pytest.approx(float(values.flip(0)[rank - 1]), rel=1e-5, abs=1e-12)
    possible = min(size, 6 * 9)  # six images, ten classes
    spectrum = torch.linalg.eigvalsh(G).flip(0)
    half = float(spectrum[0] / spectrum[possible // 2 - 1])
    assert found["last", "GGN", "half_rank_condition"] == pytest.approx(half, rel=1e-6)
    assert found["last", "GGN", "largest_to_mean"] == pytest.approx(float(spectrum[0] * possible / G.trace()), rel=1e-9)
    difference = float((H - G).norm() / H.norm())
    assert found["last", "GGN to Hessian", "relative_difference"] == pytest.approx(difference, rel=1e-7, abs=1e-12)
    assert (difference < 1e-12) is (pooling == "gap")  # ReLU and a linear head: one layer's Hessian is its GGN
    kfac = found["last", "K-FAC (expand)", "cosine"]
    assert 0.1 < kfac < found["last", "EKFAC", "cosine"] + 1e-9
    assert model.training


def test_a_network_above_the_limit_of_the_whole_has_its_blocks_measured() -> None:
    model, images = network("digits_tiny", "gap", 10, 1), torch.randn(6, 1, 8, 8)
    rows = pd.DataFrame(measure(model, images, torch.arange(6), Limits(whole=0, probes=2, steps=4)))
    assert "whole" not in set(rows.block)
    assert set(rows[rows.matrix == "Hessian"].block) <= set(rows[rows.matrix == "GGN"].block)
    assert (rows.matrix == "GGN to Hessian").any()


def test_blocks_of_a_larger_network_are_those_of_a_dense_one() -> None:
    model = network("digits_tiny", "gcp", 10, 1)
    torch.manual_seed(1)
    small = rows_of(model, Limits())
    torch.manual_seed(1)
    large = rows_of(model, Limits(whole=0, dense=0, probes=10))
    assert "whole" in small.index.get_level_values("block")
    assert "whole" not in large.index.get_level_values("block")
    for block in ("first", "middle", "last", "classifier"):
        for measured in ("largest", "trace", "condition"):
            assert large[block, "GGN", measured] == pytest.approx(small[block, "GGN", measured], rel=1e-6)
        for matrix in ("K-FAC (expand)", "K-FAC (reduce)", "EKFAC", "diagonal"):
            assert large[block, matrix, "cosine"] == pytest.approx(small[block, matrix, "cosine"], rel=1e-8)


def test_the_hessian_may_be_left_out() -> None:
    found = rows_of(network("digits_tiny", "gap", 10, 1), Limits(), hessian=False)
    assert not {"Hessian", "GGN to Hessian"} & set(found.index.get_level_values("matrix"))
    assert "GGN" in found.index.get_level_values("matrix")


@pytest.mark.parametrize(
    ("backbone", "reduced", "first", "middle", "last"),
    [
        ("digits_tiny", 0, "stem.0", "features.0", "features.3"),
        ("cifar_resnet8", 0, "stem.0", "features.stage2.0.conv1", "features.stage3.0.conv2"),
        ("cifar_resnet20", 0, "stem.0", "features.stage2.1.conv1", "features.stage3.2.conv2"),
        ("resnet18", 64, "stem.conv1", "features.layer3.0.conv1", "head.reduction.0"),
        ("mobilenet_v2", 64, "stem.0.0", "features.10.conv.0.0", "head.reduction.0"),
        ("shufflenet_v2_x0_5", 64, "stem.conv1.0", "features.stage3.4.branch2.0", "head.reduction.0"),
    ],
)
def test_blocks_are_chosen_by_depth(backbone: str, reduced: int, first: str, middle: str, last: str) -> None:
    for pooling in ("gap", "gcp"):
        with torch.device("meta"):
            names = block_names(network(backbone, pooling, 10, reduced_channels=reduced), 300_000)
        assert [names[role] for role in ("first", "middle", "last")] == [f"{n}.weight" for n in (first, middle, last)]
        assert names["classifier"] == (
            "classifier.linear.weight" if backbone == "mobilenet_v2" else "classifier.weight"
        )


def test_a_large_convolution_is_replaced_by_the_nearest_small_one() -> None:
    with torch.device("meta"):
        names = block_names(network("cifar_resnet8", "gap", 10), 20_000)
    assert names["last"] == "features.stage3.0.conv1.weight"  # conv2 has 36,864 weights, conv1 18,432


def test_phases_and_shared_backbones(finished: Path) -> None:
    table = pd.read_csv(finished / "curvature.csv")
    assert set(table.phase) == {"initial", "trained", "shared: gap"}
    assert set(table[table.phase == "shared: gap"].pooling) == {"gap", "gcp"}
    assert set(table[table.phase == "initial"].step) == {0}
    assert set(table[table.phase == "trained"].step) == {3}
    assert table.value.notna().all()
    spectra = pd.read_csv(finished / "curvature_spectra.csv")
    assert (spectra[spectra.matrix == "GGN"].value > 0).all()


def test_moments_are_equally_spaced() -> None:
    settings = dataclasses.replace(PRESETS["smoke"], small=Scale(images=4, epochs=5, measurements=4, train_limit=192))
    common = Common(preset="smoke", seeds=1, threads=1)
    data = curvature.check(common, settings)
    run = curvature.runs(common, settings)[0]
    own = curvature.observer(run, settings, data["digits_tiny"])  # 15 steps
    assert [step for step in range(15) if step % own.every == 0] == [0, 5, 10]


@undrawn_figures()
def test_a_killed_study_resumes_to_the_same_table(finished: Path, tmp_path: Path, killed: Callable[..., None]) -> None:
    flags = [*SMALLEST, "--out", str(tmp_path)]
    killed(lambda: bool(list(tmp_path.glob("runs/curvature/*/trained.json"))), flags)
    assert not (tmp_path / "curvature.csv").exists()
    assert main([*flags, "--resume"]) == 0
    for name in ("curvature.csv", "curvature_spectra.csv", "curvature_summary.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_damaged_measurement_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALLEST, "--out", str(tmp_path)]
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    file = next(tmp_path.glob("runs/curvature/*/trained.json"))
    file.write_text("[{")
    assert main([*flags, "--resume"]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backbones", "resnet19"], "unknown backbone 'resnet19'"),
        (["--backbones", "digits_tiny", "digits_tiny"], "--backbones digits_tiny digits_tiny: name at least one"),
        (["--small.share", "gpc"], "unknown pooling to share 'gpc'; choose one of: gap"),
        (["--small.images", "5000"], "images 5000: there are only 192 training images"),
        (["--small.images", "1"], "images 1: at least 2"),
        (["--small.measurements", "1"], "measurements 1: at least 2"),
        (["--processes", "0"], "--processes 0: at least 1"),
        (["--limits.threshold", "2"], "threshold 2.0: a share of the largest eigenvalue"),
        (["--limits.probes", "1"], "probes 1: at least 2"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, refused: Callable[..., None]) -> None:
    refused(words, *SMOKE, *arguments)


def test_dry_run_counts_every_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMOKE, "--dry-run", "--limits.dense", "0", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "digits_tiny + gap" in printed
    assert "2 seeds of 2 networks" in printed
    assert not (tmp_path / "none").exists()
