"""Trainings of a study, side by side, whose tables grow with each that is finished."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from secondorder.training import is_main_process
from studies.jobs import map_jobs

Measured = TypeVar("Measured")


def so_far(
    name: str, measure: Callable[..., Measured], todo: Sequence[tuple[Any, ...]], processes: int, progress: bool
) -> Iterator[list[Measured]]:
    """measure(*arguments) of all runs that are done, after each of them; the first of the arguments is the Run.

    With `progress` the main process says which run it is, with the name of the study.
    """
    done: list[Measured] = []
    for measured in map_jobs(measure, todo, processes):
        one = todo[len(done)][0]
        done.append(measured)
        if progress and is_main_process():
            words = f"{one.backbone} + {one.pooling}, seed {one.seed}"
            print(f"{name}: run {len(done)} of {len(todo)}: {words}", flush=True)
        yield done
