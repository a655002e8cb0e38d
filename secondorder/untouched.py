"""Measuring without leaving a trace in the model that is measured."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def same_randomness() -> Iterator[None]:
    """Random draws inside start from the present state and are undone on exit (Python, NumPy, torch on CPU and CUDA).

    Two bodies run one after the other under this context see the same random numbers, e.g. the same dropout masks.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (user code may draw from it)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore `model` bit for bit on exit, also after an exception, and the random state with it.

    Restored are the values of parameters and buffers (batch-norm statistics among them), ``.grad`` (the same tensor
    objects with the same values, or None), ``requires_grad`` and the train/eval mode of every module. The body may do
    with the model what it likes as long as it replaces no parameter or buffer object.
    """
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    tracked = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    with same_randomness():
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    if not torch.equal(tensor, value):  # an untouched tensor keeps its version counter
                        tensor.copy_(value)
                for parameter, gradient, before in gradients:
                    if gradient is not None and before is not None and not torch.equal(gradient, before):
                        gradient.copy_(before)
                    parameter.grad = gradient
            for parameter, requires_grad in tracked:
                parameter.requires_grad_(requires_grad)
            for module, mode in modes:
                module.training = mode
