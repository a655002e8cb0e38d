"""What BackPACK would silently get wrong, refused by name: networks, quantities and batches."""

from numbers import Integral
from typing import Any

import torch
from backpack import hook_run_extensions, hook_store_io
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from secondorder.curvature.backpack.kinds import Kind, kind_of, subsampling
from secondorder.errors import InputError, NonFiniteError, check_whole, short
from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout

EVAL = "call .eval() on it (or on the network) first"
MATRIX_FREE = "use curvature_blocks, which is matrix-free and works for any network"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def named(path: str, module: nn.Module) -> str:
    """The module for messages: `'features.0' (Conv2d)`."""
    return f"{path!r} ({type(module).__name__})" if path else f"the network itself ({type(module).__name__})"


def check_model(model: nn.Module) -> None:
    """InputError for a network whose twin would compute something else than the network, whatever the quantity."""
    if not isinstance(model, nn.Module):
        raise InputError(f"network {model!r}: must be an nn.Module")
    check_dtype(model)
    for path, module in model.named_modules():
        name = named(path, module)
        check_hooks(name, module)
        if "forward" in vars(module):
            raise InputError(f"{name} has a forward set on the instance, which its twin would lose; make it a class")
        if isinstance(module, _ConvNd):
            check_padding(name, module)
        if isinstance(module, _BatchNorm):
            check_batch_norm(name, module)
        if isinstance(module, AdaptiveChannelDropout) and module.training:
            raise InputError(f"{name} is in training mode, where its rate mixes samples; {EVAL}")


def check_dtype(model: nn.Module) -> None:
    """InputError unless all parameters are float32, or all float64: BackPACK has no mixed or half precision."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InputError(f"network with {found} parameters: curvature needs all float32 or all float64; use .float()")


def check_hooks(name: str, module: nn.Module) -> None:
    """InputError for a module with hooks other than BackPACK's, or with BackPACK's and an in-place activation."""
    hooks = [hook for kind in HOOKS for hook in (getattr(module, kind) or {}).values()]
    foreign = [hook for hook in hooks if hook not in (hook_store_io, hook_run_extensions)]
    if foreign:
        hook = getattr(foreign[0], "__name__", type(foreign[0]).__name__)
        raise InputError(f"{name} has a hook ({hook}), which its twin would not run; remove the hook, or {MATRIX_FREE}")
    if hooks and getattr(module, "inplace", False):
        raise InputError(
            f"{name} works in place in a network extended by BackPACK, which keeps its input: its forward fails; set "
            "inplace=False, or pass the network without `extend`"
        )


def check_padding(name: str, module: _ConvNd) -> None:
    """InputError for padding that BackPACK ignores (other than zeros) or does not understand (given by name)."""
    if module.padding_mode != "zeros":
        raise InputError(
            f"{name} has padding_mode={module.padding_mode!r}, which BackPACK silently takes for zeros; "
            f"use padding_mode='zeros', or {MATRIX_FREE}"
        )
    if isinstance(module.padding, str):
        raise InputError(
            f"{name} has padding={module.padding!r}, which BackPACK does not understand; give it as whole numbers, "
            f"or {MATRIX_FREE}"
        )


def check_batch_norm(name: str, module: _BatchNorm) -> None:
    """InputError for batch normalisation by the batch's own statistics, which mixes its samples."""
    if module.training:
        raise InputError(f"{name} is in training mode, where it mixes samples; {EVAL}")
    if module.running_mean is None:
        raise InputError(f"{name} has no running statistics and mixes samples; use track_running_stats=True")


def check_extension(extension: object) -> BackpropExtension:
    """The extension. InputError for a class instead of an instance, and for anything else (PCHMP: by `kind_of`).

    And for a number of Monte-Carlo samples that is none.
    """
    if isinstance(extension, type) and issubclass(extension, BackpropExtension):
        raise InputError(f"extension {extension.__name__} is a class; pass an instance: {extension.__name__}()")
    if not isinstance(extension, BackpropExtension):
        raise InputError(f"extension {extension!r}: must be a BackPACK extension, e.g. backpack.extensions.KFAC()")
    kind_of(extension)
    if hasattr(extension, "_mc_samples"):
        check_whole("mc_samples", extension._mc_samples)
    return extension


