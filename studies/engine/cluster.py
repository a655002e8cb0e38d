"""Jobs on a cluster: who begins which, what is begun again, and how outcomes come back.

A scheduler is told a folder and a number for each job, and nothing else: function and arguments are one file in that folder,
which all machines see, and the outcome of a job is a file beside it. A job that ends without one has died.
"""

import os
import pickle
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import torch
from threadpoolctl import threadpool_limits

from secondorder.atomic import write_atomically
from studies.jobs import ATTEMPTS, LostJobError, job_name, pickled_error

JOBS = "jobs"
"""File of the function and of the arguments of all jobs of a call."""


class Scheduler(Protocol):
    """What runs jobs; a handle is whatever tells one job that was begun from another."""

    def begin(self, place: Path, number: int) -> Any:
        """Begin `do_there(place, number, ...)` in a process of its own; its handle, a dictionary's key."""

    def ended(self, handles: Collection[Any]) -> Mapping[Any, str]:
        """Those that have ended, each with how in words, should it have died; waits until there is one."""

    def cancel(self, handles: Collection[Any]) -> None:
        """End what is under way."""


def cluster_jobs(
    scheduler: Scheduler,
    folder: Path,
    processes: int,
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
) -> Iterator[Any]:
    """function(*a) for each a, in order, by the jobs of a scheduler; see `studies.jobs.workers`, whose contract it is.

    Args:
        scheduler: runs the jobs.
        folder: seen by all machines; a folder inside it is there as long as the jobs are.
        processes: jobs at a time.
        function: what a job computes; it must find what an earlier attempt left.
        arguments: one tuple for each job.

    Raises:
        LostJobError: naming the job that died at each of `ATTEMPTS` attempts.
        Exception: the error of a job, as it is, when its turn comes. No job is begun after an error, and what is under way when
            it is raised is ended, as it is when this process is interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="jobs-", dir=folder)).absolute()
    names = [job_name(function, values) for values in arguments]
    queue = _Queue(scheduler, place, names, processes)
    try:
        write_atomically(place / JOBS, cloudpickle.dumps((function, list(arguments))))
        yield from queue.results()
    finally:
        scheduler.cancel([*queue.running])
        shutil.rmtree(place, ignore_errors=True)


class _Queue:
    """The jobs of one call."""

    def __init__(self, scheduler: Scheduler, place: Path, names: Sequence[str], room: int) -> None:
        self.scheduler, self.place, self.names, self.room = scheduler, place, names, room
        self.waiting = deque(range(len(names)))
        self.running: dict[Any, int] = {}
        self.losses: Counter[int] = Counter()
        self.failed = False

    def results(self) -> Iterator[Any]:
        """The results in order; raises the first error in that order among the jobs that were begun."""
        outcomes: dict[int, tuple[bool, Any]] = {}
        for turn in range(len(self.names)):
            while turn not in outcomes and (self.waiting or self.running):
                outcomes |= self._finished()
            number = turn if turn in outcomes else min(n for n, (good, _) in outcomes.items() if not good)
            good, value = outcomes.pop(number)
            if not good:
                raise value
            yield value

    def _finished(self) -> dict[int, tuple[bool, Any]]:
        """Begin as many jobs as there is room for and wait until one has ended: the outcomes that are new, if any."""
        while self.waiting and len(self.running) < self.room:
            number = self.waiting.popleft()
            self.running[self.scheduler.begin(self.place, number)] = number
        outcomes = {}
        for handle, how in self.scheduler.ended([*self.running]).items():
            number = self.running.pop(handle)
            file = self.place / str(number)
            if file.exists():
                outcomes[number] = pickle.loads(file.read_bytes())
                file.unlink()
                self.failed |= not outcomes[number][0]
            else:
                self._lose(number, how)
        if self.failed:
            self.waiting.clear()
        return outcomes

    def _lose(self, number: int, how: str) -> None:
        """Begin a job again that died; LostJobError when it has had all its attempts."""
        self.losses[number] += 1
        if self.losses[number] >= ATTEMPTS:
            raise LostJobError(
                f"{self.names[number]}: it died {self.losses[number]} times on the cluster ({how}), for lack of memory perhaps; "
                "the same command continues"
            )
        self.waiting.appendleft(number)


def last_line(error: BaseException | None) -> str:
    """What a scheduler says of a job that failed, which ends with the reason; "" of one that did not."""
    return next((line.strip() for line in reversed(str(error or "").splitlines()) if line.strip()), "")[:120]


_there: dict[str, Any] = {}
"""In a process of the cluster: place, function and arguments of its jobs, which are read once."""


def do_there(place: str, number: int, threads: int, folder: str) -> None:
    """A job in a process of the cluster: its outcome, (True, result) or (False, error), is written as a file.

    Args:
        place: the folder of the call.
        number: of the job.
        threads: that every library may use.
        folder: the working folder of the command, to which its paths are relative.
    """
    os.chdir(folder)
    try:
        if _there.get("place") != place:
            function, arguments = pickle.loads((Path(place) / JOBS).read_bytes())
            _there.update(place=place, function=function, arguments=arguments)
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            content = cloudpickle.dumps((True, _there["function"](*_there["arguments"][number])))
    except Exception as error:  # an exit is none: it is how a scheduler ends a job that it begins again
        content = pickled_error(error)
    write_atomically(Path(place) / str(number), content)
