import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

from studies import parallel
from studies.parallel import shared, side_by_side, threads_each
from studies.settings import Common


def product(a: int, b: int) -> tuple[int, int, int]:
    return a * b, os.getpid(), torch.get_num_threads()


def most_threads(number: int) -> tuple[int, int]:
    """Of any library that is loaded here, and how many there are."""
    import sklearn.linear_model  # noqa: F401 - it comes with an OpenMP and a BLAS of its own, after the beginning

    threads = [library["num_threads"] for library in threadpool_info()]
    return max(threads), len(threads)


def fails(a: int) -> int:
    if a == 2:
        raise ValueError(f"argument {a}")
    return a


def test_results_come_in_order_from_other_processes_that_share_the_threads() -> None:
    results = side_by_side(product, [(1, 2), (3, 4), (5, 6)], processes=2)
    assert [value for value, _, _ in results] == [2, 12, 30]
    assert os.getpid() not in {process for _, process, _ in results}
    assert {threads for _, _, threads in results} == {threads_each(torch.get_num_threads(), 2)}


def test_no_library_takes_more_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = side_by_side(most_threads, [(0,), (1,)], processes=2)
    finally:
        torch.set_num_threads(before)
    for most, libraries in found:
        assert libraries >= 2
        assert most == 2


def test_no_more_processes_than_tasks_and_one_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    common = Common(threads=6)
    assert shared(common, 3, 10) == (replace(common, threads=2), 3)
    assert shared(common, 3, 2) == (replace(common, threads=3), 2)
    assert shared(common, 3, 1) == (common, 1)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    assert shared(common, 3, 10) == (common, 1)


def test_one_process_is_this_one() -> None:
    assert side_by_side(product, [(1, 2), (3, 4)], processes=1) == [
        (2, os.getpid(), torch.get_num_threads()),
        (12, os.getpid(), torch.get_num_threads()),
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_error_is_raised(processes: int) -> None:
    with pytest.raises(ValueError, match="argument 2"):
        side_by_side(fails, [(1,), (2,), (3,)], processes)


@pytest.mark.parametrize(("threads", "processes", "each"), [(2, 2, 1), (1, 2, 1), (8, 3, 2), (2, 1, 2)])
def test_threads_are_divided(threads: int, processes: int, each: int) -> None:
    assert threads_each(threads, processes) == each


PARENT = """
import sys, time, os
from pathlib import Path
from studies.parallel import side_by_side

def works(folder, number):
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    side_by_side(works, [(sys.argv[1], 0), (sys.argv[1], 1)], 2)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parent.parent
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    parent.send_signal(how)
    assert parent.wait(timeout=30) != 0
    wait_for(lambda: all(gone(int(file.read_text())) for file in files))


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
