import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_to_map import (
    dies,
    dies_once,
    fails,
    fails_at_once_or_leaves_a_sign,
    fails_unreadably,
    has_a_bar,
    large,
    most_threads,
    naps,
    product,
)
from terminal import signals_of_a_terminal

from studies.jobs import ATTEMPTS, LostJobError, _Queue, job_name, workers

ROOT = Path(__file__).parent.parent
LONG = 100.0
"""Seconds after which a wait has failed, whatever else the machine does."""


def map_jobs(
    function: Callable[..., Any], arguments: list[tuple[Any, ...]], processes: int, attempts: int = ATTEMPTS
) -> Iterator[Any]:
    with workers(processes, attempts) as jobs:
        yield from jobs(function, arguments)


def test_what_every_process_imports_is_light() -> None:
    """torch takes seconds, also in those processes that are only begun again."""
    subprocess.run([sys.executable, "-c", "import sys, studies.jobs; assert 'torch' not in sys.modules"], check=True)


def test_results_come_in_order_from_other_processes() -> None:
    results = list(map_jobs(product, [(1, 2), (3, 4), (5, 6)], processes=2))
    assert [value for value, _ in results] == [2, 12, 30]
    assert os.getpid() not in {process for _, process in results}


def test_libraries_take_as_many_threads_as_here() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = list(map_jobs(most_threads, [(0,), (1,)], processes=2))
    finally:
        torch.set_num_threads(before)
    (most, libraries, of_torch), _ = found
    assert libraries >= 3
    assert most == of_torch == 2


def test_one_process_is_this_one() -> None:
    assert list(map_jobs(product, [(1, 2), (3, 4)], processes=1)) == [(2, os.getpid()), (12, os.getpid())]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_error_is_raised_in_its_turn(processes: int) -> None:
    results = map_jobs(fails, [(1,), (2,), (3,)], processes)
    assert next(results) == 1
    with pytest.raises(ValueError, match="argument 2"):
        next(results)


def test_an_error_tells_where_it_happened() -> None:
    with pytest.raises(ValueError, match="argument 2") as caught:
        list(map_jobs(fails, [(1,), (2,)], processes=2))
    assert "in fails" in "".join(caught.value.__notes__)


def test_an_error_that_cannot_be_read_again_is_told_in_words() -> None:
    with pytest.raises(RuntimeError, match="1 and 7"):
        list(map_jobs(fails_unreadably, [(1,), (1,)], processes=2))


def test_no_result_takes_the_place_of_a_job_that_was_not_begun(tmp_path: Path) -> None:
    """The first job is to be begun again, the second is done, and the third fails: nothing is given for the first."""
    queue = _Queue(None, tmp_path, ["a", "b", "c"], room=2, attempts=3)  # type: ignore[arg-type]
    outcomes = {1: (True, "b"), 2: (False, ValueError("c"))}

    def finished() -> list[int]:
        number = min(outcomes)
        (tmp_path / str(number)).write_bytes(pickle.dumps(outcomes.pop(number)))
        return [number]

    queue._finished = finished  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="c"):
        next(queue.results())


def test_nothing_is_begun_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argument 0"):
        list(map_jobs(fails_at_once_or_leaves_a_sign, [(number, tmp_path) for number in range(50)], processes=2))
    assert len(list(tmp_path.iterdir())) < 46


def test_large_values_pass() -> None:
    values = os.urandom(1 << 22)  # far more than a pipe holds
    assert list(map_jobs(large, [(number, values) for number in range(4)], 2)) == [
        values + bytes([n]) for n in range(4)
    ]


def test_a_job_whose_process_dies_is_begun_again(tmp_path: Path) -> None:
    assert list(map_jobs(dies_once, [(number, tmp_path) for number in range(5)], 2)) == [0, 1, 2, 3, 4]
    assert (tmp_path / "1").exists()


