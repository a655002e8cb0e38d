"""Part A in the report: head conditioning."""

from collections.abc import Mapping

import pandas as pd

from studies.preconditioning.heads import figures
from studies.preconditioning.heads.measure import PROBED
from studies.preconditioning.heads.reading import OTHERS, PUBLISHED, geometric_mean, head_name, per_seed, prepared
from studies.preconditioning.part import Part
from studies.preconditioning.reading import at_the_end, backbone_name
from studies.report.section import Claim, Picture, Table
from studies.statistics import (
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Interval,
    geometric_interval,
    mean_interval,
)

GROUP = "A: head conditioning"
ROOT2 = 2**0.5
ROUNDING = 1e-6
"""How far above sqrt(2) a condition number may be by rounding."""
AGREED = 1e-8
"""Relative difference of singular values that counts as none."""
NEAR = 2.0
"""Twice as wide as an isometry: how near the published steps are said to come to the root."""


def part(table: pd.DataFrame) -> Part:
    """Claims, figure and table of part A; only a remark when nothing was measured."""
    if table.empty:
        return Part(
            [], remarks=["Head conditioning: no image had features with a covariance, so nothing was measured."]
        )
    table = prepared(table)
    end = at_the_end(table)
    claims = [_theorem(table), _agreement(table), *_published(end), _others(end), _gain(end)]
    return Part(
        [claim for claim in claims if claim is not None],
        remarks=[_remark(end)],
        pictures=[Picture("preconditioning", _caption(table, end), figures.conditioning(table))],
        tables=[Table("preconditioning_heads", _table_caption(end), summary(end))],
    )


def _claim(
    statement: str,
    quantity: str,
    interval: Interval,
    claimed: str,
    reference: float,
    meanings: Mapping[str, str],
    headline: bool = False,
) -> Claim:
    """The claim with the sentence that belongs to its verdict."""
    return Claim(statement, quantity, interval, claimed, reference, GROUP, headline=headline).meant(meanings)


def _theorem(table: pd.DataFrame) -> Claim:
    worst = per_seed(table.assign(backbone="all"), "exact root", "condition_max", "max")["all"]
    return _claim(
        f"The head with the exact root is conditioned within √2 for every image (below √2 + {ROUNDING:g} for rounding).",
        "largest condition number of the head's Jacobian over images, moments and backbones, exact root",
        mean_interval(worst),
        "below",
        ROOT2 + ROUNDING,
        {
            SUPPORTED: "In feature space the exact root is a near-isometry whatever the features: the sense in which GCP "
            "preconditions, confirmed on real features.",
            NOT_SUPPORTED: "On real features the bound of the theory is broken: theory or code is wrong.",
            UNDECIDED: "The bound of the theory is neither confirmed nor broken by so few seeds.",
        },
        headline=True,
    )


def _agreement(table: pd.DataFrame) -> Claim:
    worst = per_seed(table.assign(backbone="all", name="all"), "all", "jacobian_error", "max")["all"]
    return _claim(
        f"The closed form of the head's singular values is the Jacobian's (relative difference below {AGREED:g}).",
        "largest difference of a singular value, closed form - autograd, over all heads, relative to the largest of them",
        mean_interval(worst),
        "below",
        AGREED,
        {
            SUPPORTED: "The conditioning of the heads is known in closed form, Newton-Schulz and its trace included.",
            NOT_SUPPORTED: "The closed form is not what the head computes: the numbers of this part are in doubt.",
            UNDECIDED: "Too few seeds to say that the closed form is what the head computes.",
        },
    )


def _published(end: pd.DataFrame) -> list[Claim]:
    """The published number of steps on each backbone; none when it was not measured."""
    values = per_seed(end, head_name("gcp", PUBLISHED), "condition_median")
    claims = []
    for backbone in values.columns:
        here = backbone_name(str(backbone))
        claims.append(
            _claim(
                f"The published {PUBLISHED} Newton-Schulz steps come near the root: condition below {NEAR:g}, {here}.",
                f"median condition number over images, {PUBLISHED} steps, backbone {here}; geometric mean over seeds",
                geometric_interval(values[backbone]),
                "below",
                NEAR,
                {
                    SUPPORTED: f"The published head is nearly as well conditioned as the exact root ({here}).",
                    NOT_SUPPORTED: f"The published head equilibrates only the larger eigenvalues ({here}): what holds for the "
                    "exact root holds for it in part.",
                    UNDECIDED: f"Whether {PUBLISHED} steps suffice is open ({here}).",
                },
                headline=backbone == "gcp",
            )
        )
    return claims


