"""Tuning: a walk on a lattice of settings until the best place has no neighbour that was not tried.

Two settings are tuned of every optimiser. Neighbours on the lattice differ by a factor in one of them (of decay rates such as
momentum by a factor of 1 - value). All begin with the same square (or cross) around a centre; then the untried neighbours of the
best place are tried, until there are none: so a winner never lies at the edge of what was tried.

Of an optimiser with heavy-ball momentum the learning rate is tuned as learning_rate / (1 - momentum), the length of its steps
in a constant gradient, so that both settings do not have to move together.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from secondorder.errors import InputError

Place = tuple[int, int]
Values = dict[str, float]
DECAYS = ("momentum", "beta2", "ema_decay")
CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
STARTS = {"cross": CROSS, "square": tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))}
"""Places that are tried first."""


@dataclass(frozen=True)
class Range:
    """A setting that is tuned: centre x factor^place; of decay rates 1 - (1 - centre) x factor^-place.

    Beyond `low` and `high` it is not tried: there it is not defined, or makes no difference.
    """

    name: str
    centre: float
    factor: float = 2.0
    low: float = 0.0
    high: float = math.inf

    def at(self, place: int) -> float | None:
        """The value at a place, with 4 digits; None beyond the ends."""
        decay = self.name in DECAYS
        value = 1 - (1 - self.centre) * self.factor**-place if decay else self.centre * self.factor**place
        value = round(value, 6) if decay else float(f"{value:.4g}")
        return value if self.low <= value <= self.high else None


@dataclass(frozen=True)
class Lattice:
    """What is tuned of an optimiser; `effective`: the first range is that of learning_rate / (1 - momentum)."""

    first: Range
    second: Range
    effective: bool = False

    def values(self, place: Place) -> Values | None:
        """The settings at a place; None where one of them is beyond its ends."""
        first, second = self.first.at(place[0]), self.second.at(place[1])
        if first is None or second is None:
            return None
        rate = float(f"{first * (1 - second):.4g}") if self.effective else first
        return {self.first.name: rate, self.second.name: second}


def _momentum(effective_rate: float, centre: float = 0.9) -> Lattice:
    """Of an optimiser with heavy-ball momentum."""
    return Lattice(Range("learning_rate", effective_rate), Range("momentum", centre), effective=True)


LATTICES = {
    "sgd": _momentum(4.0, 0.8),
    "kfac": _momentum(0.5),
    "kfac_adam": Lattice(Range("learning_rate", 0.06), Range("momentum", 0.9)),
    "ekfac": _momentum(0.5),
    "gauss_newton": _momentum(2.0),
    "adamw": Lattice(Range("learning_rate", 0.06), Range("weight_decay", 1e-3, 10.0, 1e-5, 1.0)),
    "soap": Lattice(Range("learning_rate", 0.06), Range("beta2", 0.95, high=0.999)),
    "shampoo": _momentum(4.0),
    "muon": Lattice(Range("learning_rate", 0.06), Range("momentum", 0.8)),
    "singd": Lattice(Range("learning_rate", 0.5), Range("damping", 1e-2, 10.0, 1e-6, 1e3)),
}
"""Optimiser of `secondorder.training.OPTIMIZERS` -> what is tuned of it."""
DEEP_LATTICES = {
    "sgd": _momentum(10.0, 0.8),
    "kfac": _momentum(0.25, 0.6),
    "kfac_quadratic": Lattice(Range("damping", 2e-3, 4.0, 1e-8), Range("ema_decay", 0.9)),
}
"""The same for the autoencoder."""


@dataclass
class Search:
    """The trials of one optimiser on one problem: the loss of each place, infinite where training diverged."""

    lattice: Lattice
    start: str
    losses: dict[Place, float] = field(default_factory=dict)

    @property
    def best(self) -> Place:
        """The place with the lowest loss, the first one tried of equals; the lowest place where all have diverged."""
        place = min(self.losses, key=self.losses.__getitem__)
        return min(self.losses) if math.isinf(self.losses[place]) else place

    @property
    def untried(self) -> list[Place]:
        """What is to be tried next: the start, then the neighbours of the best place; nothing at the end of the walk."""
        places = [(self.best[0] + i, self.best[1] + j) for i, j in CROSS] if self.losses else STARTS[self.start]
        return [place for place in places if place not in self.losses and self.lattice.values(place) is not None]

    def chosen(self, name: str, extensions: int) -> Values:
        """The settings of the best place; InputError with the name when every trial diverged or it has untried neighbours.

        With 0 extensions the walk was not to go on, and the best place may lie at an edge.
        """
        values = self.lattice.values(self.best)
        assert values is not None
        if math.isinf(self.losses[self.best]):
            raise InputError(f"{name}: all {len(self.losses)} trials diverged; raise --extensions, or leave it out")
        if extensions and self.untried:
            words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())
            raise InputError(
                f"{name}: the best of {len(self.losses)} trials, {words}, still lies at the edge of what was tried; "
                "raise --extensions"
            )
        return values

    @property
    def summary(self) -> dict[str, Any]:
        """For each trial both settings and the loss, the best first; names of the settings; whether the best is at an edge."""
        order = sorted(self.losses, key=lambda place: (self.losses[place], place != self.best))
        trials = [[*(self.lattice.values(place) or {}).values(), self.losses[place]] for place in order]
        names = [self.lattice.first.name, self.lattice.second.name]
        return {"names": names, "trials": trials, "edge": bool(self.untried)}
