"""The state of the optimiser: torch's part checked, and the whole in a form that torch.distributed.checkpoint keeps."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from traceback import walk_stack
from typing import Any

from secondorder.errors import InputError
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.options import SETTINGS, checked_settings
from secondorder.kfac.rule_updates import BUFFERS
from secondorder.kfac.state_check import check_entries, check_list, check_optimizer
from secondorder.kfac.step_rule import StepRule

UPDATE = "update"
"""The buffer of a parameter that `quadratic_step` keeps, its last update."""
WHOLE = "kfac"
"""The entry of an optimiser's state, and the buffer of a parameter that stands for the state: see `as_buffer`."""


def check_groups_and_buffers(
    state: Mapping[str, Any],
    names: Sequence[Sequence[str]],
    rule: StepRule,
    groups: Sequence[Mapping[str, Any]],
    layers: Iterable[KroneckerLayer],
) -> None:
    """InputError for an optimiser's state of another step rule or other groups, and for damaged settings and buffers.

    names: of the parameters in each of the optimiser's groups. layers: whose buffers lie with their weights, `[G, O, D]`, unless
    the rule is plain.
    """
    if (theirs := state[WHOLE].get("step_rule")) != rule.words:
        raise InputError(f"state of another step rule: {theirs!s:.60}, and it is {rule.words} now")
    for i, before in enumerate(state[WHOLE]["groups"]):
        check_list(f"kfac.groups.{i}", before, str)
    for i, (before, own) in enumerate(zip_longest(state[WHOLE]["groups"], names)):
        if before != own:
            raise InputError(
                f"state of other parameter groups: group {i} was {before!s:.80}, and is {own!s:.80} now; Options(groups=...) or "
                "add_param_group make the same"
            )
    rest = {key: value for key, value in state.items() if key != WHOLE}
    check_entries("the state", rest, ("state", "param_groups"))
    shapes = {layer.weight: (layer.groups, layer.outputs, layer.inputs) for layer in layers if not rule.is_plain}
    check = partial(checked_settings, decoupled=False)
    check_optimizer(rest, groups, SETTINGS, check, (*BUFFERS, UPDATE), shapes)


def as_buffer(state: Mapping[str, Any], live: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An optimiser's state, whole, as a buffer of the first trainable parameter of its `live` groups, and nothing else.

    torch.distributed.checkpoint drops every entry that torch's own optimisers do not have, and loads into the shapes that the
    state has before, in which a new optimiser has no factors yet. A tuple it takes for a value, whatever is in it.
    """
    parameters = [parameter for group in live for parameter in group["params"]]
    index = next((i for i, parameter in enumerate(parameters) if parameter.requires_grad), 0)
    groups = [dict(group) for group in state["param_groups"]]
    return {
        "state": {**{i: {} for i in range(len(parameters))}, index: {WHOLE: (state,)}},
        "param_groups": groups,
    }


def from_buffer(state: object) -> Mapping[str, Any]:
    """The state that `as_buffer` was given, or the state itself if it is not of that form.

    InputError unless it is that of an optimiser, with the entry "kfac".
    """
    found = state
    if isinstance(state, Mapping) and WHOLE not in state and isinstance(state.get("state"), Mapping):
        inside = [buffers[WHOLE] for buffers in state["state"].values() if WHOLE in buffers]
        found = (
            inside[-1][0] if inside and isinstance(inside[-1], tuple | list) else state
        )  # what was loaded comes last
    own = found.get(WHOLE) if isinstance(found, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(own.get("groups"), list):
        raise InputError("state_dict without the entry 'kfac': it is not of a KFAC optimiser")
    return found  # type: ignore[return-value]


def in_distributed_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint is asking, which cannot be told in another way."""
    return any(
        frame.f_globals.get("__name__", "").startswith("torch.distributed.checkpoint") for frame, _ in walk_stack(None)
    )
