"""Part C in the report: do the gradients under a GCP head point where K-FAC turns those under a GAP head?"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd

from studies.preconditioning.directions import figures
from studies.preconditioning.directions.figures import HEADS
from studies.preconditioning.directions.measure import NATURAL, NATURAL_DAMPING, WHOLE
from studies.preconditioning.directions.reading import GAIN, PLAIN, Readings, Setting
from studies.preconditioning.part import Part
from studies.preconditioning.reading import backbone_name
from studies.report.section import Claim, Picture, Table
from studies.statistics import NOT_SUPPORTED, SUPPORTED, UNDECIDED

GROUP = "C: two heads on one backbone"
STATEMENTS = {
    GAIN: "K-FAC turns the GAP head's gradient towards the GCP head's: cos(g GCP, P g GAP) − cos(g GCP, g GAP) is above 0.",
    "partial": "What K-FAC adds to the GAP head's gradient is in the GCP head's: the partial correlation given g GAP is above 0.",
}
CONTROL = (
    "The GCP head's gradient has more of what K-FAC adds than that of the control “{}”: the difference is above 0."
)
MEANINGS = {
    GAIN: {
        SUPPORTED: "The GCP gradient is nearer to K-FAC's direction than to the plain one, as “GCP acts like K-FAC” predicts.",
        NOT_SUPPORTED: "K-FAC turns the gradient away from GCP's: here GCP's direction is not that of a second-order method.",
        UNDECIDED: "Whether K-FAC turns the gradient towards GCP's is open.",
    },
    "partial": {
        SUPPORTED: "Beyond the plain gradient GCP shares something with K-FAC; whether that is special to GCP, the controls say.",
        NOT_SUPPORTED: "Beyond the plain gradient GCP goes against what K-FAC adds.",
        UNDECIDED: "Whether GCP shares anything with K-FAC beyond the plain gradient is open.",
    },
}
CONTROL_MEANINGS = {
    "covariance": {
        SUPPORTED: "The square root brings the gradient nearer to K-FAC's than pooling the covariance alone does.",
        NOT_SUPPORTED: "The covariance without its root has more of it: the root is not what resembles K-FAC.",
        UNDECIDED: "Whether the root, and not the covariance alone, brings GCP nearer to K-FAC is open.",
    },
    "random": {
        SUPPORTED: "The likeness to K-FAC takes a fitted classifier: it is not in the pooling alone.",
        NOT_SUPPORTED: "A GCP head with random weights has more of it: the likeness has nothing to do with the task.",
        UNDECIDED: "Whether the likeness to K-FAC takes a fitted classifier is open.",
    },
    "permuted": {
        SUPPORTED: "The likeness to K-FAC takes the true labels: it is not in features and head alone.",
        NOT_SUPPORTED: "With permuted labels there is more of it: the likeness has nothing to do with the task.",
        UNDECIDED: "Whether the likeness to K-FAC takes the true labels is open.",
    },
}
NO_LIKENESS = (
    "GCP has more of it than the control, but none itself: its own partial correlation is not above 0, no likeness."
)
"""Of a difference to a control that is above 0 when GCP's own value is not."""


def part(table: pd.DataFrame) -> Part:
    """Claims, figures and table of part C; only a remark when nothing was measured."""
    if table.empty or not (table.measure == "preconditioned").any():
        return Part([], remarks=["Two heads: no backbone had a gradient to compare, so nothing was measured."])
    found = Readings(table)
    claims = [claim for backbone in found.backbones for claim in backbone_claims(found, backbone)]
    return Part(
        claims,
        remarks=remarks(found, claims),
        pictures=[
            Picture("preconditioning_directions", layer_caption(found), figures.by_layer(found)),
            Picture("preconditioning_directions_damping", sweep_caption(found), figures.sweep(found)),
        ],
        tables=[Table("preconditioning_directions", table_caption(found), summary(found))],
    )


# --------------------------------------------------------------------------------------------------------------- claims


