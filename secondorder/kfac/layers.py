"""What each parameter of a model is treated as: a Kronecker-factored layer, the fallback, or frozen, and why.

Index letters: G groups, O outputs and D inputs of a group; the bias is the last input, which is 1. The first dimension of a
layer's input is the sample (batch_first=True for transformers).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

from secondorder.curvature.kronecker.factors import SHARINGS
from secondorder.curvature.kronecker.layer_kinds import layer_kind
from secondorder.curvature.kronecker.weight_sharing import LayerKind
from secondorder.errors import InputError, check_known
from secondorder.kfac.declared import TREATMENTS, TreatAs, check_used, declared_modules
from secondorder.kfac.modules import (
    WEIGHTS,
    Place,
    attention_modules,
    check_parameters,
    clean_paths,
    modules_by_parameter,
    reason_without_factors,
    unsupported_modules,
)
from secondorder.kfac.options import WIDE_INPUT, WIDE_OUTPUT
from secondorder.kfac.policy import Policy


@dataclass(frozen=True, eq=False)
class KroneckerLayer:
    """One weight with its bias, and the modules, most often one, that use them; also one of which only a diagonal is kept."""

    name: str
    modules: tuple[nn.Module, ...]
    approximation: str
    sharing: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    wide_inputs: int
    wide_outputs: int
    attribute: str = "weight"
    callers: tuple[nn.Module, ...] = ()
    """Modules that use the weight without a call of `modules`: see `capture.attention`."""
    declared: str = ""
    """What the user says that the modules are, a word of `declared.TREATMENTS`."""

    @property
    def module(self) -> nn.Module:
        """The first of the modules; the others have the same geometry."""
        return self.modules[0]

    @cached_property
    def kind(self) -> LayerKind:
        """What the module does with its weight, as a multiplication of vectors by it."""
        return _kind(self.module, self.attribute, self.declared)

    @cached_property
    def groups(self) -> int:
        """G, the number of groups with inputs, outputs and a weight matrix of their own."""
        return self.kind.groups

    @cached_property
    def inputs(self) -> int:
        """D, the number of inputs of a group, with the one for the bias."""
        return self.kind.inputs + (self.bias is not None)

    @cached_property
    def outputs(self) -> int:
        """O, the number of outputs of a group."""
        return self.kind.outputs

    @property
    def wide(self) -> bool:
        """Whether there are so many inputs that A may be kept as rows."""
        return self.inputs > self.wide_inputs and not self.kind.diagonal_input and not self.diagonal

    @property
    def diagonal_outputs(self) -> bool:
        """Whether there are so many outputs that B is kept as its diagonal."""
        return self.outputs > self.wide_outputs and not self.diagonal

    @property
    def diagonal(self) -> bool:
        """Whether the block is the diagonal of the layer's own, without Kronecker factors."""
        return self.approximation == "diagonal"

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the factors: the weight's, at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weight and bias as one matrix `[G, O, D]`, of tensors in their shapes; a view where there is no bias."""
        W = self.kind.matrix(weight)
        return W if bias is None else torch.cat([W, bias.reshape(self.groups, self.outputs, 1)], -1)

    def parts(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias (None without one), in their shapes, of a matrix `[G, O, D]`."""
        if self.bias is None:
            return self.kind.weight(matrix), None
        return self.kind.weight(matrix[..., :-1]), matrix[..., -1].reshape(self.bias.shape)

    def is_same(self, other: "KroneckerLayer") -> bool:
        """Whether statistics of the other are also of this layer: its name, modules, parameters and settings."""
        if self.weight is not other.weight or self.bias is not other.bias:
            return False
        if self.modules != other.modules or self.callers != other.callers:
            return False
        settings = (self.name, self.approximation, self.sharing, self.declared)
        return settings == (other.name, other.approximation, other.sharing, other.declared)


@dataclass(frozen=True, eq=False)
class Treatment:
    """How a parameter is treated ("kfac", "ekfac", "diagonal", "fallback" or "frozen"), why, and in which layer."""

    name: str
    parameter: nn.Parameter
    how: str
    why: str
    layer: str | None = None


def find_layers(
    model: nn.Module,
    approximation: str | Mapping[str, str] = "kfac",
    sharing: str = "expand",
    wide_inputs: int = WIDE_INPUT,
    wide_outputs: int = WIDE_OUTPUT,
    treat_as: TreatAs = MappingProxyType({}),
    trained: Collection[nn.Parameter] | None = None,
) -> tuple[list[KroneckerLayer], list[Treatment]]:
    """The layers with Kronecker factors, in the order of the model, and the treatment of every parameter.

    Args:
        model: the network.
        approximation: "kfac", "ekfac", "diagonal" or "fallback" for all layers, or for patterns of layer names ("features.*":
            "ekfac", the first that matches counts; "kfac" where none does). Normalisations have the fallback unless they are
            "diagonal".
        sharing, wide_inputs, wide_outputs, treat_as: see `secondorder.kfac.Options`.
        trained: parameters that count as trainable though they are frozen at present. It is given when a model is read once
            more, whose layers the patterns need not match any longer.

    Raises:
        InputError: for unknown words, a pattern without layer, parameters without numbers or spread over processes, two
            parameters of one name, and a model without any supported layer.
    """
    policy = Policy(approximation)
    check_known("sharing", sharing, SHARINGS)
    found = _Contents.of(model, treat_as, trained or ())
    layers: list[KroneckerLayer] = []
    treatments: dict[nn.Parameter, tuple[str, str, str | None]] = {}
    candidates = False
    for weight, holders in found.places.items():
        if holders[0].attribute not in WEIGHTS or found.reason(weight):
            continue
        names, kind = _names(holders), found.kind(holders[0])
        word, pattern = policy.word(names)
        if kind.has_factors or word in ("diagonal", "fallback"):
            policy.use(names)
        if weight not in found.trainable:
            continue
        candidates |= kind.has_factors
        name, why, bias = None, found.class_of(holders[0]), found.bias(holders)
        if word == "fallback":
            why = f"approximation {pattern!r}: 'fallback'"
        elif word != "diagonal" and not kind.has_factors:
            word = "fallback"
        else:
            name, modules = names[0], tuple(holder.module for holder in holders)
            positions = "expand" if kind.diagonal_input else sharing
            rest = wide_inputs, wide_outputs, holders[0].attribute, found.callers(modules), found.word(holders[0])
            layers.append(KroneckerLayer(name, modules, word, positions, weight, bias, *rest))
        treatments |= {parameter: (word, why, name) for parameter in (weight, bias) if parameter is not None}
    if trained is None:
        policy.check_used()
        check_used(found.paths, treat_as)
    if not layers:
        raise InputError(_nothing(candidates))
    return layers, [
        Treatment(holders[0].name, p, *(treatments.get(p) or found.treatment_outside(p)))
        for p, holders in found.places.items()
    ]


@dataclass(frozen=True, eq=False)
class _Contents:
    """What a model consists of: the holders of each parameter, names of modules, which of these can be layers, or call them."""

    places: Mapping[nn.Parameter, Sequence[Place]]
    paths: Mapping[nn.Module, str]
    declared: Mapping[nn.Module, str]
    unsupported: Mapping[nn.Module, str]
    attention: Mapping[nn.Module, nn.Module]
    trainable: Collection[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, treat_as: TreatAs, trained: Collection[nn.Parameter]) -> "_Contents":
        """The contents of a model; InputError for parameters and declarations that cannot be."""
        places = modules_by_parameter(model)
        check_parameters(model, places)
        paths = dict(zip(model.modules(), clean_paths(model).values(), strict=True))
        declared = declared_modules(paths, treat_as)
        trainable = {p for p in places if p.requires_grad} | set(trained)
        unsupported, attention = unsupported_modules(model, declared), attention_modules(model)
        return cls(places, paths, declared, unsupported, attention, trainable)

    def reason(self, weight: nn.Parameter) -> str:
        """Why a weight has no factors, empty if it has."""
        return reason_without_factors(weight, self.places[weight], self.unsupported)

    def kind(self, holder: Place) -> LayerKind:
        """What a module does with its weight."""
        return _kind(holder.module, holder.attribute, self.word(holder))

    def word(self, holder: Place) -> str:
        """What a module is declared as, empty for most."""
        return self.declared.get(holder.module, "")

    def callers(self, modules: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
        """The attention modules that use the weight of these without calling them."""
        return tuple(self.attention[module] for module in modules if module in self.attention)

    def class_of(self, holder: Place) -> str:
        """The class of a module, and what it is declared as."""
        word = self.word(holder)
        return type(holder.module).__name__ + (f", treated as {word}" if word else "")

    def bias(self, holders: Sequence[Place]) -> nn.Parameter | None:
        """The trainable bias that these modules, and no others, add."""
        attribute = WEIGHTS[holders[0].attribute]
        bias = holders[0].module._parameters.get(attribute)
        if bias is None or bias not in self.trainable:
            return None
        users = [(place.module, place.attribute) for place in self.places[bias]]
        return bias if users == [(holder.module, attribute) for holder in holders] else None

    def treatment_outside(self, parameter: nn.Parameter) -> tuple[str, str, None]:
        """The treatment of a parameter that is in no layer."""
        holders = self.places[parameter]
        if parameter not in self.trainable:
            return "frozen", "requires_grad is False", None
        if reason := self.reason(parameter):
            return "fallback", reason, None
        if holders[0].attribute == "bias":
            return "fallback", self._without_weight(holders), None
        return "fallback", type(holders[0].module).__name__, None

    def _without_weight(self, holders: Sequence[Place]) -> str:
        """Why a trainable bias of supported modules is not the last input of a layer."""
        weight, *others = {holder.module._parameters["weight"] for holder in holders}
        if others or weight is None:
            return "shared by modules with different weights"
        return (
            "the weight beside it is frozen"
            if weight not in self.trainable
            else (f"the weight beside it is {self.reason(weight)}")
        )


def _kind(module: nn.Module, attribute: str, declared: str) -> LayerKind:
    return TREATMENTS[declared].kind(module, attribute) if declared else layer_kind(module, attribute)


def _names(holders: Sequence[Place]) -> list[str]:
    """The names of a layer: the paths of its modules, with the part of an attention module that a weight is of."""
    part = holders[0].attribute.removesuffix("weight").removesuffix("_")
    return [f"{holder.path}.{part}".strip(".") if part else holder.path for holder in holders]


def _nothing(candidates: bool) -> str:
    if candidates:
        return "approximation leaves every layer to the fallback; use 'kfac' or 'ekfac' for at least one"
    return "the model has no layer that K-FAC can treat: no Linear, convolution or Embedding of its own with a trainable weight"
