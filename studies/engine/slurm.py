"""Slurm as a scheduler of jobs, by submitit: what is killed at its time limit or preempted is requeued and goes on."""

import contextlib
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from secondorder.errors import InputError
from secondorder.training import resolve_device
from studies.engine.cluster import do_there, last_line
from studies.settings import Common

REQUEUES = 10_000
"""Time limits that a job may reach: a training of days on a partition of hours."""
LOOK = 0.1
"""Seconds from one look at the jobs to the next; submitit asks Slurm itself less often."""


class Requeued:
    """A job that submitit begins again when it gets SIGUSR2, which Slurm sends before the time limit: it finds its checkpoint."""

    def __call__(self, *arguments: Any) -> None:
        """Do the job; it leaves its outcome as a file."""
        do_there(*arguments)

    def checkpoint(self, *arguments: Any) -> Any:
        """Called by submitit in the signal's handler: what to submit in its place."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


class SubmititScheduler:
    """Jobs by submitit: each is a job of Slurm, which asks for what the command's ``--slurm`` flags say.

    Args:
        common: settings of the command; submitit's own files, logs among them, are in ``submitit`` inside its store.
        cluster: "slurm", or "local" for processes of this machine.

    Raises:
        InputError: when submitit is not installed, or there is no Slurm here.
    """

    def __init__(self, common: Common, cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError:
            raise InputError("--executor slurm needs submitit: pip install 'secondorder[slurm]'") from None
        self.common, self.folder = common, common.store_folder.absolute() / "submitit"
        try:
            self.executor = submitit.AutoExecutor(
                self.folder, cluster, slurm_max_num_timeout=REQUEUES, local_max_num_timeout=REQUEUES
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(f"--executor slurm: {str(error).partition(chr(10))[0]}; use --executor local") from None
        self.refused = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)
        flags = common.slurm
        gpus = flags.gpus if flags.gpus is not None else int(resolve_device(common.device).type != "cpu")
        self.executor.update_parameters(
            name="secondorder",
            timeout_min=flags.time,
            cpus_per_task=common.threads,
            gpus_per_node=gpus or None,
            mem_gb=flags.mem,
            slurm_partition=flags.partition,
            slurm_account=flags.account,
            slurm_additional_parameters={"requeue": True},
        )

    def begin(self, place: Path, number: int) -> Any:
        """Submit a job; InputError with Slurm's own words when it is refused."""
        try:
            return self.executor.submit(Requeued(), str(place), number, self.common.threads, str(Path.cwd()))
        except self.refused as error:
            raise InputError(f"--executor slurm: {last_line(error)}") from None

    def ended(self, handles: Collection[Any]) -> dict[Any, str]:
        """The jobs that are done or dead; of one that seems dead submitit waits some seconds for what is on its way."""
        while not (over := [job for job in handles if job.done()]):
            time.sleep(LOOK)
        return {job: last_line(job.exception()) for job in over}

    def cancel(self, handles: Collection[Any]) -> None:
        """Cancel these jobs by scancel, as far as Slurm answers."""
        for job in handles:
            with contextlib.suppress(Exception):  # it is over, or Slurm does not answer
                job.cancel(check=False)
