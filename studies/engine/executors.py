"""Who does the jobs of a command: processes of this machine, or a cluster. Same jobs, same files, same results.

An executor is a function ``executor(function, arguments, processes)`` that gives function(*a) for each a, in order. Jobs are
independent, can be begun again, and leave what they did in the store: so a cluster's only duty is to run them where they see the
store, and their results are collected from there.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from secondorder.errors import InputError, check_known
from studies.engine.store import Store
from studies.jobs import ATTEMPTS, LostJobError, job_name, map_jobs

Executor = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], int], Iterator[Any]]


def submitit_jobs(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    processes: int,
    *,
    store: Store,
    cluster: str = "slurm",
    minutes: int = 24 * 60,
) -> Iterator[Any]:
    """Jobs by submitit: each is a job of Slurm, `processes` of them at a time; one that dies is begun again.

    Args:
        function: what a job computes; it must find what an earlier attempt left, and return at once when all is there.
        arguments: one tuple for each job.
        processes: jobs at a time.
        store: seen by all machines; submitit's own files are in ``submitit`` inside it.
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


def executor_of(name: str, store: Store) -> Executor:
    """The executor of a name; InputError for an unknown one."""
    table: dict[str, Executor] = {"local": map_jobs, "slurm": partial(submitit_jobs, store=store)}
    check_known("executor", name, table)
    return table[name]
