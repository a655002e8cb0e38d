"""What a reader is shown of transfer: the claim about detectors with their curves and pictures, and the probes."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from studies.draw import Curves, Forest, Scatter, case_rows, gallery
from studies.draw.numbers import estimate_words
from studies.draw.palette import LABELS, label
from studies.engine.study import Results
from studies.judge import CONTRADICTED, SUPPORTED, Judged
from studies.page import Fold, Picture, Table
from studies.statistics import mean_interval
from studies.training import trained_so
from studies.transfer import claims
from studies.transfer.claims import BOX, MASK, PROBES, RANDOM
from studies.transfer.detectors import FROZEN, PICTURE
from studies.transfer.targets import scenes_of

ARMS = {BOX: "boxes", MASK: "masks", f"{BOX}{FROZEN}": "boxes, frozen", f"{MASK}{FROZEN}": "masks, frozen"}
"""Quantity of a detector -> words."""
PUBLISHED = pd.DataFrame(
    [
        ("Faster R-CNN, ResNet-50", "boxes", 36.4, 36.6, 37.1),
        ("Faster R-CNN, ResNet-101", "boxes", 38.7, 39.5, 39.6),
        ("Mask R-CNN, ResNet-50", "boxes", 37.2, 37.3, 37.9),
        ("Mask R-CNN, ResNet-101", "boxes", 39.4, 40.3, 40.7),
        ("Mask R-CNN, ResNet-50", "masks", 34.1, 34.2, 34.7),
        ("Mask R-CNN, ResNet-101", "masks", 35.9, 36.5, 36.7),
    ],
    columns=["detector", "AP of", "GAP", "GCP_D", "GCP_M"],
)


def folds(results: Results) -> Sequence[Fold]:
    """The claim, and what probes of frozen features find."""
    return [_detectors(results), *_probes(results)]


def by_pretraining(records: pd.DataFrame) -> pd.DataFrame:
    """The records with the pretraining in place of the head, "random" for none, in the order of the palette."""
    table = records.assign(head=records.trained_under.where(records.trained_under != "", RANDOM))
    order = {name: place for place, name in enumerate(LABELS)}
    return table.sort_values("head", key=lambda heads: heads.map(order), kind="stable")


def short_label(head: str) -> str:
    """The name of a head without what stands in brackets."""
    return label(head).partition(" (")[0]


def _detectors(results: Results) -> Fold:
    """Claim 9."""
    judged, records = results.of("transfers"), by_pretraining(results.records)
    measured = records[records.quantity.isin(ARMS)]
    return Fold(
        judged=judged,
        sentences=_words(results) if len(measured) else [],
        pictures=[*_curves(measured, judged), *_gallery(records)],
        controls=results.of(*(claim.name for claim in claims.CONTROLS)),
        exploratory=[case for case in results.of(*(c.name for c in claims.DETECTION)) if case.estimate is not None],
        tables=[
            *([Table("transfer_detectors", AP_CAPTION, _table(records))] if len(measured) else []),
            Table("transfer_published", "Published by Wang et al. (2020): AP on COCO, in percent.", PUBLISHED),
        ],
        method=_method(results),
        provenance=results.provenance,
    )


AP_CAPTION = (
    "Average precision in percent, means over seeds with 95 % intervals, by budget in epochs; AP: over IoU thresholds from 0.5 "
    "to 0.95, AP50 and AP75 at one. Thirds: AP of a third of the objects each, by their area."
)


def _words(results: Results) -> list[str]:
    """Mean precisions by pretraining, and whether better classification explains their difference."""
    means = 100 * claims.score(results.records, BOX).groupby("trained_under").value.mean()
    heads = [head for head in ("gap", "gcp", "") if head in means]
    told = ", ".join(f"{means[head]:.1f} ({short_label(head or RANDOM)})" for head in heads)
    words = [f"Box AP of fine-tuned detectors in percent, mean over data sets and budgets: {told}."]
    gains = [
        f"{short_label(head)} {estimate_words(*case.estimate.seen)}"
        for head in ("gap", "gcp")
        for case in results.of(f"{BOX}: {head} - {RANDOM}")
        if case.estimate is not None
    ]
    if gains:
        words.append(f"What pretraining adds to initial weights, as a fraction: {', '.join(gains)}.")
    main, matched = (results.of(name) for name in ("transfers", claims.CONTROLS[0].name))
    for claim, control in zip(main, matched, strict=True):
        if claim.outcome in (SUPPORTED, CONTRADICTED) and control.estimate is not None:
            _, low, high = control.estimate.seen
            words.append(_explained(low, high) if claim.outcome == SUPPORTED else _explained(-high, -low))
    return words


def _explained(low: float, high: float) -> str:
    """Whether better classification explains an effect, by what of it, counted in its direction, is left at matched accuracy."""
    if low > 0:
        return (
            "Better classification alone does not explain it: a difference of the same sign is left at matched accuracy of the "
            "pretraining."
        )
    if high < 0:
        return (
            "Better classification explains it, and more: at matched accuracy of the pretraining the difference has the other "
            "sign."
        )
    return (
        "It cannot be told apart from an effect of classification accuracy: at matched accuracy of the pretraining the interval "
        "of the difference has zero in it."
    )


def _curves(measured: pd.DataFrame, judged: Sequence[Judged]) -> list[Picture]:
    """Precision over the budget, a panel for each data set and arm."""
    if measured.empty:
        return []
    panels = measured.layer.map(label) + ", " + measured.quantity.map(ARMS)
    order = {arm: place for place, arm in enumerate(ARMS)}
    table = measured.assign(panel=panels, value=100 * measured.value)
    table = table.sort_values(
        ["layer", "quantity"], key=lambda c: c.map(order) if c.name == "quantity" else c, kind="stable"
    )
    drawn = Curves("setting", "value", panels="panel", x_label="budget, epochs", y_label="AP, %").draw(table)
    words = f"{judged[0].sentence} Average precision on test images by budget, each a training of its own."
    return [Picture("transfer_budgets", words, drawn)]


def _gallery(records: pd.DataFrame) -> list[Picture]:
    """The worst and the best test image of the first seed; none without detectors."""
    shown = records[records.quantity.str.startswith(PICTURE)]
    if shown.empty:
        return []
    pictures = {}
    for row in shown.sort_values(["quantity", "index"], kind="stable").to_dict("records"):
        data, rank = row["quantity"].partition(", ")[2], "best" if row["index"] else "worst"
        pictures[f"{short_label(row['head'])}, {label(data)}, {rank}: AP {100 * row['value']:.0f} %"] = decoded(
            row["layer"]
        )
    words = "Truth at the left, detections of a score above 0.5 at the right: worst and best test image of the largest budget."
    return [Picture("transfer_pictures", words, gallery(pictures))]


def decoded(uri: str) -> NDArray[np.uint8]:
    """The picture [H, W, 3] of a data URI."""
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _table(records: pd.DataFrame) -> pd.DataFrame:
    """Precisions by data set and pretraining: AP of every budget, the others of the largest."""
    part = records[records.quantity.str.match("(box|mask) AP")]
    largest = part.setting == part.groupby(["layer", "quantity"]).setting.transform("max")
    part = part[largest | part.quantity.isin(ARMS)].sort_values(["layer", "quantity", "setting"], kind="stable")
    return _by_head(part, ["layer", "quantity", "setting"], {"layer": "data", "setting": "epochs"})


def _probes(results: Results) -> list[Fold]:
    """Linear and dense probes; none where none were fitted."""
    records = by_pretraining(results.records)
    probed = records[records.quantity.isin(PROBES)]
    if probed.empty:
        return []
    cases = [case for case in results.of(*(c.name for c in claims.PROBED)) if case.estimate is not None]
    return [
        Fold(
            title="Probes of frozen features",
            sentences=_probe_words(results),
            pictures=[*_forest(cases), *_accuracy(results)],
            exploratory=[case for case in results.of(*(c.name for c in claims.MATCHED)) if case.estimate is not None],
            tables=[Table("transfer_probes", PROBE_CAPTION, _probe_table(probed))],
            method=[
                "Features are the last stage's maps, batch-norm statistics renewed on the new images, all else frozen. Linear "
                "probe: logistic regression on standardised means over positions, or on these and signed roots of covariances; "
                "mean over draws of the samples. Dense probe: two convolutions that tell objects from background, by the "
                "intersection over union of foreground pixels. Scores are compared on a logit scale, intervals are over seeds."
            ],
            provenance=results.provenance,
        )
    ]


PROBE_CAPTION = (
    "Accuracy of linear probes by samples of a class, and foreground IoU of dense probes by images, in percent."
)


def _probe_words(results: Results) -> list[str]:
    """The means over seeds, data sets and settings under GAP, GCP and none, of each kind of probe."""
    words = []
    for quantity in PROBES:
        means = 100 * claims.score(results.records, quantity).groupby("trained_under").value.mean()
        heads = [head for head in ("gap", "gcp", "") if head in means]
        if heads:
            told = ", ".join(f"{means[head]:.1f} % ({short_label(head or RANDOM)})" for head in heads)
            words.append(f"{quantity[0].upper()}{quantity[1:]}, mean over data and samples: {told}.")
    return words


def _forest(cases: Sequence[Judged]) -> list[Picture]:
    """Differences of probes between pretrainings."""
    rows = []
    for case in cases:
        quantity, _, pair = case.claim.name.partition(": ")
        words = " − ".join(short_label(word) for word in pair.split(" - "))
        rows += [one | {"quantity": quantity, "pair": words} for one in case_rows(case)]
    if not rows:
        return []
    drawn = Forest("pair", groups="quantity", x_label="difference of the score, a fraction", labels=0.3).draw(
        pd.DataFrame(rows)
    )
    words = "Differences of probe scores between pretrainings, means over data sets and samples; right of 0: the first is better."
    return [Picture("transfer_probes", words, drawn)]


def _accuracy(results: Results) -> list[Picture]:
    """Scores against the accuracy of the pretraining, a point for each network."""
    parts = [claims.with_accuracy(results.records, quantity).assign(quantity=quantity) for quantity in (*PROBES, BOX)]
    parts = [part for part in parts if part.accuracy.nunique() > 2 and part.value.nunique() > 2]
    if not parts:
        return []
    told = [f"{part.quantity.iloc[0]} {spearmanr(part.accuracy, part.value).statistic:.2f}" for part in parts]
    table = pd.concat(parts)
    shown = by_pretraining(table.assign(value=100 * table.value.astype(float), accuracy=100 * table.accuracy))
    labels = ("top-1 of the pretraining, %", "score, %")
    draw = Scatter("accuracy", "value", panels="quantity", x_label=labels[0], y_label=labels[1], own_y=True)
    words = (
        f"Rank correlation of a score with the accuracy of the pretraining, heads and seeds mixed: {', '.join(told)}."
    )
    return [Picture("transfer_accuracy", f"{words} A point is one network.", draw.draw(shown))]


def _probe_table(probed: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with intervals, by quantity, data set and setting; a column for each pretraining."""
    return _by_head(probed, ["quantity", "layer", "setting"], {"layer": "data", "setting": "samples"})


