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

import torch
from torch import Tensor, nn

from secondorder.curvature.kronecker.blocks import kronecker_blocks, kronecker_bytes, kronecker_layers, recorded_layers
from secondorder.curvature.kronecker.ekfac import ekfac_blocks, ekfac_bytes
from secondorder.curvature.matrix_free.batch_parts import Probe, part_size, probed
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.hessian import HessianOperator
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.loss_check import check_loss
from secondorder.curvature.matrix_free.loss_curvature import KNOWN, AnyLoss, Loss, loss_curvature, loss_name
from secondorder.curvature.matrix_free.memory import BLOCK_BYTES, BLOCK_COPIES, budget
from secondorder.curvature.matrix_free.output_matrix import FISHERS, OutputMatrix, output_matrix
from secondorder.curvature.matrix_free.per_sample import layers_with_rules
from secondorder.curvature.matrix_free.separable_losses import LossCurvature, SeparableLoss
from secondorder.curvature.operators import BlockDiagonalOperator, DiagonalOperator, SymmetricOperator
from secondorder.errors import InputError, NonFiniteError, check_known
from secondorder.matrix_power.transforms import full_precision


class CurvatureBlocks(Mapping[str, SymmetricOperator]):
    """The block of each parameter by its name, in the network's order; parameters are flattened row by row."""

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
    """What a quantity is made from."""

    jacobian: Jacobian
    loss: LossCurvature
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
    """J^T M J."""

    def operator(names: Iterable[str]) -> GaussNewtonOperator:
        return GaussNewtonOperator(problem.jacobian, problem.matrix, list(names), problem.memory)

    names = problem.jacobian.network.weights
    return CurvatureBlocks({name: operator([name]) for name in names}, operator(names))


def hessian(problem: Problem) -> CurvatureBlocks:
    """d^2 L / dw^2."""
    names = list(problem.jacobian.network.weights)
    operators = {name: HessianOperator(problem.jacobian, problem.loss, [name]) for name in names}
    return CurvatureBlocks(operators, HessianOperator(problem.jacobian, problem.loss, names))


def gauss_newton_diagonal(problem: Problem) -> CurvatureBlocks:
    """The diagonal of J^T M J."""
    network = problem.jacobian.network
    whole = GaussNewtonOperator(problem.jacobian, problem.matrix, list(network.weights), problem.memory).diagonal()
    parts = whole.split([w.numel() for w in network.weights.values()])
    blocks = {name: DiagonalOperator(part) for name, part in zip(network.weights, parts, strict=True)}
    return CurvatureBlocks(blocks, DiagonalOperator(whole))


def kronecker(problem: Problem, sharing: str) -> CurvatureBlocks:
    """B kron A."""
    blocks = kronecker_blocks(problem.jacobian, problem.matrix, kronecker_layers(problem.jacobian.network), sharing)
    return CurvatureBlocks(blocks, BlockDiagonalOperator(list(blocks.values())))


def ekfac(problem: Problem) -> CurvatureBlocks:
    """A diagonal in the eigenbasis of B kron A."""
    blocks = ekfac_blocks(problem.jacobian, problem.matrix, kronecker_layers(problem.jacobian.network))
    return CurvatureBlocks(blocks, BlockDiagonalOperator(list(blocks.values())))


