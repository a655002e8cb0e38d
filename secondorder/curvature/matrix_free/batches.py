"""Batches of inputs and labels as a user gives them: checked, and moved to the network's device.

Both are tensors `[N, ...]` or structures of such (`samples`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.samples import (
    Samples,
    SampleTree,
    described,
    floating_tensors,
    joined,
    tensors_of,
)
from secondorder.errors import InputError, NonFiniteError

PAIR = "a batch is a pair (inputs, labels): tensors [N, ...], or mappings or tuples of tensors as inputs"


@dataclass(frozen=True)
class Batch:
    """Some samples and their labels, both tensors `[N, ...]` or structures of such; counted and indexed by sample."""

    inputs: Samples
    labels: Samples

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Any) -> "Batch":
        return Batch(self.inputs[rows], self.labels[rows])

    @property
    def few(self) -> "Batch":
        """What formulas may be tried on, as of a `BatchStream`: all samples."""
        return self

    @property
    def largest(self) -> int:
        """Samples of the largest batch, which is the only one."""
        return len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of inputs and labels."""
        return self.inputs.nbytes + self.labels.nbytes

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor of the inputs requires gradients."""
        return self.inputs.requires_grad

    @property
    def kind(self) -> object:
        """What batches of one data set have in common: the structure, and every tensor's shape (of a sample) and numbers."""
        return [
            (getattr(samples, "spec", None), [(t.shape[1:], t.dtype) for t in tensors_of(samples)])
            for samples in (self.inputs, self.labels)
        ]

    def on(self, device: torch.device, *, copy: bool = False) -> "Batch":
        """The batch on a device, its tensors detached from their graphs.

        `copy`: in memory of its own also where it is there already.
        """
        return Batch(self.inputs.detach().to(device, copy=copy), self.labels.detach().to(device, copy=copy))

    def check(self, network: FrozenNetwork) -> None:
        """InputError unless there are as many labels as inputs, at least one, in the network's numbers, and finite."""
        both = (*tensors_of(self.inputs), *tensors_of(self.labels))
        if any(t.is_nested or t.layout != torch.strided for t in both):
            raise InputError("images or labels are sparse or nested tensors; use .to_dense(), or pad them")
        if network.has_numbers and any(t.is_meta for t in both):
            raise InputError("images or labels are on the device 'meta', which holds no numbers")
        if any(t.ndim == 0 for t in both) or len(self) == 0 or len(self) != len(self.labels):
            shapes = f"images {described(self.inputs)} and labels {described(self.labels)}"
            raise InputError(f"{shapes}; a batch needs one label for each image, at least one")
        kinds = {w.dtype for w in (*network.weights.values(), *network.constants.values())}
        for images in floating_tensors(self.inputs):
            if images.dtype not in kinds:
                raise InputError(
                    f"the images are {images.dtype}, the network is {network.dtype}; convert one of them with .to()"
                )
            if network.has_numbers and not torch.isfinite(images).all():
                raise NonFiniteError("the images contain NaN or infinity")


def is_batch(data: Any) -> bool:
    """Whether data are a pair (inputs, labels), and not batches of a data set; a tuple of two always is, if a bad one."""
    if isinstance(data, Tensor | Mapping) or (isinstance(data, tuple) and len(data) == 2):
        return True
    return isinstance(data, list) and len(data) == 2 and isinstance(data[1], Tensor | Mapping)


def batch_of(data: Any) -> Batch:
    """A pair (inputs, labels). Raises InputError for anything else."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        got = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else type(data).__name__
        raise InputError(f"{PAIR}, not {got}")
    inputs, labels = data
    if isinstance(inputs, Mapping) and isinstance(labels, Mapping) and set(inputs) == set(labels):
        raise InputError(f"{PAIR}; these are two mappings with the same names: take the labels out of each batch")
    return Batch(_samples(inputs, "inputs", Mapping | tuple | list), _samples(labels, "labels", Mapping))


def checked_batch(batch: tuple[Any, Any], network: FrozenNetwork) -> Batch:
    """A copy of a pair (inputs, labels) on the network's device, which is told whether inputs require gradients.

    InputError unless they are as many, at least one, and finite.
    """
    given = batch_of(batch)
    given.check(network)
    network.differentiates_images = given.requires_grad
    return given.on(network.device, copy=True)  # loaders use their memory again


def checked_tensors(batch: tuple[Tensor, Tensor], network: FrozenNetwork) -> tuple[Tensor, Tensor]:
    """Images and labels as `checked_batch` makes them. Raises InputError unless both are tensors."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        raise InputError("a batch is a pair (images, labels) of tensors")
    made = checked_batch(batch, network)
    assert isinstance(made.inputs, Tensor)
    assert isinstance(made.labels, Tensor)
    return made.inputs, made.labels


def joined_batches(parts: Iterable[Batch]) -> Batch:
    """Samples and labels of several batches as one batch, in order."""
    parts = list(parts)
    return Batch(joined(part.inputs for part in parts), joined(part.labels for part in parts))


def _samples(given: Any, what: str, structures: Any) -> Samples:
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, structures):
        raise InputError(f"{PAIR}; the {what} are {type(given).__name__} (several batches go in a list)")
    return SampleTree(given, what)
