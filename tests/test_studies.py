"""The command line and the studies end to end, at their smallest preset."""

import dataclasses
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from undrawn_figures import undrawn_figures

from studies.__main__ import main
from studies.command_line import parse
from studies.engine.command import plain
from studies.engine.fake_data import fake_data
from studies.engine.records import COLUMNS, has_records, read_records
from studies.engine.run import Table
from studies.settings import PRESETS
from studies.study import STUDIES

SMOKE = ["--preset", "smoke", "--no-progress", "--processes", "1"]
ONE_RUN = ["landscape", *SMOKE, "--heads", "gap", "--seeds", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with undrawn_figures():
        assert main([*ONE_RUN, "--out", str(folder)]) == 0
    return folder


def table(folder: Path, study: str = "landscape") -> pd.DataFrame:
    """The records of a study without the seconds that its trainings took."""
    records = read_records(folder, study)[0]
    return records[records.quantity != "seconds"].reset_index(drop=True)


def test_a_study_writes_its_table_and_a_page(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = table(finished)
    assert tuple(records.columns) == COLUMNS
    # before steps 0 and 2 of the 3 steps: two lines of 3 points, and one of 2 of which two quantities are taken
    assert len(records[records.layer != ""]) == 2 * (2 * (2 + 4 * 3) + 2 * 2)
    assert json.loads((finished / "landscape.json").read_text())["settings"]["preset"] == "smoke"
    for page in ("report.md", "index.html"):
        assert "smoother loss" in (finished / page).read_text()
    assert list(pd.read_csv(finished / "claims.csv").claim)[:2] == ["smoother loss", "predictive gradients"]


@undrawn_figures()
def test_what_is_there_is_not_computed_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "store")
    written = (tmp_path / "landscape.csv").read_bytes()
    assert main([*ONE_RUN, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "store").exists()
    assert (tmp_path / "landscape.csv").read_bytes() == written
    assert main([*ONE_RUN, "--out", str(tmp_path), "--fresh"]) == 0
    assert (tmp_path / "store").exists()
    pd.testing.assert_frame_equal(table(tmp_path), table(finished))


@pytest.mark.slow
@undrawn_figures()
def test_processes_side_by_side_continue_a_killed_study_to_the_table_of_one(
    tmp_path: Path, killed: Callable[..., None]
) -> None:
    flags = ["landscape", *SMOKE, "--seeds", "2", "--heads", "gap", "gcp"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    records = table(tmp_path / "whole")
    starts = records[(records.step == 0) & (records.quantity == "loss at origin")]
    assert (starts.groupby(["seed", "layer"]).value.nunique() == 2).all()  # each head its own, on the same features
    killed(
        lambda: len(list((tmp_path / "killed" / "store").glob("*/checkpoint.pt"))) >= 2,
        [*flags, "--out", str(tmp_path / "killed")],
    )
    assert main([*flags, "--processes", "2", "--out", str(tmp_path / "killed")]) == 0
    pd.testing.assert_frame_equal(table(tmp_path / "killed"), records)


@undrawn_figures()
def test_what_is_damaged_in_the_store_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "landscape.csv").unlink()
    kept = next(tmp_path.glob("store/*/measured/*.json"))
    kept.write_text(kept.read_text().replace("0.", "1.", 1))
    assert main([*ONE_RUN, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{kept} is damaged" in error
    assert "delete it, and the same command computes it again" in error
    kept.unlink()
    assert main([*ONE_RUN, "--out", str(tmp_path)]) == 0
    pd.testing.assert_frame_equal(table(tmp_path), table(finished))


@undrawn_figures()
def test_a_table_of_other_settings_is_not_mixed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    flags = [*ONE_RUN, "--out", str(tmp_path)]
    written = (tmp_path / "landscape.csv").read_bytes()
    assert main([*flags, "--learning-rate", "0.2"]) == 2
    assert "replace it with --fresh" in capsys.readouterr().err
    (tmp_path / "landscape.csv").write_bytes(written[:-30])
    assert main(flags) == 2
    assert "is not the table that was written there" in capsys.readouterr().err
    (tmp_path / "landscape.csv").write_bytes(written)
    assert main([*flags, "--heads", "gap", "gcp"]) == 0  # one more head
    assert set(table(tmp_path)["head"]) == {"gap", "gcp"}


def test_divergence_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ONE_RUN, "--learning-rate", "1e30", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "lower learning_rate" in error


def test_the_store_is_listed_and_cleaned(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished / "store", store)
    assert main(["store", "--store", str(store)]) == 0
    assert f"{store}: 1 entries" in capsys.readouterr().out
    assert main(["store", "--store", str(store), "--remove", "x"]) == 2
    assert "--remove x: not in" in capsys.readouterr().err
    assert main(["store", "--stor"]) == 2
    assert "--help" in capsys.readouterr().err
    assert main(["store", "--store", str(store), "--remove", "all"]) == 0
    assert list(store.iterdir()) == []


def test_one_study_has_unprefixed_flags() -> None:
    command = parse(
        ["landscape", "--preset", "cifar10", "--epochs", "3", "--heads", "gap", "gcp_exact", "--seeds", "5"]
    )
    assert list(command.studies) == ["landscape"]
    settings = command.studies["landscape"]
    assert (settings.training.epochs, settings.heads, command.common.seeds) == (3, ("gap", "gcp_exact"), 5)
    assert settings.training.dataset == "cifar10"
    assert command.common.folder == Path("reports/cifar10")
    assert command.common.store_folder == Path("reports/store")


def test_all_studies_have_prefixed_flags() -> None:
    command = parse(["--landscape.epochs", "3", "--performance.repeats", "2", "--out", "x"])
    assert list(command.studies) == list(STUDIES)
    assert (command.studies["landscape"].training.epochs, command.studies["performance"].repeats) == (3, 2)
    assert command.common.folder == Path("x")
    assert command.common.store_folder == Path("x/store")


@pytest.mark.parametrize("study", [None, *STUDIES])
def test_help_explains_every_field(study: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse([study, "--help"] if study else ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in [study] if study else list(STUDIES):
        for field in dataclasses.fields(STUDIES[name].presets["quick"]):
            if not dataclasses.is_dataclass(getattr(STUDIES[name].presets["quick"], field.name)):
                flag = field.name.replace("_", "-")
                assert (f"--{flag}" if study else f"--{name}.{flag}") in text
    for flag in ("preset", "out", "data-root", "device", "seeds", "store", "fresh", "processes", "threads", "dry-run"):
        assert f"--{flag}" in text


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", STUDIES)
def test_every_preset_of_every_study_parses(name: str, preset: str) -> None:
    assert parse([name, "--preset", preset]).studies[name] == STUDIES[name].presets[preset]
    assert STUDIES[name].seeds[preset] >= 1


@pytest.mark.parametrize("preset", ["quick", "cifar10"])
def test_the_tables_in_git_are_of_the_settings_of_their_presets(preset: str) -> None:
    """Otherwise the first command of the README would refuse them."""
    for name, study in STUDIES.items():
        if has_records(Path("reports") / preset, name):
            described = plain(dataclasses.asdict(study.presets[preset]) | {"preset": preset})
            Table.opened(Path("reports") / preset, name, described, study.may_grow, fresh=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["landscap"], "unknown study 'landscap'; choose one of: landscape, curvature, preconditioning"),
        (["landscape", "--preset"], "unknown preset ''; choose one of: smoke"),
        (["--preset", "huge"], "unknown preset 'huge'; choose one of: smoke, quick, cifar10, paper"),
        (["landscape", "--heads", "gap", "gpc"], "unknown pooling 'gpc'; choose one of: gap, covariance, gcp"),
        (["landscape", "--heads", "gap", "gap"], "--heads gap gap: name at least one, each once"),
        (["landscape", "--processes", "0"], "--processes 0: use 1 to"),
        (["landscape", "--network", "resnet19"], "unknown backbone 'resnet19'; choose one of: mobilenet_v2"),
        (["landscape", "--dataset", "mnist"], "unknown dataset 'mnist'; choose one of: digits"),
        (["landscape", "--schedule", "fast"], "unknown schedule 'fast'; choose one of:"),
        (["landscape", "--dataset", "cifar10", "--network", "cifar_resnet8", "--data-root", "/nowhere"], "/nowhere"),
        (["landscape", "--device", "cuda"], "available: cpu"),
        (["landscape", "--device", "tpu"], "device is 'tpu'; choose one of: auto, cpu, cuda, mps, xpu"),
        (["performance", "--device", "foo"], "device is 'foo'; choose one of: auto, cpu, cuda, mps, xpu"),
        (["performance", "--device", "foo", "--dry-run"], "device is 'foo'; choose one of: auto, cpu, cuda, mps, xpu"),
        (["landscape", "--seeds", "0"], "--seeds 0: at least 1 seed"),
        (["landscape", "--eta-low", "5", "--eta-high", "1"], r"the eta range [5.0, 1.0]"),
        (["landscape", "--rho", "-1"], "the eta range"),
        (["landscape", "--measure-every", "0"], "--measure-every 0"),
        (["landscape", "--batch-size", "4096"], "4096"),
        (["landscape", "--learning-rate", "-1"], "learning_rate must be a number in [0, 3.4e+38), got -1.0"),
        (["performance", "--shapes", "3x3"], "shape '3x3' is not images x channels x height x width"),
        (["performance", "--repeats", "0"], "--repeats 0"),
        (["landscape", "--network", "resnet18"], "the last feature map is 1x1, its covariance is always zero"),
        (["landscape", "--dataset", "imagefolder"], "SECONDORDER_DATA"),
        (["landscape", "--epoch", "3"], "--epochs"),
        (["landscape", "--epochs", "three"], "'three'"),
        (["landscape", "--amp", "int8"], "int8"),
        (["--epochs", "3"], "--landscape.epochs"),
        (["landscape", "--out", "/dev/null/x"], "cannot write to the output folder /dev/null/x"),
        (["landscape", "--processes", "1", "--store", "/dev/null/x"], "choose another with --store"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    preset = [] if "--preset" in arguments else SMOKE[:3]
    assert main([*arguments, *preset, *out]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""  # nothing was computed before
    assert not has_records(tmp_path, arguments[0])


def test_the_module_ends_with_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["studies", "landscap"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(sys.modules["studies.__main__"].__file__ or "")), run_name="__main__")
    assert stopped.value.code == 2


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
    flags = ["landscape", "--preset", "paper", "--dry-run", "--heads", "gcp", "--eta-points", "1"]
    small = [
        "--network",
        "shufflenet_v2_x0_5",
        "--batch-size",
        "2",
        "--reduced-channels",
        "16",
    ]  # to make takes the time
    assert main([*flags, *small, "--rho", "0.1", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "shufflenet_v2_x0_5 + gcp" in printed
    assert "images 3x224x224" in printed
    assert "64,058,300 steps" in printed  # 1,281,167 // 2 images x 100 epochs
    assert "3 seeds of 1 networks" in printed
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
