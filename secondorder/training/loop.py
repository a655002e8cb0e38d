"""Training of one network: `train`, deterministic per seed on CPU, resumable after a kill at any moment.

The state after step s is a function of the state before it and of (run, s) alone: data order and augmentation depend on
(seed, epoch), dropout masks on (seed, s). So a resumed run repeats the uninterrupted one bit for bit.
"""

import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from secondorder.accelerator import wait_for
from secondorder.data import ImageDataset, epoch_order
from secondorder.errors import InputError, NonFiniteError
from secondorder.training import checkpoint, processes
from secondorder.training.batch_norm import desynchronise, synchronise, without_synchronisation
from secondorder.training.batches import batches
from secondorder.training.device import autocast, check_device, isolated, resolve_device, seed_step
from secondorder.training.divergence import NonFiniteLossError, all_finite
from secondorder.training.evaluation import correct, evaluate, to_device
from secondorder.training.observers import Moment, Observer, Row, intervals, observe
from secondorder.training.optimizers import OPTIMIZERS
from secondorder.training.run import Run
from secondorder.training.schedules import SCHEDULES
from secondorder.training.setup import check_fit, initial_network
from secondorder.training.state import Progress, Trained

READ_EVERY = 100
"""Steps at most whose losses stay on an accelerator before the CPU waits for them, if nothing else asks before."""


def train(
    run: Run,
    data: ImageDataset,
    folder: Path,
    *,
    observers: Mapping[str, Observer] = MappingProxyType({}),
    resume: bool = False,
    checkpoint_every: float = 30.0,
    progress: bool = True,
    workers: int = 0,
) -> Trained:
    """Train the network of ``run`` on ``data``; ``folder`` keeps the last good checkpoint (``checkpoint.pt``).

    With ``resume`` the checkpoint in the folder is continued: a finished run is returned at once, a folder without a
    checkpoint starts from the beginning. Without ``resume`` a checkpoint there is replaced at the first saving. A
    checkpoint is saved every ``checkpoint_every`` seconds (0: after every step) and at the end. The caller's
    random-number state and number of threads are left as they were.

    Raises:
        InputError: for settings that do not fit the data, the device or the number of processes, a folder that cannot
            be written, and a checkpoint that is damaged or of another run.
        NonFiniteLossError: when the loss is not finite, naming the step; no checkpoint has taken it. (On an accelerator,
            where losses are read at the end of an epoch, for observers and checkpoints and every 100 steps, it comes then.)
    """
    device = resolve_device(run.device)
    with processes.distributed(device), isolated(device, run.threads):
        check_device(device.type, run.amp)
        check_fit(run, data)
        training = _Training(run, data, Path(folder), observers, device)
        with contextlib.ExitStack() as held:
            processes.on_main(lambda: held.enter_context(checkpoint.own_folder(training.folder)))
            if resume:
                training.resume()
            training.continue_to_the_end(checkpoint_every, progress and processes.is_main_process(), workers)
        return training.trained()


