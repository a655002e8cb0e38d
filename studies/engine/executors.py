"""Who does the jobs of a command: processes of this machine, or a cluster. Same jobs, same files, same results.

An executor is a context with a function ``map(function, arguments)`` that gives function(*a) for each a, in order. Jobs are
independent, can be begun again, and leave what they did in the store: so a cluster's only duty is to run them where they see the
store.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from secondorder.errors import InputError
from secondorder.training.processes import world_size
from studies.engine.cluster import Scheduler, cluster_jobs
from studies.jobs import Map, workers
from studies.settings import Common


@contextmanager
def executor_of(common: Common) -> Iterator[Map]:
    """The executor of a command, with as many jobs at a time as it says.

    Raises:
        InputError: when its library is not installed, there is no such cluster here, or the device is one of several.
    """
    if common.executor == "local":
        with workers(1 if world_size() > 1 else common.processes) as jobs:
            yield jobs
        return
    if ":" in common.device:
        raise InputError(f"--device {common.device}: a job on a cluster sees its own GPUs alone; use cuda")
    if world_size() > 1:
        raise InputError(f"--executor {common.executor}: each job is one process; leave torchrun out")
    if common.executor == "ray":
        from studies.engine.ray_cluster import ray_scheduler

        with ray_scheduler(common) as scheduler:
            yield on_cluster(scheduler, common)
    else:
        from studies.engine.slurm import SubmititScheduler

        yield on_cluster(SubmititScheduler(common), common)


def on_cluster(scheduler: Scheduler, common: Common) -> Map:
    """The jobs of a scheduler as a `Map`."""
    return partial(cluster_jobs, scheduler, common.store_folder.absolute() / common.executor, common.processes)
