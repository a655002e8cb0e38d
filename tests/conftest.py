"""One thread and a fixed seed for every test, little work for the garbage collector, and a launcher of two processes."""

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_no_garbage() -> None:
    """Keep the million objects that imports leave out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Starts processes that may be killed, forked from a server that has imported the packages once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["studies.__main__", "sklearn.datasets"])
    return context


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script or ``-m module`` with arguments in two processes under torchrun, on the loopback interface only."""

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
        process = subprocess.Popen(
            [*command, f"--master_port={port}", *arguments],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher with both of its processes
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return launch
