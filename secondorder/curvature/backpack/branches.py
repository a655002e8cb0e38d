"""Branches of a network as modules of their own, so that BackPACK can walk through sums, concatenations and splits.

Index letters: V columns, N samples, C channels, `...` positions. BackPACK finds the quantity of a tensor by its memory
address; every module here therefore writes its output to new memory.
"""

from collections.abc import Iterable
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn

from secondorder.curvature.backpack.hessian_factors import tagged
from secondorder.curvature.backpack.kinds import Kind, kind_of
from secondorder.errors import InputError


class Sum(nn.Module):
    """x_1 + x_2 + ... of tensors of one shape."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """The sum; no broadcasting. Raises InputError for different shapes, or for fewer than two tensors."""
        shapes = {tuple(x.shape) for x in inputs}
        if len(inputs) < 2 or len(shapes) > 1:
            raise InputError(f"Sum needs two or more tensors of one shape, got {[list(x.shape) for x in inputs]}")
        total = inputs[0] + inputs[1]
        for x in inputs[2:]:
            total = total + x
        return total


class Concatenate(nn.Module):
    """Feature maps one after the other along the channels: `[N, C_1, ...], [N, C_2, ...] -> [N, C_1 + C_2, ...]`."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """The feature maps joined along the channels: `[N, C_1 + C_2 + ..., ...]`."""
        return torch.cat(inputs, 1)


class ChannelSlice(nn.Module):
    """Channels start, ..., stop - 1: `[N, C, ...] -> [N, stop - start, ...]`."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        if not 0 <= start < stop:
            raise InputError(f"ChannelSlice({start}, {stop}): needs 0 <= start < stop")
        self.start = start
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        """The channels, in memory of their own. Raises InputError when x has too few."""
        if x.shape[1] < self.stop:
            raise InputError(f"ChannelSlice({self.start}, {self.stop}) got {x.shape[1]} channels")
        return x[:, self.start : self.stop].clone()

    def extra_repr(self) -> str:
        """The range of the channels, as text: start, stop."""
        return f"{self.start}, {self.stop}"


class ChannelShuffle(nn.Module):
    """Channel (g, c) of G groups moves to (c, g), as in ShuffleNet: `[N, G c, ...] -> [N, c G, ...]`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def permutation(self, channels: int, device: torch.device | None = None) -> Tensor:
        """Index `[channels]`: which input channel each output channel is. Raises InputError unless G divides it."""
        if channels % self.groups:
            raise InputError(f"ChannelShuffle({self.groups}): {channels} channels are not divisible into groups")
        return torch.arange(channels, device=device).view(self.groups, -1).T.flatten()

    def forward(self, x: Tensor) -> Tensor:
        """The feature map `[N, C, ...]` with its channels permuted. Raises InputError unless the groups divide C."""
        return x[:, self.permutation(x.shape[1], x.device)]

    def extra_repr(self) -> str:
        """The number of groups, as text."""
        return f"{self.groups}"


class Branches(nn.Module):
    """merge(branch_1(x), branch_2(x), ...); a container that BackPACK does not see, only the modules inside it.

    An empty `nn.Sequential()` is the branch that hands x on.
    """

    def __init__(self, branches: Iterable[nn.Module], merge: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        """merge(branch_1(x), branch_2(x), ...) of an input x that every branch gets."""
        return self.merge(*(branch(x) for branch in self.branches))


class MergeRow(ModuleExtension):
    """What BackPACK does at a module with several inputs: each gets its own share of the output's quantity.

    (BackPACK's own rows hand the same object to all inputs.) A square root S `[V, N, C, ...]` or a Hessian's factors go
    through the transposed Jacobian of each input. Averages `[D, D]` and products are refused: what the branches share,
    J_1^T H J_2, is in none of their quantities.
    """

    def __call__(self, extension: BackpropExtension, module: nn.Module, g_inp: Any, g_out: Any) -> None:
        """Take the output's quantity and save a share of it for each input."""
        kind = kind_of(extension)
        if kind is None:
            return
        if kind not in (Kind.SQUARE_ROOT, Kind.HESSIAN_FACTORS):
            raise InputError(
                f"{type(extension).__name__} is wrong at a {type(module).__name__}: the cross terms of its branches are "
                "lost; use curvature_blocks with quantity 'ggn' or 'hessian'"
            )
        output: Any = module.output
        quantity: Any = extension.saved_quantities.retrieve_quantity(output.data_ptr(), True)
        quantity = tagged(quantity) if kind is Kind.HESSIAN_FACTORS else quantity
        for index, x in enumerate(inputs(module)):
            if x.requires_grad:
                extension.saved_quantities.save_quantity(
                    x.data_ptr(), self.share(module, index, quantity), extension.accumulate_backpropagated_quantities
                )

    def share(self, module: nn.Module, index: int, quantity: Any) -> Any:
        """The quantity of one input; lists are new ones, because BackPACK appends to them in place."""
        if isinstance(quantity, dict):
            factors = [self.transposed(module, index, F) for F in quantity["matrices"]]
            return {"matrices": factors, "signs": list(quantity["signs"])}
        return self.transposed(module, index, quantity)

    def transposed(self, module: nn.Module, index: int, S: Tensor) -> Tensor:
        """J_index^T S `[V, N, C_index, ...]`, the share of the input number `index` in a square root S `[V, N, C, ...]`."""
        raise NotImplementedError


class SumRow(MergeRow):
    """BackPACK's row of `Sum`: every input's Jacobian is the identity, so each gets the output's quantity."""

    def transposed(self, module: nn.Module, index: int, S: Tensor) -> Tensor:
        """S itself for every input, since each Jacobian of a sum is the identity."""
        return S


class ConcatenateRow(MergeRow):
    """BackPACK's row of `Concatenate`: every input's Jacobian places its channels among the output's."""

    def transposed(self, module: nn.Module, index: int, S: Tensor) -> Tensor:
        """The channels of S that come from this input."""
        widths = [x.shape[1] for x in inputs(module)]
        start = sum(widths[:index])
        return S[:, :, start : start + widths[index]].contiguous()


def inputs(module: nn.Module) -> list[Tensor]:
    """The inputs `input0`, `input1`, ... of a module that BackPACK's forward hook has kept, in order."""
    found: list[Tensor] = []
    while hasattr(module, f"input{len(found)}"):
        found.append(getattr(module, f"input{len(found)}"))
    return found
