"""K-FAC: Kronecker-factored blocks of the Gauss-Newton or Fisher matrix for linear layers, convolutions and attention.

The factors of a layer are those of `kronecker.factors`, summed over the parts of a batch and the columns of M's factor.
Several uses of one layer, or of layers that share a weight, count as more positions.

Index letters: N samples, n of one part, R columns, G groups, D inputs and O outputs of a layer (of a group).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature.kronecker.call_check import Layers, check_calls, check_reads
from secondorder.curvature.kronecker.factors import (
    KRONECKER_LAYERS,
    joint_gradient_sum,
    joint_input_rows,
    joint_input_sum,
)
from secondorder.curvature.kronecker.layer_kinds import layer_kind
from secondorder.curvature.kronecker.storage import factor_bytes
from secondorder.curvature.kronecker.weight_sharing import LayerKind
from secondorder.curvature.matrix_free.batch_parts import Probe
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork, unwrapped
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.layer_uses import LayerUse
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.output_matrix import OutputMatrix
from secondorder.curvature.matrix_free.per_sample import sites
from secondorder.curvature.matrix_free.sample_gradients import pulled_back, pulled_columns, slices
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.resuming.keys import Key
from secondorder.curvature.resuming.sums import Sums
from secondorder.errors import InputError
from secondorder.matrix_power.transforms import symmetric

WIDE_INPUT = 1024
"""Inputs above which A is kept as rows if there are fewer: the classifier of a covariance head of 64 channels has 2,080."""


def kronecker_parameters(network: nn.Module) -> list[str]:
    """The names of the parameters with Kronecker structure: weights and biases of linear layers and convolutions.

    And those of the projections of `nn.MultiheadAttention`, where query, key and value are projected by one weight: of that the
    block has three parts. Raises InputError for what is no `nn.Module`.
    """
    if not isinstance(network, nn.Module):
        raise InputError(f"network {type(network).__name__}: must be a torch.nn.Module")
    module, prefix = unwrapped(network)
    parameters = dict(module.named_parameters())
    callers = attention_callers(module)
    return [prefix + name for name, places in sites(module, parameters).items() if _has_structure(places, callers)]


def kronecker_layers(network: FrozenNetwork) -> dict[str, tuple[Layers, str]]:
    """The layers of each chosen parameter, and whether it is their weight or bias.

    InputError that lists the parameters without Kronecker structure, if any was chosen.
    """
    places, callers = sites(network.module, network.parameters), attention_callers(network.module)
    without = [name for name, found in places.items() if not _has_structure(found, callers)]
    if without:
        shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        raise InputError(
            f"no Kronecker structure: {shown}; use params=kronecker_parameters(network) (linear layers, convolutions, attention)"
        )
    return {
        name: (tuple(layer for layer, _ in found), found[0][1].removeprefix("in_proj_"))
        for name, found in places.items()
    }


def recorded_layers(network: FrozenNetwork) -> dict[nn.Module, nn.Module | None]:
    """The layers of the chosen parameters, each with the attention module that uses its weight without calling it, or None."""
    callers = attention_callers(network.module)
    return {layer: callers.get(layer) for layers, _ in kronecker_layers(network).values() for layer in layers}


def attention_callers(network: nn.Module) -> dict[nn.Module, nn.Module]:
    """The attention module that uses the weights of a module, itself or its output projection, without calling it."""
    found = [module for module in network.modules() if isinstance(module, nn.MultiheadAttention)]
    return {module: module for module in found} | {module.out_proj: module for module in found}


def _has_structure(places: Sequence[tuple[nn.Module, str]], callers: Mapping[nn.Module, nn.Module]) -> bool:
    """Weights and biases of layers that do what their type does: a reparametrised weight, for one, has another name."""
    if (
        len({callers.get(layer) is layer for layer, _ in places}) != 1
    ):  # none, or one weight for query, key, value and for another
        return False
    return all(
        _plain(layer)
        and (layer not in callers or (_plain(callers[layer]) and _plain(callers[layer].out_proj)))  # type: ignore[arg-type]
        and attribute in (("in_proj_weight", "in_proj_bias") if callers.get(layer) is layer else ("weight", "bias"))
        and getattr(layer, "in_proj_weight", layer) is not None
        for layer, attribute in places
    )


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is of a kind with factors, and its class's forward that of its kind."""
    kinds = [kind for kind in (*KRONECKER_LAYERS, nn.MultiheadAttention) if isinstance(layer, kind)]
    return any(type(layer).forward is kind.forward for kind in kinds)


