"""The store of trained networks: each is trained once, whoever asks, and kept with its snapshots.

A network has a folder of its own, named by everything that determines its numbers: all fields of its `Run` and, for networks
and data of the user's, digests of them. While it is trained the folder holds the checkpoint that training resumes from; it is
finished once ``trained.json`` is there:

    <store>/digits-digits_net-gcp-s0-1f0c5a7e2b9d/
        checkpoint.pt          the last state
        step-60.pt             snapshots, as many as were asked for
        trained.json           run, history and losses, seconds, commit; with a digest
        measured/<key>.json    records of measurements; with a digest
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from secondorder.atomic import write_atomically
from secondorder.data import ImageDataset
from secondorder.data.own import is_own
from secondorder.errors import InputError
from secondorder.training import Run, TensorBoard, Tracker, load_checkpoint, on_main, resolve_device, train
from secondorder.training.checkpoint import CHECKPOINT, snapshot_name
from secondorder.training.setup import first_model
from secondorder.training.weights import Initial, OwnNetwork
from studies.machine import device_name, git_commit
from studies.results import read_sealed, write_sealed

FORMAT = 1
TRAINED, MEASURED, COMMIT, AGAIN, LOCK = "trained.json", "measured", "commit.json", "again", ".entry.lock"


@dataclass(frozen=True)
class Subject:
    """A network that is trained: its run and data, and what of it is the user's own."""

    run: Run
    data: ImageDataset
    network: OwnNetwork | None = None
    initial: Initial | None = None

    @cached_property
    def name(self) -> str:
        """The folder's name: readable, with a digest of everything that determines the numbers."""
        run, settings = self.run, self.run.to_dict() | {"data": self.data.name}
        if is_own(self.data.name):
            settings["samples"] = self.data.provenance["samples_sha256"]
        if self.network is not None or self.initial is not None:
            settings["origin"] = first_model(run, self.data, self.network, self.initial)[1]
        return f"{run.dataset}-{run.backbone}-{run.pooling}-s{run.seed}-{digest(settings)}"

    @property
    def labels(self) -> dict[str, Any]:
        """What the records of the network have in common."""
        run = self.run
        return {
            "network": run.backbone,
            "head": run.pooling,
            "trained_under": run.pooling,
            "dataset": self.data.name,
            "optimizer": run.optimizer,
            "schedule": run.schedule,
            "seed": run.seed,
        }


