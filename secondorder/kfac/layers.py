"""What each parameter of a model is treated as: a Kronecker-factored layer, the fallback, or frozen, and why.

Index letters: G groups, O outputs and D inputs of a group; the bias is the last input, which is 1. The first dimension of a
layer's input is the sample (batch_first=True for transformers).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secondorder.curvature.kronecker.factors import SHARINGS
from secondorder.curvature.kronecker.layer_kinds import layer_kind
from secondorder.curvature.kronecker.weight_sharing import LayerKind
from secondorder.errors import InputError, check_known
from secondorder.kfac.modules import (
    WEIGHTS,
    Place,
    attention_modules,
    modules_by_parameter,
    reason_without_factors,
    unsupported_modules,
)
from secondorder.kfac.options import WIDE_INPUT, WIDE_OUTPUT

APPROXIMATIONS = ("kfac", "ekfac", "fallback", "diagonal")


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

    @property
    def module(self) -> nn.Module:
        """The first of the modules; the others have the same geometry."""
        return self.modules[0]

    @cached_property
    def kind(self) -> LayerKind:
        """What the module does with its weight."""
        return layer_kind(self.module, self.attribute)

    @cached_property
    def groups(self) -> int:
        """G."""
        return self.kind.groups

    @cached_property
    def inputs(self) -> int:
        """D, with the one for the bias."""
        return self.kind.inputs + (self.bias is not None)

    @cached_property
    def outputs(self) -> int:
        """O."""
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
        """That of the factors: the weight's, at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[G, O, D]` of tensors shaped like weight and bias; a view where there is no bias."""
        W = self.kind.matrix(weight)
        return W if bias is None else torch.cat([W, bias.reshape(self.groups, self.outputs, 1)], -1)

    def parts(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part `[G, O, D]` of weight and bias, in their shapes."""
        if self.bias is None:
            return self.kind.weight(matrix), None
        return self.kind.weight(matrix[..., :-1]), matrix[..., -1].reshape(self.bias.shape)


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
) -> tuple[list[KroneckerLayer], list[Treatment]]:
    """The layers with Kronecker factors, in the order of the model, and the treatment of every parameter.

    approximation: "kfac", "ekfac", "diagonal" or "fallback" for all layers, or for patterns of layer names ("features.*":
    "ekfac", the first that matches counts; "kfac" where none does). Normalisations have the fallback unless they are "diagonal".
    Raises InputError for unknown words, a pattern without layer, uninitialised parameters, two parameters of one name, and a
    model without any supported layer.
    """
    policy = _policy(approximation)
    check_known("sharing", sharing, SHARINGS)
    places = modules_by_parameter(model)
    _check_parameters(places)
    unsupported, attention = unsupported_modules(model), attention_modules(model)
    layers: list[KroneckerLayer] = []
    treatments: dict[nn.Parameter, tuple[str, str, str | None]] = {}
    candidates = 0
    matched: set[str] = set()
    for weight, holders in places.items():
        why = reason_without_factors(weight, holders, unsupported)
        attribute = holders[0].attribute
        if attribute not in WEIGHTS or why or not weight.requires_grad:
            continue
        part = attribute.removesuffix("_weight") if attribute != "weight" else ""
        names = [f"{holder.path}.{part}".strip(".") if part else holder.path for holder in holders]
        word, pattern = _word(policy, names)
        bias, described = _bias(holders, places), layer_kind(holders[0].module, attribute)
        name, why = None, type(holders[0].module).__name__
        if described.has_factors or word in ("diagonal", "fallback"):
            candidates += described.has_factors
            matched.update(p for p in policy if any(fnmatchcase(name, p) for name in names))
        if word == "fallback":
            why = f"approximation {pattern!r}: 'fallback'"
        elif word != "diagonal" and not described.has_factors:
            word = "fallback"
        else:
            name = names[0]
            positions = "expand" if described.diagonal_input else sharing
            modules = tuple(holder.module for holder in holders)
            callers = tuple(attention[module] for module in modules if module in attention)
            sizes = wide_inputs, wide_outputs
            layers.append(KroneckerLayer(name, modules, word, positions, weight, bias, *sizes, attribute, callers))
        for parameter in (weight, bias):
            if parameter is not None:
                treatments[parameter] = (word, why, name)
    _check_patterns(policy, matched)
    if not layers:
        raise InputError(_nothing(candidates))
    return layers, [
        Treatment(holders[0].name, p, *(treatments.get(p) or _other(p, places, unsupported)))
        for p, holders in places.items()
    ]


def _check_parameters(places: Mapping[nn.Parameter, Sequence[Place]]) -> None:
    for parameter, holders in places.items():
        if is_lazy(parameter):
            raise InputError(f"parameter {holders[0].name} is not initialised yet; run the model once before this")
    name, count = Counter(holders[0].name for holders in places.values()).most_common(1)[0] if places else ("", 0)
    if count > 1:
        raise InputError(
            f"{count} parameters are called {name} without what wrappers (DataParallel, torch.compile) add; "
            "rename the module beside the wrapped one"
        )


def _policy(approximation: str | Mapping[str, str]) -> dict[str, str]:
    policy = dict(approximation) if isinstance(approximation, Mapping) else {"*": approximation}
    for pattern, word in policy.items():
        if not isinstance(pattern, str):
            raise InputError(
                f"approximation {pattern!r}: a pattern of names of layers is a text, for example 'features.*'"
            )
        check_known("approximation", word, APPROXIMATIONS)
    return policy


def _word(policy: Mapping[str, str], names: Sequence[str]) -> tuple[str, str]:
    """The word of the first pattern that matches one of the names of a layer, and this pattern."""
    matching = ((word, p) for p, word in policy.items() if any(fnmatchcase(name, p) for name in names))
    return next(matching, ("kfac", "*"))


def _check_patterns(policy: Mapping[str, str], matched: set[str]) -> None:
    for pattern in policy:
        if pattern not in matched and pattern != "*":
            raise InputError(
                f"approximation {pattern!r} matches no linear layer or convolution with a trainable weight; "
                "names are those of model.named_modules(), without what wrappers add"
            )


def _nothing(candidates: int) -> str:
    if candidates:
        return "approximation leaves every layer to the fallback; use 'kfac' or 'ekfac' for at least one"
    return "the model has no layer that K-FAC can treat: no Linear, convolution or Embedding of its own with a trainable weight"


def _bias(holders: Sequence[Place], places: Mapping[nn.Parameter, Sequence[Place]]) -> nn.Parameter | None:
    """The trainable bias that these modules, and no others, add."""
    attribute = WEIGHTS[holders[0].attribute]
    bias = holders[0].module._parameters.get(attribute)
    if bias is None or not bias.requires_grad:
        return None
    users = [(place.module, place.attribute) for place in places[bias]]
    return bias if users == [(holder.module, attribute) for holder in holders] else None


def _other(
    parameter: nn.Parameter, places: Mapping[nn.Parameter, Sequence[Place]], unsupported: Mapping[nn.Module, str]
) -> tuple[str, str, None]:
    """The treatment of a parameter that is in no layer."""
    holders = places[parameter]
    if not parameter.requires_grad:
        return "frozen", "requires_grad is False", None
    reason = reason_without_factors(parameter, holders, unsupported)
    if reason:
        return "fallback", reason, None
    if holders[0].attribute == "bias":
        return "fallback", _without_weight(holders, places, unsupported), None
    return "fallback", type(holders[0].module).__name__, None


def _without_weight(
    holders: Sequence[Place], places: Mapping[nn.Parameter, Sequence[Place]], unsupported: Mapping[nn.Module, str]
) -> str:
    """Why a trainable bias of supported modules is not the last input of a layer."""
    weight, *others = {holder.module._parameters["weight"] for holder in holders}
    if others or weight is None:
        return "shared by modules with different weights"
    if not weight.requires_grad:
        return "the weight beside it is frozen"
    return f"the weight beside it is {reason_without_factors(weight, places[weight], unsupported)}"
