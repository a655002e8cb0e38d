"""Every study, from its trainings to its report, on any device: the smallest preset, made smaller still."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from undrawn_figures import undrawn_figures

from studies.__main__ import main
from studies.report import write_report
from studies.study import STUDIES

CURVATURE = (
    "--poolings gap --small.images 2 --batch-size 96 "
    "--limits.whole 0 --limits.dense 0 --limits.block 100 --limits.steps 2"
)
PRECONDITIONING = (
    "--trained gcp --images 2 --curvature-images 2 --reference-images 4 --gradient-batches 2 --gradient-batch-size 4 "
    "--dampings 1 --newton-schulz-steps 2 --batch-size 128 --no-natural-gradient "
    "--factorial.optimisers sgd --factorial.timing-steps 1 --factorial.seeds 1"
)
OPTIMISERS = (
    "--arms sgd kfac --trials 1 --dampings 1 --timing-steps 1 --autoencoder.updates 4 --autoencoder.evaluations 2"
)
FLAGS = {
    "landscape": "--poolings gap gcp --eta-points 1 --measure-every 3",
    "curvature": CURVATURE,
    "preconditioning": PRECONDITIONING,
    "performance": "--shapes 2x4x3x3 --repeats 1 --kfac-repeats 1 --kfac-poolings gap",
    "optimisers": OPTIMISERS,
}


@pytest.fixture
def _little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No report but that of the performance study: what is read from tables knows no device, unless it was not measured.

    And few of the products with Hessians whose number is no flag.
    """

    def report(folder: Path, sections: dict, preset: str, must: object = ()) -> tuple[Path, Path]:
        return write_report(folder, {"performance": sections["performance"]}, preset)

    monkeypatch.setattr("studies.preconditioning.blocks.measure.LANCZOS", 1)
    monkeypatch.setattr("studies.preconditioning.blocks.measure.PROBES", 1)
    monkeypatch.setattr("studies.program.write_report", report)
    with undrawn_figures():
        yield


@pytest.mark.usefixtures("_little_work")
@pytest.mark.parametrize("study", STUDIES)
def test_studies(study: str, device: str, tmp_path: Path) -> None:
    flags = [*FLAGS[study].split(), *["--preset", "smoke", "--seeds", "1", "--threads", "1", "--no-progress"]]
    assert main([study, *flags, "--device", device, "--out", str(tmp_path)]) == 0
    assert len(pd.read_csv(tmp_path / f"{study}.csv")) > 0
    assert f'"device": "{device.partition(":")[0]}: ' in (tmp_path / f"{study}.json").read_text()


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("study", ["curvature", "preconditioning"])
def test_studies_that_need_float64(study: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "smoke", "--device", device, "--out", str(tmp_path)]
    assert main([study, *flags]) == 2
    assert capsys.readouterr().err == (
        f"error: the {study} study needs float64, which the device {device}:0 does not have; use the cpu\n"
    )