class Entry:
    """The folder of one network in the store."""

    def __init__(self, folder: Path, subject: Subject, events: Path | None = None) -> None:
        self.folder, self.subject, self.events = folder, subject, events

    def ensure(self, steps: Collection[int], progress: bool = False) -> dict[str, Any]:
        """Train the network unless it is trained, with snapshots after so many steps; what ``trained.json`` holds of it.

        Snapshots that training has not kept are made by continuing from the nearest one before. When another process trains
        the same network it is waited for.

        Raises:
            InputError: for what `train` refuses, a folder that cannot be written, and a damaged or foreign entry.
            NonFiniteLossError: when training diverges.
        """
        on_main(lambda: _make(self.folder))
        with _held(self.folder):
            if not on_main((self.folder / TRAINED).is_file):
                self._train(self._still_to_come(steps), progress)
            elif self.events is not None:
                on_main(lambda: follow(self.tracker, self.subject.run, self.training()))
            training = self.training()
            if lost := on_main(lambda: [s for s in sorted(steps) if s < training["total"] and not self.has(s)]):
                self._train_again(lost, progress)
        return training

    def has(self, step: int) -> bool:
        """Whether the snapshot after so many steps is kept."""
        return (self.folder / snapshot_name(step)).exists()

    def file(self, step: int) -> Path:
        """The snapshot after so many steps; that of the last one is the checkpoint."""
        return self.folder / (snapshot_name(step) if self.has(step) else CHECKPOINT)

    def training(self) -> dict[str, Any]:
        """The training's history, step_losses, total, seconds, commit, device and data; InputError when it is damaged."""
        content = cast(dict[str, Any], read_sealed(self.folder / TRAINED, self._way_out))
        if content.get("format") != FORMAT:
            raise InputError(
                f"{self.folder} was written by another version, format {content.get('format')!r}; {self._way_out}"
            )
        return content

    def measured(self, key: str, compute: Callable[[], Any]) -> Any:
        """What is kept under a key, which is computed when there is nothing; InputError when it is damaged."""
        return kept(self.folder / MEASURED / f"{key}.json", compute)

    @property
    def _way_out(self) -> str:
        return "delete this folder, and the same command trains the network again"

    def _still_to_come(self, steps: Collection[int]) -> list[int]:
        """The snapshots that an interrupted training can still keep, which goes on from the last state that there is."""

        def begin() -> list[int]:
            state = load_checkpoint(self.folder)
            done = 0 if state is None else int(state["progress"]["step"])
            newest = max(self._kept_steps(), default=0)
            if newest > done:
                write_atomically(self.folder / CHECKPOINT, (self.folder / snapshot_name(newest)).read_bytes())
            return [step for step in steps if step >= max(done, newest) or self.has(step)]

        return on_main(begin)

    def _kept_steps(self) -> list[int]:
        """The steps after which there is a snapshot."""
        return [int(file.stem.removeprefix("step-")) for file in self.folder.glob("step-*.pt")]

    def _train(self, steps: Collection[int], progress: bool) -> None:
        run, data = self.subject.run, self.subject.data
        on_main(lambda: kept(self.folder / COMMIT, git_commit))
        trained = self._trained_in(self.folder, steps, progress, tracker=self.tracker)
        content = {
            "format": FORMAT,
            "run": run.to_dict(),
            "total": len(trained.step_losses),
            "history": trained.history,
            "step_losses": trained.step_losses,
            "seconds": trained.seconds,
            "commit": read_sealed(self.folder / COMMIT),
            "device": device_name(resolve_device(run.device)),
            "data": {"label": data.label, **data.provenance},
        }
        on_main(lambda: write_sealed(self.folder / TRAINED, content))

    def _train_again(self, lost: list[int], progress: bool) -> None:
        """Make snapshots that were not kept, in a folder inside, from the nearest one before the first of them."""
        again = self.folder / AGAIN
        before = [step for step in self._kept_steps() if step < lost[0]]

        def begin() -> None:
            shutil.rmtree(again, ignore_errors=True)
            _make(again)
            if before:
                write_atomically(again / CHECKPOINT, (self.folder / snapshot_name(max(before))).read_bytes())

        def move() -> None:
            for step in lost:
                (again / snapshot_name(step)).replace(self.folder / snapshot_name(step))
            shutil.rmtree(again, ignore_errors=True)

        on_main(begin)
        self._trained_in(again, lost, progress, until=lost[-1])
        on_main(move)

    @property
    def tracker(self) -> TensorBoard | None:
        """Writes events of the training, if they are wanted, into a folder with the name of the entry."""
        return None if self.events is None else TensorBoard(self.events, self.folder.name)

    def _trained_in(
        self,
        folder: Path,
        steps: Collection[int],
        progress: bool,
        until: int | None = None,
        tracker: TensorBoard | None = None,
    ) -> Any:
        subject = self.subject
        return train(
            subject.run,
            subject.data,
            folder,
            network=subject.network,
            initial=subject.initial,
            snapshots=steps,
            until=until,
            resume=True,
            progress=progress,
            tracker=tracker,
        )


class Store:
    """All trained networks of a folder; with `events` their trainings are written there for TensorBoard."""

    def __init__(self, folder: Path, events: Path | None = None) -> None:
        self.folder, self.events = folder, events

    def entry(self, subject: Subject) -> Entry:
        """The entry of a network, trained or not."""
        return Entry(self.folder / subject.name, subject, self.events)

    def forget(self, name: str) -> None:
        """Remove an entry, or what was computed under a key; nothing if there is neither."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self._computed(name).unlink(missing_ok=True)

    def _computed(self, key: str) -> Path:
        return self.folder / "computed" / f"{key}.json"

    def computed(self, key: str, compute: Callable[[], Any]) -> Any:
        """What is kept under a key that belongs to no network."""
        return kept(self._computed(key), compute)


def follow(tracker: Tracker | None, run: Run, training: dict[str, Any]) -> None:
    """Tell a tracker of a training that is over."""
    if tracker is not None:
        tracker.begin(run)
        tracker.update(training["history"], training["step_losses"])
        tracker.end(finished=True)


def digest(settings: Any) -> str:
    """12 digits of the sha256 of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def kept(file: Path, compute: Callable[[], Any]) -> Any:
    """What is in a sealed file, which is computed and written when it does not exist; InputError when it is damaged."""
    if not os.path.lexists(file):
        value = compute()
        _make(file.parent)
        write_sealed(file, value)
    return read_sealed(file)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder} in the store: {error.strerror}; choose another with --store") from None


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold an entry, once another command that holds it is done or dead: the system takes a lock from the dead.

    The processes of one distributed training hold it together.
    """
    lock = FileLock(folder / LOCK)
    on_main(lambda: _acquire(lock, folder))
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    said = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1.0)
        except Timeout:
            if not said:
                print(f"waiting for another command that trains {folder.name}", flush=True)
            said = True
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot lock {folder}: {reason}; choose another store with --store") from None