def backbone_claims(found: Readings, backbone: str) -> list[Claim]:
    """At the default damping and at the best of the sweep; the first two also of mini-batches and with the exact P."""
    claims = []
    for measure in (GAIN, "partial"):
        settings: list[Setting] = [found.default, found.best(backbone, measure), *([NATURAL] if found.natural else [])]
        claims += [_claim(found, backbone, measure, setting) for setting in dict.fromkeys(settings)]
        claims.append(_claim(found, backbone, measure, found.default, batches=True))
    for control in found.controls:
        settings = [found.default, found.best(backbone, "partial", control)]
        claims += [_claim(found, backbone, "partial", setting, control) for setting in dict.fromkeys(settings)]
    return claims


def _claim(
    found: Readings, backbone: str, measure: str, setting: Setting, control: str = "", batches: bool = False
) -> Claim:
    quantity = "gain in cosine" if measure == GAIN else "partial correlation"
    against = f", GCP − {HEADS[control]}" if control else ""
    of = "single mini-batches" if batches else "the reference images"
    words = f"{quantity}{against}, gradient of {of}, mean over convolutions, {backbone_name(backbone)}"
    claim = Claim(
        CONTROL.format(HEADS[control]) if control else STATEMENTS[measure],
        f"{words}, {_setting_words(found, backbone, measure, setting, control)}",
        found.interval(backbone, measure, setting, control, batches),
        claimed="above",
        reference=0.0,
        group=GROUP,
        headline=backbone != "untrained" and setting in (found.default, NATURAL) and not batches,
    )
    meanings: Mapping[str, str] = CONTROL_MEANINGS[control] if control else MEANINGS[measure]
    nothing = control and found.interval(backbone, measure, setting).low <= 0
    meaning = NO_LIKENESS if nothing and claim.verdict == SUPPORTED else meanings[claim.verdict]
    return replace(claim, statement=_named(claim.statement, setting), meaning=_named(meaning, setting))


def _named(sentence: str, setting: Setting) -> str:
    """A sentence about K-FAC, about the natural gradient where that is the preconditioner."""
    if setting != NATURAL:
        return sentence
    sentence = sentence.replace("K-FAC", "the natural gradient")
    return sentence[0].upper() + sentence[1:]


def _setting_words(found: Readings, backbone: str, measure: str, setting: Setting, control: str) -> str:
    """Which preconditioner, and whether its damping was chosen after the fact, in favour of the claim."""
    if isinstance(setting, str):
        return f"exact natural gradient, damping {NATURAL_DAMPING:g}{_unsolved(found)}"
    if setting == found.default:
        best = setting == found.best(backbone, measure, control)
        return f"K-FAC's default damping {setting:g}" + (", also the best of the sweep" if best else "")
    return f"K-FAC's damping {setting:g}, the best of {len(found.dampings)}, which is generous to the claim"


# ---------------------------------------------------------------------------------------------------------------- words


def remarks(found: Readings, claims: list[Claim]) -> list[str]:
    """What the verdicts come to, and whether the natural gradient was solved."""
    words = []
    for backbone in found.backbones:
        own = [claim.verdict for claim in claims if f", {backbone_name(backbone)}, " in claim.quantity]
        counts = ", ".join(f"{own.count(word)} {word}" for word in (SUPPORTED, NOT_SUPPORTED, UNDECIDED))
        words.append(f"{backbone_name(backbone)}: {counts}")
    said = [f"“GCP acts like K-FAC” predicts every claim of part C. {'; '.join(words)}."]
    residuals, steps = (found.table[found.table.measure == name].value for name in ("cg_residual", "cg_iterations"))
    if len(residuals):
        said.append(
            f"Natural gradients of part C: {len(residuals)} systems (the exact Gauss-Newton matrix of the GAP network on the "
            f"reference images, all convolutions together){_unsolved(found) or ', all solved'}; largest relative residual of "
            f"conjugate gradients {residuals.max():.2g}, at most {steps.max():.0f} steps."
        )
    return said


def _unsolved(found: Readings) -> str:
    """How many systems of the natural gradient conjugate gradients left unsolved, in words; empty when there is none."""
    converged = found.table[found.table.measure == "cg_converged"].value
    left = int((converged == 0).sum())
    return f", {left} of {len(converged)} systems not solved to the tolerance" if left else ""


