"""Ray as a scheduler of jobs: a cluster that is there, or one of this machine that begins and ends with the command."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from secondorder.errors import InputError
from secondorder.training import resolve_device
from studies.engine.cluster import do_there, last_line
from studies.settings import Common

LONGEST = 107
"""Bytes of the path of a Unix socket."""
SOCKET = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.0000000"
"""What Ray adds to its folder, at most."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of a Ray of this machine: nothing is reported, no token is written into the home folder, addresses are those of the
loopback interface, and what CUDA sees stays as it is for jobs without a GPU."""

OBJECTS = 128 * 2**20
"""Bytes of shared memory of a Ray of this machine: what jobs give back goes through files."""


class RayScheduler:
    """Jobs as tasks of the Ray that this process is connected to, each with its own CPUs and perhaps a GPU."""

    def __init__(self, ray: Any, threads: int, gpus: int) -> None:
        self.ray, self.threads = ray, threads
        # a process that has had a GPU keeps its context there, so that the next job gets a new one
        options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0, "max_calls": 1 if gpus else 0}
        self.do = ray.remote(**options)(do_there)

    def begin(self, place: Path, number: int) -> Any:
        """Hand over a task; it waits in Ray until its CPUs are free."""
        return self.do.remote(str(place), number, self.threads, str(Path.cwd()))

    def ended(self, handles: Collection[Any]) -> dict[Any, str]:
        """The tasks that are done or dead."""
        over, _ = self.ray.wait([*handles], num_returns=1)
        return {handle: self._how(handle) for handle in over}

    def _how(self, handle: Any) -> str:
        try:
            self.ray.get(handle)
        except self.ray.exceptions.RayTaskError as error:
            return last_line(error)
        except self.ray.exceptions.RayError as error:
            return str(error).partition("\n")[0].partition(". ")[0]
        return ""

    def cancel(self, handles: Collection[Any]) -> None:
        """Kill the processes of these jobs, as far as Ray finds them."""
        for handle in handles:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.cancel(handle, force=True)


@contextmanager
def ray_scheduler(common: Common) -> Iterator[RayScheduler]:
    """Connect to the cluster at RAY_ADDRESS, or else begin one of this machine, which nothing outlives.

    Ray's files of the latter are in ``ray`` inside the store while it runs, or where the path of a socket would be too long
    there in a temporary folder.

    Raises:
        InputError: when Ray is not installed, does not begin, or has no machine that can do a job.
    """
    gpus = int(resolve_device(common.device).type != "cpu")
    is_here = "RAY_ADDRESS" not in os.environ
    with ExitStack() as ended:
        if is_here:
            ended.enter_context(_environment(QUIET))  # some of which Ray reads when it is imported
        try:
            import ray
        except ImportError:
            raise InputError("--executor ray needs ray: pip install 'secondorder[ray]'") from None
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if not is_here:
            options["address"] = "auto"
        else:
            options |= {"address": "local", "include_dashboard": False, "num_cpus": common.processes * common.threads}
            options["object_store_memory"] = OBJECTS
            options["_temp_dir"] = str(ended.enter_context(_folder(common.store_folder.absolute())))
        ended.callback(ray.shutdown)
        try:
            with _handlers_as_they_are():
                ray.init(**options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"--executor ray: {last_line(error)}; use --executor local") from None
        _check_room(ray.nodes(), common.threads, gpus)
        yield RayScheduler(ray, common.threads, gpus)


def _check_room(nodes: list[dict[str, Any]], threads: int, gpus: int) -> None:
    """InputError when a job would wait for ever: no machine has as much as one needs."""
    has = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(one.get("CPU", 0) >= threads and one.get("GPU", 0) >= gpus for one in has):
        needs = f"{threads} CPUs" + (" and a GPU" if gpus else "")
        raise InputError(f"--executor ray: no machine of the cluster has {needs}, which a job needs; see --threads")


@contextmanager
def _folder(store: Path) -> Iterator[Path]:
    """A folder for Ray that is removed at the end: in the store if its path is short enough."""
    inside = store / "ray"
    if len(os.fsencode(f"{inside}{SOCKET}")) <= LONGEST:
        inside.mkdir(parents=True, exist_ok=True)
    else:
        inside = Path(tempfile.mkdtemp(prefix="ray-"))
    try:
        yield inside
    finally:
        shutil.rmtree(inside, ignore_errors=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that Ray and its processes read, unless they are set already; at the end all are as they were."""
    before = dict(os.environ)
    os.environ.update(values | before)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _handlers_as_they_are() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM, by which the studies end in order."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)
