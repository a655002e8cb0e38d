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
from torch.nn.utils.parametrize import ParametrizationList

from secondorder.curvature.kronecker.factors import SHARINGS
from secondorder.curvature.matrix_free.frozen_network import WRAPPERS
from secondorder.errors import InputError, check_known
from secondorder.kfac.options import WIDE_INPUT
from secondorder.kfac.vectors import Geometry, factor_dtype, geometry

KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
APPROXIMATIONS = ("kfac", "ekfac", "fallback")


@dataclass(frozen=True, eq=False)
class KroneckerLayer:
    """One weight with its bias, and the modules, most often one, that use them."""

    name: str
    modules: tuple[nn.Module, ...]
    approximation: str
    sharing: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    wide_inputs: int

    @property
    def module(self) -> nn.Module:
        """The first of the modules; the others have the same geometry."""
        return self.modules[0]

    @cached_property
    def geometry(self) -> Geometry:
        """The module as a linear layer or 2d convolution."""
        return geometry(self.module)

    @cached_property
    def groups(self) -> int:
        """G."""
        return getattr(self.module, "groups", 1)

    @cached_property
    def inputs(self) -> int:
        """D, with the one for the bias."""
        return self.weight[0].numel() + (self.bias is not None)

    @cached_property
    def outputs(self) -> int:
        """O."""
        return len(self.weight) // self.groups

    @property
    def wide(self) -> bool:
        """Whether there are so many inputs that A may be kept as rows."""
        return self.inputs > self.wide_inputs

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return factor_dtype(self.weight)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[G, O, D]` of tensors shaped like weight and bias; a view where there is no bias."""
        W = weight.reshape(self.groups, self.outputs, -1)
        return W if bias is None else torch.cat([W, bias.reshape(self.groups, self.outputs, 1)], -1)

    def parts(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part `[G, O, D]` of weight and bias, in their shapes."""
        if self.bias is None:
            return matrix.reshape(self.weight.shape), None
        return matrix[..., :-1].reshape(self.weight.shape), matrix[..., -1].reshape(self.bias.shape)


@dataclass(frozen=True, eq=False)
class Treatment:
    """How a parameter is treated ("kfac", "ekfac", "fallback" or "frozen"), why, and in which layer."""

    name: str
    parameter: nn.Parameter
    how: str
    why: str
    layer: str | None = None


@dataclass(frozen=True, eq=False)
class Place:
    """A module that holds a parameter, under the name `attribute`; path: without what wrappers add."""

    path: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """Of the parameter."""
        return f"{self.path}.{self.attribute}".lstrip(".")


def clean_paths(model: nn.Module) -> dict[str, str]:
    """The dotted path of every module without what wrappers add to it, by its path in `model.named_modules()`.

    DataParallel and DistributedDataParallel add `module`, torch.compile `_orig_mod`; an attribute `module` of any other
    module is the user's own and stays.
    """
    modules = dict(model.named_modules())
    paths = {"": ""}
    for path in modules:
        parent, _, attribute = path.rpartition(".")
        if path:
            above = paths[parent]
            paths[path] = above if _wraps(modules[parent], attribute) else f"{above}.{attribute}".lstrip(".")
    return paths


def _wraps(module: nn.Module, attribute: str) -> bool:
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return attribute == "_orig_mod" or any(WRAPPERS.get(kind) == attribute for kind in kinds)


def find_layers(
    model: nn.Module,
    approximation: str | Mapping[str, str] = "kfac",
    sharing: str = "expand",
    wide_inputs: int = WIDE_INPUT,
) -> tuple[list[KroneckerLayer], list[Treatment]]:
    """The layers with Kronecker factors, in the order of the model, and the treatment of every parameter.

    approximation: "kfac", "ekfac" or "fallback" for all layers, or for patterns of layer names ("features.*": "ekfac", the
    first that matches counts; "kfac" where none does). Raises InputError for unknown words, a pattern without layer,
    uninitialised parameters, two parameters of one name, and a model without any supported layer.
    """
    policy = _policy(approximation)
    check_known("sharing", sharing, SHARINGS)
    places = _places(model)
    _check_parameters(places)
    unsupported = _unsupported(model)
    layers: list[KroneckerLayer] = []
    treatments: dict[nn.Parameter, tuple[str, str, str | None]] = {}
    candidates = 0
    matched: set[str] = set()
    for weight, holders in places.items():
        why = _reason(weight, holders, unsupported)
        if holders[0].attribute != "weight" or why or not weight.requires_grad:
            continue
        candidates += 1
        names = [holder.path for holder in holders]
        word, pattern = _word(policy, names)
        matched.update(p for p in policy if any(fnmatchcase(name, p) for name in names))
        bias = _bias(holders, places)
        if word == "fallback":
            reason = f"approximation {pattern!r}: 'fallback'"
            treatments[weight] = (word, reason, None)
            if bias is not None:
                treatments[bias] = (word, reason, None)
            continue
        layers.append(
            KroneckerLayer(names[0], tuple(h.module for h in holders), word, sharing, weight, bias, wide_inputs)
        )
        kind = type(holders[0].module).__name__
        for parameter in (weight, bias):
            if parameter is not None:
                treatments[parameter] = (word, kind, names[0])
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
    return "the model has no layer that K-FAC can treat: no Linear, Conv1d or Conv2d of its own with a trainable weight"


def _places(model: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """Every module that holds a parameter; parameters in the order of `model.named_parameters()`."""
    paths = clean_paths(model)
    places: dict[nn.Parameter, list[Place]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append(Place(paths[path], module, attribute))
    return places


def _unsupported(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose own kind, or that of a module around them, excludes them, with the reason."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = "MultiheadAttention uses its weights without calling its layers"
            found |= dict.fromkeys(module.modules(), reason)
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            found[module] = "parametrised"
        elif module not in found and not _plain(module):
            found[module] = type(module).__name__ + _what_differs(module)
    return found


def _plain(module: nn.Module) -> bool:
    """Whether a module computes what its type, one of KINDS, does."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if kind is None or "forward" in vars(module) or type(module).forward is not kind.forward:
        return False
    if "weight" not in module._parameters:  # reparametrised by hooks or properties
        return False
    return getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def _what_differs(module: nn.Module) -> str:
    if not isinstance(module, KINDS):
        return ""
    return ", its weight is parametrised" if "weight" not in module._parameters else ", with a forward of its own"


def _reason(parameter: nn.Parameter, holders: Sequence[Place], unsupported: Mapping[nn.Module, str]) -> str:
    """Why a weight has no Kronecker factors, empty if it has."""
    if len(holders) > 1 and any(not _alike(holders[0], other) for other in holders[1:]):
        users = " and ".join(f"{type(h.module).__name__} {h.path}".rstrip() for h in holders[:3])
        return f"shared by unlike modules: {users}"
    return next((unsupported[h.module] for h in holders if h.module in unsupported), "")


def _alike(a: Place, b: Place) -> bool:
    """Whether two modules are the same function of their input, up to nothing but its size."""
    return a.attribute == b.attribute and type(a.module) is type(b.module) and _options(a.module) == _options(b.module)


def _options(module: nn.Module) -> list[object]:
    """Everything that decides on the output beside the weight."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return [getattr(module, name, None) for name in names] + [id(module._parameters.get("bias"))]


def _bias(holders: Sequence[Place], places: Mapping[nn.Parameter, Sequence[Place]]) -> nn.Parameter | None:
    """The trainable bias that these modules, and no others, add."""
    bias = holders[0].module._parameters.get("bias")
    if bias is None or not bias.requires_grad:
        return None
    users = [(place.module, place.attribute) for place in places[bias]]
    return bias if users == [(holder.module, "bias") for holder in holders] else None


def _other(
    parameter: nn.Parameter, places: Mapping[nn.Parameter, Sequence[Place]], unsupported: Mapping[nn.Module, str]
) -> tuple[str, str, None]:
    """The treatment of a parameter that is in no layer."""
    holders = places[parameter]
    if not parameter.requires_grad:
        return "frozen", "requires_grad is False", None
    reason = _reason(parameter, holders, unsupported)
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
    return f"the weight beside it is {_reason(weight, places[weight], unsupported)}"