def _others(end: pd.DataFrame) -> Claim:
    root = per_seed(end, "exact root", "condition_median")
    ratios = pd.concat([(per_seed(end, name, "condition_median") / root).min(axis=1) for name in OTHERS], axis=1)
    least = ratios.min(axis=1).dropna()
    return _claim(
        "No other function conditions the head as well as the root: every ratio to it is above 1.",
        f"condition number / that of the exact root, medians over images; the smallest over {', '.join(OTHERS)} and backbones",
        geometric_interval(least),
        "above",
        1.0,
        {
            SUPPORTED: "It is the exponent 1/2, not normalisation as such, that takes the features' spectrum out of the head.",
            NOT_SUPPORTED: "Another function conditions the head at least as well: the root is not special on these features.",
            UNDECIDED: "Whether the root is special on these features is open.",
        },
        headline=True,
    )


def _gain(end: pd.DataFrame) -> Claim | None:
    """The published head against none; None when the published number of steps was not measured."""
    published = per_seed(end, head_name("gcp", PUBLISHED), "condition_median")
    if published.empty:
        return None
    worst = (published / per_seed(end, "covariance", "condition_median")).max(axis=1).dropna()
    return _claim(
        f"The published {PUBLISHED} steps condition the head better than no root: ratio below 1 on every backbone.",
        f"condition number, {PUBLISHED} steps / covariance without root, medians over images; the largest over backbones",
        geometric_interval(worst),
        "below",
        1.0,
        {
            SUPPORTED: "Even stopped early the iteration preconditions the head; how far depends on the features.",
            NOT_SUPPORTED: "Stopped early the iteration does not precondition the head on some backbone.",
            UNDECIDED: "Whether the iteration stopped early preconditions the head is open.",
        },
    )


def summary(end: pd.DataFrame) -> pd.DataFrame:
    """Median condition number of every head on every backbone, and its extreme singular values over all."""
    rows = []
    for name in end.name[end["head"] != "features"].unique():
        medians = per_seed(end, name, "condition_median")
        own = end[end.name == name].groupby("measure").value
        conditions = {f"condition, {backbone_name(str(b))}": geometric_mean(medians[b]) for b in medians.columns}
        extremes = {"worst condition": own.max()["condition_max"], "smallest σ √M": own.min()["smallest"]}
        rows.append({"head": name, **conditions, **extremes, "largest σ √M": own.max()["largest"]})
    return pd.DataFrame(rows)


def _table_caption(end: pd.DataFrame) -> str:
    return (
        "Condition number of the head's Jacobian after training (median over images, geometric mean over "
        f"{end.seed.nunique()} seeds), the largest of any image, and extreme singular values σ in units of 1/√M."
    )


def _caption(table: pd.DataFrame, end: pd.DataFrame) -> str:
    error = table[table.measure == "jacobian_error"].value.max()
    root = table[(table.name == "exact root") & (table.measure == "condition_max")].value.max()
    bound = "within" if root <= ROOT2 + ROUNDING else "beyond"
    return (
        f"Singular values of the pooling head's Jacobian on real features ({end.seed.nunique()} seeds; bands: quartiles over "
        "images, thin lines: seeds, thick lines: geometric means over seeds). Top: spectrum of the features after training, and "
        "condition number by Newton-Schulz steps. Bottom: condition number over training, and the closed form (lines) "
        "beside the Jacobian itself (circles; squares at the left: covariance, dotted, and exact root, dashed) for one image and "
        f"at most {PROBED} of its channels. "
        f"The two differ by at most {error:.1g} of the largest singular value. The exact root's largest condition number is "
        f"{root:.4f}, {bound} √2."
    )


def _remark(end: pd.DataFrame) -> str:
    """How far the formula without the trace is, and the condition of the features."""
    gaps = end[end.measure == "trace_gap"].groupby("setting").value.max()
    kappa = {backbone_name(str(b)): geometric_mean(v) for b, v in per_seed(end, "features", "kappa_median").items()}
    return (
        "Head conditioning: the condition number of the features' covariance is "
        + ", ".join(f"{value:.3g} ({name})" for name, value in kappa.items())
        + ". The formula that leaves the trace out of Newton-Schulz is off by up to "
        + ", ".join(f"{gap:.1g} ({head_name('gcp', float(str(steps)))})" for steps, gap in _few(gaps).items())
        + " in units of 1/√M; the closed form used here has it."
    )


def _few(gaps: pd.Series) -> pd.Series:
    """The first, the published and the last number of steps."""
    steps = [float(str(step)) for step in gaps.index]
    return gaps[[step in (min(steps), PUBLISHED, max(steps)) for step in steps]]
