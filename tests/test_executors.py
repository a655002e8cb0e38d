"""Executors: who begins which job, what is begun again, what a cluster is asked for; on real ones see `test_clusters`."""

import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from secondorder.errors import InputError
from studies.engine.cluster import cluster_jobs, do_there
from studies.engine.executors import executor_of
from studies.engine.slurm import SubmititScheduler
from studies.jobs import ATTEMPTS, LostJobError
from studies.settings import Common, Slurm

# The queue, on a scheduler that does a job when it is asked what has ended


class Here:
    """Does the job that was begun last (or first), unless it is among those that die, so many times."""

    def __init__(self, of: Callable[..., tuple[int, int]] = max, **deaths: int) -> None:
        self.of = of
        self.deaths = {int(name[1:]): times for name, times in deaths.items()}
        self.begun: list[int] = []
        self.most = 0
        self.cancelled: list[tuple[int, int]] = []

    def begin(self, place: Path, number: int) -> tuple[int, int]:
        self.place = place
        self.begun.append(number)
        return len(self.begun), number

    def ended(self, handles: Collection[tuple[int, int]]) -> dict[tuple[int, int], str]:
        self.most = max(self.most, len(handles))
        handle = self.of(handles)
        if self.deaths.get(handle[1], 0):
            self.deaths[handle[1]] -= 1
            return {handle: "killed"}
        do_there(str(self.place), handle[1], 1, str(Path.cwd()))
        return {handle: ""}

    def cancel(self, handles: Collection[tuple[int, int]]) -> None:
        self.cancelled += handles


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"no root of {number}")
    return number**2


def test_results_come_in_order_whatever_ends_first_and_dies(tmp_path: Path) -> None:
    scheduler = Here(n1=ATTEMPTS - 1, n3=1)
    assert [*cluster_jobs(scheduler, tmp_path / "new", 2, square, [(n,) for n in range(5)])] == [0, 1, 4, 9, 16]
    assert scheduler.most == 2
    assert sorted(scheduler.begun) == [0, 1, 1, 1, 2, 3, 3, 4]
    assert scheduler.cancelled == []
    assert [*(tmp_path / "new").iterdir()] == []


def test_a_job_that_dies_every_time_is_named(tmp_path: Path) -> None:
    with pytest.raises(LostJobError, match=r"square\(1\): it died 3 times on the cluster \(killed\).*same command"):
        list(cluster_jobs(Here(n1=ATTEMPTS), tmp_path, 1, square, [(n,) for n in range(3)]))


def test_an_error_of_a_job_is_raised_as_it_is_and_ends_the_others(tmp_path: Path) -> None:
    scheduler = Here()
    results = cluster_jobs(scheduler, tmp_path, 3, square, [(1,), (2,), (-3,), (4,)])
    with pytest.raises(ValueError, match="no root of -3"):
        list(results)
    assert 3 not in scheduler.begun
    assert [*tmp_path.iterdir()] == []


def test_what_is_under_way_is_cancelled_when_nobody_asks_for_the_rest(tmp_path: Path) -> None:
    scheduler = Here(of=min)
    results = cluster_jobs(scheduler, tmp_path, 2, square, [(n,) for n in range(4)])
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert scheduler.cancelled == [(2, 1)]
    assert [*tmp_path.iterdir()] == []


def test_an_exit_leaves_no_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is how submitit ends a job that it requeues."""
    monkeypatch.chdir(tmp_path)  # as a job does

    def leaves() -> None:
        sys.exit(1)

    (tmp_path / "jobs").write_bytes(cloudpickle.dumps((leaves, [()])))
    with pytest.raises(SystemExit):
        do_there(str(tmp_path), 0, 1, str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["jobs"]


# What Slurm is asked for


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put commands srun and sbatch on the path; the latter keeps the script and then does as it is told."""
    pytest.importorskip("submitit", reason="an extra: pip install 'secondorder[slurm]'")

    def install(then: str) -> Path:
        script = tmp_path / "script"
        for name, content in (("srun", "exit 0"), ("sbatch", f'cat "$1" > {script}\n{then}')):
            file = tmp_path / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"#!/bin/sh\n{content}\n")
            file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        return script

    return install


