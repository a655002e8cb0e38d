"""The table of studies: a new study is one row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.curvature import section as curvature_section
from studies.curvature import settings as curvature_settings
from studies.curvature import study as curvature
from studies.landscape import section as landscape_section
from studies.landscape import study as landscape
from studies.optimisers import section as optimisers_section
from studies.optimisers import settings as optimisers_settings
from studies.optimisers import study as optimisers
from studies.performance import section as performance_section
from studies.performance import study as performance
from studies.preconditioning import section as preconditioning_section
from studies.preconditioning import settings as preconditioning_settings
from studies.preconditioning import study as preconditioning
from studies.report.section import Section
from studies.settings import Common


@dataclass(frozen=True)
class Study:
    """A study: its settings, one per preset; what it does; and what the report says of its results.

    `check` finds whatever would stop it (names, data, sizes) before anything is computed and returns what `run` needs;
    `dry_run` takes one step on fake data and returns sentences that state the cost.
    """

    title: str
    presets: Mapping[str, Any]
    check: Callable[[Common, Any], Any]
    run: Callable[[Common, Any, Any], None]
    dry_run: Callable[[Common, Any], list[str]]
    section: Callable[[Path], Section]


STUDIES: dict[str, Study] = {
    "landscape": Study(
        "smoothness of the loss of GAP and GCP networks over training",
        landscape.PRESETS,
        landscape.check,
        landscape.run,
        landscape.dry_run,
        landscape_section.section,
    ),
    "curvature": Study(
        "conditioning and spectra of GGN and Hessian blocks, and K-FAC against them",
        curvature_settings.PRESETS,
        curvature.check,
        curvature.run,
        curvature.dry_run,
        curvature_section.section,
    ),
    "preconditioning": Study(
        "is GCP a second-order method in disguise: its head, its gradients, its curvature, its training",
        preconditioning_settings.PRESETS,
        preconditioning.check,
        preconditioning.run,
        preconditioning.dry_run,
        preconditioning_section.section,
    ),
    "performance": Study(
        "time and memory of the GCP head against the textbook version, of curvature quantities and of K-FAC's steps",
        performance.PRESETS,
        performance.check,
        performance.run,
        performance.dry_run,
        performance_section.section,
    ),
    "optimisers": Study(
        "K-FAC and other optimisers against tuned SGD: per epoch, per second, per peak memory",
        optimisers_settings.PRESETS,
        optimisers.check,
        optimisers.run,
        optimisers.dry_run,
        optimisers_section.section,
    ),
}
