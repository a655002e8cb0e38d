"""The preconditioning study end to end: its tables, its verdicts, resumption after a kill, bad input."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from undrawn_figures import undrawn_figures

from studies.__main__ import main
from studies.preconditioning import study
from studies.preconditioning.section import section
from studies.preconditioning.study import ENDS, OFTEN
from studies.report import write_report
from studies.report.section import Section
from studies.statistics import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from studies.study import STUDIES

SMOKE = ["preconditioning", "--preset", "smoke", "--no-progress", "--threads", "1"]
FEWER = [*SMOKE, "--no-natural-gradient"]
"""A third of the time less; test_directions_part has the natural gradient."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study, to be read or copied."""
    folder = tmp_path_factory.mktemp("finished")
    with undrawn_figures():
        assert main([*FEWER, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def reported(finished: Path) -> Section:
    """What the report says of it."""
    return section(finished)


def test_every_part_is_measured_at_its_moments(finished: Path) -> None:
    table = pd.read_csv(finished / "preconditioning.csv", keep_default_na=False, na_values=["nan"])
    assert set(table.part) == set(OFTEN)
    assert set(table.backbone) == {"untrained", "gap", "gcp"}
    assert set(table.seed) == {0, 1}
    assert table.value.notna().all()
    assert set(table[table.backbone == "untrained"].step) == {0}
    assert set(table[table.backbone == "gcp"].moment) == {1.0}  # two measurements: before and after training
    gradients = pd.read_csv(finished / "preconditioning_gradients.csv.gz")
    assert set(gradients.part) == set(ENDS)
    assert set(gradients.backbone) == {"untrained", "gap", "gcp"}
    assert gradients.value.notna().all()
    epochs = pd.read_csv(finished / "preconditioning_training.csv")
    assert epochs.groupby(["backbone", "seed"]).size().to_dict() == {(b, s): 1 for b in ("gap", "gcp") for s in (0, 1)}


def test_every_claim_has_its_row(finished: Path, reported: Section) -> None:
    verdicts = pd.read_csv(finished / "preconditioning_verdicts.csv")
    assert list(verdicts.prediction) == [claim.statement for claim in reported.claims]
    assert list(verdicts.verdict) == [claim.verdict for claim in reported.claims]
    assert set(verdicts.verdict) <= {SUPPORTED, NOT_SUPPORTED, UNDECIDED}
    assert [part[:2] for part in dict.fromkeys(verdicts.part)] == ["A:", "B:", "C:", "D:", "E:"]
    assert verdicts.meaning.notna().all()
    assert not verdicts.duplicated(["prediction", "measured"]).any()


def test_the_report_begins_with_what_the_verdicts_mean(finished: Path, reported: Section) -> None:
    text = (finished / "report.md").read_text()
    beginning = text[: text.index("| study |")]
    assert "## In short" in beginning
    claims = reported.claims
    assert [part[:2] for part in dict.fromkeys(c.group for c in claims if c.headline)] == ["A:", "B:", "C:", "D:", "E:"]
    for claim in claims:
        assert (f"{claim.verdict}: {claim.quantity}: {claim.interval}" in beginning) == claim.headline
        assert claim.meaning in beginning or not claim.headline


def test_a_killed_study_resumes_to_the_same_tables(
    finished: Path, tmp_path: Path, killed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*FEWER, "--out", str(tmp_path)]
    killed(lambda: bool(list(tmp_path.glob("runs/preconditioning/*/rows.json"))), flags)
    assert not (tmp_path / "preconditioning.csv").exists()
    monkeypatch.setattr("studies.program.write_report", lambda folder, *_, **__: (folder, folder))
    assert main([*flags, "--resume"]) == 0
    names = ("preconditioning.csv", "preconditioning_gradients.csv.gz", "preconditioning_factorial_curves.csv")
    for name in names:  # other tables have times in them
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


class StoppedError(Exception):
    pass


def test_processes_share_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that train backbones, and those that train the factorial."""
    threads: list[int] = []

    def recorded(function: object, todo: list, processes: int) -> list:
        threads.append(todo[0][0].threads)
        return []

    def stopped(function: object, todo: list, processes: int) -> None:
        threads.append(todo[0][0].common.threads)
        raise StoppedError

    monkeypatch.setattr(study, "map_jobs", recorded)
    monkeypatch.setattr(study.factorial, "map_jobs", stopped)
    with pytest.raises(StoppedError):
        main([*SMOKE[:-1], "2", "--processes", "2", "--out", str(tmp_path)])
    assert threads == [1, 1]


def test_results_of_another_version_are_named(finished: Path, tmp_path: Path) -> None:
    for name in ("preconditioning.csv", "preconditioning.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    table = pd.read_csv(tmp_path / "preconditioning.csv").drop(columns="measure")
    table.to_csv(tmp_path / "preconditioning.csv", index=False)
    write_report(tmp_path, {"preconditioning": STUDIES["preconditioning"].section}, "smoke")
    assert "lacks the columns measure" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backbone", "resnet19"], "unknown backbone 'resnet19'"),
        (["--trained", "gpc"], "unknown pooling 'gpc'; choose one of: gap"),
        (["--dampings"], "--dampings (none): name at least one"),
        (["--dampings", "0.1", "0.1"], "--dampings 0.1 0.1: name at least one, each once"),
        (["--newton-schulz-steps"], "--newton-schulz-steps (none): name at least one"),
        (["--dampings", "0"], "--dampings 0: every value must be above 0"),
        (["--measurements", "1"], "--measurements 1: at least 2"),
        (["--gradient-batches", "1"], "--gradient-batches 1: at least 2"),
        (
            ["--gradient-batch-size", "256"],
            "there are only 256 training images, so that all mini-batches would be the same",
        ),
        (["--weight-decay", "0"], "weight_decay 0.0: a shared backbone needs a positive one"),
        (["--factorial.optimisers", "adamw"], "the factorial needs 'sgd' among adamw"),
        (["--factorial.poolings", "gap"], "the factorial needs 'gcp' among gap"),
        (["--factorial.trials", "0"], "--factorial.trials 0: at least 1"),
        (["--factorial.schedule", "sinus"], "unknown schedule 'sinus'"),
        (["--processes", "0"], "--processes 0: at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, refused: Callable[..., None]) -> None:
    refused(words, *SMOKE, *arguments)


def test_dry_run_states_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMOKE, "--dry-run", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "digits_tiny + gcp" in printed
    assert "without measuring: about" in printed
    assert not (tmp_path / "none").exists()
