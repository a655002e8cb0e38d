"""How processes side by side share what one has."""

from dataclasses import replace

from secondorder.training.processes import world_size
from studies.jobs import threads_each
from studies.settings import Common


def shared(common: Common, processes: int, tasks: int) -> tuple[Common, int]:
    """The settings of each of several processes that share the threads, and how many there are: no more than tasks.

    One when torchrun has started several for the same training.
    """
    processes = min(processes, tasks) if world_size() == 1 else 1
    return replace(common, threads=threads_each(common.threads, processes)), processes
