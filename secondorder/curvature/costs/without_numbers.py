"""A network, a batch and a loss of which only shapes are known, set up as `curvature_blocks` sets up those with numbers."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from secondorder.curvature.blocks import Extent, check_loss_kind, copied_bytes, coupling, sizes, watched_layers
from secondorder.curvature.costs.meter import Meter
from secondorder.curvature.costs.rehearsal import FirstParts, Rehearsal, counted
from secondorder.curvature.matrix_free.batch_parts import evaluated
from secondorder.curvature.matrix_free.batch_stream import check_readable
from secondorder.curvature.matrix_free.batches import Batch, batch_of, is_batch
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.loss_curvature import Loss, loss_curvature
from secondorder.curvature.matrix_free.memory import budget
from secondorder.curvature.matrix_free.network_outputs import NetworkOutputs, Output
from secondorder.curvature.matrix_free.output_matrix import output_matrix
from secondorder.curvature.matrix_free.sample_coupling import COMPANY
from secondorder.curvature.matrix_free.samples import Samples, tensors_of
from secondorder.curvature.matrix_free.streamed import CUT
from secondorder.curvature.matrix_free.trial import FEW, trial_count
from secondorder.curvature.quantities import QUANTITIES, Problem
from secondorder.errors import InputError
from secondorder.untouched import same_randomness


class NothingDrawn:
    """In place of a network's random state, from which tensors without numbers take nothing."""

    def __init__(self) -> None:
        self.drawn = False

    def replayed(self, part: int = 0) -> nullcontext[None]:
        """A context in which random numbers are what they are: those of a part need no state."""
        return nullcontext()


def network_without_numbers(network: FrozenNetwork, fakes: FakeTensorMode) -> FrozenNetwork:
    """The network with parameters and buffers that have shapes only; on the CPU if they were on the device meta."""
    made = copy(network)
    made.device = torch.device("cpu") if network.device.type == "meta" else network.device
    made.random = NothingDrawn()  # type: ignore[assignment]

    def shaped(tensor: Tensor) -> Tensor:
        device = made.device if tensor.is_meta else tensor.device
        with fakes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    made.weights = {name: shaped(w).requires_grad_() for name, w in network.weights.items()}
    made.constants, made.buffers = (
        {name: shaped(t) for name, t in tensors.items()} for tensors in (network.constants, network.buffers)
    )
    return made


@dataclass(frozen=True)
class Data:
    """The first of so many batches, with their extent."""

    first: Batch
    extent: Extent
    several: bool


def described_data(data: Any, network: FrozenNetwork) -> Data:
    """One batch, or a data set of which the first batch is read, and of a DataLoader no other: its sampler tells how many."""
    if is_batch(data):
        first = batch_of(data)
        first.check(network)
        return Data(first, Extent(len(first), len(first), first.nbytes), False)
    check_readable(data)
    with same_randomness():
        first, lengths = _read(data)
    first.check(network)
    if len(lengths) == 1:
        return Data(first, Extent(len(first), len(first), first.nbytes), False)
    largest = max(lengths)
    return Data(first, Extent(sum(lengths), largest, 3 * first.nbytes * largest // len(first)), True)


def _read(data: Iterable[Any]) -> tuple[Batch, list[int]]:
    """The first batch, and the samples of each."""
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise InputError("the data set has no batches; give at least one")
    first = batch_of(first)
    size = data.batch_size if isinstance(data, DataLoader) else None
    if size is None or not hasattr(data.sampler, "__len__"):  # type: ignore[attr-defined]
        return first, [len(first), *(len(batch_of(batch)) for batch in batches)]
    whole, left = divmod(len(data.sampler), size)  # type: ignore[attr-defined]
    return first, [size] * whole + [left] * (left > 0 and not data.drop_last)  # type: ignore[attr-defined]


def rehearsal(
    network: nn.Module,
    loss: Loss,
    batch: Any,
    quantity: str,
    params: Iterable[str] | None,
    *,
    output: Output | None,
    samples: int,
    fisher: str,
    chunk: int | None,
    memory: int | None,
) -> Rehearsal:
    """The program for a quantity, with the arguments of `curvature_blocks`. Raises InputError as that does, but for numbers."""
    row, outputs, meter = QUANTITIES[quantity], NetworkOutputs(output), Meter()
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    frozen = network_without_numbers(FrozenNetwork(network, params, output=outputs, meta=True), fakes)
    data = described_data(batch, frozen)
    frozen.differentiates_images = data.first.requires_grad
    layers, extent = watched_layers(row, frozen), data.extent
    images = _mapped(data.first.inputs, lambda t: _without_numbers(t, extent.samples, frozen.device, fakes))
    meter.ignore([*tensors_of(images), *frozen.weights.values(), *frozen.constants.values()])  # which are in `held`
    with counted(meter, fakes):
        probe, _ = evaluated(frozen, images, slice(FEW), layers)
    frozen.random.drawn = meter.drawn
    available, loss = budget(memory, frozen.device), outputs.loss_of_one(loss)
    labels = _labels(data.first.labels, min(extent.samples, 2 * extent.largest), loss, frozen.device)
    curvature = loss_curvature(loss, torch.Size([len(labels), *probe.outputs]), labels, probe.dtype)
    why = partial(coupling, probe, frozen, loss, curvature.separable)
    if data.several and (reason := why()):
        raise InputError(f"{reason}; {CUT}")
    check_loss_kind(quantity, curvature, loss)
    matrix = output_matrix(curvature, row.fisher or fisher, samples, 0, extent.samples, available)
    size, block_bytes = sizes(row, frozen, probe, matrix, extent, chunk, available, why)
    coupled, width = probe.coupling is not None, probe.outputs.numel()
    jacobian = FirstParts(frozen, images, size, coupled, layers, block_bytes, width=width, meter=meter)
    held = extent.nbytes + copied_bytes(frozen) + matrix.noise_bytes
    made = Rehearsal(Problem(jacobian, curvature, matrix, memory), meter, fakes, held)
    outputs_of_layers = sum(shape[1:].numel() for shapes in probe.shapes.values() for shape in shapes)
    made.column_bytes = size * (outputs_of_layers + 2 * probe.outputs.numel()) * probe.dtype.itemsize
    few = trial_count(min(len(labels), extent.samples), available // max(1, probe.sample_bytes), COMPANY)
    whole = row.stored and not (row.kronecker and matrix.fisher == "mc")
    apart = whole or size < extent.samples
    made.trials = made.count_trial(few, apart, whole, products=not row.stored, twice=quantity == "hessian")
    return made


def _mapped(samples: Samples, function: Callable[[Tensor], Tensor]) -> Samples:
    return function(samples) if isinstance(samples, Tensor) else samples.mapped(function)


def _without_numbers(samples: Tensor, count: int, device: torch.device, fakes: FakeTensorMode) -> Tensor:
    """So many samples like these."""
    with fakes:
        return torch.empty(count, *samples.shape[1:], dtype=samples.dtype, device=device)


def _labels(labels: Samples, count: int, loss: Loss, device: torch.device) -> Samples:
    """So many labels: those that are given, again and again; where they have no numbers a label that is not ignored."""
    counts = int(getattr(loss, "ignore_index", None) == 0)

    def repeated(given: Tensor) -> Tensor:
        if given.is_meta:
            return torch.full((count, *given.shape[1:]), counts, dtype=given.dtype, device=device)
        return given.detach().to(device)[torch.arange(count, device=device) % len(given)]

    return _mapped(labels, repeated)
