"""From the studies that a command names to their tables, their claims judged together, and the page of the folder."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from secondorder.errors import InputError
from secondorder.training.processes import world_size
from studies.engine.executors import executor_of
from studies.engine.records import Origins, frame, has_records, read_records
from studies.engine.run import Table, carry_out
from studies.engine.store import Store
from studies.engine.study import Results, Study
from studies.judge import complete, judge
from studies.page import Fold, Page, write_page
from studies.settings import Common

TITLE = "What does global covariance pooling have to do with second-order optimisation?"
QUESTION = (
    "Wang et al. (CVPR 2020) replace the global average pooling (GAP) of a CNN by the root of its feature covariance (GCP) and "
    "explain the gains by optimisation. Nine of their claims, judged on what was measured here; every outcome is computed."
)


def measure(common: Common, chosen: Mapping[str, tuple[Study, Any]]) -> None:
    """Do what the studies want and write their tables into the folder of the command; see `carry_out` for what is raised.

    What another study's table in the folder has is not measured again, unless that table cannot be used.
    """
    plans, tables = {}, {}
    for name, (study, settings) in chosen.items():
        context = study.context(common, settings)
        described = asdict(settings) | {"preset": common.preset}
        tables[name] = Table.opened(common.folder, name, plain(described), study.may_grow, common.fresh)
        plans[name] = study.plan(context)
    store = Store(common.store_folder, common.tensorboard)
    others = cache(lambda: [*_others(common.folder, chosen)])
    with executor_of(common) as executor:
        bars = common.progress and common.executor == "local" and (common.processes == 1 or world_size() > 1)
        carry_out(
            plans, tables, store, executor, others=others, fresh=common.fresh, progress=common.progress, bars=bars
        )


def _others(folder: Path, chosen: Collection[str]) -> Iterator[Table]:
    """The tables in a folder of studies that are not chosen, as far as they can be used."""
    for name in sorted(file.stem for file in folder.glob("*.json")):
        if name not in chosen and has_records(folder, name):
            with suppress(InputError):
                yield Table.read(folder, name)


def plain(settings: Any) -> Any:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings, default=str))


def write_pages(folder: Path, preset: str, studies: Mapping[str, Study], must: Sequence[str]) -> tuple[Path, Path]:
    """Judge the claims of all studies with tables in the folder, together, and write its page; paths of Markdown and HTML.

    A study whose tables cannot be used has a line on the page. InputError with that line, once all else is written, when it is
    one of those in `must`.
    """
    read: dict[str, tuple[pd.DataFrame, Origins]] = {}
    for name in (name for name in studies if has_records(folder, name)):
        with suppress(InputError):  # said by its folds
            read[name] = read_records(folder, name)
    claims = [claim for study in studies.values() for claim in study.claims]
    primary = complete(claims)
    judging = [records for name, (records, _) in read.items() if studies[name].claims]
    records = pd.concat(judging) if judging else frame("", [], {}, "")
    judged = judge(claims, records)

    def folds(name: str) -> Sequence[Fold]:
        records, origins = read[name] if name in read else read_records(folder, name)
        names = {claim.name for claim in studies[name].claims}
        mine = [case for case in judged if case.claim.name in names and case.dataset in set(records.dataset)]
        return studies[name].folds(Results(records, origins, mine))

    flags = "" if preset == Common.preset else f" --preset {preset}"
    page = Page(
        title=TITLE,
        question=QUESTION,
        preset=preset,
        claims=primary,
        commands={c.name: f"python -m studies {c.study}{flags}" for c in primary if c.study and c.study not in read},
    )
    makers = {name: lambda _, name=name: folds(name) for name in studies}
    return write_page(folder, page, makers, must=must)
