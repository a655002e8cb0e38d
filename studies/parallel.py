"""The same function for many arguments, in processes side by side."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from secondorder.training.processes import world_size
from studies.settings import Common

Result = TypeVar("Result")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that libraries read when they are loaded."""


def side_by_side(function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], processes: int) -> list[Result]:
    """[function(*a) for a in arguments], in order: see `one_after_another`."""
    return list(one_after_another(function, arguments, processes))


def one_after_another(
    function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], processes: int
) -> Iterator[Result]:
    """function(*a) for each a, in order, each as soon as it and those before it are there.

    With more than one process the function and all values are pickled, and the threads of this process are divided among them,
    at least one each. The first error is raised here; what has not begun by then is not begun, and what is under way is ended,
    as it is when this process is interrupted or killed.
    """
    if processes == 1 or len(arguments) < 2:
        yield from (function(*a) for a in arguments)
        return
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    begin = (threads_each(torch.get_num_threads(), processes), end)
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=begin) as pool:
        futures = [pool.submit(function, *a) for a in arguments]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end.set()
            raise


def shared(common: Common, processes: int, tasks: int) -> tuple[Common, int]:
    """The settings of each of several processes that share the threads, and how many there are: no more than tasks.

    One when torchrun has started several for the same training.
    """
    processes = min(processes, tasks) if world_size() == 1 else 1
    return replace(common, threads=threads_each(common.threads, processes)), processes


def threads_each(threads: int, processes: int) -> int:
    """Threads of one of several processes that share `threads`."""
    return max(1, threads // processes)


def _begin(threads: int, end: Event) -> None:
    """Prepare a process of the pool; an interruption from the keyboard is for its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    os.environ.update(dict.fromkeys(THREADS, str(threads)))  # for libraries that are not loaded yet
    threadpool_limits(threads)  # of BLAS and OpenMP, of which SciPy and scikit-learn have copies of their own
    threading.Thread(target=_end_with_the_parent, args=(end,), daemon=True).start()


def _end_with_the_parent(end: Event) -> None:
    """Leave at once when told to, or when the parent is gone: the executor alone would wait for tasks under way."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not end.wait(0.5) and parent.is_alive():
        pass
    os._exit(1)
