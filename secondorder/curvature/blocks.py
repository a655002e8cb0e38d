"""Curvature of a network's loss, parameter by parameter, as symmetric linear operators.

    ggn                 J^T H J, J = df/dw of the network's outputs, H the loss's Hessian at them (generalised Gauss-Newton)
    hessian             d^2 L / dw^2
    mc_fisher           the GGN with labels drawn from the model: unbiased, `samples` columns instead of one for each class
    empirical_fisher    1/N sum_n g_n g_n^T, g_n the gradient of a sample's own loss (sum_n for a summed loss; class weights
                        weight the samples): mc_fisher with the given labels in place of drawn ones
    kfac_expand         B kron A for each layer, positions as samples (KFC)
    kfac_reduce         B kron A for each layer, positions averaged first
    ekfac               the best diagonal in the eigenbasis of kfac_expand
    diagonal            the diagonal of the GGN

For the Kronecker-factored quantities `fisher` says what B is made of: the exact Hessian H, labels that the model draws (mc),
or the given labels (empirical).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from secondorder.curvature.kronecker.blocks import kronecker_blocks, kronecker_bytes, kronecker_layers, recorded_layers
from secondorder.curvature.kronecker.ekfac import ekfac_blocks, ekfac_bytes
from secondorder.curvature.matrix_free.batch_parts import Probe, part_size, probed
from secondorder.curvature.matrix_free.batch_stream import BatchStream
from secondorder.curvature.matrix_free.batches import Batch, checked_batch, is_batch
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.hessian import HessianOperator
from secondorder.curvature.matrix_free.jacobian import Jacobian, Linearisation
from secondorder.curvature.matrix_free.loss_check import check_loss
from secondorder.curvature.matrix_free.loss_curvature import KNOWN, AnyLoss, Loss, known, loss_curvature, loss_name
from secondorder.curvature.matrix_free.memory import BLOCK_BYTES, BLOCK_COPIES, budget
from secondorder.curvature.matrix_free.network_outputs import NetworkOutputs, Output
from secondorder.curvature.matrix_free.output_matrix import FISHERS, OutputMatrix, output_matrix
from secondorder.curvature.matrix_free.per_sample import layers_with_rules
from secondorder.curvature.matrix_free.samples import tensors_of
from secondorder.curvature.matrix_free.separable_losses import LossParts
from secondorder.curvature.matrix_free.streamed import CUT, StreamedJacobian, StreamedLoss
from secondorder.curvature.operators import BlockDiagonalOperator, DiagonalOperator, SymmetricOperator
from secondorder.errors import InputError, check_known
from secondorder.matrix_power.transforms import full_precision


class CurvatureBlocks(Mapping[str, SymmetricOperator]):
    """Parameter name -> its curvature block `[P, P]`, a `SymmetricOperator`, in the network's order.

    Of `blocks` by name, P entries of a parameter flattened row by row, and `whole`, all at once. KeyError for a name without one.
    """

    def __init__(self, blocks: Mapping[str, SymmetricOperator], whole: SymmetricOperator) -> None:
        self._blocks = dict(blocks)
        self.whole = whole
        """All parameters at once, in this order; block diagonal for Kronecker-factored quantities and the diagonal."""

    def __getitem__(self, name: str) -> SymmetricOperator:
        if name not in self._blocks:
            raise KeyError(f"no block for {name!r}; there are: {', '.join(self._blocks)}")
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


@dataclass(frozen=True)
class Problem:
    """What a quantity is made from: Jacobian, loss, the matrix M at the outputs, and bytes that may be used."""

    jacobian: Jacobian
    loss: LossParts
    matrix: OutputMatrix
    memory: int | None


@dataclass(frozen=True)
class Quantity:
    """One kind of curvature.

    fisher: columns of M, None for those that the caller chooses; any_loss: whether products with M are enough;
    graphs: memory in units of the graph of the samples that are evaluated at once; fixed: other bytes, for N samples.
    """

    build: Callable[[Problem], CurvatureBlocks]
    fisher: str | None
    any_loss: bool
    graphs: float
    fixed: Callable[[FrozenNetwork, Probe, int], int]
    kronecker: bool = False


def gauss_newton(problem: Problem) -> CurvatureBlocks:
    """The blocks J^T M J of each parameter and of all together, M `[N K, N K]` at the outputs, known by products."""

    def operator(names: Iterable[str]) -> GaussNewtonOperator:
        return GaussNewtonOperator(problem.jacobian, problem.matrix, list(names), problem.memory)

    names = problem.jacobian.network.weights
    return CurvatureBlocks({name: operator([name]) for name in names}, operator(names))


def hessian(problem: Problem) -> CurvatureBlocks:
    """The blocks of the Hessian d^2 L / dw^2 of each parameter and of all together, known by their products."""
    names = list(problem.jacobian.network.weights)
    operators = {name: HessianOperator(problem.jacobian, problem.loss, [name]) for name in names}
    return CurvatureBlocks(operators, HessianOperator(problem.jacobian, problem.loss, names))


def gauss_newton_diagonal(problem: Problem) -> CurvatureBlocks:
    """The diagonal of J^T M J, M the matrix at the outputs, as a diagonal block of each parameter; `whole` is diagonal too."""
    network = problem.jacobian.network
    whole = GaussNewtonOperator(problem.jacobian, problem.matrix, list(network.weights), problem.memory).diagonal()
    parts = whole.split([w.numel() for w in network.weights.values()])
    blocks = {name: DiagonalOperator(part) for name, part in zip(network.weights, parts, strict=True)}
    return CurvatureBlocks(blocks, DiagonalOperator(whole))


def kronecker(problem: Problem, sharing: str) -> CurvatureBlocks:
    """The K-FAC blocks B kron A of each parameter, with `sharing` "expand" (positions as samples) or "reduce" (their mean)."""
    blocks = kronecker_blocks(problem.jacobian, problem.matrix, kronecker_layers(problem.jacobian.network), sharing)
    return CurvatureBlocks(blocks, BlockDiagonalOperator(list(blocks.values())))


def ekfac(problem: Problem) -> CurvatureBlocks:
    """The EKFAC block of each parameter: the best diagonal in the eigenbasis of its "expand" factors B kron A."""
    blocks = ekfac_blocks(problem.jacobian, problem.matrix, kronecker_layers(problem.jacobian.network))
    return CurvatureBlocks(blocks, BlockDiagonalOperator(list(blocks.values())))


def vectors(network: FrozenNetwork, probe: Probe, samples: int, count: int) -> int:
    """Bytes of `count` vectors `[P]` over all chosen parameters of the network; probe and samples do not matter."""
    return count * sum(w.nbytes for w in network.weights.values())


PRODUCTS, ROWS = partial(vectors, count=4), partial(vectors, count=4 + BLOCK_COPIES)
EXPAND, REDUCE = (partial(kronecker_bytes, sharing=sharing) for sharing in ("expand", "reduce"))

QUANTITIES: dict[str, Quantity] = {
    "ggn": Quantity(gauss_newton, "exact", any_loss=True, graphs=2.5, fixed=PRODUCTS),
    "hessian": Quantity(hessian, "exact", any_loss=True, graphs=4, fixed=PRODUCTS),
    "empirical_fisher": Quantity(gauss_newton, "empirical", any_loss=False, graphs=2.5, fixed=PRODUCTS),
    "mc_fisher": Quantity(gauss_newton, "mc", any_loss=False, graphs=2.5, fixed=PRODUCTS),
    "kfac_expand": Quantity(
        partial(kronecker, sharing="expand"), None, any_loss=False, graphs=3, fixed=EXPAND, kronecker=True
    ),
    "kfac_reduce": Quantity(
        partial(kronecker, sharing="reduce"), None, any_loss=False, graphs=3, fixed=REDUCE, kronecker=True
    ),
    "ekfac": Quantity(ekfac, None, any_loss=False, graphs=3, fixed=ekfac_bytes, kronecker=True),
    "diagonal": Quantity(gauss_newton_diagonal, "exact", any_loss=False, graphs=3, fixed=ROWS),
}
"""Name -> how it is computed."""


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
        InputError: for input that does not fit, and before anything is computed when the memory does not suffice.
    """
    check_known("quantity", quantity, QUANTITIES)
    check_known("fisher", fisher, FISHERS)
    row = QUANTITIES[quantity]
    outputs = NetworkOutputs(output)
    frozen = FrozenNetwork(network, params, copied=True, output=outputs)
    layers = recorded_layers(frozen) if row.kronecker else layers_with_rules(frozen.module, frozen.parameters)
    data = checked_data(batch, frozen)
    available = budget(memory, frozen.device)
    probe = probed(frozen, data.few.inputs, layers, available)
    loss = outputs.loss_of_one(loss)
    curvature, why = loss_parts(data, loss, probe, frozen)
    if not row.any_loss and not curvature.factored:
        other = loss_name(loss) + (" of such targets" if known(loss) else "")
        raise InputError(
            f"quantity {quantity!r} needs {KNOWN}, not {other}; use quantity 'ggn' or 'hessian', which take any loss"
        )
    matrix = output_matrix(curvature, row.fisher or fisher, samples, seed, len(data), available)
    fixed = row.fixed(frozen, probe, len(data)) + matrix.noise_bytes + copied_bytes(frozen, data)
    each = row.graphs * probe.sample_bytes + matrix.output_bytes(probe.outputs.numel(), probe.dtype.itemsize)
    size = part_size(data.largest, chunk, each, fixed, available, why, reserve=available // 4)
    block_bytes = min(BLOCK_BYTES, int(available - fixed - size * each) // BLOCK_COPIES)
    jacobian = jacobian_of(frozen, data, probe, size, layers, block_bytes)
    with full_precision(tensors_of(data.few.inputs)[0]):
        check_any_loss(curvature, jacobian, data.few)
        return row.build(Problem(jacobian, curvature, matrix, memory))


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
    chunk: int,
    layers: Mapping[nn.Module, nn.Module | None],
    block_bytes: int,
) -> Jacobian:
    """The Jacobian J of the outputs of one batch, or of a data set read batch by batch, `chunk` samples at a time."""
    if isinstance(data, BatchStream):
        return StreamedJacobian(network, data, chunk, layers, block_bytes, probe.outputs.numel())
    return Jacobian(network, data.inputs, chunk, probe.coupling is not None, layers, block_bytes)


def loss_parts(
    data: Batch | BatchStream, loss: Loss, probe: Probe, network: FrozenNetwork
) -> tuple[LossParts, str | None]:
    """The loss as a sum over samples, and why the batch cannot be divided, or None.

    InputError for a data set where there is a reason.
    """
    if not isinstance(data, BatchStream):
        made = loss_curvature(loss, torch.Size([len(data), *probe.outputs]), data.labels, probe.dtype)
        return made, coupling(probe, network, loss, made.separable)
    if why := coupling(probe, network, loss, separable=True):
        raise InputError(f"{why}; {CUT}")
    return StreamedLoss(data, loss, probe.outputs, probe.dtype), None


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


def copied_bytes(network: FrozenNetwork, data: Batch | BatchStream) -> int:
    """Bytes of the copies of all parameters and of a batch; of a data set's largest: as it is read, on the device, and joined."""
    batch = data.nbytes if not isinstance(data, BatchStream) else 3 * data.largest_bytes
    return batch + sum(t.nbytes for t in (*network.weights.values(), *network.constants.values()))
