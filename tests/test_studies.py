"""The command line and the studies end to end, at their smallest preset."""

import dataclasses
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from undrawn_figures import undrawn_figures

from secondorder.training import train
from studies.__main__ import main
from studies.command_line import parse
from studies.dry_run import fake_data
from studies.landscape import study as landscape
from studies.performance import study as performance
from studies.settings import PRESETS, Common
from studies.study import STUDIES

SMOKE = ["--preset", "smoke", "--no-progress", "--threads", "1"]
ONE_RUN = ["landscape", *SMOKE, "--poolings", "gap", "--seeds", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with undrawn_figures():
        assert main([*ONE_RUN, "--out", str(folder)]) == 0
    return folder


def test_processes_side_by_side_find_what_one_finds(tmp_path: Path) -> None:
    few = ["--seeds", "1", "--arms", "sgd", "kfac", "--dampings", "1", "--trials", "1", "--autoencoder.updates", "5"]
    tables = ["optimisers", "optimisers_trials", "optimisers_curves", "optimisers_sensitivity"]
    found = {}
    with undrawn_figures():
        for processes in ("1", "2"):
            out = tmp_path / processes
            assert main(["optimisers", *SMOKE, *few, "--processes", processes, "--out", str(out)]) == 0
            found[processes] = [
                pd.read_csv(out / f"{table}.csv").drop(columns="seconds", errors="ignore") for table in tables
            ]
    assert len(found["1"][0]) >= 2
    for one, two in zip(found["1"], found["2"], strict=True):
        pd.testing.assert_frame_equal(one, two)


def test_all_studies_write_results_figures_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At their smallest, and only the first figure of each drawn: the studies have tests of their own."""
    out = tmp_path / "new" / "out"
    lanczos = ["--curvature.limits.dense", "0"]  # the Hessian by products; as a matrix it is in test_curvature_study
    few = ["--preconditioning.no-natural-gradient", "--preconditioning.factorial.seeds", "1"]
    few += ["--performance.shapes", "2x8x3x3", "--performance.kfac-poolings", "gap"]
    with undrawn_figures(but=STUDIES):
        assert main([*SMOKE, "--seeds", "1", *lanczos, *few, "--out", str(out)]) == 0
    for name in STUDIES:
        table = pd.read_csv(out / f"{name}.csv")
        assert len(table) > 0
        assert table.select_dtypes("number").notna().all().all()  # a word may be empty
        assert json.loads((out / f"{name}.json").read_text())["config"]["preset"] == "smoke"
        assert (out / f"{name}.svg").stat().st_size > 1000
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = pd.read_csv(out / "landscape.csv")
    assert set(lines.pooling) == {"gap", "covariance", "gcp"}
    # three lines of 3 points, measured before steps 0 and 2 of the 3 steps, 3 heads
    assert len(lines) == 3 * 3 * 2 * 3
    start = lines[(lines.step == 0) & (lines.space == "weight")]
    assert start.loss_at_origin.nunique() == 3  # each head its own loss, from the same backbone weights
    printed = capsys.readouterr().out
    assert str(out / "report.md") in printed
    assert str(out / "index.html") in printed


def test_one_study_has_unprefixed_flags() -> None:
    command = parse(
        ["landscape", "--preset", "cifar10", "--epochs", "3", "--poolings", "gap", "gcp_exact", "--seeds", "5"]
    )
    assert list(command.studies) == ["landscape"]
    settings = command.studies["landscape"]
    assert (settings.epochs, settings.poolings, command.common.seeds) == (3, ("gap", "gcp_exact"), 5)
    assert settings.dataset == "cifar10"
    assert command.common.folder == Path("reports/cifar10")


def test_all_studies_have_prefixed_flags() -> None:
    command = parse(["--landscape.epochs", "3", "--performance.repeats", "2", "--out", "x"])
    assert list(command.studies) == list(STUDIES)
    assert (command.studies["landscape"].epochs, command.studies["performance"].repeats) == (3, 2)
    assert command.common.folder == Path("x")


@pytest.mark.parametrize("study", [None, *STUDIES])
def test_help_explains_every_field(study: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse([study, "--help"] if study else ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    names = [study] if study else list(STUDIES)
    for name in names:
        for field in dataclasses.fields(STUDIES[name].presets["quick"]):
            flag = field.name.replace("_", "-")
            assert (f"--{flag}" if study else f"--{name}.{flag}") in text
    for field in ("preset", "out", "data-root", "device", "seeds", "resume", "threads", "dry-run"):
        assert f"--{field}" in text


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", STUDIES)
def test_every_preset_of_every_study_parses(name: str, preset: str) -> None:
    assert parse([name, "--preset", preset]).studies[name] == STUDIES[name].presets[preset]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["landscap"], "unknown study 'landscap'; choose one of: landscape, curvature, preconditioning"),
        (["landscape", "--preset"], "unknown preset ''; choose one of: smoke"),
        (["--preset", "huge"], "unknown preset 'huge'; choose one of: smoke, quick, cifar10, paper"),
        (["landscape", "--poolings", "gap", "gpc"], "unknown pooling 'gpc'; choose one of: gap, covariance, gcp"),
        (["landscape", "--poolings", "gap", "gap"], "--poolings gap gap: name at least one, each once"),
        (["landscape", "--processes", "0"], "--processes 0: at least 1"),
        (["landscape", "--backbone", "resnet19"], "unknown backbone 'resnet19'; choose one of: mobilenet_v2"),
        (["landscape", "--dataset", "mnist"], "unknown dataset 'mnist'; choose one of: digits"),
        (["landscape", "--schedule", "fast"], "unknown schedule 'fast'; choose one of:"),
        (["landscape", "--dataset", "cifar10", "--backbone", "cifar_resnet8", "--data-root", "/nowhere"], "/nowhere"),
        (["landscape", "--device", "cuda"], "available: cpu"),
        (["landscape", "--device", "tpu"], "device is 'tpu'; choose one of: auto, cpu, cuda, mps, xpu"),
        (["performance", "--device", "foo"], "device is 'foo'; choose one of: auto, cpu, cuda, mps, xpu"),
        (["performance", "--device", "foo", "--dry-run"], "device is 'foo'; choose one of: auto, cpu, cuda, mps, xpu"),
        (["landscape", "--seeds", "0"], "--seeds 0: at least 1 seed"),
        (["landscape", "--eta-low", "5", "--eta-high", "1"], r"the eta range [5.0, 1.0]"),
        (["landscape", "--measure-every", "0"], "--measure-every 0"),
        (["landscape", "--batch-size", "4096"], "4096"),
        (["landscape", "--learning-rate", "-1"], "learning_rate is -1.0"),
        (["landscape", "--last-stride", "1"], "digits_net cannot change it"),
        (["performance", "--shapes", "3x3"], "shape '3x3' is not images x channels x height x width"),
        (["performance", "--repeats", "0"], "--repeats 0"),
        (["landscape", "--backbone", "resnet18"], "the last feature map is 1x1, its covariance is always zero"),
        (["landscape", "--dataset", "imagefolder"], "SECONDORDER_DATA"),
        (["landscape", "--epoch", "3"], "--epochs"),
        (["landscape", "--epochs", "three"], "'three'"),
        (["landscape", "--amp", "int8"], "int8"),
        (["--epochs", "3"], "--landscape.epochs"),
        (["landscape", "--out", "/dev/null/x"], "cannot write to the output folder /dev/null/x"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    preset = [] if "--preset" in arguments else SMOKE
    assert main([*arguments, *preset, *out]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""  # nothing was computed before


def test_the_module_ends_with_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["studies", "landscap"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(sys.modules["studies.__main__"].__file__ or "")), run_name="__main__")
    assert stopped.value.code == 2


def test_divergence_is_reported_and_finished_runs_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--learning-rate", "1e30", "--poolings", "gap", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["landscape", *SMOKE, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "lower learning_rate" in error


@undrawn_figures()
def test_a_corrupt_checkpoint_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*ONE_RUN, "--out", str(tmp_path)]
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    checkpoint = next(tmp_path.glob("runs/landscape/*/checkpoint.pt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    table = (tmp_path / "landscape.csv").read_bytes()
    assert main([*flags, "--resume"]) == 2
    assert checkpoint.name in capsys.readouterr().err
    assert (tmp_path / "landscape.csv").read_bytes() == table
    settings = tmp_path / "runs" / "landscape" / "settings.json"
    settings.write_text("{")
    assert main([*flags, "--resume"]) == 2
    assert f"{settings} is damaged" in capsys.readouterr().err


@undrawn_figures()
def test_resuming_with_other_settings_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*ONE_RUN, "--out", str(tmp_path)]
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    table = (tmp_path / "landscape.csv").read_bytes()
    for change, words in (
        (["--eta-points", "5"], "have eta_points = 3, not 5"),
        (["--learning-rate", "0.2"], "have learning_rate = 0.1, not 0.2"),
        (["--threads", "2"], "run threads = 1, not 2"),
    ):
        assert main([*flags, *change, "--resume"]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "landscape.csv").read_bytes() == table
    assert main([*flags, "--poolings", "gap", "gcp", "--resume"]) == 0  # one more head
    assert set(pd.read_csv(tmp_path / "landscape.csv").pooling) == {"gap", "gcp"}


@undrawn_figures()
def test_a_fresh_start_forgets_the_runs_and_keeps_the_table_until_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["landscape", *SMOKE, "--poolings", "gap", "gcp", "--seeds", "1", "--out", str(tmp_path)]
    assert main(flags) == 0
    table = (tmp_path / "landscape.csv").read_bytes()
    checkpoints = sorted(tmp_path.glob("runs/landscape/*/checkpoint.pt"))
    real, calls = landscape.train, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(landscape, "train", interrupted)
    assert main(flags) == 130
    assert (tmp_path / "landscape.csv").read_bytes() == table
    assert len(pd.read_csv(tmp_path / "landscape.partial.csv")) * 2 == len(pd.read_csv(tmp_path / "landscape.csv"))
    assert [path.exists() for path in checkpoints].count(True) == 1
    monkeypatch.setattr(landscape, "train", real)
    assert main([*flags, "--resume"]) == 0
    assert (tmp_path / "landscape.csv").read_bytes() == table
    assert not (tmp_path / "landscape.partial.csv").exists()


def test_the_measured_loss_is_that_of_the_step(tmp_path: Path) -> None:
    """Same batch, same weights, training mode, same dropout masks: the lines start at the training loss."""
    settings = dataclasses.replace(landscape.PRESETS["smoke"], poolings=("gcp",), dropout=0.3, measure_every=1)
    common = Common(preset="smoke", seeds=1, threads=1, out=tmp_path)
    data = landscape.check(common, settings)
    run = landscape.runs(common, settings)[0]
    trained = train(run, data, tmp_path, observers={"l": landscape.LandscapeObserver(settings)}, progress=False)
    rows = pd.DataFrame(trained.records["l"])
    for space in ("feature", "weight"):
        starts = rows[rows.space == space].groupby("step").loss_at_origin.first()
        assert list(starts) == pytest.approx(trained.step_losses, rel=1e-5)


def test_each_direction_is_measured_as_it_is_named(tmp_path: Path) -> None:
    settings = dataclasses.replace(landscape.PRESETS["smoke"], poolings=("gap",), eta_low=0.5, eta_high=1.0)
    common = Common(preset="smoke", seeds=1, threads=1, out=tmp_path)
    data = landscape.check(common, settings)
    run = landscape.runs(common, settings)[0]
    trained = train(run, data, tmp_path, observers={"l": landscape.LandscapeObserver(settings)}, progress=False)
    rows = pd.DataFrame(trained.records["l"])
    rises = (rows.loss - rows.loss_at_origin).groupby(rows.direction)
    slope = (rows.eta * rows.gradient_norm**2).groupby(rows.direction).sum()
    assert rises.sum()["ascent"] == pytest.approx(slope["ascent"], rel=0.1)
    assert rises.sum()["descent"] == pytest.approx(-slope["descent"], rel=0.1)


def test_the_baseline_is_five_textbook_steps() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    S = torch.stack([torch.cov(sample.flatten(1), correction=0) for sample in x])
    trace = S.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    y, z = S / trace, torch.eye(6, dtype=x.dtype)
    for _ in range(5):
        y, z = 0.5 * y @ (3 * torch.eye(6) - z @ y), 0.5 * (3 * torch.eye(6) - z @ y) @ z
    row, column = torch.triu_indices(6, 6)
    torch.testing.assert_close(performance.textbook(x), (y * trace.sqrt())[:, row, column])


@undrawn_figures()
def test_a_killed_study_resumes_to_the_same_table(tmp_path: Path, killed: Callable[..., None]) -> None:
    flags = ["landscape", *SMOKE, "--seeds", "2", "--epochs", "3", "--poolings", "gap", "gcp"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    lines = pd.read_csv(tmp_path / "whole" / "landscape.csv")
    assert set(lines.seed) == {0, 1}
    same_start = lines[(lines.step == 0) & (lines.space == "weight")].groupby("seed").loss_at_origin.nunique()
    assert (same_start == 2).all()  # each head its own loss, from the same backbone weights
    killed(
        lambda: len(list((tmp_path / "killed").glob("runs/landscape/*/checkpoint.pt"))) >= 2,
        [*flags, "--out", str(tmp_path / "killed")],
    )
    assert main([*flags, "--out", str(tmp_path / "killed"), "--resume"]) == 0
    for name in ("landscape.csv", "landscape_summary.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_study_joins_the_processes_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written; what two processes then compute is in `test_distributed`."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main([*ONE_RUN, "--out", str(tmp_path)]) == 2
    assert "start with torchrun" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_paper_states_its_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["landscape", "--preset", "paper", "--dry-run", "--poolings", "gcp", "--eta-points", "1", "--threads", "1"]
    small = ["--batch-size", "2", "--reduced-channels", "16"]  # 24 M parameters fewer, most of the time
    assert main([*flags, *small, "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "resnet18 + gcp" in printed
    assert "images 3x224x224" in printed
    assert "64,058,300 steps" in printed  # 1,281,167 // 2 images x 100 epochs
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("dataset", "shape", "classes"), [("digits", (1, 8, 8), 10), ("imagefolder", (3, 224, 224), 1000)]
)
def test_fake_data_has_the_right_shape(dataset: str, shape: tuple[int, int, int], classes: int) -> None:
    data = fake_data(dataset, 4)
    image, label = data.train[3]
    assert tuple(image.shape) == shape
    assert label == 3
    assert data.num_classes == classes
    assert data.label.startswith("fake data")