@dataclass
class KroneckerFactors:
    """Sums over samples, positions and columns that make up the factors of layers with one weight."""

    layers: Layers
    sharing: str
    samples: int
    wide: int
    block_bytes: int
    counted: int = 0
    A: Tensor | None = None
    rows: list[Tensor] | None = None
    B: Tensor | None = None

    def add_inputs(self, uses: Sequence[LayerUse]) -> None:
        """Add the inputs of all uses of the layers in one part of the batch to the sums of A."""
        kind, inputs = self.kind, [use.input for use in uses if len(use.input)]
        if not inputs:  # an expert that no image is sent to
            zero = uses[0].input.new_zeros(kind.groups, kind.inputs, kind.inputs)
            self.A = zero if self.A is None and self.rows is None else self.A
            return
        positions = sum(kind.positions(x) for x in inputs) if self.sharing == "expand" else 1
        self.counted += sum(len(x) * kind.positions(x) for x in inputs) if self.sharing == "expand" else len(inputs[0])
        if self.wide < kind.inputs > self.samples * positions:
            self.rows = [*(self.rows or []), joint_input_rows(kind, inputs, self.sharing)]
        else:
            A = joint_input_sum(kind, inputs, self.sharing, most_bytes=self.block_bytes)
            self.A = A if self.A is None else self.A.add_(A)

    def add_gradients(self, s: Sequence[Tensor]) -> None:
        """Add gradients `[n, r, *out]` of some columns at the outputs of all uses of the layers to the sum of B."""
        kind, some = self.kind, [g for g in s if len(g)]
        if some:
            B = joint_gradient_sum(kind, some, self.sharing, self.block_bytes)
        else:
            B = s[0].new_zeros(kind.groups, kind.outputs, kind.outputs)
        self.B = B if self.B is None else self.B.add_(B)

    def sums(self) -> dict[str, Any]:
        """The sums so far, as tensors and plain values."""
        return {"counted": self.counted, "A": self.A, "rows": self.rows, "B": self.B}

    def take(self, sums: Mapping[str, Any]) -> None:
        """Go on from such sums."""
        self.counted, self.A, self.rows, self.B = (sums[name] for name in ("counted", "A", "rows", "B"))

    @property
    def kind(self) -> LayerKind:
        """What the layers do with their weight, as a multiplication of vectors by it."""
        return layer_kind(self.layers[0])

    @property
    def input(self) -> list[SymmetricOperator]:
        """The input factor A of each group, `[D, D]` or kept as its rows, as G operators."""
        if self.rows is not None:
            return [FactoredOperator(rows) for rows in torch.cat(self.rows, -2) / math.sqrt(self.counted)]
        assert self.A is not None
        return [DenseOperator(a) for a in self.A / max(1, self.counted)]

    @property
    def gradient(self) -> list[SymmetricOperator]:
        """The gradient factor B `[O, O]` of each group, as G operators."""
        assert self.B is not None
        return [DenseOperator(symmetric(b)) for b in self.B]

    def block(self, kind: str) -> SymmetricOperator:
        """B kron A for a weight; B for a bias, whose input is 1."""
        if kind == "bias":
            return joined(self.gradient)
        return joined([KroneckerOperator(B, A) for B, A in zip(self.gradient, self.input, strict=True)])


def kronecker_blocks(
    jacobian: Jacobian, matrix: OutputMatrix, layers: Mapping[str, tuple[Layers, str]], sharing: str
) -> dict[str, SymmetricOperator]:
    """The K-FAC block of each parameter, `sharing` = expand or reduce."""
    factors = kronecker_factors(jacobian, matrix, layers, sharing, WIDE_INPUT)
    return {name: factors[shared].block(kind) for name, (shared, kind) in layers.items()}


def kronecker_bytes(network: FrozenNetwork, probe: Probe, samples: int, sharing: str) -> int:
    """Bytes that the factors of `kronecker_blocks` take beside the graph, for so many samples and a weight sharing."""
    layers = kronecker_layers(network)
    return factor_bytes(layers, probe.shapes, samples, sharing, WIDE_INPUT, network.dtype.itemsize)


