"""Settings that all studies share: where results go, on which device, with how many seeds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from secondorder.atomic import check_writable, exclusive
from secondorder.errors import InputError, check_known
from secondorder.training import resolve_device
from secondorder.training.device import check_device

Preset = Literal["smoke", "quick", "cifar10", "paper"]
PRESETS: dict[str, str] = {
    "smoke": "seconds, for tests",
    "quick": "minutes on two CPU cores, on scikit-learn's digits",
    "cifar10": "hours a study on two CPU cores, resumable, on CIFAR-10",
    "paper": "the published ImageNet settings; days on GPUs",
}
MOST_SEEDS = 1000
MOST_JOBS = 10_000
"""Jobs at a time on a cluster."""
EXECUTORS: dict[str, str] = {
    "local": "processes of this machine",
    "slurm": "jobs of Slurm, by submitit",
    "ray": "tasks of Ray: of the cluster at RAY_ADDRESS, else of one that is started here and ends with the command",
}


@dataclass(frozen=True)
class Slurm:
    """What every job asks Slurm for (``--executor slurm``), in sbatch's words."""

    partition: str | None = None
    """Partition; Slurm's default when not given."""
    account: str | None = None
    """Account that is charged; the user's default when not given."""
    time: int = 24 * 60
    """Minutes that a job may take; one that needs longer is requeued before, and goes on from its checkpoint."""
    gpus: int | None = None
    """GPUs of a job; when not given 1 with --device cuda (or xpu), else none."""
    mem: int | None = None
    """GB of memory of a job; the partition's default when not given."""

    def __post_init__(self) -> None:
        for name, value, least in (("time", self.time, 2), ("gpus", self.gpus, 0), ("mem", self.mem, 1)):
            if value is not None and value < least:
                raise InputError(f"--slurm.{name} {value}: at least {least}")


@dataclass(frozen=True)
class Common:
    """Settings that every study has, whichever it is."""

    preset: Preset = "quick"
    """Size of everything: smoke (seconds, for tests), quick (minutes, digits), cifar10 (hours a study), paper
    (ImageNet). Gives the defaults of all other flags."""
    out: Path | None = None
    """Folder for results, figures and report; reports/<preset> when not given."""
    data_root: Path | None = None
    """Folder that holds the data set; else the variable SECONDORDER_DATA."""
    download: bool = False
    """Let torchvision download a missing data set into the data root."""
    device: str = "cpu"
    """Where to compute: auto (the accelerator if there is one), cpu, cuda, mps or xpu; one of several as cuda:<index>."""
    seeds: int | None = None
    """Number of seeds, 0 to seeds - 1; intervals need at least 2. Each study has its own for the preset when not given."""
    processes: int = 2
    """Jobs side by side: trainings with their measurements, each of `threads` threads."""
    threads: int = 1
    """CPU threads that torch uses inside an operation; the last bits of a result depend on it."""
    executor: str = "local"
    """Who does the jobs: local (processes of this machine), slurm (by submitit) or ray; machines of a cluster see the store
    and the working folder."""
    slurm: Slurm = field(default_factory=Slurm)
    """What a job asks Slurm for."""
    store: Path | None = None
    """Folder of trained networks, shared by all studies and presets; the folder store in `out` when that is given, else
    reports/store."""
    fresh: bool = False
    """Train and measure everything again, whatever the tables and the store have."""
    dry_run: bool = False
    """Only build everything, take one training step and one measurement on fake data of the right shape, and state what
    the study would cost on this device."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's event files: losses, epochs and hyper-parameters of each network, and the figures."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        check_device(self.device, "off")
        if self.seeds is not None and not 1 <= self.seeds <= MOST_SEEDS:
            raise InputError(f"--seeds {self.seeds}: at least 1 seed is needed, and at most {MOST_SEEDS}")
        check_known("executor", self.executor, EXECUTORS)
        here = max(64, os.cpu_count() or 1)
        at_a_time = here if self.executor == "local" else MOST_JOBS
        for name, count, most in (("threads", self.threads, here), ("processes", self.processes, at_a_time)):
            if not 1 <= count <= most:
                raise InputError(f"--{name} {count}: use 1 to {most}")

    @property
    def folder(self) -> Path:
        """The folder of results, figures and report."""
        return self.out if self.out is not None else Path("reports") / self.preset

    @property
    def store_folder(self) -> Path:
        """The folder of trained networks."""
        return self.store or (Path("reports") if self.out is None else self.out) / "store"

    @property
    def torch_device(self) -> torch.device:
        """The device, checked to exist; InputError else."""
        return resolve_device(self.device)


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, prove that it can be written and keep other studies out; InputError that names it else."""
    try:
        check_writable(folder)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError):
            reason = "it is a link to nowhere" if folder.is_symlink() else "it is a file"
        raise InputError(f"cannot write to the output folder {folder}: {reason}; choose another with --out") from None
    with exclusive(folder):
        yield
