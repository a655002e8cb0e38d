"""A study as data: what it trains and measures, which claims it judges, and what a reader is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from studies.engine.records import Origins
from studies.engine.run import Plan
from studies.judge import Claim, Judged
from studies.page import Fold, Provenance
from studies.settings import Common


@dataclass(frozen=True)
class Context:
    """What a plan and a page may ask for: the settings of the command and those of the study."""

    common: Common
    settings: Any
    seeds: Sequence[int]


@dataclass(frozen=True)
class Results:
    """What the page of a study is made of."""

    records: pd.DataFrame
    origins: Origins
    judged: Sequence[Judged]
    """The study's claims, as judged on the records."""

    @property
    def provenance(self) -> Provenance:
        """Where the records come from."""
        return Provenance(self.origins.study, self.origins.words(self.records.seed))

    def of(self, *names: str) -> list[Judged]:
        """The claims of these names, on each data set."""
        return [judged for name in names for judged in self.judged if judged.claim.name == name]


@dataclass(frozen=True)
class Study:
    """A study. A new one is one file that makes such a record, and a row in `studies.study.STUDIES`.

    Args:
        name: of its table, its flags and on the command line.
        title: a sentence.
        presets: settings by the name of a preset, frozen dataclasses of one type; their fields are flags.
        seeds: number of seeds by the name of a preset.
        plan: from a Context a generator of stages, each a list of `Trained` and `Computed` tasks; it is sent their records.
        claims: from the records the claims that are judged on them; data.
        folds: from Results what the page shows.
        may_grow: settings that may differ from those of a table that is there: their values have records of their own.
    """

    name: str
    title: str
    presets: Mapping[str, Any]
    seeds: Mapping[str, int]
    plan: Callable[[Context], Plan]
    claims: Sequence[Claim] = ()
    folds: Callable[[Results], Sequence[Fold]] = lambda results: ()
    may_grow: Sequence[str] = ("heads",)

    def context(self, common: Common, settings: Any) -> Context:
        """Settings for the plan, with as many seeds as the command or else the preset says."""
        seeds = common.seeds or self.seeds[common.preset]
        return Context(replace(common, seeds=seeds), settings, range(seeds))