def kronecker_factors(
    jacobian: Jacobian,
    matrix: OutputMatrix,
    layers: Mapping[str, tuple[Layers, str]],
    sharing: str,
    wide: int = WIDE_INPUT,
    by_image: bool = False,
) -> dict[Layers, KroneckerFactors]:
    """The factors of all layers: one pull-back for each column, down to the outputs of the layers.

    A is kept as rows when its input is wider than `wide` and than the number of rows. `by_image` says that sums over the
    positions of an image are needed, as they are for `reduce`.
    """
    jacobian.check_backward()
    check_calls(jacobian, layers, by_image or sharing == "reduce")
    with_weight = {shared for shared, kind in layers.values() if kind == "weight"}
    N = len(jacobian.images)
    most = jacobian.block_bytes
    factors = {shared: KroneckerFactors(shared, sharing, N, wide, most) for shared, _ in layers.values()}

    def take(found: list[dict[str, Any]]) -> None:
        for one, sums_of_one in zip(factors.values(), found, strict=True):
            one.take(sums_of_one)

    key = partial(factors_key, jacobian, matrix, layers, sharing, wide)
    with Sums("factors", key, get=lambda: [f.sums() for f in factors.values()], set=take) as sums:
        for part in sums.parts(jacobian):
            uses = uses_of(part.uses, layers)
            check_reads(part, layers)
            jacobian.check_part(part)
            if matrix.fisher != "mc":
                jacobian.check_apart(part)
            for shared, found in uses.items() if sums.unit == 0 else ():
                if shared in with_weight:
                    factors[shared].add_inputs(found)
            for s in gradients_of_columns(jacobian, part, matrix, flat(uses), sums):
                gradients = iter(s)
                for shared, found in uses.items():
                    factors[shared].add_gradients([next(gradients) for _ in found])
    return factors


def gradients_of_columns(
    jacobian: Jacobian, part: Linearisation, matrix: OutputMatrix, uses: Sequence[LayerUse], sums: Sums, extra: int = 0
) -> Iterator[list[Tensor]]:
    """The gradients s `[n, r, *out]` at the uses, of some columns of M's factor at a time; `extra` numbers are held for each.

    Where images act on one another, a column of one image has gradients at all of them: each image has columns of its own then, R
    for each of n. Pulled back together, columns of several images would mix, but for labels drawn independently (`mc`), whose
    products vanish in the mean.
    """
    most = jacobian.block_bytes
    if matrix.fisher == "mc" or not jacobian.coupled:
        for _, _, s in pulled_columns(part, matrix, uses, most, sums, extra):
            yield s
        return
    n, K = part.z.shape
    numbers = sum(use.output_shape.numel() for use in uses) + extra + part.z.numel()
    for image in sums.units(jacobian.samples(n)):
        one, place = slice(image, image + 1), slice(part.rows.start + image, part.rows.start + image + 1)
        for columns in slices(matrix.count(K), numbers * part.z.itemsize, most):
            F = matrix.columns(part.z[one], place, columns)
            U = F.new_zeros(n, K, F.shape[-1])
            U[one] = F
            yield pulled_back(part, U, uses)


def factors_key(
    jacobian: Jacobian, matrix: OutputMatrix, layers: Mapping[str, tuple[Layers, str]], sharing: str, wide: int
) -> Key:
    """What Kronecker factors are made from, as a long run notes it."""
    settings = {"the weight sharing": sharing, "the widest input": wide, "the parameters": ", ".join(layers)}
    return {**jacobian.fingerprint(matrix.loss), **matrix.fingerprint(), **settings}


def uses_of(uses: Sequence[LayerUse], layers: Mapping[str, tuple[Layers, str]]) -> dict[Layers, list[LayerUse]]:
    """The uses of each group of layers; InputError for a layer that the network never calls."""
    found = {shared: [use for use in uses if use.layer in shared] for shared, _ in layers.values()}
    for name, (shared, _) in layers.items():
        if not found[shared]:
            raise InputError(
                f"the network never calls the layer of {name}: no Kronecker factors; leave it out of params"
            )
        if not all(use.intact for use in found[shared]):
            raise InputError(
                f"the input of the layer of {name} is changed in place after its use; use inplace=False there"
            )
    return found


def flat(uses: Mapping[Layers, list[LayerUse]]) -> list[LayerUse]:
    """The uses of all groups of layers in one list, in the order of the groups."""
    return [use for found in uses.values() for use in found]


def joined(groups: Sequence[SymmetricOperator]) -> SymmetricOperator:
    """The operators of all groups as one, block diagonal over them; that of a single group as it is."""
    return groups[0] if len(groups) == 1 else BlockDiagonalOperator(groups)
