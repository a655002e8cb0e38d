"""What a reader is shown of robustness: the claim by corruption and severity, perturbations, smoothness, pictures."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from scipy.stats import t as student
from sklearn.datasets import load_sample_image

from secondorder.robustness import CORRUPTIONS, SEQUENCES, corrupt, perturb
from studies.draw import Heatmap, Scatter, strips
from studies.draw.palette import label
from studies.engine.study import Results
from studies.landscape import DESCENT, FIRST_ORDER, late
from studies.page import Fold, Picture, Table
from studies.robustness import claims
from studies.robustness.claims import CONTROLS, KEYS, OTHERS, STABILITY
from studies.robustness.measures import CORRUPTED, FLIPS, TOP5
from studies.statistics import mean_interval
from studies.training import trained_so

PUBLISHED = {
    "ResNet-18": (84.7, 76.3, 103.9, 101.3, 72.8, 53.2, 87.0, 77.1),
    "ResNet-34": (77.9, 72.4, 98.7, 96.9, 61.7, 47.7, 79.5, 72.4),
    "ResNet-50": (76.7, 70.7, 105.0, 97.9, 58.0, 47.5, 78.3, 74.6),
    "ResNet-101": (70.3, 65.5, 93.7, 89.1, 52.6, 42.1, 73.9, 68.3),
    "MobileNetV2": (87.1, 81.7, 114.9, 110.6, 79.8, 64.3, 96.5, 87.6),
    "ShuffleNetV2": (92.7, 85.2, 126.7, 112.6, 94.7, 75.2, 108.2, 95.5),
}
"""Wang et al. (2020), ImageNet, in percent of AlexNet: mCE, relative mCE, mFP and mT5D, each under GAP and under GCP."""
MEASURES = ("mCE", "relative mCE", "mFP", "mT5D")
SIDE = 32
"""Pixels of the photograph that shows what corruptions do; the parameters are those of such images."""


def folds(results: Results) -> Sequence[Fold]:
    """The claim, the perturbations, and what smoothness has to do with it."""
    return [_corruptions(results), *_perturbations(results), *_smoothness(results)]


def _corruptions(results: Results) -> Fold:
    """Claim 8."""
    judged, records = results.of("robust to corruptions"), results.records
    errors = records[records.quantity == CORRUPTED].rename(columns={"layer": "corruption", "index": "severity"})
    keys = ["network", "seed", "corruption", "severity"]
    gcp, gap = (errors[errors["head"] == head].set_index(keys).value for head in ("gcp", "gap"))
    points = (100 * (gcp - gap)).dropna().reset_index()
    points = points.sort_values("corruption", key=lambda names: names.map([*CORRUPTIONS].index), kind="stable")
    left_out = [
        f"{label(network)}: {', '.join(sorted(missing))}"
        for network, part in records.groupby("network", sort=False)
        if (missing := {*claims.of_quantity(part, CORRUPTED).layer} - {*claims.counted(part)})
    ]
    return Fold(
        judged=judged,
        sentences=[
            f"Left out of relative errors, as GAP loses nothing by it: {'; '.join(left_out)}." if left_out else
            "GAP loses accuracy by every corruption: all enter relative errors." if len(claims.relative(records)) else
            "No relative errors: they need GAP and corruptions of the benchmark.",
            _table_words(records),
        ],
        pictures=[
            *_heat_map(points, judged[0].sentence),
            Picture(
                "robustness_pictures",
                f"What is done to an image of {SIDE} pixels: as it is, then severities 1 to 5; the last four are extra.",
                strips(_corrupted(), columns=2),
            ),
        ],
        controls=results.of(*(claim.name for claim in CONTROLS)),
        exploratory=results.of(*(claim.name for claim in OTHERS)),
        tables=[
            Table("robustness_heads", "Means over seeds with 95 % intervals, by head.", _by_head(records)),
            Table("robustness_published", "Published by Wang et al. (2020) on ImageNet, in percent of AlexNet.", _published()),
        ],
        method=[_method(results)],
        provenance=results.provenance,
    )  # fmt: skip


def _heat_map(points: pd.DataFrame, sentence: str) -> list[Picture]:
    """The differences of errors by corruption and severity; none where no seed has both heads."""
    if points.empty:
        return []
    seen = points.corruption.str.replace("_", " ")
    drawn = Heatmap(
        "corruption", "severity", "value", panels="network" if points.network.nunique() > 1 else None, best="", signed=True,
        value_label="error under GCP - under GAP, points",
    ).draw(points.assign(corruption=seen))  # fmt: skip
    words = "Mean difference of errors over seeds, half of its 95 % interval below; bold where that excludes 0."
    return [Picture("robustness_corruptions", f"{sentence} {words}", drawn)]


def _table_words(records: pd.DataFrame) -> str:
    """The clean error and the mean error on corrupted images under both heads, in words."""
    clean, corrupted = (
        table.groupby("head").value.mean() for table in (claims.clean_error(records), claims.mean(records, CORRUPTED))
    )
    told = ", ".join(
        f"{100 * clean[head]:.1f} % and {100 * corrupted[head]:.1f} % ({label(head)})"
        for head in ("gap", "gcp")
        if head in clean and head in corrupted
    )
    return f"Mean errors on clean and on corrupted images: {told or 'not measured'}."


def _by_head(records: pd.DataFrame) -> pd.DataFrame:
    """The measures of each network and head, of which only the relative error may be below 0."""
    ends = {"relative mCE": (-np.inf, np.inf), TOP5: (0.0, np.inf)}
    measures = {
        "clean error": claims.clean_error(records),
        "mean corrupted error": claims.mean(records, CORRUPTED),
        "relative mCE": claims.relative(records),
        FLIPS: claims.mean(records, FLIPS),
        TOP5: claims.mean(records, TOP5),
    }
    columns = {}
    for name, table in measures.items():
        if len(table):
            seeds = table.groupby(["network", "head"], sort=False).value
            columns[name] = seeds.agg(_short, within=ends.get(name, (0.0, 1.0)))
    table = pd.DataFrame(columns).reset_index()
    return table.assign(network=table.network.map(label), head=table["head"].map(label))


def _short(values: pd.Series, within: tuple[float, float]) -> str:
    return mean_interval(values, within).short


def _published() -> pd.DataFrame:
    columns = [f"{measure}, {head}" for measure in MEASURES for head in ("GAP", "GCP")]
    return pd.DataFrame.from_dict(PUBLISHED, orient="index", columns=columns).rename_axis("network").reset_index()


def _perturbations(results: Results) -> list[Fold]:
    """Flips along sequences of frames; none where none were measured."""
    records = results.records
    flips = records[records.quantity == FLIPS]
    if flips.empty:
        return []
    table = flips.assign(
        value=100 * flips.value, sequence=flips.layer.str.replace("_", " "), head=flips["head"].map(label)
    )
    panels = "network" if flips.network.nunique() > 1 else None
    drawn = Heatmap("sequence", "head", "value", panels=panels, best="", value_label="flip probability, %").draw(table)
    classes = " On ten classes the top-5 distance is saturated by chance." if TOP5 in {*records.quantity} else ""
    return [
        Fold(
            title="Stability along perturbations",
            sentences=[f"Flip probabilities and top-5 distances are at difficulty 1, not normalised.{classes}"],
            pictures=[
                Picture(
                    "robustness_flips", "How often the class changes from frame to frame (noises: from frame 0).", drawn
                ),
                Picture(
                    "robustness_sequences",
                    "Perturbation sequences: eight of the frames, equally spaced; the last four are extra.",
                    strips(_perturbed(), columns=2),
                ),
            ],
            exploratory=results.of(*(claim.name for claim in STABILITY)),
            method=["As for claim 8, on fewer images."],
            provenance=results.provenance,
        )
    ]


def _smoothness(results: Results) -> list[Fold]:
    """The quantity of claim 1 against the relative mCE, a point for each network; none without the lines of the landscape."""
    records = results.records
    smooth = late(records, DESCENT, FIRST_ORDER)
    table = smooth.merge(claims.relative(records), on=KEYS, suffixes=("", "_relative"))
    table = table[np.isfinite(table.value) & (table.value > 0)]
    if len(table) < 4 or table["head"].nunique() < 2:
        return []
    x, y = np.log(table.value), table.value_relative
    group = [table["network"], table["head"]]
    over = float(spearmanr(x, y).statistic)
    within = float(spearmanr(x - x.groupby(group).transform("mean"), y - y.groupby(group).transform("mean")).statistic)
    freedom = len(table) - table.groupby(["network", "head"]).ngroups - 1
    p = 2 * student.sf(abs(within) * np.sqrt(freedom / max(1 - within**2, 1e-12)), freedom) if freedom > 0 else 1.0
    told = (
        f"Over {len(table)} networks the first-order error of claim 1 and the relative mCE have the rank correlation {over:.2f}, "
        f"heads and seeds mixed; within heads, their means taken away, {within:.2f} (p = {p:.2g})."
    )
    seen = (
        "no correlation was seen"
        if p > 0.05
        else f"the smoother ones are the {'more' if within > 0 else 'less'} robust ones"
    )
    words = f"Among networks of the same head, which differ in the seed alone, {seen} (exploratory)."
    panels = "network" if table.network.nunique() > 1 else None
    draw = Scatter("value", "value_relative", panels=panels, log="x", x_label=FIRST_ORDER, y_label="relative mCE")
    return [
        Fold(
            title="Does a smoother loss predict robustness?",
            sentences=[told, words],
            pictures=[Picture("robustness_smoothness", f"{words} A point is one network.", draw.draw(table))],
            method=[
                "The first-order error is that of claim 1, over the later half of the training of the same networks."
            ],
            provenance=results.provenance,
        )
    ]


def _photograph() -> torch.Tensor:
    """The centre of scikit-learn's photograph of a flower, uint8 [1, 3, SIDE, SIDE]."""
    picture = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None, :, :, 106:533]
    small = torch.nn.functional.interpolate(picture.float(), size=(SIDE, SIDE), mode="area")
    return small.round().to(torch.uint8)


