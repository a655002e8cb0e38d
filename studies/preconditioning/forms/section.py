"""Part B in the report: the published approximation of the backward pass."""

from collections.abc import Mapping

import pandas as pd

from studies.preconditioning.forms import figures
from studies.preconditioning.part import Part
from studies.preconditioning.reading import at_the_end, backbone_name
from studies.report.section import Claim, Picture, Table
from studies.statistics import NOT_SUPPORTED, SUPPORTED, UNDECIDED, mean_interval

GROUP = "B: the published approximation"
GOOD = 0.9
"""Cosine from which an approximation is said to stand for the exact backward pass."""
OWN = "gcp"
"""The backbone whose last layer was trained with the head that the approximation is about."""


def part(table: pd.DataFrame) -> Part:
    """Claims, figure and table of part B; only a remark when nothing was measured."""
    if table.empty:
        return Part([], remarks=["The published approximation: no layer had a gradient, so nothing was measured."])
    end = at_the_end(table)
    everything = scopes(table, end)[-1][0]
    claims = [c for words, rows in scopes(table, end) for c in _better_than_none(words, rows, words == everything)]
    claims += _stands(*scopes(table, end)[0])
    return Part(
        claims,
        remarks=[_remark(end)],
        pictures=[Picture("preconditioning_forms", _caption(table, claims), figures.over_training(table))],
        tables=[Table("preconditioning_forms", _table_caption(end), summary(end))],
    )


def scopes(table: pd.DataFrame, end: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(words, rows): the last layer as the published head trains it, and everything that was measured."""
    everything = ("mean over layers, backbones and moments", table)
    last = end[(end.backbone == OWN) & (end.layer == end.layer.unique()[-1])]
    if last.empty:
        return [everything]
    return [(f"last layer, {backbone_name(OWN)}, after training", last), everything]


def per_seed(rows: pd.DataFrame, form: str, measure: str) -> pd.Series:
    """The mean over the rows of each seed."""
    some = rows[(rows.setting == form) & (rows.measure == measure)]
    found: pd.Series = some.groupby("seed").value.mean()
    return found


def _better_than_none(words: str, rows: pd.DataFrame, headline: bool) -> list[Claim]:
    """Whether the trimmed forms are nearer to the exact one than plain covariance pooling's backward pass is."""
    claims = []
    for form in ("trimmed", "trimmed_rotated"):
        name = figures.FORMS[form][0]
        difference = per_seed(rows, form, "cosine") - per_seed(rows, "unpreconditioned", "cosine")
        claims.append(
            _claim(
                f"The backward pass '{name}' is closer to the exact one than that without a preconditioner ({words}).",
                f"cosine to the exact dL/dX, {name} - no preconditioner; {words}",
                difference.dropna(),
                0.0,
                {
                    SUPPORTED: f"The form '{name}' carries some of GCP's preconditioning ({words}).",
                    NOT_SUPPORTED: f"The form '{name}' is further from GCP's gradient than plain covariance pooling is, and "
                    f"cannot carry the argument ({words}).",
                    UNDECIDED: f"The form '{name}' is not clearly nearer than no preconditioner ({words}).",
                },
                headline,
            )
        )
    return [claim for claim in claims if claim is not None]


def _stands(words: str, rows: pd.DataFrame) -> list[Claim]:
    """Which forms stand for the exact one, for features and for weights."""
    stated = {
        ("trimmed", "cosine"): ("The published approximation, as printed, stands for the backward pass", "dL/dX"),
        ("trimmed", "weight_cosine"): (
            "The same holds for the convolution's weights, as in the published table",
            "dL/dW",
        ),
        ("trimmed_rotated", "cosine"): ("With its eigenvectors kept it stands for the backward pass", "dL/dX"),
        ("newton_schulz", "cosine"): ("The published head's own backward pass is that of the exact root", "dL/dX"),
    }
    claims = []
    for (form, measure), (statement, of) in stated.items():
        name = figures.FORMS[form][0]
        meanings = {
            SUPPORTED: f"For {of} the form '{name}' points where the exact backward pass points ({words}).",
            NOT_SUPPORTED: f"For {of} the form '{name}' does not stand for the exact backward pass ({words}).",
            UNDECIDED: f"For {of} whether the form '{name}' stands for the exact one is open ({words}).",
        }
        claims.append(
            _claim(
                f"{statement}: cosine above {GOOD:g} ({words}).",
                f"cosine to the exact {of}, {name}; {words}",
                per_seed(rows, form, measure),
                GOOD,
                meanings,
                headline=(form, measure) == ("trimmed", "cosine"),
            )
        )
    return [claim for claim in claims if claim is not None]


def _claim(
    statement: str,
    quantity: str,
    values: pd.Series,
    reference: float,
    meanings: Mapping[str, str],
    headline: bool = False,
) -> Claim | None:
    """The claim that values are above a reference, with the sentence that belongs to its verdict; None without values."""
    if values.empty:
        return None
    interval = mean_interval(values)
    return Claim(statement, quantity, interval, "above", reference, GROUP, headline=headline).meant(meanings)


def summary(end: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every measure, and the interval of the cosine; a row a backbone, layer and form."""
    rows = []
    for (backbone, layer, form), own in end.groupby(["backbone", "layer", "setting"], sort=False):
        means = own.groupby("measure").value.mean()
        cosine = mean_interval(own[own.measure == "cosine"].value)
        row = {"backbone": backbone_name(str(backbone)), "layer": layer, "form": figures.FORMS[str(form)][0]}
        rows.append(row | {"cosine": str(cosine), "error": means.get("relative_error"), **_of_weights(means)})
    return pd.DataFrame(rows)


def _of_weights(means: pd.Series) -> dict[str, float]:
    names = {"weight_cosine": "cosine, weights", "weight_relative_error": "error, weights"}
    return {name: float(means[measure]) for measure, name in names.items() if measure in means}


def _table_caption(end: pd.DataFrame) -> str:
    return (
        "Forms of GCP's backward pass against the exact one after training: cosine and relative error of dL/dX and of the "
        f"gradient of the convolution below (means over {end.seed.nunique()} seeds)."
    )


def _caption(table: pd.DataFrame, claims: list[Claim]) -> str:
    holds = [claim for claim in claims if claim.verdict == SUPPORTED]
    return (
        "Forms of the backward pass of GCP against the exact one (cosine 1, error 0), for the same dL/dZ of a fitted GCP head "
        f"at each layer; {table.seed.nunique()} seeds: lines are means, bands from the smallest to the largest. Solid: backbone "
        "trained under GCP; dashed: under GAP; both start from the untrained one. The error is not scaled: without a "
        f"preconditioner it depends on the scale of the features. {len(holds)} of {len(claims)} claims hold"
        + (f": {'; '.join(claim.quantity for claim in holds)}." if holds else ".")
    )


def _remark(end: pd.DataFrame) -> str:
    """The cosines in one sentence."""
    means = end[end.measure == "cosine"].groupby("setting").value.mean()
    named = [f"{means[form]:.2f} ({name})" for form, (name, _) in figures.FORMS.items() if form in means]
    return (
        "The published approximation: mean cosine to the exact backward pass after training is "
        + ", ".join(named)
        + "."
    )
