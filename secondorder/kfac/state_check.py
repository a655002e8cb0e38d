"""Checks of a saved state, all made before anything of it is loaded: a state is taken whole or not at all.

Each check raises InputError that names the entry, as a path from the state: ``kfac.statistics.layer1.A``.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.kfac.layers import Treatment

WAY_OUT = "the state is damaged or of another version; load that of an earlier checkpoint"
COUNTS = ("squares",)
"""Buffers of a parameter that are a whole number, not a tensor."""
SCALARS = ("size",)
"""Buffers that are a tensor of one number."""
MATRICES = ("momentum_buffer", "square")
"""Buffers that have the shape of a layer where a weight stands for one."""


def refused(entry: str, reason: str) -> InputError:
    """The error of an entry that cannot be loaded."""
    return InputError(f"{entry[-100:]} {reason[:120]}: {WAY_OUT}")


def check_entries(entry: str, value: object, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Raises InputError, naming `entry`, unless the value is a dictionary with all required and no unknown keys."""
    if not isinstance(value, Mapping):
        raise refused(entry, f"is of type {type(value).__name__}, not a dictionary")
    if missing := [key for key in required if key not in value]:
        raise refused(entry, f"lacks {missing[0]!r}")
    if extra := [key for key in value if key not in required and key not in optional]:
        raise refused(entry, f"has an unknown entry {extra[0]!r:.60}")


def check_list(entry: str, value: object, kind: type) -> None:
    """Raises InputError, naming `entry`, unless the value is a list of values of one type."""
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise refused(entry, f"is {value!r:.40}, not a list of {kind.__name__}")


def check_count(entry: str, value: object, most: float = math.inf) -> None:
    """Raises InputError, naming `entry`, unless the value is a whole number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        limit = "" if math.isinf(most) else f" from 0 to {most:.0f}"
        raise refused(entry, f"is {value!r:.40}, not a whole number{limit}")


def check_float(entry: str, value: object, least: float = 0.0, most: float = math.inf) -> None:
    """Raises InputError, naming `entry`, unless the value is a finite number from `least` to `most`."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or math.isinf(value):  # type: ignore[arg-type]
        raise refused(entry, f"is {value!r:.40}, not a finite number from {least:g} to {most:g}")


def check_tensor(entry: str, value: object, shape: Sequence[int | None], dtype: torch.dtype) -> None:
    """Raises InputError, naming `entry`, unless the value is a finite tensor of this shape (None: any length) and type."""
    if not isinstance(value, Tensor):
        raise refused(entry, f"is of type {type(value).__name__}, not a tensor")
    fits = value.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
    if not fits:
        raise refused(entry, f"has shape {list(value.shape)}, not {['any' if n is None else n for n in shape]}")
    if value.dtype != dtype:
        raise refused(entry, f"is of {value.dtype}, not {dtype}")
    if value.layout != torch.strided or value.is_meta or not bool(value.isfinite().all()):
        raise refused(entry, "holds numbers that are not finite")


def check_same(state: Mapping[str, Any], treatments: Sequence[Treatment], sharing: str) -> None:
    """InputError that names the first difference between a state's parameters and their treatments and those of the model."""
    own = {t.name: list(t.parameter.shape) for t in treatments}
    theirs, before = state["parameters"], state["treatments"]
    check_entries("kfac.parameters", theirs, (), theirs if isinstance(theirs, Mapping) else ())
    for name, shape in theirs.items():
        check_list(f"kfac.parameters.{name}", shape, int)
    for name in [*own, *theirs]:
        if own.get(name) != theirs.get(name):
            raise InputError(
                f"state of another architecture: {name} is {theirs.get(name, 'missing')} in the state and "
                f"{own.get(name, 'missing')} in the model"
            )
    check_entries("kfac.treatments", before, own)
    check_list("kfac.treatments and sharing", [*before.values(), state["sharing"]], str)
    for t in treatments:
        if before[t.name] != t.how:
            way_out = "make the optimiser while the same parameters are frozen as in the state, load, then change that"
            advice = f"; {way_out}" if "frozen" in (before[t.name], t.how) else ""
            raise InputError(f"state of other settings: {t.name} was {before[t.name]}, and is {t.how} now{advice}")
    if state["sharing"] != sharing:
        raise InputError(f"state of other settings: sharing was {state['sharing']!r}, and is {sharing!r} now")


def check_optimizer(
    state: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    settings: Collection[str],
    check_settings: Callable[[Mapping[str, Any]], Any],
    buffers: Collection[str],
    shapes: Mapping[nn.Parameter, Sequence[int]] = MappingProxyType({}),
) -> None:
    """What torch saves of an optimiser: the settings of its groups, and `buffers` of parameters, each of the parameter's shape.

    Args:
        shapes: of the layers whose weights have `MATRICES`. A schedule may have added settings of its own to a group.
    """
    saved, content = state.get("param_groups"), state.get("state")
    if not isinstance(saved, list) or not isinstance(content, Mapping) or len(saved) != len(groups):
        raise refused("param_groups or state", f"is missing, or not of {len(groups)} groups")
    parameters: dict[object, nn.Parameter] = {}
    for i, (theirs, own) in enumerate(zip(saved, groups, strict=True)):
        check_entries(f"param_groups.{i}", theirs, ("params", *settings), theirs if isinstance(theirs, Mapping) else ())
        indices = theirs["params"]
        if not isinstance(indices, list) or len(indices) != len(own["params"]):
            raise refused(f"param_groups.{i}.params", f"does not name the {len(own['params'])} parameters of the group")
        for index, parameter in zip(indices, own["params"], strict=True):
            check_count(f"param_groups.{i}.params", index)
            parameters[index] = parameter
        check_settings({name: theirs[name] for name in settings})
    if len(parameters) != sum(len(own["params"]) for own in groups):
        raise refused("param_groups", "name a parameter twice")
    for index, entries in content.items():
        if index not in parameters:
            raise refused(f"state.{index}", "is of no parameter")
        check_entries(f"state.{index}", entries, (), buffers)
        for name, value in entries.items():
            if name in COUNTS:
                check_count(f"state.{index}.{name}", value)
            else:
                p = parameters[index]
                shape = () if name in SCALARS else shapes.get(p, p.shape) if name in MATRICES else p.shape
                check_tensor(f"state.{index}.{name}", value, shape, p.dtype)
