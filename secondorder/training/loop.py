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
from secondorder.data import ImageDataset
from secondorder.data.files import expanded, shown
from secondorder.data.own import is_own
from secondorder.errors import InputError, NonFiniteError
from secondorder.training import checkpoint, processes
from secondorder.training.batch_norm import desynchronise, synchronise, without_synchronisation
from secondorder.training.batches import batches
from secondorder.training.device import autocast, check_device, isolated, resolve_device, seed_step
from secondorder.training.divergence import NonFiniteLossError, all_finite
from secondorder.training.evaluation import check_labels, checked_logits, correct, evaluate, to_device
from secondorder.training.observers import Moment, Observer, Row, intervals, observe
from secondorder.training.optimizers import OPTIMIZERS
from secondorder.training.parts import divide_groups, train_mode
from secondorder.training.run import Run
from secondorder.training.schedules import SCHEDULES
from secondorder.training.setup import Data, check_fit, check_given, dataset_of, first_model
from secondorder.training.state import Progress, Trained
from secondorder.training.weights import Initial, OwnNetwork

READ_EVERY = 100
"""Steps at most whose losses stay on an accelerator before the CPU waits for them, if nothing else asks before."""


def train(
    run: Run,
    data: Data,
    folder: str | Path,
    *,
    network: OwnNetwork | None = None,
    initial: Initial | None = None,
    observers: Mapping[str, Observer] = MappingProxyType({}),
    resume: bool = False,
    checkpoint_every: float = 30.0,
    progress: bool = True,
    workers: int = 0,
) -> Trained:
    """Train the network of ``run`` on ``data``; ``folder`` keeps the last good checkpoint (``checkpoint.pt``).

    The caller's network, random-number state and number of threads are left as they were.

        run = Run("own-vit", "own", "own-flowers", epochs=10, batch_size=64, learning_rate=0.1, schedule="cosine")
        trained = train(run, (flowers_train, flowers_test), "runs/vit", network=vit)

    Args:
        run: all settings.
        data: the data set of ``run.dataset``; for own data also a pair (train, test) of map-style data sets of
            (image, label), or of loaders over them: see `own_dataset`.
        folder: keeps the last good checkpoint.
        network: with ``run.backbone`` "own" or "own-...": the network, of which a copy is trained, or a function without
            arguments that builds it, called with torch's generator seeded by ``run.seed``. It gives logits
            ``[B, classes]``; parameters that need no gradient stay bit for bit as they are.
        initial: with a name in ``run.initial``: weights to begin with, a state_dict of the whole network, a file with one, or
            the checkpoint (folder or file) of another training. Optimiser and schedule begin afresh.
        observers: measurements during training, by name.
        resume: continue the checkpoint in the folder: a finished run is returned at once, a folder without a checkpoint
            starts from the beginning. Without it a checkpoint there is replaced at the first saving. The run must be the
            checkpoint's in everything but the number of epochs, which may differ where the steps done so far have the same
            learning rates under both (always with the schedule "constant"): the result is that of a run of so many
            epochs from the beginning. Own data and networks are recognised by a digest of samples and initial weights.
        checkpoint_every: seconds from one saving to the next (0: after every step); one more is at the end.
        progress: show a bar.
        workers: threads that prepare batches ahead, processes for own data (None of a loader's own: 0); they change the time,
            never the batches.

    Raises:
        InputError: for settings that do not fit the data, the network, the device or the number of processes, a folder that
            cannot be written, and a checkpoint that is damaged or of another run.
        NonFiniteLossError: when the loss is not finite, naming the step; no checkpoint has taken it. (On an accelerator,
            where losses are read at the end of an epoch, for observers and checkpoints and every 100 steps, it comes then.)
    """
    device = resolve_device(run.device)
    with processes.distributed(device), isolated(device, run.threads):
        check_device(device.type, run.amp)
        check_given(run, network, initial)
        dataset = dataset_of(run, data)
        check_fit(run, dataset)
        training = _Training(run, dataset, expanded(folder, "folder"), observers, device, network, initial)
        with contextlib.ExitStack() as held:
            processes.on_main(lambda: held.enter_context(checkpoint.own_folder(training.folder)))
            if resume:
                training.resume()
            training.continue_to_the_end(checkpoint_every, progress and processes.is_main_process(), workers)
        return training.trained()


