"""What a training step costs: measured here, and counted for a GPU whose peak rate is stated.

A step of B images is taken with as many as this device has room for, and scaled, but for what the optimiser's `step` takes, which
does not depend on B. Counted are the floating-point operations of
the forward and backward passes (2 for a multiplication with an addition), and the bytes that the forward pass keeps for the
backward pass; with the weights, their gradients and the optimiser's state these are the memory of a step.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from secondorder.data import ImageDataset
from secondorder.training import Run, resolve_device, train
from secondorder.training.checkpoint import CHECKPOINT
from secondorder.training.device import seed_step
from secondorder.training.evaluation import to_device
from secondorder.training.setup import first_state
from studies.engine.fake_data import fake_data

RATES = {"off": 0.15 * 156e12, "float16": 0.2 * 312e12, "bfloat16": 0.2 * 312e12}
"""Operations a second of an A100 by mixed precision: shares of its dense peaks, TF32 and 16 bits (NVIDIA's data sheet), which
NVIDIA's ResNet-50 reaches on one: 938 and 2,470 images a second (DeepLearningExamples), 24.5 GFLOP each."""
BANDWIDTH, PASSES = 1.555e12, 4
"""Bytes a second of its memory, and how often what is kept goes through it: written and read, and its gradient, too."""
CPU_PIXELS = 8 * 224**2
"""Pixels of a step on a CPU, 8 ImageNet images: a whole batch of them needs more than 10 GiB."""
COUNTED = 2
"""Images whose operations are counted."""
IRRELEVANT = ("seed", "learning_rate", "momentum", "weight_decay", "optimizer_options")
"""Fields of a run that make no difference to its cost."""
LENGTH = {"epochs": 2, "schedule": "constant", "train_limit": None, "test_limit": None}
"""Fields that make none to that of a step, and what they are while it is measured."""


@dataclass(frozen=True)
class StepCost:
    """Of one training step of a run."""

    seconds: float
    """On this device."""
    images: int
    """Of the step that was taken."""
    parameters: int
    flops: float
    """Of the forward and backward passes of the whole batch; what the optimiser computes is not among them."""
    gpu_seconds: float
    """On the stated GPU: by its operations or by its memory, whichever takes longer, as depthwise convolutions do by memory."""
    memory: float
    """Bytes that a step of the whole batch needs, in float32 or the 16 bits of its mixed precision."""
    state: int
    """Bytes of a checkpoint, of which a snapshot is one."""


def small(run: Run) -> tuple[Run, ImageDataset]:
    """The run with a batch that this device has room for, two steps long, and fake images for it."""
    images = run.batch_size
    data = fake_data(run.dataset, 2, run.image_size)
    if run.device == "cpu":
        images = min(images, max(2, CPU_PIXELS // data.image_size**2))
    return replace(run, batch_size=images, **LENGTH), fake_data(run.dataset, images, run.image_size)  # type: ignore[arg-type]


def step_cost(run: Run, amp: str) -> StepCost:
    """The cost of a step of a run, on a GPU in this mixed precision, which a CPU may lack; once for all that are alike."""
    first = Run("digits_tiny", "gap", "digits", epochs=1, batch_size=2, learning_rate=1e-4)
    alike = {name: getattr(first, name) for name in IRRELEVANT} | LENGTH
    return _step_cost(replace(run, **alike), amp)


@cache
def _step_cost(run: Run, amp: str) -> StepCost:
    taken, fake = small(run)
    with tempfile.TemporaryDirectory() as folder, _optimizer_seconds() as updates:
        trained = train(taken, fake, folder, progress=False)
        state = (Path(folder) / CHECKPOINT).stat().st_size
    seconds = float(trained.history[1]["seconds"]) - float(trained.history[0]["seconds"])  # the first step is slow
    flops, saved = _counted(taken, fake)
    parameters = sum(p.numel() for p in trained.model.parameters())
    flops, saved = flops * run.batch_size, saved * run.batch_size * (1 if amp == "off" else 0.5)
    update = min(updates[-1], seconds)
    return StepCost(
        update + (seconds - update) * run.batch_size / taken.batch_size,
        taken.batch_size,
        parameters,
        flops,
        max(flops / RATES[amp], PASSES * saved / BANDWIDTH),
        4 * parameters + state + saved,
        state,
    )


@contextmanager
def _optimizer_seconds() -> Iterator[list[float]]:
    """Seconds of each call of an optimiser's `step` inside; 0 of one that evaluates the network, as it depends on the images."""
    seconds: list[float] = []
    began: list[float] = []
    evaluated: list[bool] = []

    def begin(*_: object) -> None:
        began.append(time.perf_counter())

    def end(*_: object) -> None:
        start = began.pop()
        if not began:  # that of another optimiser around it
            seconds.append(0.0 if evaluated else time.perf_counter() - start)
            evaluated.clear()

    def note(*_: object) -> None:
        if began:
            evaluated.append(True)

    handles = (
        register_optimizer_step_pre_hook(begin),
        register_optimizer_step_post_hook(end),
        register_module_forward_pre_hook(note),
    )
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _counted(run: Run, data: ImageDataset) -> tuple[float, float]:
    """Operations of the forward and backward passes, and bytes kept between them, for each image."""
    device = resolve_device(run.device)
    model, *_ = first_state(run, data, device, None, None)
    images, labels = data.train.batch(torch.arange(COUNTED) % len(data.train))
    seed_step(0, 0, 0)
    with (
        FlopCounterMode(display=False, custom_mapping=OWN_FORMULAS) as operations,
        _bytes_saved(model.train()) as saved,
    ):
        loss = F.cross_entropy(model(to_device(images, device, run.channels_last)), labels.to(device))
        loss.backward()
    return operations.get_total_flops() / COUNTED, sum(saved.values()) / COUNTED


def _convolution_backward(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, **_: Any) -> int:
    """For each gradient that is wanted, of inputs and weights, as many operations as the forward pass has.

    PyTorch's own formula (2.14) counts those of the weights as if there were no groups.
    """
    transposed, wanted = others[-4], others[-1]
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(wanted[:2])


OWN_FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward}


@contextmanager
def _bytes_saved(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the storages that forward passes inside keep for their backward pass, those of the weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