def _by_head(table: pd.DataFrame, keys: list[str], names: dict[str, str]) -> pd.DataFrame:
    """In percent, a row for each combination of the keys, a column for each pretraining."""
    percent = table.assign(value=100 * table.value, head=table["head"].map(label), layer=table.layer.map(label))
    seeds = percent.groupby([*keys, "head"], sort=False).value
    found = seeds.agg(lambda values: mean_interval(values, (0.0, 100.0)).short).unstack("head", sort=False)
    return found.reset_index().rename(columns=names).rename_axis(columns=None)


def _method(results: Results) -> list[str]:
    settings = results.origins.settings
    model = settings["detector"]
    words = [
        f"Pretraining: {trained_so(results.origins)}. Initial weights (random) are those that all heads began from."
    ]
    if settings["detection"]:
        adapted = (
            "" if model["adaptation"] == "none" else f" Adaptation of a last stage of stride 1: {model['adaptation']}."
        )
        crops = [
            f"{scenes_of(name).crop} pixels ({label(name)})" for name in settings["detection"] if scenes_of(name).crop
        ]
        windows = f", random crops of {', '.join(crops)}" if crops else ""
        words.append(
            f"Detectors: torchvision's Faster R-CNN, with masks Mask R-CNN, on a feature pyramid; {model['images']} training "
            f"images that the seed draws and {model['test_images']} test images (all where there are fewer), SGD, batch "
            f"{model['batch_size']}, learning rate {model['learning_rate']:g} with warm-up and cosine decay, random "
            f"flips{windows}. The value of the claim is the mean over data sets and budgets, the same for every network. "
            f"Settings were chosen in trials of other networks that were tested on the same images.{adapted}"
        )
    return words
