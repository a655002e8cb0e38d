"""Curvature of a loss with respect to images, or to what a module of the network puts out, instead of parameters.

The loss is taken as a function of shifts s_n, one for each sample n of the batch, that are added to its activation a_n (the
image, or the output of a module for it). At s = 0 derivatives with respect to s are those with respect to a: shifts are
parameters of a network whose input are the numbers of the samples, and all that is known of the curvature of parameters holds.

Index letters: N samples, D numbers of an activation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondorder.curvature.blocks import curvature_blocks
from secondorder.curvature.matrix_free.batches import checked_tensors
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork, unwrapped
from secondorder.curvature.matrix_free.loss_curvature import Loss
from secondorder.curvature.matrix_free.plain_attention import plain_attention
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.quantities import QUANTITIES
from secondorder.errors import InputError, check_known, failures_of
from secondorder.untouched import untouched

FEW = 2
"""Samples that tell the shape of an activation: the fewest with which training-mode batch norm works."""


@dataclass(frozen=True)
class ActivationCurvature:
    """The curvature of the loss of a batch with respect to the activations of its N samples, D numbers each.

    Args:
        samples: the diagonal block `[D, D]` of each sample. Without batch statistics there are no others, and each is that of the
            sample's own term of the loss: of a mean over N, 1/N of the curvature of the sample's own loss.
        whole: the matrix `[N D, N D]`, samples one after the other.
        shape: of the activation of a sample, which is flattened row by row.
    """

    samples: list[SymmetricOperator]
    whole: SymmetricOperator
    shape: torch.Size


class ShiftedActivations(nn.Module):
    """Sample numbers `[n]` -> outputs of a network with shifts, all zero, added to the activations of these samples.

    The activation is what the module `at` puts out, None for the images.
    """

    def __init__(self, network: nn.Module, images: Tensor, at: str | None, like: Tensor) -> None:
        super().__init__()
        self.network = network
        self.at = at
        self.images = images  # no buffer, of which each evaluation has a copy
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros_like(like)) for _ in images])

    def forward(self, numbers: Tensor) -> Tensor:
        """The network's outputs `[n, ...]` for the images of these sample numbers `[n]`, their shifts added to the activation."""
        images, shifts = self.images[numbers], torch.stack([self.shifts[n] for n in numbers.tolist()])
        if self.at is None:
            outputs: Tensor = self.network(images + shifts)
            return outputs
        return _with_activation(self.network, self.at, images, lambda activation: activation + shifts)


def activation_curvature(
    network: nn.Module,
    loss: Loss,
    batch: tuple[Tensor, Tensor],
    quantity: str,
    at: str | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    memory: int | None = None,
) -> ActivationCurvature:
    """The curvature of the loss of a batch (images `[N, ...]`, labels) with respect to its images or to an activation.

    Everything that `curvature_blocks` says of networks, losses and memory holds. A product with the block of a single sample
    costs as much as one with the whole; for many products with few blocks give batches of one sample.

    Args:
        network: in its present mode; it is left as it is.
        loss: see `curvature_blocks`.
        batch: images, of floating-point numbers where the curvature is with respect to them, and labels.
        quantity: "ggn", "hessian", "mc_fisher", "empirical_fisher" or "diagonal".
        at: name of a module of the network that is called once and puts out a tensor `[N, ...]`; None: the images.
        samples: Monte-Carlo columns of "mc_fisher".
        seed: of their random numbers.
        chunk: samples that are evaluated at once; None: as many as the memory allows.
        memory: bytes that may be used; None: most of what is available.

    Raises:
        InputError: as `curvature_blocks`, and for a module that is not there, not called, called more than once, or puts out
            something else.
    """
    check_known("quantity", quantity, [name for name, row in QUANTITIES.items() if not row.kronecker])
    if not isinstance(network, nn.Module):
        raise InputError(f"network {type(network).__name__}: must be a torch.nn.Module")
    network = unwrapped(network)[0]
    images, labels = checked_tensors(batch, _reference(network, batch))
    like = images[0]
    if at is not None:
        check_known("module", at, [name for name, _ in network.named_modules()])
        like = _activation(network, at, images[:FEW])
    if not like.is_floating_point():
        raise InputError(
            f"{'the images' if at is None else at} are {like.dtype}; curvature needs floating-point numbers"
        )
    shifted = ShiftedActivations(network, images, at, like)
    numbers = torch.arange(len(images), device=images.device)
    names = [f"shifts.{n}" for n in range(len(images))]
    blocks = curvature_blocks(
        shifted, loss, (numbers, labels), quantity, names, samples=samples, seed=seed, chunk=chunk, memory=memory
    )
    return ActivationCurvature([blocks[name] for name in names], blocks.whole, like.shape)


def _reference(network: nn.Module, batch: object) -> FrozenNetwork:
    """What tells the device and the number format that images must have: those of the network, if it has any."""
    if names := [name for name, _ in network.named_parameters()]:
        return FrozenNetwork(network, names)
    images = batch[0] if isinstance(batch, tuple | list) and batch else None
    zero = images.new_zeros(()) if isinstance(images, Tensor) and images.is_floating_point() else torch.zeros(())
    return FrozenNetwork(nn.ParameterList([zero]))


def _activation(network: nn.Module, at: str, images: Tensor) -> Tensor:
    """The activation of the first image."""
    found: list[Tensor] = []

    def keep(activation: Tensor) -> Tensor:
        found.append(activation.detach())
        return activation

    with untouched(network), plain_attention(), failures_of(f"the network for images {list(images.shape)}"):
        _with_activation(network, at, images.clone(), keep)
    return found[0][0]


def _with_activation(network: nn.Module, at: str, images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The network's outputs with another activation. InputError unless the module is called once, for a tensor `[n, ...]`."""
    calls = 0

    def hook(module: nn.Module, arguments: object, activation: object) -> Tensor:
        nonlocal calls
        calls += 1
        if not isinstance(activation, Tensor) or activation.ndim == 0 or len(activation) != len(images):
            got = f"shape {list(activation.shape)}" if isinstance(activation, Tensor) else type(activation).__name__
            raise InputError(
                f"module {at!r} puts out {got} for {len(images)} images; name one that puts out a tensor [N, ...]"
            )
        return change(activation)

    handle = network.get_submodule(at).register_forward_hook(hook)
    try:
        outputs: Tensor = network(images)
    finally:
        handle.remove()
    if calls != 1:
        raise InputError(f"module {at!r} is called {calls} times; name one that is called once")
    return outputs
