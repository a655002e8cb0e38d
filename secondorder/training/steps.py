"""One training in progress: its steps, epochs, observers, checkpoints and snapshots, and what is said when it diverges."""

import math
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from secondorder.accelerator import wait_for
from secondorder.data import ImageDataset
from secondorder.data.files import shown
from secondorder.data.own import is_own
from secondorder.errors import InputError, NonFiniteError, check_whole, first_line
from secondorder.training import checkpoint, processes
from secondorder.training.batch_norm import desynchronise, without_synchronisation
from secondorder.training.batches import batches
from secondorder.training.device import autocast, seed_step
from secondorder.training.divergence import NonFiniteLossError, all_finite, divergence, left_range
from secondorder.training.evaluation import evaluate, to_device
from secondorder.training.losses import UnreadLosses, step_loss
from secondorder.training.observers import Moment, Observer, Row, intervals, observe
from secondorder.training.parts import set_learning_rate, train_mode
from secondorder.training.run import Run
from secondorder.training.schedules import SCHEDULES
from secondorder.training.setup import first_state
from secondorder.training.state import Progress, Trained
from secondorder.training.tensorboard import Tracker
from secondorder.training.weights import Initial, OwnNetwork


class Training:
    """One training in progress: network, optimiser and progress of a run, with its observers and checkpoints."""

    def __init__(
        self,
        run: Run,
        data: ImageDataset,
        folder: Path,
        observers: Mapping[str, Observer],
        device: torch.device,
        network: OwnNetwork | None,
        initial: Initial | None,
    ) -> None:
        self.run, self.data, self.folder, self.observers, self.device = run, data, folder, observers, device
        self.intervals = intervals(observers)
        self.own_data = is_own(data.name)
        self.schedule = SCHEDULES[run.schedule]
        self.steps_per_epoch = len(data.train) // run.batch_size
        self.total = self.end = self.steps_per_epoch * run.epochs
        self.snapshots: frozenset[int] = frozenset()
        self.model, self.optimizer, origin = first_state(run, data, device, network, initial)
        self.identity = checkpoint.identity(run, data, self.intervals, origin)
        self.learning_rate = run.learning_rate
        self.update_curvature = getattr(self.optimizer, "update_curvature", None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp == "float16")
        self.progress = Progress(records={name: [] for name in observers})
        self.tracker: Tracker | None = None
        self.unread = UnreadLosses(device)

    def continue_to_the_end(self, checkpoint_every: float, show: bool, workers: int) -> None:
        """All steps that are left, with a checkpoint every so many seconds and after the last step."""
        state, train = self.progress, self.data.train
        model = processes.parallel(self.model, self.device)
        started, saved = time.perf_counter() - state.seconds, time.perf_counter()
        with tqdm(
            desc=self.run.name, total=self.total, initial=state.step, unit="step", leave=False, disable=not show
        ) as bar:
            while state.step < self.end:
                epoch, first = divmod(state.step, self.steps_per_epoch)
                train_mode(self.model, self.run.frozen)
                train.set_epoch(self.run.seed, epoch)
                order = train.order(self.run.seed, epoch)
                fetching = time.perf_counter()
                for indices, images, labels in batches(train, order, self.run.batch_size, first, workers):
                    state.training_seconds += time.perf_counter() - fetching
                    if state.step in self.snapshots:
                        self._save(checkpoint.snapshot_name(state.step))
                    self._step(model, indices, images, labels)
                    bar.update()
                    if state.step % self.steps_per_epoch == 0:
                        bar.set_postfix_str(self._finish_epoch())
                    state.seconds = time.perf_counter() - started
                    if self._due(saved + checkpoint_every):
                        self._save()
                        saved = time.perf_counter()
                    fetching = time.perf_counter()
                    if state.step == self.end:
                        break
        if state.step in self.snapshots:
            self._save(checkpoint.snapshot_name(state.step))
        desynchronise(self.model)

    @contextmanager
    def followed_by(self, tracker: Tracker | None) -> Iterator[None]:
        """Tell a tracker how training goes that happens inside."""
        if tracker is None:
            yield
            return
        tracker.begin(self.run)
        self.tracker = tracker
        try:
            tracker.update(self.progress.history, self.progress.step_losses)
            yield
        finally:
            tracker.end(self.progress.step == self.total)

    def keep(self, snapshots: Collection[int], until: int | None) -> None:
        """Set which states are kept and where to stop; InputError for steps that are over and were not kept, or no steps."""
        done = self.progress.step
        for step in (*snapshots, *(() if until is None else (until,))):
            check_whole("a step of snapshots or until", step, least=0, most=self.total)
        kept = self.folder
        lost = processes.on_main(
            lambda: [step for step in snapshots if step < done and not (kept / checkpoint.snapshot_name(step)).exists()]
        )
        if lost:
            raise InputError(
                f"snapshot at step {lost[0]}: {done} steps are done and it was not kept; resume from an earlier one, copied "
                f"into a folder of its own as {checkpoint.CHECKPOINT}"
            )
        self.snapshots, self.end = frozenset(snapshots), self.total if until is None else until

    def _due(self, time_of_next: float) -> bool:
        """Whether to save a checkpoint now; the clock of the main process counts."""
        return self.progress.step == self.end or processes.on_main(lambda: time.perf_counter() >= time_of_next)

    def _step(self, model: nn.Module, indices: Tensor, images: Tensor, labels: Tensor) -> None:
        """Observe, then one step of the optimiser on this process's images and labels of the batch ``indices``."""
        state = self.progress
        factor = self.schedule.factor_at(state.step, self.steps_per_epoch, self.run.epochs)
        self.learning_rate = self.run.learning_rate * factor
        set_learning_rate(self.optimizer, self.learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        seed_step(self.run.seed, state.step, processes.rank())  # an observer draws what the step will draw
        self._observe(indices)
        started = time.perf_counter()
        images, targets = to_device(images, self.device, self.run.channels_last), labels.to(self.device)
        seed_step(self.run.seed, state.step, processes.rank())
        loss, right, logits = self._loss(model, images, targets, labels)
        self.unread.add(state.step, self.learning_rate, loss, right)
        if self.unread.due():
            self._read_losses()
        if self.update_curvature is not None:
            self.update_curvature(logits)
        self.scaler.scale(loss).backward()
        self._apply_update()
        self.scaler.update()
        state.step += 1
        state.training_seconds += time.perf_counter() - started

    def _loss(self, model: nn.Module, images: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`step_loss` in the run's precision."""
        try:
            with autocast(self.device, self.run.amp):
                return step_loss(model, images, targets, labels, self.own_data)
        except (NonFiniteError, torch.linalg.LinAlgError) as error:
            self._read_losses()  # an earlier step may be the first to blame
            raise self._diverged("the features before the pooling head are not finite", under_way=True) from error

    def _apply_update(self) -> None:
        """The optimiser's step; one that has left the range of its numbers is divergence."""
        try:
            self.scaler.step(self.optimizer)
        except InputError:
            raise
        except RuntimeError as error:
            if not left_range(error):
                raise
            self._read_losses()
            reason = f"{self.run.optimizer}: {shown(first_line(error), 60)}"
            raise self._diverged(f"the step cannot be taken ({reason})", under_way=True) from error

    def _read_losses(self) -> None:
        """Losses and right predictions of the steps since the last time, all at once; an accelerator is waited for.

        Raises:
            NonFiniteLossError: naming the first step whose loss is not finite. On the CPU, where every step is read, the
                weights have not taken it; elsewhere they may have taken it and later ones, but no checkpoint has.
        """
        for step, learning_rate, loss, right in self.unread.read():
            if not math.isfinite(loss):
                self.progress.step, self.learning_rate = step, learning_rate
                raise self._diverged(f"the training loss is {loss}", under_way=True)
            self.progress.step_losses.append(loss)
            self.progress.epoch_correct += right

    def _catch_up(self) -> None:
        """Wait for the steps under way and read their losses; the time counts as theirs."""
        started = time.perf_counter()
        self._read_losses()
        wait_for(self.device)
        self.progress.training_seconds += time.perf_counter() - started

    def _observe(self, indices: Tensor) -> None:
        """Let the main process call the observers that are due, with the whole batch."""
        step = self.progress.step
        if not any(step % every == 0 for every in self.intervals.values()):
            return
        self._catch_up()

        def rows() -> dict[str, list[Row]]:
            images, labels = self.data.train.batch(indices)
            images, labels = to_device(images, self.device, self.run.channels_last), labels.to(self.device)
            epoch = step // self.steps_per_epoch + 1
            moment = Moment(self.model, self.optimizer, images, labels, step, epoch, self.learning_rate, self.run)
            with without_synchronisation(self.model):
                return observe(self.observers, moment)

        for name, new in processes.on_main(rows).items():
            self.progress.records[name].extend(new)
        train_mode(self.model, self.run.frozen)
        self.optimizer.zero_grad(set_to_none=True)

    def _finish_epoch(self) -> str:
        """Evaluate and add the epoch's row to the history; the epoch in a few words."""
        state, run = self.progress, self.run
        self._catch_up()
        try:
            test = evaluate(self.model, self.data.test, amp=run.amp, channels_last=run.channels_last)
        except (NonFiniteError, torch.linalg.LinAlgError) as error:
            raise self._diverged("the features of a test image are not finite") from error
        if not math.isfinite(test.loss):
            raise self._diverged(f"the test loss is {test.loss}")
        row = state.finish_epoch(self.steps_per_epoch, run.batch_size, self.learning_rate, test)
        if self.tracker is not None:
            self.tracker.update(state.history, state.step_losses)
        return f"epoch {row['epoch']}/{run.epochs}, loss {row['train_loss']:.3f}, top-1 {test.top1:.1%}"

    def _diverged(self, what: str, under_way: bool = False) -> NonFiniteLossError:
        """The error for the step under way, or for the last one done."""
        done, learning_rate = self.progress.step, self.learning_rate
        return divergence(what, self.run, self.folder, done, self.steps_per_epoch, learning_rate, under_way)

    def _parts(self) -> dict[str, Any]:
        """What a checkpoint holds the state of."""
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def _save(self, name: str = checkpoint.CHECKPOINT) -> None:
        self._catch_up()

        def save() -> None:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            if not all_finite(state):
                raise self._diverged("a weight, statistic or momentum is not finite")
            checkpoint.save(self.identity | state | {"progress": dict(vars(self.progress))}, self.folder, name)

        processes.on_main(save)

    def resume(self) -> None:
        """Continue from the folder's checkpoint, if there is one; raises InputError when it does not fit."""
        content = processes.on_main(lambda: checkpoint.read(self.folder / checkpoint.CHECKPOINT))
        if content is not None:
            self.progress = checkpoint.resumed(
                content, self.folder, self.run, self.steps_per_epoch, self.identity, self._parts()
            )

    def trained(self) -> Trained:
        """The finished training, as `train` returns it; the network is in eval mode from now on."""
        state = self.progress
        return Trained(self.run, self.model.eval(), state.history, state.step_losses, state.records, state.seconds)
