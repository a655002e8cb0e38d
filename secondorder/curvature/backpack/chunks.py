"""How many samples fit into memory at once.

Index letters: N samples, V columns, P parameters of a module. A module with D_in inputs and D_out outputs for a sample keeps
both for the backward pass; while it is worked on, there are V columns of either, and V gradients of its P parameters.
The estimate was within a factor of two of what CIFAR's ResNet-8 took for most quantities, and high for the exact Hessian.
"""

import math
from dataclasses import dataclass

import torch
from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn

from secondorder.curvature.backpack.conversion import Twin
from secondorder.curvature.backpack.diag_hessian_mc import BatchDiagHessianMC
from secondorder.curvature.backpack.kinds import Kind, kind_of, mc_samples, subsampling
from secondorder.curvature.backpack.merging import MERGES
from secondorder.curvature.matrix_free.memory import budget, check_memory
from secondorder.errors import InputError, check_whole
from secondorder.pooling import Covariance
from secondorder.pooling.matrix_function import MatrixFunction

COPIES = 4  # of the columns of one module at a time: before, after, and work space
CURVED = (nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.LogSigmoid, nn.SiLU, nn.GELU, nn.Softplus)
SQUARE_ROOTS = (extensions.SqrtGGNExact, extensions.SqrtGGNMC)  # results [V, N, *parameter]
PER_SAMPLE = (  # results [N, *parameter]
    extensions.BatchGrad,
    extensions.BatchDiagGGNExact,
    extensions.BatchDiagGGNMC,
    extensions.BatchDiagHessian,
    BatchDiagHessianMC,
)


@dataclass(frozen=True)
class Size:
    """Numbers of one sample at a module of the twin."""

    module: nn.Module
    inputs: int  # D_in
    outputs: int  # D_out


def run_once(twin: Twin, image: Tensor) -> tuple[Tensor, list[Size]]:
    """The twin's outputs for one image `[1, ...]` without a graph, and the sizes of its modules in running order."""
    sizes: list[Size] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(Size(module, sum(x.numel() for x in args), output.numel()))

    handles = [leaf.register_forward_hook(note) for _, leaf in twin.leaves()]
    try:
        with torch.no_grad():
            return twin(image), sizes
    finally:
        for handle in handles:
            handle.remove()


def chunk_size(
    sizes: list[Size],
    extension: BackpropExtension,
    images: Tensor,
    outputs: int,
    chunk: int | None = None,
    memory: int | None = None,
) -> int:
    """Samples to run at a time: as asked, else as many as fit into `memory` bytes (None: most of what is free).

    Raises InputError for a chunk that is no positive whole number, for chunks of a quantity that cannot be merged, and
    with the number of bytes when not even one sample fits.
    """
    N, quantity = len(images), type(extension).__name__
    whole = type(extension) not in MERGES or subsampling(extension) is not None
    if chunk is not None:
        check_whole("chunk", chunk, hint="; or None (as memory allows)")
        if whole and chunk < N:
            raise InputError(f"chunk {chunk}: {quantity} cannot be put together from chunks; use chunk=None")
        return min(chunk, N)
    whole_batch, per_sample = numbers_needed(sizes, extension, outputs, N)
    fixed, each = whole_batch * images.dtype.itemsize, per_sample * images.dtype.itemsize
    available, least = budget(memory, images.device), N if whole else 1
    way_out = "use smaller images or batches or a Monte-Carlo quantity, or pass chunk to try all the same"
    check_memory(fixed + each * least, available, f"{quantity} of {least} of {N} samples at a time", way_out)
    return N if whole else min(N, (available - fixed) // each)


def numbers_needed(sizes: list[Size], extension: BackpropExtension, outputs: int, N: int) -> tuple[int, int]:
    """Estimates of the numbers that are needed for the batch as a whole, and for each sample that is run at a time.

    The former are results that keep the samples apart, twice, as chunks are put together; and for averages (KFRA) the
    matrices [D_in, D_in] before, after and at work. The latter are all inputs and outputs, and the worst module's columns.
    """
    columns = first_columns(extension, outputs)
    kept = columns if isinstance(extension, SQUARE_ROOTS) else int(isinstance(extension, PER_SAMPLE))
    results = worst = 0
    for size in reversed(sizes):
        trained = sum(p.numel() for p in size.module.parameters() if p.requires_grad)
        results += 2 * N * kept * trained
        worst = max(worst, columns * (COPIES * (size.inputs + size.outputs) + 2 * trained))
        if kind_of(extension) is Kind.HESSIAN_FACTORS:
            columns += residual_columns(size, getattr(extension, "draws", None))
    if kind_of(extension) is Kind.AVERAGE:
        results = 3 * max(size.inputs for size in sizes) ** 2
    return results, sum(size.inputs + size.outputs for size in sizes) + worst


def first_columns(extension: BackpropExtension, outputs: int) -> int:
    """The number of columns V of the loss's root: `outputs` of a sample, or Monte-Carlo samples; 1 where nothing goes back."""
    if kind_of(extension) is None:
        return 1
    return mc_samples(extension) or outputs


def residual_columns(size: Size, draws: int | None) -> int:
    """An upper estimate of the signed factors that a module adds to the Hessian."""
    if isinstance(size.module, Covariance):
        return size.inputs if draws is None else 2 * draws  # C M
    if isinstance(size.module, MatrixFunction):
        return size.outputs + math.isqrt(size.outputs) if draws is None else 2 * draws  # C (C + 1)
    return size.outputs if isinstance(size.module, CURVED) else 0
