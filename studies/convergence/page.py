"""What the page shows of the convergence study."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from studies.convergence import claims
from studies.convergence.claims import WORDS, by_epoch, kinds, matching
from studies.convergence.costs import FLOPS, PARAMETERS, PEAK
from studies.draw import LABELS, Curves
from studies.engine.study import Results
from studies.page import Fold, Picture, Table
from studies.training import trained_so

AT_STRIDE = "gap_at_stride_of_gcp"
CELL = ["network", "head", "optimizer", "schedule"]
PUBLISHED = pd.DataFrame(
    [
        ("MobileNetV2", 71.58, 400, 73.97, 150, 68),
        ("ShuffleNetV2", 67.96, 240, 71.17, 100, 78),
        ("ResNet-18", 70.47, 100, 74.86, 50, 32),
        ("ResNet-34", 74.19, 100, 76.81, 50, 38),
        ("ResNet-50", 76.17, 100, 78.03, 50, 40),
        ("ResNet-101", 77.67, 100, 79.18, 50, 41),
    ],
    columns=["network", "GAP, LRnorm: top-1 [%]", "epochs of it", "GCP, LRadju: top-1 [%]", "epochs", "matching epoch"],
)
PUBLISHED_CAPTION = "Published by Wang et al. (2020), on ImageNet; not measured here."


def folds(results: Results) -> Sequence[Fold]:
    """The claim with its curves and tables."""
    records, judged = results.records, results.of("converges under rapid decay")
    table = summary(records)
    controls, exploratory = (
        [case for claim in asked for case in results.of(claim.name) if case.estimate and not case.estimate.censored]
        for asked in (claims.CONTROLS, claims.EXPLORATORY)
    )  # of a censored epoch there is only a bound; the table says how often
    return [
        Fold(
            judged=judged,
            sentences=[_sooner(matching(records))],
            pictures=[*_curves(records), *_kfac(records)],
            controls=controls,
            exploratory=exploratory,
            tables=[
                Table("convergence_accuracy", CAPTION, table),
                Table("convergence_costs", COSTS_CAPTION, costs(records)),
                Table("convergence_published", PUBLISHED_CAPTION, PUBLISHED),
            ],
            method=_method(results),
            provenance=results.provenance,
        )
    ]


def _sooner(epochs: pd.DataFrame) -> str:
    """When GCP reaches what GAP ends at, under each schedule."""
    part = epochs[(epochs["head"] == "gcp") & (epochs.optimizer == "sgd")]
    words = [
        f"under {WORDS[kind]} in {(~own.censored).sum()} of {len(own)}"
        for kind in WORDS
        if len(own := part[part.schedule == kind])
    ]
    return f"GCP reaches the final accuracy of GAP under LRnorm, of the same seed, {', '.join(words)} trainings."


CAPTION = (
    "Test accuracy after the last epoch, mean and standard deviation over seeds, and of the best epoch of each seed. Matching "
    "epoch: the first after which a network is as accurate as GAP after the last epoch of LRnorm, and the seconds of training "
    "steps until then; medians over seeds, of which some never get there. Trainings ran side by side: compare seconds roughly."
)
COSTS_CAPTION = (
    "Operations of a forward pass of one image (convolutions, products of matrices; 2 for a multiplication with addition), and "
    "what torch's allocator holds at the peak of a training step."
)


def ordered(epochs: pd.DataFrame) -> pd.DataFrame:
    """`by_epoch` by network, optimiser, schedule and head; GAP with the stride of GCP is a head of its own."""
    rank = {word: place for place, word in enumerate([*LABELS, *WORDS])}
    table = epochs.assign(head=epochs["head"].where(epochs.layer == "", AT_STRIDE)).sort_values(["seed", "epoch"])
    table = table.sort_values(["optimizer", "schedule", "head"], key=lambda words: words.map(rank), kind="stable")
    return table.sort_values("network", kind="stable", ignore_index=True)


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each network, head, optimiser and schedule."""
    epochs = ordered(by_epoch(records))
    match = ordered(matching(records))
    rows: list[dict[str, Any]] = []
    for cell, part in epochs.groupby(CELL, sort=False):
        runs = part.groupby("seed")[["test_top1", "test_top5"]]
        last, best = 100 * runs.last(), 100 * runs.max()
        found = match[(match[CELL] == [*cell]).all(axis=1)]
        network, head, optimizer, kind = map(str, cell)
        rows.append({
            "network": LABELS.get(network, network),
            "head": LABELS.get(head, head),
            "optimiser": LABELS.get(optimizer, optimizer),
            "schedule": WORDS.get(kind, kind),
            "epochs": int(part.epoch.max()),
            "seeds": len(last),
            "top-1 [%]": last.test_top1.mean(),
            "± seeds": last.test_top1.std(),
            "best top-1": best.test_top1.mean(),
            "top-5 [%]": last.test_top5.mean(),
            "best top-5": best.test_top5.mean(),
            "matching epoch": _median(found.value, found.censored),
            "seconds to it": _median(found.seconds, found.censored),
            "never": f"{found.censored.sum()} of {len(found)}",
        })  # fmt: skip
    return pd.DataFrame(rows).round(4)