class _Training:
    """One training in progress."""

    def __init__(
        self, run: Run, data: ImageDataset, folder: Path, observers: Mapping[str, Observer], device: torch.device
    ) -> None:
        self.run, self.data, self.folder, self.observers, self.device = run, data, folder, observers, device
        self.intervals = intervals(observers)
        self.schedule = SCHEDULES[run.schedule]
        self.steps_per_epoch = len(data.train) // run.batch_size
        self.total = self.steps_per_epoch * run.epochs
        self.memory_format = torch.channels_last if run.channels_last else torch.preserve_format
        self.model = initial_network(run, data).to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = OPTIMIZERS[run.optimizer](self.model, run)
        self.update_curvature = getattr(self.optimizer, "update_curvature", None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp == "float16")
        self.progress = Progress(records={name: [] for name in observers})
        self.unread: list[tuple[int, float, Tensor, Tensor]] = []
        """Step, learning rate, loss and number of right predictions of steps whose numbers are still on the device."""

    def continue_to_the_end(self, checkpoint_every: float, show: bool, workers: int) -> None:
        """All steps that are left, with a checkpoint every so many seconds and after the last step."""
        state, train = self.progress, self.data.train
        model = self._distributed_model()
        started, saved = time.perf_counter() - state.seconds, time.perf_counter()
        with tqdm(
            desc=self.run.name, total=self.total, initial=state.step, unit="step", leave=False, disable=not show
        ) as bar:
            while state.step < self.total:
                epoch, first = divmod(state.step, self.steps_per_epoch)
                self.model.train()
                train.set_epoch(self.run.seed, epoch)
                order = epoch_order(len(train), self.run.seed, epoch)
                fetching = time.perf_counter()
                for indices, images, labels in batches(train, order, self.run.batch_size, first, workers):
                    state.training_seconds += time.perf_counter() - fetching
                    self._step(model, indices, images, labels)
                    bar.update()
                    if state.step % self.steps_per_epoch == 0:
                        bar.set_postfix_str(self._finish_epoch())
                    state.seconds = time.perf_counter() - started
                    if self._due(saved + checkpoint_every):
                        self._save()
                        saved = time.perf_counter()
                    fetching = time.perf_counter()
        desynchronise(self.model)

    def _due(self, time_of_next: float) -> bool:
        """Whether to save a checkpoint now; the clock of the main process counts."""
        return self.progress.step == self.total or processes.on_main(lambda: time.perf_counter() >= time_of_next)

    def _distributed_model(self) -> nn.Module:
        """The network as the training step uses it: wrapped when several processes train together."""
        if not processes.is_distributed():
            return self.model
        synchronise(self.model, self.device)
        return DistributedDataParallel(
            self.model, device_ids=[self.device.index] if self.device.type != "cpu" else None
        )

    def _step(self, model: nn.Module, indices: Tensor, images: Tensor, labels: Tensor) -> None:
        """Observe, then one step of the optimiser on this process's images and labels of the batch ``indices``."""
        state = self.progress
        learning_rate = self.run.learning_rate * self.schedule.factor_at(
            state.step, self.steps_per_epoch, self.run.epochs
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        seed_step(self.run.seed, state.step, processes.rank())  # an observer draws what the step will draw
        self._observe(indices, learning_rate)
        started = time.perf_counter()
        images, labels = to_device(images, self.device, self.run.channels_last), labels.to(self.device)
        seed_step(self.run.seed, state.step, processes.rank())
        loss, right, logits = self._loss(model, images, labels, learning_rate)
        self.unread.append((state.step, learning_rate, loss.detach(), right))
        if self.device.type == "cpu" or len(self.unread) == READ_EVERY:
            self._read_losses()
        if self.update_curvature is not None:
            self.update_curvature(logits)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        state.step += 1
        state.training_seconds += time.perf_counter() - started

    def _loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy (a scalar), the number of right predictions of a batch, and its logits."""
        try:
            with autocast(self.device, self.run.amp):
                logits = model(images).float()
                return F.cross_entropy(logits, labels), correct(logits, labels, 1), logits
        except (NonFiniteError, torch.linalg.LinAlgError) as error:
            self._read_losses()  # an earlier step may be the first to blame
            raise self._diverged("the features before the pooling head are not finite", learning_rate) from error

    def _read_losses(self) -> None:
        """Losses and right predictions of the steps since the last time, all at once; an accelerator is waited for.

        Raises:
            NonFiniteLossError: naming the first step whose loss is not finite. On the CPU, where every step is read, the
                weights have not taken it; elsewhere they may have taken it and later ones, but no checkpoint has.
        """
        unread, self.unread = self.unread, []
        if not unread:
            return
        numbers = torch.stack([number.float() for _, _, *pair in unread for number in pair]).tolist()
        summed = processes.summed(*(loss / processes.world_size() for loss in numbers[::2]), *numbers[1::2])
        for (step, learning_rate, *_), value, right in zip(
            unread, summed[: len(unread)], summed[len(unread) :], strict=True
        ):
            if not math.isfinite(value):
                self.progress.step = step
                raise self._diverged(f"the training loss is {value}", learning_rate)
            self.progress.step_losses.append(value)
            self.progress.epoch_correct += int(right)

    def _catch_up(self) -> None:
        """Wait for the steps under way and read their losses; the time counts as theirs."""
        started = time.perf_counter()
        self._read_losses()
        wait_for(self.device)
        self.progress.training_seconds += time.perf_counter() - started

    def _observe(self, indices: Tensor, learning_rate: float) -> None:
        """Let the main process call the observers that are due, with the whole batch."""
        step = self.progress.step
        if not any(step % every == 0 for every in self.intervals.values()):
            return
        self._catch_up()

        def rows() -> dict[str, list[Row]]:
            images, labels = self.data.train.batch(indices)
            images, labels = to_device(images, self.device, self.run.channels_last), labels.to(self.device)
            epoch = step // self.steps_per_epoch + 1
            moment = Moment(self.model, self.optimizer, images, labels, step, epoch, learning_rate, self.run)
            with without_synchronisation(self.model):
                return observe(self.observers, moment)

        for name, new in processes.on_main(rows).items():
            self.progress.records[name].extend(new)
        self.model.train()
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
        losses = state.step_losses[-self.steps_per_epoch :]
        row = {
            "epoch": state.step // self.steps_per_epoch,
            "step": state.step,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": sum(losses) / len(losses),
            "train_top1": state.epoch_correct / (self.steps_per_epoch * run.batch_size),
            "test_loss": test.loss,
            "test_top1": test.top1,
            "test_top5": test.top5,
            "seconds": state.training_seconds,
        }
        state.history.append(row)
        state.epoch_correct = 0
        return f"epoch {row['epoch']}/{run.epochs}, loss {row['train_loss']:.3f}, top-1 {test.top1:.1%}"

    def _diverged(self, what: str, learning_rate: float | None = None) -> NonFiniteLossError:
        state = self.progress
        rate = self.optimizer.param_groups[0]["lr"] if learning_rate is None else learning_rate
        at = state.step if learning_rate is not None else state.step - 1  # a step under way, else the last one done
        epoch = at // self.steps_per_epoch + 1
        return NonFiniteLossError(
            f"run {self.run.name}: {what} at epoch {epoch}, after {state.step} of {self.total} steps, learning rate "
            f"{rate:g}; lower learning_rate ({self.run.learning_rate:g}); the last good checkpoint, if one was due, "
            f"stays in {str(self.folder)!r}"
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this training to be continued."""
        data = self.data
        sizes = {"name": data.name, "train": len(data.train), "test": len(data.test), "image_size": data.image_size}
        return {"run": self.run.to_dict(), "data": sizes, "observers": self.intervals}

    def _save(self) -> None:
        self._catch_up()

        def save() -> None:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            if not all_finite(state):
                raise self._diverged("a weight, statistic or momentum is not finite")
            checkpoint.save(self._identity() | state | {"progress": dict(vars(self.progress))}, self.folder)

        processes.on_main(save)

    def resume(self) -> None:
        """Continue from the folder's checkpoint, if there is one; raises InputError when it does not fit."""
        content = processes.on_main(lambda: checkpoint.read(self.folder))
        if content is None:
            return
        state = checkpoint.parse(content, self.folder)
        checkpoint.check_same(state, self._identity(), self.folder)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:  # the package's code has changed since
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"the checkpoint in {str(self.folder)!r} does not fit the network ({reason}); choose another folder or "
                "run without --resume to start afresh"
            ) from error
        self.progress = Progress(**state["progress"])

    def trained(self) -> Trained:
        state = self.progress
        return Trained(self.run, self.model.eval(), state.history, state.step_losses, state.records, state.seconds)