@pytest.mark.parametrize(("how", "attempts"), [(signal.SIGKILL, ATTEMPTS), (signal.SIGTERM, 2), (signal.SIGSEGV, 2)])
def test_the_job_whose_process_dies_every_time_is_named(how: signal.Signals, attempts: int) -> None:
    jobs = [(what, int(how)) for what in ("lives", "lives too", "dies", "lives on")]
    with pytest.raises(
        LostJobError, match=rf"dies\(dies, {int(how)}\): its process died {attempts} times \({how.name}"
    ) as caught:
        list(map_jobs(dies, jobs, 2, attempts))
    assert ATTEMPTS == 3
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_processes_hold_no_semaphore_with_ajob_name() -> None:
    """One that a process holds when it is killed is reported on standard error, from nowhere."""
    for lock, start in map_jobs(has_a_bar, [(1,), (2,)], 2):
        assert lock == "_thread"
        assert start != "loky"


@dataclass
class Named:
    """As a Run; and settings have a backbone, too, but no name."""

    backbone: str = "resnet"
    name: str | None = "digits-gap-s0"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((Named(), object(), 3), "product(digits-gap-s0, 3)"),
        ((Named(name=None), Path("/x"), "gap"), "product(gap)"),
        ((large, object(), "gap", "kfac"), "product(large, gap, kfac)"),
        (("gap", {"learning_rate": 0.5, "momentum": 0.9}, 1000), "product(gap, learning_rate=0.5 momentum=0.9, 1000)"),
        (({"a": [1] * 1000}, torch.zeros(3)), "product()"),
    ],
)
def test_the_name_of_a_job(arguments: tuple[Any, ...], name: str) -> None:
    assert job_name(product, arguments) == name


def killed_at_random(folder: Path, kills: int, stop: threading.Event, done: list[int]) -> None:
    """Kill one of the processes that wrote their number into `folder`, again and again, at moments that a seed decides."""
    generator = random.Random(0)
    while len(done) < kills and not stop.wait(generator.uniform(0.0, 0.4)):
        alive = [int(file.stem) for file in sorted(folder.glob("*.pid")) if not gone(int(file.stem))]
        if alive:
            victim = generator.choice(alive)
            os.kill(victim, signal.SIGKILL)
            done.append(victim)
            (folder / f"{victim}.pid").unlink()


@pytest.mark.parametrize("kills", [int(os.environ.get("SECONDORDER_TEST_KILLS", 3))])
def test_processes_killed_at_random_moments_change_nothing(tmp_path: Path, kills: int) -> None:
    """SECONDORDER_TEST_KILLS=30 is the long form."""
    stop, done, count = threading.Event(), list[int](), 40 * kills
    killer = threading.Thread(target=killed_at_random, args=(tmp_path, kills, stop, done), daemon=True)
    killer.start()
    try:
        results = list(map_jobs(naps, [(number, tmp_path) for number in range(count)], 2, attempts=kills + 1))
    finally:
        stop.set()
        killer.join(timeout=LONG)
    assert results == list(range(count))
    assert done


SLOW_IMPORT = """
import time

time.sleep(0.5)
get_num_threads, set_num_threads = lambda: 1, lambda number: None
"""
"""In the place of torch, which takes seconds of the processor to import: these processes have no other use for it."""
PARENT = """
import sys, time, os
from pathlib import Path
import torch
from studies.jobs import workers

def works(folder, number):
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    try:
        print("begun", flush=True)
        with workers(2) as jobs:
            list(jobs(works, [(sys.argv[1], 0), (sys.argv[1], 1)]))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own that has begun two jobs; what is left of the group is ended with the test."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    (tmp_path / "torch.py").write_text(SLOW_IMPORT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=signals_of_a_terminal,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with process:  # closes its pipes
        process.wait(timeout=LONG)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent(parent: subprocess.Popen[str], tmp_path: Path, how: signal.Signals) -> None:
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    parent.send_signal(how)
    assert parent.wait(timeout=LONG) != 0
    wait_for(lambda: all(gone(int(file.read_text())) for file in files))
    wait_for(lambda: not list(tmp_path.glob("secondorder-jobs-*")))


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.8])
def test_an_interruption_of_the_group_is_quiet_at_any_moment(parent: subprocess.Popen[str], delay: float) -> None:
    """Ctrl-C reaches all processes of a terminal, those too that are still importing; the delays are moments, not limits."""
    time.sleep(delay)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=LONG)
    assert parent.returncode == 130
    assert errors == ""
    wait_for(lambda: not members(parent.pid))


def members(group: int) -> list[int]:
    """The processes of a group that are not gone."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields: list[Any] = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
