"""Any BackPACK quantity of any network that has a twin, without a trace in the network."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backpack import backpack, disable
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.saved_quantities import SavedQuantities
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from secondorder.accelerator import seed_random_numbers
from secondorder.curvature.backpack.chunks import chunk_size, run_once
from secondorder.curvature.backpack.conversion import Twin, backpack_network, extend_leaves
from secondorder.curvature.backpack.criterion import Criterion, check_loss, loss_of
from secondorder.curvature.backpack.kinds import Kind, kind_of
from secondorder.curvature.backpack.merging import MERGES, Part, product
from secondorder.curvature.backpack.refusals import (
    MATRIX_FREE,
    check_branches,
    check_extension,
    check_finite,
    check_images,
    check_leaves,
    check_subsampling,
)
from secondorder.curvature.backpack.registration import register
from secondorder.curvature.blocks import curvature_blocks
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.loss_curvature import Loss
from secondorder.curvature.matrix_free.separable_losses import SeparableLoss
from secondorder.curvature.operators.symmetric import SymmetricOperator
from secondorder.errors import InputError, check_seed
from secondorder.untouched import same_randomness

PRODUCTS = {Kind.GGN_PRODUCT: "ggn", Kind.HESSIAN_PRODUCT: "hessian"}


def backpack_quantity(
    network: nn.Module,
    loss: Loss,
    batch: tuple[Tensor, Tensor],
    extension: BackpropExtension,
    *,
    chunk: int | None = None,
    memory: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """What `extension` saves for each parameter, under the parameter's name in `network`.

    Parameters without `requires_grad`, and those for which the quantity has no value (batch normalisation with Kronecker
    factors), are left out.

    Args:
        network: anything that `backpack_network` can rewrite. It is not touched: the twin that is run has parameters of its own
            (in the same memory, unless they are `channels_last`) and copies of the buffers, so that values, ``.grad``, hooks,
            modes and attributes of the network stay as they are. Each chunk starts from the present buffers.
        loss: nn.CrossEntropyLoss, with class weights, ignored labels and smoothing, nn.BCEWithLogitsLoss or nn.MSELoss, or
            their functions of `torch.nn.functional`; mean or sum. BackPACK's own curvature of losses is not used.
        batch: images `[N, ...]`, and labels or targets as the loss takes them for the outputs, `[N, K]` or `[N, C, ...]`.
        extension: an instance, with or without `register`. Its result's format is BackPACK's. GGNMP and HMP give functions
            mat `[V, *parameter]` -> `[V, *parameter]` as long as the network's parameters stay as they are; networks with
            branches, where BackPACK's lose the cross terms, get exact matrix-free ones.
        chunk: so many samples at a time; the result is that of the whole batch. None: as many as memory allows.
        memory: bytes that may be used, by an estimate. None: most of what is free.
        seed: of Monte-Carlo quantities; None: from the present random state, which is left as it was. Labels that are drawn do
            not depend on `chunk`; the random columns of DiagHessianMC do.

    Raises:
        InputError: for everything that would be wrong; see `refusals`.
    """
    check_loss(loss)
    if seed is not None:
        check_seed(seed, hint="; or None (the present random state)")
    register(check_extension(extension))
    twin = private_twin(network)
    images, targets = check_images(network, batch)
    check_twin(twin, extension)
    check_subsampling(extension, len(images))
    frozen, images = FrozenNetwork(network), row_major(images)
    with surroundings(images, seed):
        with same_randomness():  # what the checks draw does not count
            expected = first_outputs(frozen, images)
            outputs, sizes = run_once(twin, images[:1])
        check_same_outputs(network, expected, outputs)
        criterion = loss_of(loss, torch.Size([len(images), *outputs.shape[1:]]), targets, images.dtype)
        kind = kind_of(extension)
        if kind is not None and kind in PRODUCTS and twin.branching() is not None:
            multiply = matrix_free(network, loss, (images, targets), PRODUCTS[kind], chunk, memory)
            return {name: as_product(multiply[name], frozen, name) for name in multiply}
        size = chunk_size(sizes, extension, images, outputs[0].numel(), chunk, memory)
        pieces = [slice(first, first + size) for first in range(0, len(images), size)]
        parts = [run(network, criterion.part(piece), images[piece], extension, len(images)) for piece in pieces]
    if kind in PRODUCTS:
        return {name: as_product(product([part[name] for part in parts]), frozen, name) for name in parts[0]}
    return merged(parts, extension)


def check_twin(twin: Twin, extension: BackpropExtension) -> None:
    """InputError where the registered extension would skip a module of the twin, or get it wrong; see `refusals`."""
    check_leaves(list(twin.leaves()), extension)
    check_branches(twin.branching(), extension)


@contextmanager
def surroundings(images: Tensor, seed: int | None = None) -> Iterator[None]:
    """The state of the process in which BackPACK runs, undone on exit.

    Its default dtype is that of the images, for BackPACK makes tensors of the default dtype; no autocast, gradients on, and so is
    BackPACK; the random state is the present one, or of this seed.
    """
    default, stores = torch.get_default_dtype(), disable.store_io
    with same_randomness(), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        if seed is not None:
            seed_random_numbers(seed)
        torch.set_default_dtype(images.dtype)
        disable.store_io = True
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            disable.store_io = stores


def first_outputs(network: FrozenNetwork, images: Tensor) -> Tensor:
    """The network's own outputs for the first image, without a graph or a trace. InputError when it cannot run on it."""
    try:
        with torch.no_grad():
            outputs = network.outputs(images[:1])
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the network cannot run on images of shape {list(images.shape)}: {reason}") from error
    if outputs.ndim < 2 or outputs.numel() == 0:
        raise InputError(
            f"the network returns shape {list(outputs.shape)} for one image; curvature needs outputs [N, K] or [N, C, ...]"
        )
    return outputs


