"""The curvature of a network's loss, parameter by parameter, as symmetric linear operators: a quantity of `quantities`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from secondorder.curvature.kronecker.blocks import recorded_layers
from secondorder.curvature.matrix_free.batch_parts import Probe, part_size, probed
from secondorder.curvature.matrix_free.batch_stream import BatchStream
from secondorder.curvature.matrix_free.batches import Batch, checked_batch, is_batch
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.loss_check import check_loss
from secondorder.curvature.matrix_free.loss_curvature import KNOWN, AnyLoss, Loss, known, loss_curvature, loss_name
from secondorder.curvature.matrix_free.memory import BLOCK_BYTES, BLOCK_COPIES, budget
from secondorder.curvature.matrix_free.network_outputs import NetworkOutputs, Output
from secondorder.curvature.matrix_free.output_matrix import FISHERS, OutputMatrix, output_matrix
from secondorder.curvature.matrix_free.per_sample import layers_with_rules
from secondorder.curvature.matrix_free.samples import tensors_of
from secondorder.curvature.matrix_free.separable_losses import LossParts
from secondorder.curvature.matrix_free.streamed import CUT, StreamedJacobian, StreamedLoss
from secondorder.curvature.quantities import QUANTITIES, CurvatureBlocks, Problem, Quantity
from secondorder.errors import InputError, check_known
from secondorder.matrix_power.transforms import full_precision


def curvature_blocks(
    network: nn.Module,
    loss: Loss,
    batch: tuple[Any, Any] | Iterable[tuple[Any, Any]],
    quantity: str,
    params: Iterable[str] | None = None,
    *,
    output: Output | None = None,
    samples: int = 1,
    seed: int = 0,
    fisher: str = "exact",
    chunk: int | None = None,
    memory: int | None = None,
) -> CurvatureBlocks:
    """The blocks of a quantity of QUANTITIES for the loss of a batch (images `[N, ...]`, labels), any network.

    The network may differentiate within its forward pass, also with respect to images that require gradients. It is evaluated
    in its present mode, attention by PyTorch's math kernel, and left as it is, bit for bit, with its parameters, buffers, images
    and labels as they are now: they are copied, and parameters that are changed later make products raise InputError, or have no
    part in them where PyTorch does not tell of the change (`.data`). Its present random state decides on dropout masks, the
    same in every product and those of one evaluation of the whole batch, which is therefore not divided. Cross-entropy (of
    outputs `[N, C]`, or `[N, C, ...]` of several positions), binary cross-entropy with logits and squared error have all
    quantities, other losses `ggn` (positive semi-definite when the loss is convex in the outputs) and `hessian`; these are
    evaluated a part of the batch at a time if `SumOverSamples` declares them to be sums. A loss is a function of the outputs:
    one that depends on parameters itself is refused, `DampedOperator(block, c)` adds what weight decay c |w|^2 / 2 does.

    Args:
        network: any module.
        loss: a function of outputs and labels to one number, such as F.cross_entropy.
        batch: images and labels; also a mapping or a tuple of tensors `[N, ...]` in place of images, with which the network is
            called by name or by position; or a data set, which is read anew for every product: a DataLoader, or a list of
            batches, that gives the same batches in the same order each time. The loss is that of all its samples at once: a mean
            is divided by their number, or by the weights of the labels that count, and a loss that is known to be a sum over
            samples is summed.
        quantity: a key of QUANTITIES.
        params: names of parameters; None: all that require gradients, which for Kronecker-factored quantities must all be
            weights and biases of linear layers, convolutions and attention (`kronecker_parameters`).
        output: what the loss reads where the network returns several tensors: a key or attribute, an index, or a function of what
            it returns. None: all, also several `[N, ...]` in a structure, for a loss of that structure.
        samples, seed: Monte-Carlo columns and their random numbers, the same on every device.
        fisher: a key of FISHERS, for Kronecker-factored quantities.
        chunk: samples that are evaluated at once; None: all if they fit into the memory, else as many as fit. A batch that is
            evaluated at once keeps its graph for further products.
        memory: bytes that may be used; None: most of what is available.

    Raises:
        InputError: for input that does not fit, and before anything is computed when the memory does not suffice. What a network
            does that has no derivative, or no second one, is refused by the first computation that would go wrong.
    """
    check_known("quantity", quantity, QUANTITIES)
    check_known("fisher", fisher, FISHERS)
    row = QUANTITIES[quantity]
    outputs = NetworkOutputs(output)
    frozen = FrozenNetwork(network, params, copied=True, output=outputs)
    layers = watched_layers(row, frozen)
    data = checked_data(batch, frozen)
    available = budget(memory, frozen.device)
    probe, few = probed(frozen, data.few.inputs, layers, available)
    loss = outputs.loss_of_one(loss)
    curvature = loss_parts(data, loss, probe, frozen)
    check_loss_kind(quantity, curvature, loss)
    matrix = output_matrix(curvature, row.fisher or fisher, samples, seed, len(data), available)
    extent = Extent.of(data)
    why = partial(coupling, probe, frozen, loss, curvature.separable)
    size, block_bytes = sizes(row, frozen, probe, matrix, extent, chunk, available, why)
    jacobian = jacobian_of(frozen, data, probe, few, size, layers, block_bytes)
    with full_precision(tensors_of(data.few.inputs)[0]):
        check_any_loss(curvature, jacobian, data.few)
        return row.build(Problem(jacobian, curvature, matrix, memory))


@dataclass(frozen=True)
class Extent:
    """N samples, those of the largest batch, and the bytes of the copies of a batch that are held."""

    samples: int
    largest: int
    nbytes: int

    @classmethod
    def of(cls, data: Batch | BatchStream) -> "Extent":
        """That of one batch, or of a data set, whose largest batch is held as it is read, on the device, and joined."""
        held = 3 * data.largest_bytes if isinstance(data, BatchStream) else data.nbytes
        return cls(len(data), data.largest, held)


def check_loss_kind(quantity: str, curvature: LossParts, loss: Loss) -> None:
    """InputError for a quantity that needs a loss with closed forms, and another one."""
    if not QUANTITIES[quantity].any_loss and not curvature.factored:
        other = loss_name(loss) + (" of such targets" if known(loss) else "")
        raise InputError(
            f"quantity {quantity!r} needs {KNOWN}, not {other}; use quantity 'ggn' or 'hessian', which take any loss"
        )


def sizes(
    row: Quantity,
    network: FrozenNetwork,
    probe: Probe,
    matrix: OutputMatrix,
    extent: Extent,
    chunk: int | None,
    available: int,
    why: Callable[[], str | None],
) -> tuple[int, int]:
    """Samples that are evaluated at once, and bytes of a block of rows. InputError for what does not fit."""
    fixed = row.fixed(network, probe, extent.samples) + matrix.noise_bytes + extent.nbytes + copied_bytes(network)
    each = row.graphs * probe.sample_bytes + matrix.output_bytes(probe.outputs.numel(), probe.dtype.itemsize)
    size = part_size(extent.largest, chunk, each, fixed, available, why, reserve=available // 4)
    return size, min(BLOCK_BYTES, int(available - fixed - size * each) // BLOCK_COPIES)


def watched_layers(row: Quantity, network: FrozenNetwork) -> dict[nn.Module, nn.Module | None]:
    """The layers whose inputs and output gradients a quantity is made of."""
    if row.kronecker:
        return recorded_layers(network)
    return dict.fromkeys(layers_with_rules(network.module, network.parameters))


def checked_data(batch: Any, network: FrozenNetwork) -> Batch | BatchStream:
    """The batch as one checked copy, or as a stream where it is a data set of several batches.

    Raises InputError for other data.
    """
    if is_batch(batch):
        return checked_batch(batch, network)
    stream = BatchStream(batch, network)
    return stream if stream.count > 1 else stream.copied()


def jacobian_of(
    network: FrozenNetwork,
    data: Batch | BatchStream,
    probe: Probe,
    few: Linearisation,
    chunk: int,
    layers: Mapping[nn.Module, nn.Module | None],
    block_bytes: int,
) -> Jacobian:
    """The Jacobian J of the outputs of one batch, or of a data set read batch by batch, `chunk` samples at a time.

    Where memory has room for a whole batch, formulas are tried on the few samples that the probe has linearised.
    """
    if isinstance(data, BatchStream):
        return StreamedJacobian(network, data, chunk, layers, block_bytes, probe.outputs.numel())
    coupled = lambda: probe.coupling is not None  # noqa: E731
    kept = few if chunk >= len(data) else None
    return Jacobian(network, data.inputs, chunk, coupled, layers, block_bytes, kept)


def loss_parts(data: Batch | BatchStream, loss: Loss, probe: Probe, network: FrozenNetwork) -> LossParts:
    """The loss as a sum over samples. InputError for a data set that cannot be divided."""
    if not isinstance(data, BatchStream):
        return loss_curvature(loss, torch.Size([len(data), *probe.outputs]), data.labels, probe.dtype)
    if why := coupling(probe, network, loss, separable=True):
        raise InputError(f"{why}; {CUT}")
    return StreamedLoss(data, loss, probe.outputs, probe.dtype)


def check_any_loss(loss: LossParts, jacobian: Jacobian, few: Batch) -> None:
    """Raises InputError for a loss known by its values only that `check_loss` refuses on few samples; other losses pass."""
    if isinstance(loss, StreamedLoss):
        made, z = loss.of_few, Linearisation(jacobian.network, few.inputs, slice(None)).z
    elif isinstance(loss, AnyLoss):
        z = next(jacobian.parts()).z
        made = loss.part(slice(0, len(z)))
    else:
        return
    if isinstance(made, AnyLoss):
        check_loss(made, z, jacobian.network.parameters)


def coupling(probe: Probe, network: FrozenNetwork, loss: Loss, separable: bool) -> str | None:
    """Why a batch cannot be divided into parts (batch statistics, random numbers, a loss that is no sum), in words, or None."""
    if probe.coupling is None and network.random.drawn:
        return "the network draws random numbers (dropout), which are those of a whole batch; eval() draws none"
    if probe.coupling is None and not separable:
        return f"{loss_name(loss)} is not known to be a sum over the samples (`SumOverSamples` says so of one)"
    return probe.coupling


def copied_bytes(network: FrozenNetwork) -> int:
    """Bytes of the copies of all parameters."""
    return sum(t.nbytes for t in (*network.weights.values(), *network.constants.values()))