def _corrupted() -> dict[str, np.ndarray]:
    """Name -> the photograph at severities 0 to 5."""
    image = _photograph()
    return {
        name.replace("_", " "): np.concatenate([_pixels(corrupt(image, name, severity)) for severity in range(6)])
        for name in CORRUPTIONS
    }


def _perturbed() -> dict[str, np.ndarray]:
    """Name -> eight frames of the photograph."""
    every = {name: _pixels(perturb(_photograph(), name)[0]) for name in SEQUENCES}
    return {
        name.replace("_", " "): frames[np.linspace(0, len(frames) - 1, 8).round().astype(int)]
        for name, frames in every.items()
    }


def _pixels(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def _method(results: Results) -> str:
    settings = results.origins.settings
    return (
        f"{trained_so(results.origins)}. {settings['images']} test images at most, for sequences {settings['sequence_images']}; "
        "corruptions and perturbations of Hendrycks & Dietterich (2019), made anew, frost with procedural textures, by the same "
        "random draws for every network. Relative mCE: mean over corruptions of the loss of accuracy, summed over severities, in "
        "units of that of the mean GAP network over seeds. A ratio at matched clean error takes the clean error out by an "
        "analysis of covariance, whose slope is estimated within heads: clean errors that differ between heads more than between "
        "seeds make its interval wide. Intervals are over seeds."
    )
