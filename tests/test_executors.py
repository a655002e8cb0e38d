"""Executors: processes of this machine and submitit do the same jobs with the same results; what dies is begun again."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pandas as pd
import pytest

from secondorder.data import load_dataset
from secondorder.errors import InputError
from secondorder.training import Run
from studies.engine.executors import executor_of, submitit_jobs
from studies.engine.plan import Trained
from studies.engine.records import read_records
from studies.engine.run import Plan, Table, carry_out
from studies.engine.store import Store, Subject, kept

pytest.importorskip("submitit", reason="an extra: pip install 'secondorder[slurm]'")
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's open processes


@pytest.fixture(autouse=True)
def no_network_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit waits 15 s for the result of a job that died, which may be under way between machines."""
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """The jobs' processes cannot import this file."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def square(folder: str, number: int, deaths: int) -> int:
    """A job that keeps its result, and is killed at its first attempts."""
    attempts = Path(folder) / f"attempts-{number}"
    result = Path(folder) / f"{number}.json"
    if not result.exists():
        with attempts.open("a") as file:
            file.write(".")
        if len(attempts.read_text()) <= deaths:
            os.kill(os.getpid(), signal.SIGKILL)
    return int(kept(result, lambda: number**2))


def test_jobs_by_submitit_one_of_which_is_killed(tmp_path: Path) -> None:
    jobs = [(str(tmp_path), number, int(number == 1)) for number in range(2)]
    results = submitit_jobs(square, jobs, store=Store(tmp_path), processes=2, cluster="local", minutes=5)
    assert list(results) == [0, 1]
    assert [len((tmp_path / f"attempts-{number}").read_text()) for number in range(2)] == [1, 2]


def test_the_engine_collects_what_submitit_did(tmp_path: Path) -> None:
    data = load_dataset("digits", limit=96)
    run = Run("digits_tiny", "gap", "digits", 1, 32, 0.05, train_limit=96, threads=1)

    def plan() -> Plan:
        yield [Trained(Subject(run, data))]

    def table(name: str, executor: Any) -> pd.DataFrame:
        folder, store = tmp_path / name, Store(tmp_path / name / "store")
        folder.mkdir()
        with executor(store) as by:
            carry_out({"a": plan()}, {"a": Table.opened(folder, "a", {}, (), False)}, store, by)
        records = read_records(folder, "a")[0]
        return records[records.quantity != "seconds"]

    def by_submitit(store: Store) -> Any:
        return nullcontext(partial(submitit_jobs, store=store, processes=1, cluster="local", minutes=5))

    pd.testing.assert_frame_equal(
        table("local", lambda store: executor_of("local", store, 1)), table("submitit", by_submitit)
    )


def test_executors_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown executor 'ray'; choose one of: local, slurm"):
        executor_of("ray", Store(tmp_path), 1)
    with (
        pytest.raises(InputError, match=r"--executor slurm: .*use --executor local"),
        executor_of("slurm", Store(tmp_path), 1) as slurm,
    ):
        list(slurm(square, [(str(tmp_path), 1, 0)]))
