"""One thread and a fixed seed for every test, little work for the garbage collector, and ways to start and kill studies."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from secondorder.accelerator import seed_random_numbers


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seed_random_numbers(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_no_garbage() -> None:
    """Keep the million objects that imports leave out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_uncompiled() -> Iterator[None]:
    """An optimiser of secondorder.kfac that lives longer than its file would keep what other files compile uncompiled."""
    yield
    hooks = sys.modules.get("secondorder.kfac.capture.hooks")
    if hooks is not None and hooks.Uncompiled._present:
        gc.collect()
        assert not hooks.Uncompiled._present, "an optimiser is still there: what keeps it, a cache?"


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Starts processes that may be killed, forked from a server that has imported the packages once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["studies.program", "sklearn.datasets", "torch._dynamo"])
    return context


@pytest.fixture
def killed(forkserver: ForkServerContext) -> Callable[..., None]:
    """Start the studies, or another function, with some arguments and kill the process as soon as a condition holds."""
    from studies.__main__ import main  # of the tests of studies only: it takes a second

    def kill_when(condition: Callable[[], bool], *arguments: Any, target: Any = main, seconds: float = 240.0) -> None:
        process = forkserver.Process(target=target, args=arguments)
        process.start()
        deadline = time.monotonic() + seconds
        try:
            while not condition():
                assert process.exitcode is None, "the process ended before it could be killed"
                assert time.monotonic() < deadline, f"nothing to be killed after {seconds} s"
                time.sleep(0.01)
        finally:
            process.kill()
            process.join(60)
        assert process.exitcode == -signal.SIGKILL

    return kill_when


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Start the studies with bad arguments: exit code 2, one line that has the words, and no result."""
    from studies.__main__ import main

    def one_line(words: str, *arguments: str) -> None:
        assert main([*arguments, "--out", str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
        assert not list(tmp_path.glob("*.csv"))

    return one_line


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script or ``-m module`` with arguments in two processes under torchrun, on the loopback interface only.

    They find the modules that the tests find, also the studies, which are not installed.
    """

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        # torchrun binds a port that is free when it binds it, and tells the processes which
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *rendezvous, *arguments],
            env=os.environ
            | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=250)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher with both of its processes
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return launch