def test_the_script_for_slurm(sbatch: Callable[[str], Path], tmp_path: Path) -> None:
    script = sbatch("echo Submitted batch job 7")
    common = Common(out=tmp_path, executor="slurm", threads=4, slurm=Slurm("long", "vision", 90, 2, 32))
    assert SubmititScheduler(common).begin(tmp_path, 0).job_id == "7"
    lines = script.read_text().splitlines()
    wanted = (
        "partition=long",
        "account=vision",
        "time=90",
        "gpus-per-node=2",
        "mem=32GB",
        "cpus-per-task=4",
        "requeue",
    )
    for line in (*wanted, "signal=USR2@90", "job-name=secondorder"):
        assert f"#SBATCH --{line}" in lines


def test_a_job_that_slurm_refuses_is_one_line(sbatch: Callable[[str], Path], tmp_path: Path) -> None:
    sbatch("echo 'sbatch: error: invalid partition specified: lnog' >&2; exit 1")
    with (
        pytest.raises(InputError, match=r"^--executor slurm: sbatch: error: invalid partition specified: lnog"),
        executor_of(Common(out=tmp_path, executor="slurm", slurm=Slurm("lnog"))) as jobs,
    ):
        list(jobs(square, [(1,)]))


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"executor": "dask"}, "unknown executor 'dask'; choose one of: local, slurm, ray"),
        ({"processes": 65 + (os.cpu_count() or 1)}, "--processes .*: use 1 to"),
        ({"executor": "slurm", "processes": 10_001}, "--processes 10001: use 1 to 10000"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    Common(executor="slurm", processes=1000)
    with pytest.raises(InputError, match=words):
        Common(**settings)


@pytest.mark.parametrize(("name", "value"), [("time", 1), ("gpus", -1), ("mem", 0)])
def test_slurm_flags_that_are_refused(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"--slurm.{name} {value}: at least"):
        Slurm(**{name: value})


def test_executors_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, library, words in (
        ("slurm", "submitit", r"^--executor slurm needs submitit: pip install 'secondorder\[slurm\]'$"),
        ("ray", "ray", r"^--executor ray needs ray: pip install 'secondorder\[ray\]'$"),
    ):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, library, None)
            with pytest.raises(InputError, match=words), executor_of(Common(out=tmp_path, executor=name)):
                pass
    pytest.importorskip("submitit", reason="an extra: pip install 'secondorder[slurm]'")
    with (
        pytest.raises(InputError, match=r"--executor slurm: .*use --executor local"),
        executor_of(Common(out=tmp_path, executor="slurm")),
    ):
        pass


def test_jobs_on_a_cluster_are_single_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.engine.executors.world_size", lambda: 2)
    with (
        pytest.raises(InputError, match="each job is one process; leave torchrun out"),
        executor_of(Common(executor="ray")),
    ):
        pass


def test_a_ray_without_room_is_refused() -> None:
    from studies.engine.ray_cluster import _check_room

    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]
    _check_room(nodes, 4, 0)
    for threads, gpus, words in ((5, 0, "has 5 CPUs, which"), (1, 1, "has 1 CPUs and a GPU")):
        with pytest.raises(InputError, match=words):
            _check_room(nodes, threads, gpus)


def test_ray_files_are_in_the_store_unless_its_path_is_too_long(tmp_path: Path) -> None:
    from studies.engine.ray_cluster import _folder

    short = Path("/tmp") / f"s{os.getpid()}"
    with _folder(short) as folder:
        assert folder == short / "ray"
    assert not (short / "ray").exists()
    short.rmdir()
    with _folder(tmp_path / ("long" * 20)) as folder:
        assert folder.is_dir()
        assert len(str(folder)) < 40
    assert not folder.exists()
