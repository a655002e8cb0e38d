"""Jobs in processes side by side: one that dies is replaced, none outlives this process, and no wait is without an end.

The processes are those of loky, which replaces a pool that has lost one of them, whatever it held when it died. What this file
adds is who does what after such a loss, and that nothing but job numbers goes through the pool's pipes: functions, arguments and
outcomes are files of a temporary folder, so that a process that dies while it writes leaves half a file and never half a message.

It imports nothing that takes long, because every process of a pool imports it before it can be told anything.
"""

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
from loky import ProcessPoolExecutor
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from secondorder.atomic import write_atomically
from secondorder.errors import InputError

Result = TypeVar("Result")
ATTEMPTS = 3
"""How often a job is begun whose process dies."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Variables that libraries read when they are loaded."""
warnings.filterwarnings(
    "ignore", "A worker was restarted", UserWarning
)  # loky's, one that has grown; its jobs are done
INTERRUPTIONS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


class LostJobError(InputError):
    """A job whose process died every time."""


Map = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]
"""function(*a) for each a, in order, each as soon as it and those before it are there."""


@contextmanager
def workers(processes: int, attempts: int = ATTEMPTS) -> Iterator[Map]:
    """A `Map` whose jobs are done by processes, which begin with its first job, stay for the next ones and end with this context.

    A single job is done by this process.

    Args:
        processes: how many jobs run at a time, with one in this process; each has as many threads as this process has now. With
            more, function, arguments and results are pickled (by cloudpickle); what several jobs share is written once, and
            read once by each process.
        attempts: how often a job is begun whose process dies (for lack of memory, say). The jobs that were under way when one
            died are begun again one at a time, so that the next to die is known, and has the memory to itself.

    The map raises:
        LostJobError: naming the job whose process died at each attempt.
        Exception: the error of a job, when its turn comes. No job is begun after an error, and what is under way then is ended,
            as it is when this process is interrupted or killed.
    """
    if processes == 1:
        yield lambda function, arguments: (function(*a) for a in arguments)
        return
    with tempfile.TemporaryDirectory(prefix="secondorder-jobs-", ignore_cleanup_errors=True) as folder:
        pool = _Processes(Path(folder))

        def jobs(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
            if len(arguments) < 2:
                yield from (function(*a) for a in arguments)
                return
            place = Path(tempfile.mkdtemp(dir=folder))
            (place / "jobs").write_bytes(cloudpickle.dumps((function, list(arguments))))
            names = [job_name(function, a) for a in arguments]
            try:
                yield from _Queue(pool, place, names, min(processes, len(names)), attempts).results()
            except BaseException:  # also when nobody asks for the rest
                pool.close()
                raise
            finally:
                shutil.rmtree(place, ignore_errors=True)

        try:
            yield jobs
        finally:
            pool.close()


class _Processes:
    """The processes of a pool of loky's, and their end."""

    def __init__(self, folder: Path) -> None:
        import torch  # the processes import this file, too, before they need it

        self.folder, self.threads = folder, torch.get_num_threads()
        self.executor: ProcessPoolExecutor | None = None
        self.size = 0

    def submit(self, place: Path, number: int, size: int) -> "Future[int]":
        """Hand a job to a pool of at least so many processes."""
        if self.size < size:
            self.close()
        try:
            return self._submit(place, number, size)
        except BrokenExecutor:  # a process died that had nothing to do
            self.close()
            return self._submit(place, number, size)

    def _submit(self, place: Path, number: int, size: int) -> "Future[int]":
        resource_tracker.ensure_running()  # by itself it would begin under the mask below, and take it off
        with _signals_held_back():  # which the processes inherit: Ctrl-C is for this one, also while they still import
            if self.executor is None:
                self.size = size
                self.executor = ProcessPoolExecutor(
                    size,
                    initializer=_prepare,
                    initargs=(str(self.folder), self.threads, os.getpid()),
                    env=dict.fromkeys(THREADS, str(self.threads)),
                )
            return self.executor.submit(_do, str(place), number)

    def close(self) -> None:
        """End the processes, whatever they do."""
        if self.executor is not None:
            self.executor.shutdown(kill_workers=True)
            self.executor = None


class _Queue:
    """The jobs of one call of a map."""

    def __init__(self, pool: _Processes, place: Path, names: Sequence[str], room: int, attempts: int) -> None:
        self.pool, self.place, self.names, self.room, self.attempts = pool, place, names, room, attempts
        self.waiting = deque(range(len(names)))
        self.suspects: deque[int] = deque()
        """Jobs that were under way when a process died; while there are any, one job runs at a time."""
        self.running: dict[Future[int], int] = {}
        self.losses: Counter[int] = Counter()

    def results(self) -> Iterator[Any]:
        """The results in order; raises the first error in that order among the jobs that were begun."""
        outcomes: dict[int, tuple[bool, Any]] = {}
        for turn in range(len(self.names)):
            while turn not in outcomes and (self.waiting or self.suspects or self.running):
                for number in self._finished():
                    outcomes[number] = pickle.loads((self.place / str(number)).read_bytes())
                    (self.place / str(number)).unlink()
                    if not outcomes[number][0]:
                        self.waiting.clear()
                        self.suspects.clear()
            failed = (n for n, (good, _) in outcomes.items() if not good)
            number = turn if turn in outcomes else min(failed)  # a suspect that was not begun again after an error
            good, value = outcomes.pop(number)
            if not good:
                raise value
            yield value

    def _finished(self) -> list[int]:
        """Begin as many jobs as there is room for, and wait until one has ended: those that have an outcome."""
        suspicious = self.suspects or any(self.losses[number] for number in self.running.values())
        queue, room = (self.suspects, 1) if suspicious else (self.waiting, self.room)
        while queue and len(self.running) < room:
            number = queue.popleft()
            self.running[self.pool.submit(self.place, number, room)] = number
        ended, _ = wait(self.running, return_when=FIRST_COMPLETED)
        numbers = {self.running.pop(future): future.exception() for future in ended}
        if lost := {number: error for number, error in numbers.items() if error is not None}:
            # the pool is broken: the others under way die with it
            lost |= {number: next(iter(lost.values())) for number in self.running.values()}
            self.running.clear()
            self._lose(lost)
        return [number for number, error in numbers.items() if error is None]

    def _lose(self, lost: dict[int, BaseException]) -> None:
        """Note jobs whose process died; raises LostJobError for one that has had all its attempts."""
        self.pool.close()
        for number, error in sorted(lost.items()):
            if not isinstance(error, BrokenExecutor):
                raise error
            self.losses[number] += 1
            if self.losses[number] >= self.attempts:
                codes = re.search(r"\{(.*)\}", str(error))
                raise LostJobError(
                    f"{self.names[number]}: its process died {self.losses[number]} times ({codes[1] if codes else 'killed'}), "
                    "for lack of memory perhaps; use fewer --processes, the same command continues"
                ) from None
        self.suspects.extend(sorted(lost))


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Interruptions wait, here and for ever in processes begun meanwhile, unless those let them through."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def job_name(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """A job in words: its function with those arguments that are short to say, and the names of runs and functions."""
    words = [getattr(a, "__name__", None) if callable(a) else _word(a) for a in arguments]
    return f"{getattr(function, '__name__', 'job')}({', '.join(word for word in words if word is not None)})"


def _word(argument: Any) -> str | None:
    """An argument in a job's name; None for one that is left out."""
    name = getattr(argument, "name", None)
    if isinstance(name, str) and not isinstance(argument, Path):
        return name
    if isinstance(argument, dict) and all(isinstance(v, str | int | float) for v in argument.values()):
        return " ".join(f"{key}={value}" for key, value in argument.items())
    return str(argument) if isinstance(argument, str | int | float) else None


# What follows runs in the processes of a pool.

_jobs: dict[str, Any] = {}
"""Number of threads, and the place, the function and the arguments of the jobs that are done."""


def _prepare(folder: str, threads: int, parent: int) -> None:
    """Make a process ready: Ctrl-C is for its parent, with whom it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Semaphores of loky's way to start processes have names, and one that this process holds when it is killed is reported on
    # standard error. Libraries start processes here as in any other program, and progress bars need to lock out threads only.
    multiprocessing.set_start_method(None, force=True)
    tqdm.set_lock(threading.RLock())
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
    _jobs.update(threads=threads, place=None)
    threading.Thread(target=_end_with_the_parent, args=(parent, folder), daemon=True).start()


def _end_with_the_parent(parent: int, folder: str) -> None:
    """Leave at once when the parent is gone: a pool alone would wait for the jobs under way. Nobody else clears the folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _do(place: str, number: int) -> int:
    """Compute a job and write its outcome, (True, result) or (False, error), as a file: so that nothing large is sent."""
    try:
        if _jobs["place"] != place:
            function, arguments = pickle.loads((Path(place) / "jobs").read_bytes())
            _jobs.update(place=place, function=function, arguments=arguments)
            _share_threads(_jobs["threads"])
        content = cloudpickle.dumps((True, _jobs["function"](*_jobs["arguments"][number])))
    except BaseException as error:
        content = pickled_error(error)
    write_atomically(Path(place) / str(number), content)
    return number


def _share_threads(threads: int) -> None:
    """Keep every library to so many threads; those that are not loaded yet read it from the environment."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
    threadpool_limits(threads)  # of BLAS and OpenMP, of which SciPy and scikit-learn have copies of their own


def pickled_error(error: BaseException) -> bytes:
    """(False, error) with its traceback as a note; in words where the error itself cannot be pickled and read again."""
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(text)
        content = cloudpickle.dumps((False, error))
        pickle.loads(content)
    except Exception:
        content = cloudpickle.dumps((False, RuntimeError(text)))
    return content
