"""SIGINT, SIGTERM and SIGHUP end the studies in one line, whatever they are doing; real processes, every wait with an end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from terminal import signals_of_a_terminal

from studies.__main__ import main
from studies.interruption import SIGNALS, Interruption

PATIENCE = 120.0
"""Seconds that a test waits at most for another process; most of it is for a busy machine."""
LONG = ["landscape", "--preset", "smoke", "--no-progress", "--threads", "1", "--epochs", "5000", "--seeds", "1"]
RUN = [*LONG, "--heads", "gap"]


@contextmanager
def started(*command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the end if it is still there."""
    process = subprocess.Popen(  # type: ignore[call-overload]
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "WORLD_SIZE"},
        preexec_fn=signals_of_a_terminal,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Whether the process has a handler for SIGTERM: the system says so."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc to know when the handlers are there"
)


@linux
@pytest.mark.parametrize("number", SIGNALS)
def test_while_libraries_are_imported(number: signal.Signals, tmp_path: Path) -> None:
    with started(sys.executable, "-m", "studies", *RUN, "--out", str(tmp_path / "out")) as process:
        wait_until(lambda: handles_signals(process), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert err == f"interrupted by {number.name}; nothing has been computed yet\n"
    assert out == ""
    assert not (tmp_path / "out").exists()


def study(arguments: list[str], errors: str, ignored: tuple[int, ...]) -> None:
    """In a process of its own: run the studies, standard error in a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    sys.exit(main(arguments))


@pytest.fixture
def training(forkserver: ForkServerContext, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a long training, in a process that need not import anything, and waits until it is under way."""
    processes: list[Any] = []

    def start(*ignored: int) -> Any:
        process = forkserver.Process(
            target=study, args=([*RUN, "--out", str(tmp_path)], str(tmp_path / "err"), ignored)
        )
        process.start()
        processes.append(process)
        deadline = time.monotonic() + PATIENCE
        while not list(tmp_path.glob("store/*/.lock")):
            assert process.exitcode is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join(PATIENCE)


@pytest.mark.parametrize(("number", "times"), [*((number, 1) for number in SIGNALS), (signal.SIGINT, 2)])
def test_in_a_training(number: signal.Signals, times: int, training: Callable[..., Any], tmp_path: Path) -> None:
    process = training()
    for _ in range(times):
        os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == 128 + number
    assert (tmp_path / "err").read_text() == (f"interrupted by {number.name}; the same command continues\n")
    assert not list(tmp_path.glob("store/*/trained.json"))
    assert not list(tmp_path.glob("**/.*.partial"))


def test_what_is_ignored_stays_ignored(training: Callable[..., Any], tmp_path: Path) -> None:
    """SIGHUP under nohup, SIGINT of a job in the background."""
    process = training(signal.SIGHUP, signal.SIGINT)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.kill(process.pid, number)
    process.join(1.0)  # time in which it would end
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGTERM


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_nothing_is_handled() -> None:
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            with Interruption():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(PATIENCE)
    assert failed == []


def test_under_torchrun_a_process_ends_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for the others in C runs no handler of Python's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) == before
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
