"""Every study, from its trainings to its page, on any device: the smallest preset, made smaller still."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from undrawn_figures import undrawn_figures

from studies.__main__ import main
from studies.engine.command import write_pages
from studies.engine.records import read_records
from studies.study import STUDIES

FLAGS = {
    "landscape": "--heads gap gcp --eta-points 1 --rho 0.1 --measure-every 3",
    "curvature": "--networks --heads gap gcp --explored-seeds 0 --limits.images 2 --limits.probes 2",
    "preconditioning": "--trained gcp",
    "performance": "--shapes 2x4x3x3 --repeats 1 --kfac-repeats 1 --kfac-heads gap",
    "convergence": "--heads gap gcp --adju-seeds 0 --kfac-seeds 0",
    "robustness": "--heads gap gcp --images 4 --sequence-images 2 --corruptions contrast --sequences rotate",
    "transfer": "--heads gap gcp --shots 2 --draws 1",
    "optimisers": "--others --autoencoder.updates 4 --autoencoder.evaluations 2 --timing-steps 1",
}


@pytest.fixture
def _only_costs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No page but that of the performance study: what is read from tables knows no device, unless it was not measured."""

    def pages(folder: Path, preset: str, studies: Mapping[str, Any], must: Sequence[str]) -> tuple[Path, Path]:
        return write_pages(folder, preset, {"performance": studies["performance"]}, must=())

    monkeypatch.setattr("studies.program.write_pages", pages)
    with undrawn_figures():
        yield


@pytest.mark.usefixtures("_only_costs")
@pytest.mark.parametrize("study", STUDIES)
def test_studies(study: str, device: str, tmp_path: Path) -> None:
    flags = [*FLAGS[study].split(), "--preset", "smoke", "--seeds", "1", "--processes", "1", "--no-progress"]
    assert main([study, *flags, "--device", device, "--out", str(tmp_path)]) == 0
    records, origins = read_records(tmp_path, study)
    assert len(records) > 0
    assert any(machine["device"].startswith(f"{device.partition(':')[0]}: ") for machine in origins.machines)


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("study", ["curvature", "preconditioning"])
def test_studies_that_need_float64(study: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "smoke", "--device", device, "--out", str(tmp_path)]
    assert main([study, *flags]) == 2
    assert capsys.readouterr().err == (
        f"error: the {study} study needs float64, which the device {device}:0 does not have; use the cpu\n"
    )
