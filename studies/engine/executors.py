"""Who does the jobs of a command: processes of this machine, or a cluster. Same jobs, same files, same results.

An executor is a context with a function ``map(function, arguments)`` that gives function(*a) for each a, in order. Jobs are
independent, can be begun again, and leave what they did in the store: so a cluster's only duty is to run them where they see the
store, and their results are collected from there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from secondorder.errors import InputError, check_known
from studies.engine.store import Store
from studies.jobs import ATTEMPTS, LostJobError, Map, job_name, workers


def submitit_jobs(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    store: Store,
    processes: int,
    cluster: str = "slurm",
    minutes: int = 24 * 60,
) -> Iterator[Any]:
    """Jobs by submitit: each is a job of Slurm, `processes` of them at a time; one that dies is begun again.

    Args:
        function: what a job computes; it must find what an earlier attempt left, and return at once when all is there.
        arguments: one tuple for each job.
        store: seen by all machines; submitit's own files are in ``submitit`` inside it.
        processes: jobs at a time.
        cluster: "slurm", or "local" for processes of this machine.
        minutes: time limit of a job; one that reaches it is requeued and goes on from its checkpoint.

    Raises:
        InputError: when submitit is not installed, or there is no such cluster here.
        LostJobError: naming the job that died at each attempt.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("--executor slurm needs submitit: pip install 'secondorder[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=store.folder.absolute() / "submitit", cluster=cluster)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--executor slurm: {str(error).partition(chr(10))[0]}; use --executor local") from None
    executor.update_parameters(
        timeout_min=minutes, **({"slurm_array_parallelism": processes} if cluster == "slurm" else {})
    )
    waiting = list(enumerate(arguments))[::-1]
    running: dict[int, Any] = {}
    for turn, own in enumerate(arguments):
        for attempt in range(1, ATTEMPTS + 1):
            while waiting and len(running) < processes:
                number, values = waiting.pop()
                running[number] = executor.submit(function, *values)
            failure = running.pop(turn).exception()  # waits; a failed job has one
            if failure is None:
                break
            if not isinstance(failure, submitit.core.utils.UncompletedJobError):
                break  # the job's own error: raised below, where it is found again
            if attempt == ATTEMPTS:
                raise LostJobError(
                    f"{job_name(function, own)}: it died {attempt} times on the cluster; see {executor.folder}"
                )
            running[turn] = executor.submit(function, *own)
        yield function(*own)


def executor_of(name: str, store: Store, processes: int) -> AbstractContextManager[Map]:
    """The executor of a name, with so many jobs at a time; InputError for an unknown one."""
    check_known("executor", name, ("local", "slurm"))
    if name == "slurm":
        return nullcontext(partial(submitit_jobs, store=store, processes=processes))
    return workers(processes)
