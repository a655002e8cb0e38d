"""The state of a preconditioner, complete and checked."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from secondorder.errors import InputError
from secondorder.kfac.blocks import Blocks
from secondorder.kfac.gathering import Gathering
from secondorder.kfac.layers import Treatment
from secondorder.kfac.schedule import Intervals
from secondorder.kfac.state_check import check_count, check_entries, check_list, check_same, refused

VERSION = 1
"""Of the state."""
ENTRIES = (
    *("version", "sharing", "parameters", "treatments", "intervals", "events"),
    *("statistics", "samples", "checked", "dampings", "inverses"),
)
"""Of the state; KFAC adds the names of its groups."""


class Preconditioner(Protocol):
    """What a preconditioner has that its state is made of, as `secondorder.kfac.KFACPreconditioner` does."""

    sharing: str
    events: Counter[str]
    intervals: Intervals
    gathering: Gathering
    blocks: Blocks

    @property
    def treatments(self) -> list[Treatment]:
        """What every parameter is treated as."""


def state_of(preconditioner: Preconditioner) -> dict[str, Any]:
    """Everything that the next step of a preconditioner depends on: tensors, numbers and words, by the keys ENTRIES."""
    treatments = preconditioner.treatments
    return {
        "version": VERSION,
        "sharing": preconditioner.sharing,
        "parameters": {t.name: list(t.parameter.shape) for t in treatments},
        "treatments": {t.name: t.how for t in treatments},
        "intervals": preconditioner.intervals.state_dict(),
        "events": dict(preconditioner.events),
        **preconditioner.gathering.state_dict(),
        **preconditioner.blocks.state_dict(),
    }


def treats_otherwise(state: object, treatments: Sequence[Treatment]) -> bool:
    """Whether a state names other treatments of parameters than these."""
    return isinstance(state, Mapping) and state.get("treatments") != {t.name: t.how for t in treatments}


def check_state(preconditioner: Preconditioner, state: Mapping[str, Any]) -> None:
    """InputError that names the first entry of a state that this preconditioner cannot continue with."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if type(version) is not int or version != VERSION:
        raise InputError(f"not a state of K-FAC in version {VERSION}")
    check_entries("kfac", state, ENTRIES, ("groups", "step_rule"))
    check_same(state, preconditioner.treatments, preconditioner.sharing)
    preconditioner.intervals.check_state(state["intervals"])
    if not isinstance(state["events"], Mapping):
        raise refused("kfac.events", "is not a dictionary")
    check_list("kfac.events", list(state["events"]), str)
    for name, count in state["events"].items():
        check_count(f"kfac.events.{name}", count)
    preconditioner.gathering.check_state(state)
    preconditioner.blocks.check_state(state)
    intervals = state["intervals"]
    if intervals["last_factors"] is None and any({"B", "S"} & one.keys() for one in state["statistics"].values()):
        raise refused("kfac.intervals.last_factors", "is None, and there are factors")
    if intervals["last_inverse"].keys() != state["inverses"].keys():
        raise refused("kfac.intervals.last_inverse", "does not name the layers that have an inverse")
