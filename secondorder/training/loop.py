"""Training of one network: `train`, deterministic per seed on CPU, resumable after a kill at any moment.

The state after step s is a function of the state before it and of (run, s) alone: data order and augmentation depend on
(seed, epoch), dropout masks on (seed, s). So a resumed run repeats the uninterrupted one bit for bit.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from secondorder.data.files import expanded
from secondorder.training import checkpoint, processes
from secondorder.training.device import check_device, isolated, resolve_device
from secondorder.training.observers import Observer
from secondorder.training.run import Run
from secondorder.training.setup import Data, check_fit, check_given, check_settings, dataset_of
from secondorder.training.state import Trained
from secondorder.training.steps import Training
from secondorder.training.tensorboard import Tracker
from secondorder.training.weights import Initial, OwnNetwork


def train(
    run: Run,
    data: Data,
    folder: str | Path,
    *,
    network: OwnNetwork | None = None,
    initial: Initial | None = None,
    observers: Mapping[str, Observer] = MappingProxyType({}),
    snapshots: Collection[int] = (),
    until: int | None = None,
    resume: bool = False,
    checkpoint_every: float = 30.0,
    progress: bool = True,
    workers: int = 0,
    tracker: Tracker | None = None,
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
            ``[B, classes]``; parameters that need no gradient stay as they are.
        initial: with a name in ``run.initial``: weights to begin with, a state_dict of the whole network, a file with one, or
            the checkpoint (folder or file) of another training. Optimiser and schedule begin afresh.
        observers: measurements during training, by name.
        snapshots: numbers of steps done (0: none yet) after which the whole state is kept for ever as ``step-<number>.pt``,
            from which `snapshot` gives training as it was there.
        until: stop when so many steps are done, with a checkpoint; resuming continues. None: at the end of the run.
        resume: continue the checkpoint in the folder, if there is one; else it is replaced at the first saving. The run must
            be the checkpoint's in everything but the number of epochs, which may differ where the steps done so far have the
            same learning rates under both (always with the schedule "constant"): the result is that of a run of so many
            epochs from the beginning. Own data and networks are recognised by a digest of samples and initial weights.
        checkpoint_every: seconds from one saving to the next (0: after every step); one more is at the end.
        progress: show a bar.
        workers: threads that prepare batches ahead, processes for own data (None of a loader's own: 0); they change the time,
            never the batches.
        tracker: is told losses and epochs as they come, `TensorBoard` for example; no part of the checkpoint.

    Raises:
        InputError: for settings that do not fit the data, the network, the device or the number of processes, a folder that
            cannot be written, and a checkpoint that is damaged or of another run.
        NonFiniteLossError: when the loss is not finite, naming the step, which no checkpoint has taken; on an accelerator when
            losses are read: every 100 steps, at the end of an epoch, for observers and checkpoints.
    """
    check_settings(run, resume, checkpoint_every, progress, workers)
    device = resolve_device(run.device)
    with processes.distributed(device), isolated(device, run.threads):
        check_device(device.type, run.amp)
        check_given(run, network, initial)
        dataset = dataset_of(run, data)
        check_fit(run, dataset)
        training = Training(run, dataset, expanded(folder, "folder"), observers, device, network, initial)
        with ExitStack() as held:
            processes.on_main(lambda: held.enter_context(checkpoint.own_folder(training.folder)))
            if resume:
                training.resume()
            training.keep(snapshots, until)
            with training.followed_by(tracker if processes.is_main_process() else None):
                training.continue_to_the_end(checkpoint_every, progress and processes.is_main_process(), workers)
        return training.trained()