def check_same_outputs(network: nn.Module, expected: Tensor, outputs: Tensor) -> None:
    """InputError unless the network gives the outputs of its twin, up to rounding.

    The two differ when a class of TWINS runs its modules in another way than its row says. Only the shapes are
    compared of outputs with random masks, and with NaN, whose origin is reported later.
    """
    random = any(isinstance(part, _DropoutNd) and part.training for part in network.modules())
    same = outputs.shape == expected.shape
    if same and not random and expected.isfinite().all():
        tolerance = 1e-2 if outputs.dtype == torch.float32 else 1e-6
        same = torch.allclose(outputs, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    if not same:
        raise InputError(
            f"the twin of this {type(network).__name__} gives other outputs; check the rows of TWINS it uses"
        )


def run(
    network: nn.Module, loss: SeparableLoss, images: Tensor, extension: BackpropExtension, total: int
) -> dict[str, Part]:
    """The quantity of one chunk for each parameter that has one, by the parameter's name in the network."""
    twin = private_twin(network)
    parameters = own_parameters(twin)
    criterion = extend_leaves(Criterion(loss))
    with quiet():
        value = criterion(twin(images))
        check_finite(list(twin.leaves()), value.detach())
        try:
            with backpack(extension):
                value.backward()
        except NotImplementedError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{type(extension).__name__}: {reason}; {MATRIX_FREE}") from error
        finally:
            extension.saved_quantities = SavedQuantities()  # nothing of this batch stays in the user's extension
    return {
        name: Part(getattr(parameter, extension.savefield), parameter.grad, len(images), len(images) / total)
        for name, parameter in parameters.items()
        if parameter.grad is not None and hasattr(parameter, extension.savefield)
    }


def private_twin(network: nn.Module) -> Twin:
    """The twin with copies of the network's buffers, which its modules may write into."""
    twin = backpack_network(network)
    for _, leaf in twin.leaves():
        for name, buffer in leaf.named_buffers(recurse=False):
            setattr(leaf, name, buffer.clone())
    return twin


def own_parameters(twin: Twin) -> dict[str, nn.Parameter]:
    """Give the twin row-major parameters of its own, where possible in the memory of the network's, by name in its order."""
    owned: dict[str, nn.Parameter] = {}
    for _, leaf in twin.leaves():
        for name, parameter in leaf.named_parameters(recurse=False):
            owned[twin.names[parameter]] = own = nn.Parameter(row_major(parameter.detach()), parameter.requires_grad)
            setattr(leaf, name, own)
    return {name: owned[name] for name in twin.names.values() if name in owned}


def row_major(tensor: Tensor) -> Tensor:
    """The tensor, or a row-major copy of it: BackPACK takes views of activations, which are `channels_last` if a factor is."""
    plain = torch.empty(tensor.shape, device="meta").stride() == tensor.stride()
    return tensor if plain else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that images need no gradient, and BackPACK's that a frozen module has no quantity."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        warnings.filterwarnings("ignore", message="Extension saving to .* does not have an extension for Module")
        yield


def merged(parts: list[dict[str, Part]], extension: BackpropExtension) -> dict[str, Any]:
    """The quantity of the batch from those of its chunks."""
    if len(parts) == 1:
        return {name: part.value for name, part in parts[0].items()}
    return {name: MERGES[type(extension)]([part[name] for part in parts]) for name in parts[0]}


def as_product(multiply: Callable[[Tensor], Tensor], frozen: FrozenNetwork, name: str) -> Callable[[Tensor], Tensor]:
    """The product with one parameter's block without a graph, run in the surroundings of its chunk.

    It raises InputError for anything but mat `[V, *parameter]`, V >= 1, of the parameter's dtype, and when a parameter has been
    changed: the products use them where they are.
    """
    w = frozen.parameters[name].detach()

    def matrix_product(mat: Tensor) -> Tensor:
        """G mat `[V, *parameter]`."""
        frozen.check_unchanged()
        if mat.ndim != w.ndim + 1 or mat.shape[1:] != w.shape or len(mat) == 0 or mat.dtype != w.dtype:
            raise InputError(
                f"mat of shape {list(mat.shape)} ({mat.dtype}): the product with {name} needs [V, {str(list(w.shape))[1:]} "
                f"({w.dtype}), V of at least 1"
            )
        with surroundings(mat), torch.no_grad():
            return multiply(mat)

    return matrix_product


def matrix_free(
    network: nn.Module,
    loss: Loss,
    batch: tuple[Tensor, Tensor],
    quantity: str,
    chunk: int | None,
    memory: int | None,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Exact products with each parameter's block, in BackPACK's calling convention mat `[V, *parameter]`."""

    def in_rows(block: SymmetricOperator) -> Callable[[Tensor], Tensor]:
        return lambda mat: (block @ mat.flatten(1).T).T.reshape(mat.shape)

    blocks = curvature_blocks(network, loss, batch, quantity, chunk=chunk, memory=memory)
    return {name: in_rows(block) for name, block in blocks.items()}