def layer_caption(found: Readings) -> str:
    """What the figure by layer shows, with its conclusion."""
    said = []
    for backbone in found.backbones:
        plain = found.average(backbone, "plain", "gcp", PLAIN)
        with_P = found.average(backbone, "preconditioned", "gcp", found.default)
        turn, partial = (found.average(backbone, m, h, found.default) for m, h in (("turn", "gap"), ("partial", "gcp")))
        others = [f"{HEADS[c]} {found.average(backbone, 'partial', c, found.default):.2f}" for c in found.controls]
        said.append(
            f"{backbone_name(backbone)}: {with_P:.2f} with P against {plain:.2f} without (P turns g GAP itself to {turn:.2f}), "
            f"partial correlation {partial:.2f}" + (f" ({'; '.join(others)})" if others else "")
        )
    return (
        "Gradients of the same weights under two heads, and K-FAC's direction P g GAP (factors of the GAP network), for every "
        "convolution: the cosines (top), and what the gradient under each head shares with P g GAP beyond g GAP (middle; bottom: "
        f"of single mini-batches). {_scope(found)} Means over convolutions at damping {found.default:g}. {'. '.join(said)}."
    )


def sweep_caption(found: Readings) -> str:
    """What the damping sweep shows, with its conclusion."""
    said = []
    for backbone in found.backbones:
        best = found.best(backbone, GAIN)
        estimate = found.interval(backbone, GAIN, best).estimate
        side = "nearer to" if estimate > 0 else "no nearer to"
        said.append(f"{backbone_name(backbone)}: at best {estimate:+.3f}, {side} GCP's gradient (damping {best:g})")
    return (
        "Above: how much nearer K-FAC brings the GAP head's gradient to that under each head; below: the partial correlation. "
        f"Means over convolutions. {_scope(found)} Dotted: the optimiser's default damping. Diamonds: the exact natural "
        f"gradient; dash-dotted: means over single mini-batches. {'; '.join(said)}. "
        f"With much damping P is a multiple of the identity, and the gain is 0 by construction.{_opposed(found)}"
    )


def _opposed(found: Readings) -> str:
    """Which heads gain by any rotation."""
    means = {c: np.mean([found.average(b, "plain", c, PLAIN) for b in found.backbones]) for c in found.controls}
    opposed = [f"{HEADS[control]} ({mean:.2f})" for control, mean in means.items() if mean < 0]
    return f" A gradient at a negative cosine to g GAP gains by any rotation: {', '.join(opposed)}." if opposed else ""


def _scope(found: Readings) -> str:
    batches, seeds = found.table[found.table.batch != WHOLE].batch.nunique(), found.table.seed.nunique()
    return (
        f"Gradients of the reference images, n = {seeds} seeds, and of {batches} mini-batches each; bands: 95 % bootstrap "
        "intervals over seeds, or over the mini-batches of all seeds."
    )


def summary(found: Readings) -> pd.DataFrame:
    """Means over convolutions and seeds."""
    settings: list[Setting] = [*found.dampings, *([NATURAL] if found.natural else [])]
    rows = []
    for backbone, setting in product(found.backbones, settings):
        rows.append({
            "backbone": backbone_name(backbone),
            "damping": setting,
            "cos(g GCP, g GAP)": found.average(backbone, "plain", "gcp", PLAIN),
            "cos(g GCP, P g GAP)": found.average(backbone, "preconditioned", "gcp", setting),
            "cos(g GAP, P g GAP)": found.average(backbone, "turn", "gap", setting),
            **{
                f"partial, {HEADS[h]}": found.average(backbone, "partial", h, setting) for h in ("gcp", *found.controls)
            },
            "partial, GCP, mini-batches": found.average(backbone, "partial", "gcp", setting, batches=True),
        })  # fmt: skip
    return pd.DataFrame(rows)


def table_caption(found: Readings) -> str:
    """What is in the summary."""
    return (
        "Part C: gradients of the reference images under two heads, means over convolutions and "
        f"{found.table.seed.nunique()} seeds; “partial” is the partial correlation with P g GAP given g GAP. Empty: not measured."
    )
