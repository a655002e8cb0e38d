"""The kinds of layers, each a record of what its weight multiplies: see `weight_sharing`, also for the index letters."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from secondorder.curvature.kronecker.normalisation import Normalisation
from secondorder.curvature.kronecker.patches import map_positions, map_size, mean_patches, moves, padded, patches
from secondorder.curvature.kronecker.weight_sharing import LayerKind
from secondorder.errors import InputError


class Linear(LayerKind):
    """`z = W x + b` over the last dimension."""

    sample = 1

    def positions(self, x: Tensor) -> int:
        """T, the product of the dimensions of an input `[N, *, D]` between the first and the last; 1 where there are none."""
        return math.prod(x.shape[1:-1])

    def input_vectors(self, x: Tensor) -> Tensor:
        """a `[N, 1, T, D]`: the inputs themselves, by position."""
        return x.reshape(len(x), 1, math.prod(x.shape[1:-1]), x.shape[-1])  # also of no samples

    def output_vectors(self, s: Tensor, leading: int = 1) -> Tensor:
        """g `[*, 1, T, O]`: the gradients at the output, by position."""
        return s.reshape(*s.shape[:leading], 1, math.prod(s.shape[leading:-1]), s.shape[-1])


class TransposedLinear(Linear):
    """`z = W^T x + b` over the last dimension, W `[D, O]`."""

    @property
    def outputs(self) -> int:
        """O, the second dimension of the weight `[D, O]`."""
        return self.weight_shape[1]

    @property
    def inputs(self) -> int:
        """D, the first dimension of the weight `[D, O]`."""
        return self.weight_shape[0]

    def matrix(self, weight: Tensor) -> Tensor:
        """W^T `[1, O, D]` of a tensor shaped like the weight `[D, O]`; a view."""
        return weight.mT[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """The tensor `[D, O]` shaped like the weight of a matrix `[1, O, D]`; a view."""
        return matrix[0].mT


class Convolution(LayerKind):
    """A convolution of one to three dimensions; any stride, padding, padding mode, dilation and groups."""

    def __init__(self, module: Any, attribute: str = "weight") -> None:
        super().__init__(module, attribute)
        self.sample = 1 + len(module.kernel_size)

    @property
    def groups(self) -> int:
        """G, the number of groups of the convolution, each with channels of its own."""
        return self.module.groups

    def check_call(self, x: Tensor, output: Tensor) -> None:
        """InputError for an output that is not of the size that the layer's settings give."""
        if map_size(self.module, self.batched(x)) != output.shape[1 - self.sample :]:
            raise InputError(self._other_size)

    @property
    def _other_size(self) -> str:
        return (
            f"{type(self.module).__name__} gives an output of another size than its kernel, stride, padding and dilation say: is "
            "it a convolution, as Options(treat_as=...) says? leave it out there, or give approximation={its name: 'fallback'}"
        )

    def positions(self, x: Tensor) -> int:
        """T, the number of positions of the output for an input `[N, C, *size]`."""
        return map_positions(self.module, x)

    def input_vectors(self, x: Tensor) -> Tensor:
        """a `[N, G, T, D]`: the patches of the input that the kernel meets at each position of the output."""
        return patches(self.module, x).mT

    def mean_vectors(self, x: Tensor) -> Tensor:
        """mean_t a `[N, G, D]`, the mean patches, without unfolding the input."""
        return mean_patches(self.module, x)

    def output_vectors(self, s: Tensor, leading: int = 1) -> Tensor:
        """g `[*, G, T, O]`: the gradients `[*, G O, *size]` at the output by position."""
        return s.flatten(leading + 1).unflatten(leading, (self.groups, -1)).mT

    def weight_gradient(self, x: Tensor, g: Tensor, bias: bool) -> Tensor:
        """sum_nt g a^T `[G, O, D]`, with `bias` sum_nt g beside it.

        The derivative of the convolution of the padded input, whose windows are the patches: these are not written out.
        """
        conv, G = self.module, self.groups
        derivative = (conv1d_weight, conv2d_weight, conv3d_weight)[len(conv.kernel_size) - 1]
        shape = (G * self.outputs, self.inputs // math.prod(conv.kernel_size), *conv.kernel_size)
        found = derivative(padded(conv, x), shape, g, moves(conv), 0, conv.dilation, G).reshape(G, self.outputs, -1)
        return torch.cat([found, self.output_vectors(g).sum((0, 2))[..., None]], -1) if bias else found


class TransposedConvolution(Convolution):
    """Its weight `[C, O, *kernel]`, C = G D / |kernel|, is turned round; the output's size is that of `output_padding`."""

    @property
    def outputs(self) -> int:
        """O, the output channels of a group: the second dimension of the weight `[C, O, *kernel]`."""
        return self.weight_shape[1]

    @property
    def inputs(self) -> int:
        """D = (C / G) |kernel|, the input channels of a group times the entries of the kernel."""
        return self.weight_shape.numel() // (self.groups * self.outputs)

    @property
    def _other_size(self) -> str:
        return (
            f"{type(self.module).__name__} called with an output_size that is not that of its output_padding: give the layer "
            "output_padding, or approximation={its name: 'fallback'}"
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """W `[G, O, D]` of a tensor shaped like the weight `[C, O, *kernel]`, its kernels turned round."""
        kernels = weight.flip(self._axes).unflatten(0, (self.groups, -1))  # [G, C / G, O, *kernel]
        return kernels.transpose(1, 2).flatten(2)

    def weight(self, matrix: Tensor) -> Tensor:
        """The tensor `[C, O, *kernel]` shaped like the weight of a matrix `[G, O, D]`, its kernels turned back."""
        kernels = matrix.unflatten(2, (-1, *self.weight_shape[2:])).transpose(1, 2)
        return kernels.flatten(0, 1).flip(self._axes)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(2, len(self.weight_shape)))


class Embedding(TransposedLinear):
    """Rows `[V, O]` looked up by tokens: D = V, a = e_k, zero for the padding token, whose row has no gradient."""

    sample = 0
    diagonal_input = True

    def numbers(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens as they are: they stay whole numbers, whatever the format of the factors."""
        return x

    def positions(self, x: Tensor) -> int:
        """T, the number of tokens of a sample, padding included: there the input is zero."""
        return math.prod(x.shape[1:])

    def input_vectors(self, x: Tensor) -> Tensor:
        """Refused with InputError: the unit vectors would be as many numbers as tokens times V.

        `counts` has their sum of squares.
        """
        raise InputError("the input vectors of an embedding are not built; its input factor is the tokens' counts")

    def counts(self, x: Tensor) -> Tensor:
        """sum_nt a, the diagonal of sum_nt a a^T `[1, V]`: how often each token occurs."""
        dtype = torch.promote_types(self.module.weight.dtype, torch.float32)
        ones = self._seen(x).to(dtype)
        return torch.zeros(1, self.inputs, dtype=dtype, device=x.device).index_add_(1, x.flatten(), ones[None])

    def weight_gradient(self, x: Tensor, g: Tensor, bias: bool) -> Tensor:
        """sum_nt g a^T `[1, O, V]`: the gradients added up by token."""
        rows = g.reshape(-1, self.outputs) * self._seen(x)[:, None]
        return self.matrix(g.new_zeros(self.weight_shape).index_add_(0, x.flatten(), rows))

    def squared_gradients(self, xs: Sequence[Tensor], gs: Sequence[Tensor]) -> Tensor:
        """sum_n (sum_t g a^T)^2 `[1, O, V]` of all tokens `[N, *]` and gradients `[N, *, O]`: sums by sample and token."""
        tokens = torch.cat([x.reshape(len(x), -1) for x in xs], 1)
        g = torch.cat([g.reshape(len(g), -1, self.outputs) for g in gs], 1).flatten(0, 1)
        places = tokens + self.inputs * torch.arange(len(tokens), device=tokens.device)[:, None]
        places, which = torch.unique(places, return_inverse=True)
        sums = g.new_zeros(len(places), self.outputs)
        sums.index_add_(0, which.flatten(), g * self._seen(tokens)[:, None])
        total = g.new_zeros(self.weight_shape)
        return self.matrix(total.index_add_(0, places % self.inputs, sums.square_()))

    def input_norm(self, x: Tensor) -> Tensor:
        """sqrt(N T), the Euclidean norm of N T unit vectors, a scalar tensor; padding tokens count too."""
        return torch.full((), math.sqrt(x.numel()), device=x.device)  # no wait

    def _seen(self, x: Tensor) -> Tensor:
        """`[N T]`, False for the padding token."""
        padding = self.module.padding_idx
        return torch.ones_like(x, dtype=torch.bool).flatten() if padding is None else x.flatten() != padding


class InProjection(LayerKind):
    """The projections of query, key and value by one weight `[3 E, E]`, three groups with inputs of their own.

    An input is `[N, T, 3, E + 1]`: what is projected, with a one, and zeros in groups that the call does not project. A group has
    the positions of its own calls: a key can have more of them than a query.
    """

    sample = 3

    @property
    def groups(self) -> int:
        """G = 3, one group each for query, key and value."""
        return 3

    def batched(self, x: Tensor, leading: int = 0) -> Tensor:
        """The input or output as it is, since its record always has a batch."""
        return x

    def positions(self, x: Tensor) -> int:
        """T, the second dimension of an input `[N, T, 3, E + 1]`."""
        return x.shape[1]

    def input_vectors(self, x: Tensor) -> Tensor:
        """a `[N, 3, T, E]`: the inputs of query, key and value, zeros where a call does not project a group."""
        return self.joint_vectors(x, bias=False)

    def joint_vectors(self, x: Tensor, bias: bool) -> Tensor:
        """a `[N, 3, T, D]`: the inputs of query, key and value, D = E or, with `bias`, E + 1 with the one of a bias."""
        return x[..., : self.inputs + bias].transpose(1, 2)

    def output_vectors(self, s: Tensor, leading: int = 1) -> Tensor:
        """g `[*, 3, T, E]`: the gradients `[*, T, 3 E]` at the projections of query, key and value."""
        return s.unflatten(-1, (3, -1)).transpose(-2, -3)

    def weights_of_positions(self, xs: Sequence[Tensor]) -> Tensor:
        """`[3, 1, 1]`: the positions of all calls as a multiple of the positions of each group's own calls."""
        own = sum((x[0, :, :, -1].sum(0) for x in xs), start=xs[0].new_zeros(3))
        return (sum(map(self.positions, xs)) / own.clamp(min=1.0))[:, None, None]


LAYER_KINDS: dict[type[nn.Module], type[LayerKind]] = {
    nn.Linear: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.ConvTranspose1d: TransposedConvolution,
    nn.ConvTranspose2d: TransposedConvolution,
    nn.ConvTranspose3d: TransposedConvolution,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: InProjection,
    nn.LayerNorm: Normalisation,
    nn.RMSNorm: Normalisation,
    nn.GroupNorm: Normalisation,
    nn.BatchNorm1d: Normalisation,
    nn.BatchNorm2d: Normalisation,
    nn.BatchNorm3d: Normalisation,
}
"""A new kind of layer is one record."""


def layer_kind(module: nn.Module, attribute: str = "weight") -> LayerKind:
    """What a module does with the weight of this name, by the table LAYER_KINDS; InputError for a module of no kind in it."""
    if attribute == "weight" and isinstance(module, nn.MultiheadAttention):
        attribute = "in_proj_weight"
    if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return Linear(module, attribute)
    for kind, description in LAYER_KINDS.items():
        if isinstance(module, kind):
            return description(module, attribute)
    raise InputError(f"{type(module).__name__} is no kind of layer with a description of what its weight multiplies")