class _Training:
    """One training in progress."""

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
        self.total = self.steps_per_epoch * run.epochs
        self.memory_format = torch.channels_last if run.channels_last else torch.preserve_format
        model, self.origin = first_model(run, data, network, initial)
        self.model = model.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.learning_rate = run.learning_rate
        self.optimizer = OPTIMIZERS[run.optimizer](self.model, run)
        divide_groups(self.optimizer, self.model, run)
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
                train_mode(self.model, self.run.frozen)
                train.set_epoch(self.run.seed, epoch)
                order = train.order(self.run.seed, epoch)
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
        self.learning_rate = learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        seed_step(self.run.seed, state.step, processes.rank())  # an observer draws what the step will draw
        self._observe(indices, learning_rate)
        started = time.perf_counter()
        images, targets = to_device(images, self.device, self.run.channels_last), labels.to(self.device)
        seed_step(self.run.seed, state.step, processes.rank())
        loss, right, logits = self._loss(model, images, targets, labels, learning_rate)
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
        self, model: nn.Module, images: Tensor, targets: Tensor, labels: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy (a scalar), the number of right predictions of a batch, and its logits.

        ``targets`` are the ``labels`` on the device.
        """
        try:
            with autocast(self.device, self.run.amp):
                logits = checked_logits(model(images), labels)
                if not logits.requires_grad:
                    raise InputError("the network's logits depend on no trainable parameter; there is nothing to train")
                if self.own_data:
                    check_labels(labels, logits.shape[1])
                return F.cross_entropy(logits, targets), correct(logits, targets, 1), logits
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
        losses = state.step_losses[-self.steps_per_epoch :]
        row = {
            "epoch": state.step // self.steps_per_epoch,
            "step": state.step,
            "learning_rate": self.learning_rate,
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
        rate = self.learning_rate if learning_rate is None else learning_rate
        at = state.step if learning_rate is not None else state.step - 1  # a step under way, else the last one done
        epoch = at // self.steps_per_epoch + 1
        return NonFiniteLossError(
            f"run {self.run.name}: {what} at epoch {epoch}, after {state.step} of {self.total} steps, learning rate "
            f"{rate:g}; lower learning_rate ({self.run.learning_rate:g}); the last good checkpoint, if one was due, "
            f"stays in {shown(self.folder)!r}"
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this training to be continued."""
        data = self.data
        sizes: dict[str, Any] = {"name": data.name, "train": len(data.train), "test": len(data.test)}
        sizes["image_size"] = data.image_size
        if self.own_data:
            sizes["samples"] = data.provenance["samples_sha256"]
        return {"run": self.run.to_dict(), "data": sizes, "observers": self.intervals, "network": self.origin}

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
        file = self.folder / checkpoint.CHECKPOINT
        content = processes.on_main(lambda: checkpoint.read(file))
        if content is None:
            return
        state = checkpoint.parse(content, file)
        checkpoint.take_epochs(state, self.run, self.steps_per_epoch, self.folder)
        checkpoint.check_same(state, self._identity(), self.folder)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:  # the package's code has changed since
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"the checkpoint in {shown(self.folder)!r} does not fit the network ({shown(reason, 60)}); choose another folder "
                "or run without --resume to start afresh"
            ) from error
        self.progress = Progress(**state["progress"])

    def trained(self) -> Trained:
        state = self.progress
        return Trained(self.run, self.model.eval(), state.history, state.step_losses, state.records, state.seconds)