def vectors(network: FrozenNetwork, probe: Probe, samples: int, count: int) -> int:
    """Bytes of some vectors `[P]`."""
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
    batch: tuple[Tensor, Tensor],
    quantity: str,
    params: Iterable[str] | None = None,
    *,
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

    params: names of parameters; None: all that require gradients, which for Kronecker-factored quantities must all be
        weights and biases of linear layers, convolutions and attention (`kronecker_parameters`).
    samples, seed: Monte-Carlo columns and their random numbers, the same on every device.
    fisher: a key of FISHERS, for Kronecker-factored quantities.
    chunk: samples that are evaluated at once; None: all if they fit into the memory, else as many as fit. A batch that is
        evaluated at once keeps its graph for further products.
    memory: bytes that may be used; None: most of what is available.

    Raises InputError for input that does not fit, and before anything is computed when the memory does not suffice.
    """
    check_known("quantity", quantity, QUANTITIES)
    check_known("fisher", fisher, FISHERS)
    row = QUANTITIES[quantity]
    frozen = FrozenNetwork(network, params, copied=True)
    layers = recorded_layers(frozen) if row.kronecker else layers_with_rules(frozen.module, frozen.parameters)
    images, labels = checked_batch(batch, frozen)
    available = budget(memory, frozen.device)
    probe = probed(frozen, images, layers, available)
    curvature = loss_curvature(loss, torch.Size([len(images), *probe.outputs]), labels, probe.dtype)
    if not row.any_loss and not isinstance(curvature, SeparableLoss):
        raise InputError(
            f"quantity {quantity!r} needs {KNOWN}, not {loss_name(loss)}; use quantity 'ggn' or 'hessian', which take any loss"
        )
    matrix = output_matrix(curvature, row.fisher or fisher, samples, seed)
    fixed = row.fixed(frozen, probe, len(images)) + matrix.noise_bytes + copied_bytes(frozen, images, labels)
    outputs = matrix.output_bytes(probe.outputs.numel(), probe.dtype.itemsize)
    each, why = row.graphs * probe.sample_bytes + outputs, coupling(probe, frozen, loss, curvature)
    size = part_size(len(images), chunk, each, fixed, available, why, reserve=available // 4)
    block_bytes = min(BLOCK_BYTES, int(available - fixed - size * each) // BLOCK_COPIES)
    jacobian = Jacobian(frozen, images, size, probe.coupling is not None, layers, block_bytes)
    with full_precision(images):
        if isinstance(curvature, AnyLoss):
            z = next(jacobian.parts()).z
            check_loss(curvature.part(slice(0, len(z))), z, frozen.parameters)
        return row.build(Problem(jacobian, curvature, matrix, memory))


def coupling(probe: Probe, network: FrozenNetwork, loss: Loss, curvature: LossCurvature) -> str | None:
    """Why the batch cannot be divided, or None."""
    if probe.coupling is None and network.random.drawn:
        return "the network draws random numbers (dropout), which are those of a whole batch; eval() draws none"
    if probe.coupling is None and not curvature.separable:
        return f"{loss_name(loss)} is not known to be a sum over the samples (`SumOverSamples` says so of one)"
    return probe.coupling


def copied_bytes(network: FrozenNetwork, images: Tensor, labels: Tensor) -> int:
    """Bytes of the copies of a batch and of all parameters."""
    return sum(t.nbytes for t in (images, labels, *network.weights.values(), *network.constants.values()))


def checked_batch(batch: tuple[Tensor, Tensor], network: FrozenNetwork) -> tuple[Tensor, Tensor]:
    """Images and labels on the network's device, which is told whether images require gradients.

    InputError unless they are as many, at least one, and finite.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        raise InputError("a batch is a pair (images, labels) of tensors")
    if any(t.is_meta for t in batch):
        raise InputError("images or labels are on the device 'meta', which holds no numbers")
    network.differentiates_images = batch[0].requires_grad
    images, labels = (t.detach().to(network.device, copy=True) for t in batch)  # loaders use their memory again
    if images.ndim == 0 or labels.ndim == 0 or len(images) == 0 or len(images) != len(labels):
        raise InputError(
            f"images {list(images.shape)} and labels {list(labels.shape)}; a batch needs one label for each image, at least one"
        )
    if images.is_floating_point():
        kinds = {w.dtype for w in (*network.weights.values(), *network.constants.values())}
        if images.dtype not in kinds:
            raise InputError(
                f"the images are {images.dtype}, the network is {network.dtype}; convert one of them with .to()"
            )
        if not torch.isfinite(images).all():
            raise NonFiniteError("the images contain NaN or infinity")
    return images, labels
