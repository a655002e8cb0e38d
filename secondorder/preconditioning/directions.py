"""Directions in parameter space: tensors by the names of a network's parameters, and the gradient of a batch's loss as one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.batches import checked_tensors
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.loss_curvature import Loss, loss_name
from secondorder.errors import InputError, NonFiniteError, failures_of
from secondorder.matrix_power.transforms import full_precision

Batch = tuple[Tensor, Tensor]
"""Images `[N, ...]` and their labels."""
Direction = dict[str, Tensor]
"""A tensor of each parameter's shape by the parameter's name."""


def loss_gradient(
    network: nn.Module, batch: Batch, *, loss: Loss = F.cross_entropy, params: Iterable[str] | None = None
) -> Direction:
    """dL/dw of the loss of a batch by parameter names, tensors of the parameters' shapes, zero where w is not used.

    The network is evaluated in its present mode and left as it is, bit for bit, its `.grad` too.

    Args:
        network: any network.
        batch: images `[N, ...]` and labels.
        loss: a function of outputs and labels to one number.
        params: names of parameters; None: all that require gradients.

    Raises:
        InputError: for bad input, and a loss that is no number or does not depend on the outputs.
        NonFiniteError: for images or gradients that are not finite.
    """
    frozen = FrozenNetwork(network, params)
    images, labels = checked_tensors(batch, frozen)
    if not callable(loss) or isinstance(loss, type):
        raise InputError(f"loss {loss!r}: must be a function of outputs and labels, for example F.cross_entropy")
    with torch.enable_grad(), full_precision(images):
        with failures_of(f"the network on images {list(images.shape)}"):
            outputs = frozen.outputs(images)
        with failures_of(f"the loss of outputs {list(outputs.shape)} and labels {list(labels.shape)}"):
            value = loss(outputs, labels)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError(
                f"{loss_name(loss)} must return one number that depends on the outputs; use reduction='mean'"
            )
        found = torch.autograd.grad(value, list(frozen.weights.values()), allow_unused=True, materialize_grads=True)
    gradient = dict(zip(frozen.weights, found, strict=True))
    check_finite(gradient)
    return gradient


@torch.no_grad()
def orthogonal_direction(gradient: Mapping[str, Tensor]) -> Direction:
    """(G G^T)^(-1/2) G = U V^T of each gradient G = U diag(s) V^T, what Muon makes of a momentum, by parameter names.

    Exact, where Muon takes five Newton-Schulz steps; zero along singular values that are zero up to rounding. Jordan et al.,
    "Muon: an optimizer for hidden layers in neural networks", 2024.

    Args:
        gradient: tensors `[O, ...]` of linear layers and convolutions, which are matrices `[O, I kH kW]` here.

    Raises:
        InputError: for a tensor with fewer than two axes, such as a bias.
        NonFiniteError: for numbers that are not finite.
    """
    for name in names_of(gradient):
        if gradient[name].ndim < 2 or gradient[name].numel() == 0:
            raise InputError(f"the gradient of {name} has the shape {list(gradient[name].shape)}: not that of a matrix")
    check_finite(gradient)
    found = {}
    for name, tensor in gradient.items():
        U, s, Vh = torch.linalg.svd(tensor.flatten(1).to(widest(tensor.device)), full_matrices=False)
        live = s > s[0] * max(U.shape[0], Vh.shape[1]) * torch.finfo(tensor.dtype).eps
        found[name] = ((U * live) @ Vh).view_as(tensor).to(tensor.dtype)
    return found


def checked_gradient(gradient: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Direction:
    """The gradient of these parameters in their order; InputError unless names and shapes are theirs, NonFiniteError."""
    names_of(gradient)
    for name in gradient:
        if name not in parameters:
            raise InputError(
                f"the gradient has {name!r}, which is not preconditioned; there are: {', '.join(parameters)}"
            )
    for name, parameter in parameters.items():
        if name not in gradient:
            raise InputError(f"the gradient lacks {name!r}; it needs: {', '.join(parameters)}")
        if gradient[name].shape != parameter.shape:
            raise InputError(
                f"the gradient of {name} has the shape {list(gradient[name].shape)}, not {list(parameter.shape)}"
            )
    ordered = {name: gradient[name].detach().to(parameter) for name, parameter in parameters.items()}
    check_finite(ordered)
    return ordered


def names_of(gradient: Mapping[str, Tensor]) -> list[str]:
    """The names of the parameters. InputError unless the gradient is tensors by names."""
    if not isinstance(gradient, Mapping) or not all(isinstance(tensor, Tensor) for tensor in gradient.values()):
        raise InputError(f"gradient {gradient!r}: must be tensors by the names of the parameters")
    return list(gradient)


def check_finite(gradient: Mapping[str, Tensor]) -> None:
    """NonFiniteError that names the first tensor with NaN or infinity."""
    for name, tensor in gradient.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"the gradient of {name} contains NaN or infinity; check the weights and the images")
