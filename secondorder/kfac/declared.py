"""Modules that compute what a Linear or a convolution does under a class of their own, because the user says so.

A class says nothing about what its `forward` computes. A subclass of a layer of torch that keeps its parent's `forward` is one;
any other class gets the fallback unless `Options(treat_as=...)` declares it. The scaling check of the first step, which compares
sum_nt g a^T with the gradient of the weight, finds a declaration that is wrong.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from secondorder.curvature.kronecker.layer_kinds import Convolution, Linear, TransposedLinear
from secondorder.curvature.kronecker.weight_sharing import LayerKind
from secondorder.errors import InputError, check_known


class Declared(NamedTuple):
    """What a declared module does with its weight, and the class whose settings (stride, padding, ...) it needs to have."""

    kind: type[LayerKind]
    settings_of: type[nn.Module] | None = None


TREATMENTS: dict[str, Declared] = {
    "linear": Declared(Linear),
    "linear_transposed": Declared(TransposedLinear),
    "conv1d": Declared(Convolution, nn.Conv1d),
    "conv2d": Declared(Convolution, nn.Conv2d),
    "conv3d": Declared(Convolution, nn.Conv3d),
}
"""What a module can be declared as, and what that computes: x W^T + b with a weight W [O, D], "linear_transposed" x W + b with
[D, O] (Conv1D of Hugging Face's GPT-2), or the convolution with the stride, padding, ... that a subclass of torch's own has."""

TreatAs = Mapping[str | type[nn.Module], str]
"""By a pattern of module names, "transformer.*.c_attn", or by a class, what modules are treated as."""


def check_treat_as(treat_as: object) -> None:
    """InputError unless the option is words of TREATMENTS by patterns of names, or by classes of modules."""
    if not isinstance(treat_as, Mapping):
        raise InputError(
            f"treat_as {treat_as!r:.100}: must be words by class or pattern, {{Conv1D: 'linear_transposed'}}"
        )
    for key, word in treat_as.items():
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise InputError(f"treat_as {key!r:.100}: must be a pattern of module names or a class of modules")
        check_known("treat_as", word, TREATMENTS)


def declared_modules(paths: Mapping[nn.Module, str], treat_as: TreatAs) -> dict[nn.Module, str]:
    """The word for each module that a key of `treat_as` fits; the first key that does counts.

    Args:
        paths: the name of every module. InputError for a module without a weight of the declared kind.
    """
    found = {}
    for module, path in paths.items():
        word = next((word for key, word in treat_as.items() if _fits(key, module, path)), None)
        if word is not None:
            _check_module(module, path, word)
            found[module] = word
    return found


def check_used(paths: Mapping[nn.Module, str], treat_as: TreatAs) -> None:
    """InputError for a key that fits no module."""
    for key in treat_as:
        if not any(_fits(key, module, path) for module, path in paths.items()):
            name = repr(key) if isinstance(key, str) else key.__name__
            raise InputError(f"treat_as {name:.100} fits no module; names are those of model.named_modules()")


def _fits(key: str | type[nn.Module], module: nn.Module, path: str) -> bool:
    if isinstance(key, str):
        return bool(module._parameters) and fnmatchcase(path, key)
    return isinstance(module, key)


def _check_module(module: nn.Module, path: str, word: str) -> None:
    """InputError for a module that cannot be what is declared."""
    needed, weight = TREATMENTS[word].settings_of, module._parameters.get("weight")
    named = f"treat_as {word!r}: module {path or 'the model'} ({type(module).__name__})"
    if weight is None:
        raise InputError(f"{named} has no parameter 'weight' of its own")
    if needed is not None and not isinstance(module, needed):
        raise InputError(f"{named} is no subclass of {needed.__name__}, whose stride, padding, ... are needed")
    if needed is None and weight.ndim != 2:
        raise InputError(f"{named} has a weight {list(weight.shape)}, not a matrix")