def check_subsampling(extension: BackpropExtension, N: int) -> None:
    """InputError for a subsampling that does not name samples of a batch of N; a tuple would index several dimensions."""
    chosen = subsampling(extension)
    numbers = chosen.tolist() if hasattr(chosen, "tolist") else chosen
    if chosen is None or (isinstance(numbers, list) and numbers and all(_names_sample(n, N) for n in numbers)):
        return
    raise InputError(
        f"subsampling {short(chosen)}: must be a list of whole numbers in 0, ..., {N - 1}, samples of the batch"
    )


def _names_sample(number: object, N: int) -> bool:
    """Whether this is the index of one of N samples; negative ones count from the end."""
    return isinstance(number, Integral) and not isinstance(number, bool) and -N <= int(number) < N


def check_leaves(leaves: list[tuple[str, nn.Module]], extension: BackpropExtension) -> None:
    """InputError for the first module that the (registered) extension would skip, fail at, or get wrong."""
    quantity, second_order = type(extension).__name__, extension.expects_backpropagation_quantities()
    known = extension._BackpropExtension__module_extensions  # BackPACK has no public way to ask
    for path, leaf in leaves:
        trained = any(parameter.requires_grad for parameter in leaf.parameters())
        if type(leaf) not in known and (second_order or trained):
            raise InputError(
                f"{named(path, leaf)} has no row for {quantity}; add its class to `DERIVATIVES` or `ROWS` in "
                f"secondorder.curvature.backpack.registration, or {MATRIX_FREE}"
            )
        if second_order and isinstance(leaf, _DropoutNd):
            raise InputError(f"{named(path, leaf)} is in training mode, where {quantity} takes zeros for drops; {EVAL}")


def check_branches(branch: str | None, extension: BackpropExtension) -> None:
    """InputError for an average over the batch (KFRA) in a network that branches at the path `branch`."""
    if branch is not None and kind_of(extension) is Kind.AVERAGE:
        raise InputError(
            f"{type(extension).__name__} at the branches of {branch!r} loses their cross terms; use KFAC or KFLR, or "
            "curvature_blocks with quantity 'kfac_expand'"
        )


def check_images(network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The images and targets, without the graphs they may have, into which the backward pass would go on.

    InputError for anything but two tensors of N >= 1 samples that fit the network's dtype.
    """
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise InputError("batch: must be a pair of tensors (images, targets)")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError("no parameter requires gradients, so no parameter has curvature; use requires_grad_() on some")
    images, targets = batch
    if images.ndim < 2 or len(images) == 0:
        raise InputError(f"batch with images of shape {list(images.shape)}: needs [N, ...] with at least one sample")
    if targets.ndim < 1 or len(targets) != len(images):
        raise InputError(
            f"batch of {len(images)} images with targets of shape {list(targets.shape)}: needs one for each"
        )
    for parameter in network.parameters():
        if (images.dtype, images.device) != (parameter.dtype, parameter.device):
            raise InputError(
                f"images are {images.dtype} on {images.device}, the network is {parameter.dtype} on {parameter.device}; "
                "use images.to(device, dtype)"
            )
    if targets.device != images.device:
        raise InputError(f"targets are on {targets.device}, images on {images.device}; use targets.to(images.device)")
    if not images.isfinite().all():
        raise NonFiniteError("the images contain NaN or infinite values")
    images, targets = (part.clone() if part.is_inference() else part.detach() for part in (images, targets))
    return images, targets


def check_finite(leaves: list[tuple[str, nn.Module]], value: Tensor) -> None:
    """NonFiniteError for a loss that is NaN or infinite, naming the first module with such an output."""
    if value.isfinite().all():
        return
    for path, leaf in leaves:
        output: Any = leaf.output
        if not output.isfinite().all():
            raise NonFiniteError(f"{named(path, leaf)} gives NaN or infinite values; curvature is undefined there")
    raise NonFiniteError("the loss is NaN or infinite; check the targets")
