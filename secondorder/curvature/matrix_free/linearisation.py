"""A network's outputs at some samples as a linear function of its parameters: products with J = df/dw, J^T and the Hessian.

Index letters: n samples, K outputs of a sample, R columns. The graph is kept, so that repeated products do not evaluate the
network again.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node

from secondorder.accelerator import seed_random_numbers
from secondorder.curvature.matrix_free.batch_stream import BatchStream
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.gradient_hooks import noted_hooks
from secondorder.curvature.matrix_free.graph import graph_nodes, leaf_uses
from secondorder.curvature.matrix_free.layer_uses import LayerUse
from secondorder.curvature.matrix_free.samples import Samples
from secondorder.curvature.matrix_free.separable_losses import LossParts
from secondorder.curvature.matrix_free.trial import check_repeated, random_like
from secondorder.errors import failures_of
from secondorder.untouched import same_randomness


@dataclass(frozen=True)
class RandomPullBack:
    """A random u `[n, K]` at a part's outputs, J^T u by the names of parameters, and its gradients at the uses of layers."""

    u: Tensor
    weights: Mapping[str, Tensor]
    outputs: Sequence[Tensor]


class Linearisation:
    """Outputs z = f(w) `[n, K]` of the samples `rows` of a batch, with the graph that leads to them from w."""

    def __init__(
        self,
        network: FrozenNetwork,
        images: Samples | BatchStream,
        rows: slice,
        part: int = 0,
        layers: Mapping[nn.Module, nn.Module | None] | None = None,
    ) -> None:
        self.network = network
        self.images = images[rows]
        self.rows = rows
        self.part = part
        with torch.enable_grad(), noted_hooks() as hooks:
            z, self.uses = network.outputs_and_uses(self.images, None, part, layers or {})
            self.graph = z.flatten(1) if z.ndim > 1 else z[:, None]
        self.z = self.graph.detach()
        network.check_finite(self.z, self.images, part)
        self.hooked = hooks.registered
        """Whether the network has registered hooks on gradients."""
        self.outputs = z.shape[1:]
        """The shape of one sample's outputs."""
        self._adjoint: tuple[Tensor, dict[str, Tensor]] | None = None
        self._gradient: dict[str, Tensor] | None = None
        self._batches: bool | None = None

    @cached_property
    def nodes(self) -> dict[Node, None]:
        """The nodes of the autograd graph of this part's outputs, in a dict without values."""
        return graph_nodes([self.graph])

    def used_elsewhere(self, layers: Mapping[str, Iterable[nn.Module]]) -> list[str]:
        """The parameters that the graph reads more often than calls of their layers do, whose uses have been recorded."""
        reads, calls = leaf_uses(self.nodes), Counter(use.layer for use in self.uses if use.output.node in self.nodes)
        weights = self.network.weights
        return [name for name, own in layers.items() if reads[id(weights[name])] > sum(calls[m] for m in set(own))]

    def pull_back(self, U: Tensor, names: Sequence[str]) -> list[Tensor]:
        """J^T U for U `[n, K]`, one tensor for each named parameter."""
        return self.gradients(U, names, ())[0]

    def output_gradients(self, U: Tensor, uses: Sequence[LayerUse]) -> list[Tensor]:
        """The transposed derivative of z with respect to the outputs of layers, applied to U `[n, K]`."""
        return self.gradients(U, (), uses)[1]

    def gradients(self, U: Tensor, names: Sequence[str], uses: Sequence[LayerUse]) -> tuple[list[Tensor], list[Tensor]]:
        """Both `pull_back` and `output_gradients` by one backward pass."""
        weights = [self.network.weights[name] for name in names]
        inputs: list[Any] = [*weights, *(use.output for use in uses)]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if self.graph.requires_grad:
            with self.network.in_place(), failures_of("a derivative of this network"):
                found = torch.autograd.grad(self.graph, inputs, U, retain_graph=True, allow_unused=True)
        at_weights = [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=False)]
        rest = zip(found[len(weights) :], uses, strict=True)
        return at_weights, [U.new_zeros(use.output_shape) if g is None else g for g, use in rest]

    def random_pull_back(self) -> RandomPullBack:
        """That of a u which is the same in every call and on every device; formulas are tried on it."""
        u, names = random_like(self.z, torch.Generator().manual_seed(0)), list(self.network.weights)
        with same_randomness():
            # A backward pass that draws random numbers shall not happen to draw those of the forward pass.
            seed_random_numbers(0)
            weights, outputs = self.gradients(u, names, self.uses)
        return RandomPullBack(u, dict(zip(names, weights, strict=True)), outputs)

    def push_forward(self, tangents: Mapping[str, Tensor]) -> Tensor:
        """J v `[n, K]` for a tangent of each named parameter, by forward mode: one evaluation without a graph."""
        weights = dict(self.network.weights)
        with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # PyTorch's own call
            for name, tangent in tangents.items():
                weights[name] = forward_ad.make_dual(weights[name].detach(), tangent)
            z, tangent = forward_ad.unpack_dual(self.network.outputs(self.images, weights, self.part))
        check_repeated(z.reshape(self.z.shape), self.z)
        return torch.zeros_like(self.z) if tangent is None else tangent.detach().reshape(self.z.shape)

    def push_forward_by_reverse(self, tangents: Mapping[str, Tensor]) -> Tensor:
        """J v `[n, K]` as d/du <J^T u, v>, for networks without forward mode: needs about twice the graph's memory."""
        if not self.graph.requires_grad:
            return torch.zeros_like(self.z)
        if self._adjoint is None:
            u = torch.zeros_like(self.z, requires_grad=True)
            with torch.enable_grad(), self.network.in_place():
                gradient = torch.autograd.grad(
                    self.graph, list(self.network.weights.values()), u, create_graph=True, materialize_grads=True
                )
            self._adjoint = u, dict(zip(self.network.weights, gradient, strict=True))
        u, gradients = self._adjoint
        with self.network.in_place():
            return along(gradients, tangents, [u])[0]

    def hessian_products(self, loss: LossParts, tangents: Mapping[str, Tensor]) -> list[Tensor]:
        """H v for the loss of these samples and R tangents v `[R, ...]` of named parameters: as many tensors `[R, ...]`.

        By differentiating the gradient, whose graph is kept, along all v at once, or one after the other where a network
        has a function that cannot be batched.
        """
        if not self.graph.requires_grad:
            return [torch.zeros_like(t) for t in tangents.values()]
        if self._gradient is None:
            with torch.enable_grad():
                value = loss.part(self.rows).value(self.graph)
            weights = list(self.network.weights.values())
            with self.network.in_place(), failures_of("a derivative of this network and loss"):
                gradient = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
            self._gradient = dict(zip(self.network.weights, gradient, strict=True))
        inputs = [self.network.weights[name] for name in tangents]
        with self.network.in_place(), failures_of("a second derivative of this network and loss"):
            if len(next(iter(tangents.values()))) > 1 and self._batches is not False:
                found = self._batched_products(tangents, inputs)
                if found is not None:
                    return found
            return self._single_products(tangents, inputs)

    def _single_products(self, tangents: Mapping[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        assert self._gradient is not None
        count = len(next(iter(tangents.values())))
        columns = [along(self._gradient, {k: t[r] for k, t in tangents.items()}, inputs) for r in range(count)]
        return [torch.stack(column) for column in zip(*columns, strict=True)]

    def _batched_products(self, tangents: Mapping[str, Tensor], inputs: list[Tensor]) -> list[Tensor] | None:
        """All at once; None when a function of the network has no rule for that, or one that is wrong for the first tangent."""
        assert self._gradient is not None
        try:
            found = along(self._gradient, tangents, inputs, batched=True)
        except RuntimeError:  # of a function without a batching rule
            self._batches = False
            return None
        if self._batches is None:
            first = self._single_products({k: t[:1] for k, t in tangents.items()}, inputs)
            self._batches = not self.network.has_numbers or self._equal(found, first)
        return found if self._batches else None

    def _equal(self, found: Sequence[Tensor], first: Sequence[Tensor]) -> bool:
        """Whether the first of several products is the single one."""
        error = sum(float((a[:1] - b).square().sum()) for a, b in zip(found, first, strict=True)) ** 0.5
        size = sum(float(b.square().sum()) for b in first) ** 0.5
        return error <= torch.finfo(self.z.dtype).eps ** 0.5 * size


def along(
    gradients: Mapping[str, Tensor], tangents: Mapping[str, Tensor], inputs: list[Tensor], batched: bool = False
) -> list[Tensor]:
    """The derivative with respect to the inputs of sum_name <gradient, tangent>, of all tangents `[R, ...]` if `batched`."""
    rows = next(iter(tangents.values())).shape[:1] if batched else ()
    reached = [name for name in tangents if gradients[name].requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if reached:
        outputs, directions = [gradients[name] for name in reached], [tangents[name] for name in reached]
        found = torch.autograd.grad(
            outputs, inputs, directions, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    return [t.new_zeros(*rows, *t.shape) if g is None else g for g, t in zip(found, inputs, strict=True)]
