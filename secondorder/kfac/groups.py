"""The parameter groups of the optimiser: by patterns of names when it is made, and for parameters of the model that come later.

All parameters of the model are in a group, also those that are frozen: once they become trainable, the settings and the schedule
of their group act on them.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.kfac.layers import KroneckerLayer, Treatment
from secondorder.kfac.modules import Place, check_parameters, modules_by_parameter
from secondorder.kfac.options import SETTINGS, checked_settings
from secondorder.kfac.preconditioner import KFACPreconditioner
from secondorder.kfac.step_rule import StepRule

Group = dict[str, Any]
KEPT = ("param_names", "initial_lr")
"""What torch and its schedules keep in a group beside its settings."""


def groups_by_pattern(treatments: Sequence[Treatment], wanted: Mapping[str, Mapping[str, float]]) -> list[Group]:
    """Parameter groups by patterns of names, the first that fits; the rest first. InputError for a pattern without parameter."""
    rest = ""
    members: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in [rest, *wanted]}
    for treatment in treatments:
        members[next((p for p in wanted if fnmatchcase(treatment.name, p)), rest)].append(treatment.parameter)
    for pattern in wanted:
        if not members[pattern]:
            raise InputError(f"groups: no parameter is named like {pattern!r}")
    chosen = {pattern: checked_settings(settings, decoupled=False) for pattern, settings in wanted.items()}
    return [{"params": found, **chosen.get(pattern, {})} for pattern, found in members.items() if found]


def setting_by_parameter(groups: Sequence[Group], name: str) -> dict[nn.Parameter, float]:
    """What the group of each parameter says, as a number."""
    return {parameter: float(group[name]) for group in groups for parameter in group["params"]}


def names_by_group(groups: Sequence[Group], treatments: Sequence[Treatment]) -> list[list[str]]:
    """The names of the parameters in each group."""
    names = {treatment.parameter: treatment.name for treatment in treatments}
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def layer_dampings(groups: Sequence[Group], layers: Mapping[str, KroneckerLayer]) -> dict[str, float]:
    """The damping of each layer, that of its weight's group."""
    dampings = setting_by_parameter(groups, "damping")
    return {name: dampings[layer.weight] for name, layer in layers.items()}


def ungrouped(model: nn.Module, groups: Sequence[Group]) -> list[Place]:
    """The trainable parameters of a model that are in no group."""
    grouped = {parameter for group in groups for parameter in group["params"]}
    return [holders[0] for p, holders in modules_by_parameter(model).items() if p.requires_grad and p not in grouped]


def check_all_grouped(model: nn.Module, groups: Sequence[Group]) -> None:
    """InputError that names the module of a trainable parameter that is in no group: it came after the optimiser was made."""
    missing = ungrouped(model, groups)
    check_parameters(model, modules_by_parameter(model))
    if missing:
        module, path = missing[0].module, missing[0].path
        called = f"module {path} ({type(module).__name__})" if path else f"parameter {missing[0].name}"
        source = f"model.get_submodule({path!r}).parameters()" if path else f"[model.{missing[0].name}]"
        raise InputError(
            f"{called} is trainable and in no parameter group, it came into the model after the optimiser was made: "
            f"optimizer.add_param_group({{'params': {source}}}) adopts it ({len(missing)} parameters in all)"
        )


def group_to_add(
    group: object,
    model: nn.Module,
    groups: Sequence[Group],
    treatments: Sequence[Treatment],
    defaults: Mapping[str, Any],
) -> Group:
    """A group for parameters of the model that are not trained yet: new ones, and those that were frozen till now.

    Args:
        group: what the user gives: "params", a parameter or some, also with names, and settings.
        model, groups, treatments: the network, and what there is already.
        defaults: the settings that the group does not name.

    Raises:
        InputError: for parameters that are not of the model or are trained already, the same one twice, none, and settings
            that cannot be used.
    """
    if not isinstance(group, Mapping) or "params" not in group:
        raise InputError(f"add_param_group({group!r:.100}): must be a dictionary with 'params'")
    settings = {name: value for name, value in group.items() if name != "params" and name not in KEPT}
    chosen = checked_settings({name: defaults[name] for name in SETTINGS} | settings, decoupled=False)
    given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    parameters = [item[1] if isinstance(item, tuple) else item for item in given]
    places = modules_by_parameter(model)
    trained = {t.parameter for t in treatments if t.how != "frozen"}
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise InputError(f"add_param_group: {type(parameter).__name__} in 'params' is no parameter")
        if parameter not in places:
            raise InputError(
                f"add_param_group: the parameter {list(parameter.shape)} at place {i} is not of the model: make its module a "
                "part of the model before, or give it to an optimiser of its own"
            )
        assert isinstance(parameter, nn.Parameter)
        name = places[parameter][0].name
        if any(parameter is other for other in parameters[:i]):
            raise InputError(f"add_param_group: parameter {name} is given twice")
        index = next((i for i, own in enumerate(groups) if any(parameter is p for p in own["params"])), None)
        if index is not None and parameter in trained:
            raise InputError(
                f"add_param_group: parameter {name} is trained in group {index} already; change the settings in "
                f"optimizer.param_groups[{index}], or make a new KFAC with Options(groups={{{name!r}: ...}})"
            )
    if not parameters:
        raise InputError("add_param_group: 'params' is empty")
    in_order = [parameter for parameter in places if any(parameter is given for given in parameters)]
    return {"params": in_order, **{name: group[name] for name in KEPT[1:] if name in group}, **chosen}


def remove_from(groups: Sequence[Group], parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of the groups that they are in, in place."""
    left = set(parameters)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in left]


def begin_buffers(groups: Sequence[Group], state: MutableMapping[Any, Any], anew: Iterable[nn.Parameter] = ()) -> None:
    """Buffers in the format of each parameter, which may have changed, and none for parameters that begin anew.

    Every parameter has an entry, also an empty one, as torch.distributed.checkpoint asks for.
    """
    for parameter in anew:
        state.pop(parameter, None)
    for parameter in (p for group in groups for p in group["params"]):
        buffers = state[parameter]
        buffers.update({k: v.to(parameter) if isinstance(v, Tensor) else v for k, v in buffers.items()})


def follow_model(
    preconditioner: KFACPreconditioner,
    groups: Sequence[Group],
    state: MutableMapping[Any, Any],
    rule: StepRule,
    between_steps: bool,
) -> None:
    """Adopt what has become trainable, in groups and buffers, too: see `KFACPreconditioner.follow_model`.

    InputError, and nothing has changed, for a module that is in no group, and a number format that is too short for the rule.
    """
    model_layers = preconditioner.model_layers
    moved = model_layers.moved
    if moved:
        rule.check_formats(model_layers.parameters)
    if model_layers.changed:
        check_all_grouped(model_layers.model, groups)
    anew = preconditioner.follow_model(between_steps)
    if anew:
        present = {t.parameter for t in preconditioner.treatments}
        remove_from(groups, [parameter for parameter in anew if parameter not in present])
    if anew or moved:
        begin_buffers(groups, state, anew)
