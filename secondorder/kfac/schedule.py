"""When factors are updated and which layers are inverted at a step.

While the training warms up, the inverses are renewed with the factors: after t steps every max(1, t / 4) steps. Of a large
network that would take many times as long as the training itself. There each layer waits for

    gap_l = sqrt(c_l) sum_k sqrt(c_k) / (WARM_UP_SHARE w)

steps, c_l the floating-point operations of its inversion and w those of a step's passes: so sum_l c_l / gap_l is a share of w,
and the mean age of the inverses is the least that this much work allows. Work is counted, not measured: a training that is
repeated takes the same steps. A layer whose gap is no less than the interval is inverted at its turns, as after warm-up.
"""

import math
from collections.abc import Collection, Mapping

from secondorder.errors import check_whole
from secondorder.kfac.state_check import check_count, check_entries, check_float

WARM_UP_SHARE = 0.5
"""Work of the renewals of all layers in a step of warm-up, as a part of that of the passes."""
SMALL_NETWORK = 2.0**35
"""Operations of one inversion of all layers, half a second of a CPU's thread, up to which nothing waits."""


class Intervals:
    """Counts steps and says what is due.

    factor_interval, inverse_interval: steps between two updates. warm_up: after t steps the interval is at most max(1, t / 4).
    costs: of inverting each layer; with stagger the layers are spread over the inverse interval, about equal cost a step.
    begun: the step from which on there is a layer that was not there from the beginning; t counts from it.
    """

    def __init__(
        self, factor_interval: int, inverse_interval: int, warm_up: bool, stagger: bool, costs: Mapping[str, float]
    ) -> None:
        check_whole("factor_interval", factor_interval)
        check_whole("inverse_interval", inverse_interval)
        self.factor_interval, self.inverse_interval, self.warm_up = factor_interval, inverse_interval, warm_up
        self.stagger, self.turns = stagger, self._turns(costs, stagger)
        self.step, self.work = 0, 0.0
        self.gaps: dict[str, float] = {}
        self.last_factors: int | None = None
        self.last_inverse: dict[str, int] = {}
        self.begun: dict[str, int] = {}

    def adopt(self, costs: Mapping[str, float], fresh: Collection[str], first_step: int) -> None:
        """Go on with the layers that `costs` names, of which the `fresh` ones have neither factors nor inverses.

        They have them in `first_step`, the next step or the present one, and more often than later for some steps.
        """
        self.turns = self._turns(costs, self.stagger)
        kept = costs.keys() - fresh
        for held in (self.last_inverse, self.begun, self.gaps):
            for name in held.keys() - kept:
                del held[name]
        self.begun |= dict.fromkeys(fresh, first_step)

    @property
    def factors_due(self) -> bool:
        """Whether the present step updates the factors."""
        if self.last_factors is None:
            return True
        newest = max(self.begun.values(), default=0)
        interval = self._at_most(self.factor_interval, newest)
        return self.last_factors < newest <= self.step or self.step - self.last_factors >= interval

    def pace(self, costs: Mapping[str, float], work: float) -> None:
        """Set the gaps of warm-up from the operations of each layer's inversion and of a step's passes: the most so far count."""
        self.work = max(self.work, work)
        roots = {name: math.sqrt(cost) for name, cost in costs.items()}
        self.gaps = {}
        if self.work and sum(costs.values()) > SMALL_NETWORK:
            scale = sum(roots.values()) / (WARM_UP_SHARE * self.work)
            self.gaps = {name: root * scale for name, root in roots.items()}

    def inverses_due(self) -> list[str]:
        """The layers whose inverse is older than their factors, and whose turn it is."""
        return [name for name in self.turns if self._due(name)]

    def _due(self, name: str) -> bool:
        if self.last_factors is None:
            return False
        last = self.last_inverse.get(name)
        if last is None:
            return True
        if last >= self.last_factors:
            return False  # nothing new since
        begun, gap = self.begun.get(name, 0), self.gaps.get(name, 0.0)
        if self.warm_up and (self.step - begun) // 4 < self.inverse_interval and gap < self.inverse_interval:
            return self.step - last >= max(gap, self._at_most(self.inverse_interval, begun))
        return (
            self.step - self.turns[name]
        ) % self.inverse_interval == 0 or self.step - last >= 2 * self.inverse_interval

    def _at_most(self, interval: int, begun: int) -> int:
        return min(interval, max(1, (self.step - begun) // 4)) if self.warm_up and self.step >= begun else interval

    def _turns(self, costs: Mapping[str, float], stagger: bool) -> dict[str, int]:
        return spread(costs, self.inverse_interval) if stagger else dict.fromkeys(costs, 0)

    def state_dict(self) -> dict[str, object]:
        """The counters, plain values: step, last_factors, last_inverse, work, and begun where a layer came later."""
        counters: dict[str, object] = {
            "step": self.step,
            "last_factors": self.last_factors,
            "last_inverse": dict(self.last_inverse),
            "work": self.work,
        }
        return counters | ({"begun": dict(self.begun)} if self.begun else {})

    def check_state(self, state: object) -> None:
        """InputError unless a state has the counters, none of them ahead of the step, of these layers."""
        check_entries("kfac.intervals", state, ("step", "last_factors", "last_inverse", "work"), ("begun",))
        assert isinstance(state, Mapping)
        check_entries("kfac.intervals.begun", state.get("begun", {}), (), self.turns)
        check_count("kfac.intervals.step", state["step"])
        check_float("kfac.intervals.work", state["work"])
        if state["last_factors"] is not None:
            check_count("kfac.intervals.last_factors", state["last_factors"], state["step"])
        check_entries("kfac.intervals.last_inverse", state["last_inverse"], (), self.turns)
        for name, step in state["last_inverse"].items():
            check_count(f"kfac.intervals.last_inverse.{name}", step, state["step"])
        for name, step in state.get("begun", {}).items():
            check_count(f"kfac.intervals.begun.{name}", step, state["step"] + 1)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from the counters of `state_dict`; `pace` is to follow, since gaps are no part of them."""
        self.step, self.last_factors = state["step"], state["last_factors"]  # type: ignore[assignment]
        self.work, self.gaps = state["work"], {}  # type: ignore[assignment]
        self.last_inverse = dict(state["last_inverse"])  # type: ignore[call-overload]
        self.begun = dict(state.get("begun", {}))  # type: ignore[call-overload]


def spread(costs: Mapping[str, float], slots: int) -> dict[str, int]:
    """A slot for each name, so that the slots cost about the same: the most expensive first, into the cheapest slot."""
    loads = [0.0] * min(slots, len(costs))  # no more can be taken
    turns = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        slot = min(range(len(loads)), key=loads.__getitem__)
        loads[slot] += costs[name]
        turns[name] = slot
    return {name: turns[name] for name in costs}
