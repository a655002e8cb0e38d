"""Ground truth of every quantity of a small network from dense matrices that torch.func computes.

Index letters: N samples, K outputs, P parameters of the whole network, V columns. l_n is the part of sample n in the
loss, w all parameters as one vector: g_n = dl_n/dw, H_n = d^2 l_n/dw^2, G_n = J_n^T (d^2 l_n/dz_n^2) J_n with J_n = dz_n/dw.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from secondorder.untouched import same_randomness

from .kronecker_reference import output_hessians, true_blocks


@dataclass(frozen=True)
class Truth:
    """What the quantities of a network are made of, dense."""

    parts: dict[str, tuple[slice, torch.Size]]  # of each parameter: its place in w, and its shape
    gradients: Tensor  # g_n [N, P]
    ggn: Tensor  # G_n [N, P, P]
    hessian: Tensor  # H_n [N, P, P]
    expand: dict[str, Tensor]  # Kronecker blocks of the weights and biases of linear and convolution layers
    reduce: dict[str, Tensor]


def truth_of(network: nn.Module, loss: nn.CrossEntropyLoss, batch: tuple[Tensor, Tensor], seed: int = 0) -> Truth:
    """The dense matrices of a network with few parameters and the mean cross-entropy.

    seed: of dropout masks; the batch is evaluated as a whole, so that they are those of any other run from this seed.
    """
    images, labels = batch
    N = len(images)
    parts, size = {}, 0
    for name, parameter in network.named_parameters():
        parts[name] = slice(size, size + parameter.numel()), parameter.shape
        size += parameter.numel()
    w = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    def outputs(w: Tensor) -> Tensor:
        state = {name: w[place].view(shape) for name, (place, shape) in parts.items()}
        with same_randomness():
            torch.manual_seed(seed)
            return functional_call(network, state, (images,))

    def losses(w: Tensor) -> Tensor:
        return torch.stack([loss(z[None], label[None]) / N for z, label in zip(outputs(w), labels, strict=True)])

    J, M = jacrev(outputs)(w), output_hessians(loss, outputs(w).detach(), labels)
    gradients, hessians = jacrev(losses)(w), jacrev(jacrev(losses))(w)
    blocks = true_blocks(network, loss, batch)
    return Truth(parts, gradients, J.mT @ M @ J, hessians, blocks["expand"], blocks["reduce"])


def diagonal(matrices: Tensor) -> Tensor:
    """`[..., P, P] -> [..., P]`."""
    return matrices.diagonal(dim1=-2, dim2=-1)


Expected = Callable[[Truth, str], Tensor]


def at(of: Callable[[Truth], Tensor], dimensions: int = 1) -> Expected:
    """The part of one parameter of an array over w; for `dimensions` 2 its block of a matrix."""

    def part(truth: Truth, name: str) -> Tensor:
        place = truth.parts[name][0]
        return of(truth)[..., place] if dimensions == 1 else of(truth)[..., place, place]

    return part


EXPECTED: dict[str, Expected] = {
    "BatchGrad": at(lambda t: t.gradients),
    "BatchL2Grad": lambda t, name: at(lambda t: t.gradients)(t, name).square().sum(1),
    "SumGradSquared": at(lambda t: t.gradients.square().sum(0)),
    "Variance": at(lambda t: t.gradients.var(0, unbiased=False)),
    "DiagGGNExact": at(lambda t: diagonal(t.ggn.sum(0))),
    "DiagGGNMC": at(lambda t: diagonal(t.ggn.sum(0))),
    "BatchDiagGGNExact": at(lambda t: diagonal(t.ggn)),
    "BatchDiagGGNMC": at(lambda t: diagonal(t.ggn)),
    "SqrtGGNExact": at(lambda t: t.ggn.sum(0), 2),
    "SqrtGGNMC": at(lambda t: t.ggn.sum(0), 2),
    "DiagHessian": at(lambda t: diagonal(t.hessian.sum(0))),
    "DiagHessianMC": at(lambda t: diagonal(t.hessian.sum(0))),
    "BatchDiagHessian": at(lambda t: diagonal(t.hessian)),
    "BatchDiagHessianMC": at(lambda t: diagonal(t.hessian)),
    "KFAC": lambda t, name: t.expand[name],
    "KFLR": lambda t, name: t.expand[name],
    "WeightSharingKFAC": lambda t, name: t.expand[name],
    "WeightSharingKFLR": lambda t, name: t.expand[name],
    "WeightSharingKFAC, reduce": lambda t, name: t.reduce[name],
    "WeightSharingKFLR, reduce": lambda t, name: t.reduce[name],
    "KFRA": lambda t, name: (EXPECTED["GGNMP"] if name.endswith("bias") else EXPECTED["KFLR"])(t, name),
    "GGNMP": at(lambda t: t.ggn.sum(0), 2),
    "HMP": at(lambda t: t.hessian.sum(0), 2),
}
"""Quantity -> what it is for a parameter. KFRA for one sample, where its averages lose nothing; it has exact blocks of biases."""


def as_tensor(value: Any, shape: torch.Size, expected: Tensor) -> Tensor:
    """A quantity of a parameter of this shape in the form of EXPECTED: factors multiplied, roots times their transpose."""
    if isinstance(value, list):
        return torch.block_diag(*(torch.kron(B.contiguous(), A.contiguous()) for B, A in pairs(value)))
    if (
        value.dim() == len(shape) + 2
        and expected.dim() == 2
        and expected.shape[0] == expected.shape[1] == shape.numel()
    ):
        root = value.flatten(2).flatten(0, 1)  # of V columns and N samples
        return root.mT @ root
    return value.reshape(expected.shape)


def pairs(factors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, A) of each group; A = 1 for a bias."""
    B = factors[0] if factors[0].dim() == 3 else factors[0][None]
    A = factors[1] if len(factors) == 2 else B.new_ones(len(B), 1, 1)
    yield from zip(B, A if A.dim() == 3 else A[None], strict=True)


def largest_error(quantity: str, found: dict[str, Any], truth: Truth) -> float:
    """max |found - expected| over all parameters that have a value, relative to the largest entry of each."""
    return max(
        float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        for value, expected in compared(quantity, found, truth)
    )


def mean_error(quantity: str, found: dict[str, Any], truth: Truth) -> float:
    """sum |found - expected| / sum |expected| over all parameters: for random quantities."""
    every = list(compared(quantity, found, truth))
    return float(sum((v - e).abs().sum() for v, e in every) / sum(e.abs().sum() for _, e in every))


def largest_scale_error(quantity: str, found: dict[str, Any], truth: Truth) -> float:
    """max |c - 1| over all parameters, c = <found, expected> / <expected, expected> the least-squares scale of each."""
    return max(float(((v * e).sum() / e.square().sum() - 1).abs()) for v, e in compared(quantity, found, truth))


def compared(quantity: str, found: dict[str, Any], truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    """(found, expected) of every parameter that has a value; of a product, what it gives for three vectors."""
    for name, value in found.items():
        expected, shape = EXPECTED[quantity](truth, name), truth.parts[name][1]
        if callable(value):
            V = torch.linspace(-1, 1, 3 * shape.numel(), dtype=expected.dtype).view(3, -1).sin()
            yield value(V.view(3, *shape)).flatten(1), V @ expected
        else:
            yield as_tensor(value, shape, expected), expected
