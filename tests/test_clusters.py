"""The same jobs by processes of this machine, submitit's local executor and a local Ray; what is killed or requeued goes on."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pandas as pd
import pytest

from secondorder.training import Moment, Run, Snapshot, train
from studies.engine.executors import executor_of, on_cluster
from studies.engine.fake_data import fake_data
from studies.engine.plan import Measurement, Trained
from studies.engine.records import read_records
from studies.engine.run import Plan, Table, carry_out
from studies.engine.slurm import SubmititScheduler
from studies.engine.store import Store, Subject
from studies.jobs import Map
from studies.settings import Common

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """The jobs' processes cannot import this file."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


# Eight jobs of the engine, two at a time, one of which is killed once


def killed_once(at: Snapshot, folder: str) -> list[dict[str, Any]]:
    """A measurement that kills its process, of one network, when it is made for the first time."""
    sign = Path(folder) / "killed"
    if at.run.seed == 3 and at.run.pooling == "gap" and not sign.exists():
        sign.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    weights = sum(float(p.detach().double().square().sum()) for p in at.model.parameters())
    return [{"quantity": "length", "value": weights}]


def table(out: Path, signs: Path, jobs: Map) -> pd.DataFrame:
    """The records of all eight, without seconds."""
    data, heads, seeds = fake_data("digits", 64), ("gap", "gcp"), range(4)
    runs = [Run("digits_tiny", h, "digits", 1, 32, 0.05, threads=1, seed=s) for s in seeds for h in heads]

    def plan() -> Plan:
        yield [Trained(Subject(run, data), ((2, Measurement("length", killed_once, str(signs))),)) for run in runs]

    out.mkdir(exist_ok=True)
    carry_out({"a": plan()}, {"a": Table.opened(out, "a", {}, (), False)}, Store(out / "store"), jobs)
    records = read_records(out, "a")[0]
    return records[records.quantity != "seconds"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """The table as this process makes it, and the folder that tells whether a process was killed."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "killed").touch()
    with executor_of(Common(processes=1)) as jobs:
        here = table(folder / "out", folder, jobs)
    assert len(here) == 8 * 7  # six of an epoch, and a length
    return here, folder


def test_eight_jobs_by_submitit(
    expected: tuple[pd.DataFrame, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="an extra: pip install 'secondorder[slurm]'")
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)  # of a job that died; there is no network drive
    here, signs = expected
    (signs / "killed").unlink()
    common = Common(out=tmp_path / "out", executor="slurm", processes=2)
    jobs = on_cluster(SubmititScheduler(common, "local"), common)
    pd.testing.assert_frame_equal(table(tmp_path / "out", signs, jobs), here)
    assert (signs / "killed").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.csv", "a.json", "store"}


def fails(number: int) -> int:
    raise ValueError(f"job {number}")


def test_eight_jobs_by_ray(
    expected: tuple[pd.DataFrame, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("ray") is None:  # which reads its environment when it is imported
        pytest.skip("an extra: pip install 'secondorder[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here, signs = expected
    (signs / "killed").unlink()
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with executor_of(Common(out=tmp_path / "out", executor="ray", processes=2)) as jobs:
        pd.testing.assert_frame_equal(table(tmp_path / "out", signs, jobs), here)
        with pytest.raises(ValueError, match="job 2"):
            list(jobs(fails, [(2,), (3,)]))
        assert signal.getsignal(signal.SIGTERM) is handler
    assert (signs / "killed").exists()
    assert dict(os.environ) == environment
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.csv", "a.json", "store"}
    assert not [*(tmp_path / "out" / "store" / "ray").glob("session*")]


# Requeued by SIGUSR2


class Preempted:
    """An observer that sends the signal of a time limit, once, and writes down every step."""

    every = 1

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, moment: Moment) -> list[dict[str, Any]]:
        first = not self.log.exists()
        with self.log.open("a") as file:
            file.write(f"{moment.step} ")
        if first or self.log.read_text().split()[-1] != "3":
            return []
        if self.log.read_text().split().count("3") == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return []


def losses(folder: str) -> list[float]:
    """Of a training of six steps, which goes on from the checkpoint in the folder."""
    run = Run("digits_tiny", "gcp", "digits", 2, 32, 0.05, threads=1)
    data, observers = fake_data("digits", 96), {"signal": Preempted(Path(folder) / "steps")}
    kept = {"resume": True, "checkpoint_every": 0.0, "progress": False}
    return train(run, data, folder, observers=observers, **kept).step_losses  # type: ignore[arg-type]


def test_a_job_that_gets_sigusr2_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="an extra: pip install 'secondorder[slurm]'")
    common = Common(out=tmp_path, executor="slurm", processes=1)
    jobs = on_cluster(SubmititScheduler(common, "local"), common)
    (found,) = jobs(losses, [(str(tmp_path),)])
    assert (tmp_path / "steps").read_text().split() == ["0", "1", "2", "3", "3", "4", "5"]
    monkeypatch.setattr(os, "kill", lambda *_: None)
    (tmp_path / "here").mkdir()
    assert losses(str(tmp_path / "here")) == found
