"""Measuring without leaving a trace in the model that is measured."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from secondorder.accelerator import fork_random_numbers, random_states, set_random_states, with_random_numbers


@contextmanager
def same_randomness() -> Iterator[None]:
    """Random draws inside start from the present state and are undone on exit (Python, NumPy, torch on every device).

    Two bodies run one after the other under this context see the same random numbers, e.g. the same dropout masks.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (user code may draw from it)
    with fork_random_numbers(with_random_numbers()):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def undrawn_if_refused() -> Iterator[None]:
    """Random draws of torch inside are undone when the body raises, so that what is refused leaves no trace; else they stay."""
    devices = with_random_numbers()
    state, states = torch.get_rng_state(), random_states(devices)
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        set_random_states(devices, states)
        raise


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
            kept = [
                (gradient, before) for _, gradient, before in gradients if gradient is not None and before is not None
            ]
            with torch.no_grad():
                for tensor, value in _changed([*zip(tensors, values, strict=True), *kept]):
                    tensor.copy_(value)
                for parameter, gradient, _ in gradients:
                    parameter.grad = gradient
            for parameter, requires_grad in tracked:
                parameter.requires_grad_(requires_grad)
            for module, mode in modes:
                module.training = mode


def _changed(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The pairs of tensors that differ; one that has not been touched is not written to and keeps its version counter.

    An accelerator is waited for once, not for each tensor.
    """
    near = [pair for pair in pairs if pair[0].device.type == "cpu" and not torch.equal(*map(_bits, pair))]
    far = [pair for pair in pairs if pair[0].device.type != "cpu"]
    if not far:
        return near
    differ = torch.stack([(_bits(tensor) != _bits(value)).any().to(far[0][0].device) for tensor, value in far]).tolist()
    return [*near, *(pair for pair, changed in zip(far, differ, strict=True) if changed)]


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: 0 and -0 are equal as numbers."""
    return tensor.detach().reshape(-1).view(torch.uint8)
