"""What each kind of layer does with its weight: the one convention of weight sharing, on which all factors rest.

Whatever its kind, a layer multiplies at each position t of a sample n the vectors a by its weight, and adds its bias:

    z_ntg = W_g a_ntg + b_g,    dL/dW_g = sum_nt g_ntg a_ntg^T

Index letters: N samples, T positions, G groups, D inputs and O outputs of a group, a `[N, G, T, D]` what the weight multiplies,
g `[N, G, T, O]` the gradients at the output, W `[G, O, D]`. A bias is the last input of each group, which is 1.

    linear layer              a the input, T all of its dimensions between the first and the last, G = 1
    convolution               a the patches of the input (`patches`)
    transposed convolution    a the patches of the input with zeros between; W the kernel turned round
    embedding                 a = e_k, token k's unit vector: only the diagonal of sum a a^T, the tokens' counts, is not zero
    normalisation             a the normalised channel, each of them a group of its own, O = D = 1

The first dimension of a layer's input is the sample, with transformers too (batch_first=True). Where it is the position
instead, N and T change places: what is summed or averaged over the positions of a sample is wrong then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secondorder.curvature.matrix_free.module_state import ModuleState
from secondorder.untouched import same_randomness

UNFOLDED_BYTES = 64 * 2**20
"""Size of a buffer of unfolded patches or of products of single samples: larger batches are taken part by part."""


class LayerKind(ABC):
    """A layer as a multiplication of vectors by its weight: z = W a + b at each position of a sample, in each of G groups."""

    sample: int
    """Dimensions of a sample of the input: an input with no more is a call without a batch."""
    diagonal_input = False
    """Whether sum a a^T is diagonal; it is `[G, D]` then, and never a matrix."""
    has_factors = True
    """Whether Kronecker factors say something about it; else there is only the diagonal of its block."""

    def __init__(self, module: Any, attribute: str = "weight") -> None:
        self.module = module
        self.weight_shape = _shape(module, attribute)

    @property
    def groups(self) -> int:
        """G, the number of groups with inputs, outputs and a weight matrix of their own."""
        return 1

    @property
    def outputs(self) -> int:
        """O, the number of outputs of a group."""
        return self.weight_shape[0] // self.groups

    @property
    def inputs(self) -> int:
        """D, the number of inputs of a group, without the one of a bias."""
        return self.weight_shape[1:].numel()

    def matrix(self, weight: Tensor) -> Tensor:
        """W `[G, O, D]` of a tensor shaped like the weight; a view where that is possible."""
        return weight.reshape(self.groups, self.outputs, self.inputs)

    def weight(self, matrix: Tensor) -> Tensor:
        """The tensor shaped like the weight whose `matrix` this is."""
        return matrix.reshape(self.weight_shape)

    def batched(self, x: Tensor, leading: int = 0) -> Tensor:
        """Input or output of a call, `[N, *]` also from a call without a batch, after `leading` dimensions."""
        return x.unsqueeze(leading) if x.ndim == self.sample + leading else x

    def numbers(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """An input in the number format of the factors."""
        return x.to(dtype)

    def check_call(self, x: Tensor, output: Tensor) -> None:  # noqa: B027  most kinds have nothing to check
        """Raises InputError for a call, with input x, whose output is not what the layer's own settings say."""

    @abstractmethod
    def positions(self, x: Tensor) -> int:
        """T, the number of positions of a sample at which an input `[N, *]` meets the weight."""

    @abstractmethod
    def input_vectors(self, x: Tensor) -> Tensor:
        """a `[N, G, T, D]`, the vectors that the weight multiplies, of an input `[N, *]`, without the one of a bias."""

    def mean_vectors(self, x: Tensor) -> Tensor:
        """mean_t a `[N, G, D]`, the mean over the positions of the vectors that the weight multiplies."""
        return self.input_vectors(x).mean(2)

    def joint_vectors(self, x: Tensor, bias: bool) -> Tensor:
        """a `[N, G, T, D]`, the vectors that the weight multiplies; with `bias` D has one more entry, the one of the bias."""
        return with_ones(self.input_vectors(x), bias)

    @abstractmethod
    def output_vectors(self, s: Tensor, leading: int = 1) -> Tensor:
        """g `[*, G, T, O]` of gradients `[*, *out]` at the output, with so many leading dimensions."""

    def weight_gradient(self, x: Tensor, g: Tensor, bias: bool) -> Tensor:
        """sum_nt g a^T `[G, O, D]`, D with the one of a bias: what autograd has to find for weight and bias."""
        step = self.samples_at_a_time(x)
        parts = (
            torch.einsum("ngto,ngtd->god", self.output_vectors(gs), self.joint_vectors(part, bias))
            for part, gs in zip(x.split(step), g.split(step), strict=True)
        )
        return _sum(parts)

    def samples_at_a_time(self, x: Tensor) -> int:
        """Samples whose vectors stay below UNFOLDED_BYTES, at least one."""
        numbers = self.positions(x) * self.groups * (self.inputs + 1)
        return max(1, UNFOLDED_BYTES // max(1, numbers * x.element_size()))

    def input_norm(self, x: Tensor) -> Tensor:
        """The Euclidean norm of an input `[N, *]`, a scalar tensor."""
        return x.norm()


def _shape(module: Any, attribute: str) -> torch.Size:
    """That of a weight, also of one that a parametrisation makes, which may write into buffers whenever it does."""
    if attribute in module._parameters:
        return module._parameters[attribute].shape
    tensors = {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}
    with ModuleState(module).with_tensors(tensors), same_randomness(), torch.no_grad():
        return getattr(module, attribute).shape


def with_ones(a: Tensor, bias: bool) -> Tensor:
    """Vectors `[*, D]` with the one of a bias last."""
    return F.pad(a, (0, 1), value=1.0) if bias else a


def _sum(terms: Iterator[Tensor]) -> Tensor:
    return sum(terms, start=next(terms))