def _median(values: "pd.Series[float]", censored: "pd.Series[bool]") -> str:
    """The median of values of which the censored ones are larger than any; "never" where it is one of these."""
    middle = float(np.median(values.where(~censored, math.inf))) if len(values) else math.nan
    return "never" if math.isinf(middle) else "" if math.isnan(middle) else f"{middle:.3g}"


def costs(records: pd.DataFrame) -> pd.DataFrame:
    """Parameters, operations and memory of each network, head and optimiser."""
    part = ordered(kinds(records[records.quantity.isin((PARAMETERS, FLOPS, PEAK))].rename(columns={"index": "epoch"})))
    part = part.replace({"head": LABELS, "optimizer": LABELS}).rename(columns={"optimizer": "optimiser"})
    table = part.pivot_table(index=["network", "head", "optimiser"], columns="quantity", values="value", sort=False)
    table = table[[PARAMETERS, FLOPS, PEAK]].reset_index().rename_axis(columns=None)
    return (
        table.astype({PARAMETERS: int}).assign(**{FLOPS: table[FLOPS] / 1e6}).rename(columns={FLOPS: f"{FLOPS} [10⁶]"})
    )


def _curves(records: pd.DataFrame) -> list[Picture]:
    """For each network the test accuracy by epoch under SGD, a panel for each schedule."""
    epochs = ordered(by_epoch(records))
    pictures = []
    for network, part in epochs[epochs.optimizer == "sgd"].groupby("network", sort=False):
        ends = part.groupby(["head", "schedule", "seed"]).test_top1.last().groupby(["head", "schedule"]).mean()
        found = ", ".join(
            f"{LABELS[head]} {WORDS[kind]} {100 * ends[head, kind]:.1f} %"
            for kind in ("norm", "fast")
            for head in ("gap", "gcp")
            if (head, kind) in ends
        )
        words = f"{LABELS.get(str(network), network)}, top-1 after the last epoch: {found}. Line: that of GAP, LRnorm."
        level = ends.get(("gap", "norm"))
        drawing = Curves("epoch", "test_top1", panels="schedule", y_label="test top-1", reference=level)
        picture = drawing.draw(part.replace({"schedule": WORDS}))
        pictures.append(Picture(f"convergence_{network}", words, picture))
    return pictures


def _kfac(records: pd.DataFrame) -> list[Picture]:
    """The test accuracy by epoch of K-FAC and of SGD, for the seeds of K-FAC; nothing without K-FAC."""
    epochs = ordered(by_epoch(records))
    kfac = epochs[epochs.optimizer != "sgd"]
    if kfac.empty:
        return []
    runs = kfac[["network", "head", "schedule", "seed"]].drop_duplicates()
    part = epochs.merge(runs)
    last = part.groupby(["optimizer", "head", "schedule", "seed"]).test_top1.last()
    ends = last.groupby(["head", "schedule", "optimizer"]).mean().unstack()
    gain = (ends.drop(columns="sgd").iloc[:, 0] - ends["sgd"]).sort_values()
    low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in (gain.iloc[0], gain.iloc[-1]))
    words = f"K-FAC at its untuned default rate ends {low} to {high} points from SGD of the same head and schedule."
    panels = part["head"].map(LABELS) + ", " + part.schedule.map(WORDS)
    drawing = Curves("epoch", "test_top1", "optimizer", "panel", y_label="test top-1")
    picture = drawing.draw(part.assign(panel=panels).sort_values("head", kind="stable"))
    return [Picture("convergence_kfac", words, picture)]


def _method(results: Results) -> list[str]:
    settings = results.origins.settings
    training, few, records = settings["training"], settings["network_limit"], results.records
    norm = records[(records.network == training["network"]) & records.schedule.str.endswith("_norm")].schedule.iloc[0]
    origins = replace(results.origins, settings=settings | {"training": training | {"schedule": norm}})
    lengths = summary(records).drop_duplicates(["network", "schedule"]).groupby("network", sort=False)
    epochs = "; ".join(
        f"{network}: {', '.join(f'{row.schedule} {row.epochs}' for row in part.itertuples())}"
        for network, part in lengths
    )
    images = f", {training['train_limit']:,} training images" if training["train_limit"] else ""
    further = (
        f" Other networks{f' ({few:,} images)' if few else ''}: learning rate (in proportion to a smaller batch) and "
        "weight decay as published for their family."
    )
    return [
        f"{trained_so(origins)}{images}; three schedules of the network's family, stretched to epochs in published "
        f"proportion ({epochs}). For each seed all heads start from the same weights below them and see the same batches."
        f"{further * bool(settings['networks'])}",
        "The claim compares the last epochs. The best epoch is chosen on the test images, so its accuracy is optimistic, for "
        "every network alike; so is the matching epoch, the first of several tries.",
        "Strides are the same under all heads, but for torchvision's ResNets, whose published GCP network keeps stride 1 in its "
        "last stage and GAP network does not: GAP with the stride of GCP is then among the controls.",
        f"K-FAC ({settings['kfac']}) has its default learning rate, untuned, the same schedules, and decoupled weight decay.",
    ]
