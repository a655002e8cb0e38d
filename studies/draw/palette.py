"""One palette for all figures: a colour means one thing, and a word has the same colour and line style everywhere.

Heads, optimisers and outcomes do not share a colour. Within each of these groups the colours stay apart for readers without red,
green or blue cones too (`tests/test_draw.py` measures it); dashes tell the lines of a group apart without any colour.
"""

from collections.abc import Iterable

import seaborn as sns

from secondorder.errors import InputError

HEAD_COLORS = {
    "gap": "#555555",
    "gap_lifted": "#AABBCC",
    "covariance": "#D55E00",
    "gcp": "#0072B2",
    "gcp_exact": "#009E73",
    "gcp_log": "#550066",
    "dropcov": "#E69F00",
}
OPTIMIZER_COLORS = {
    "sgd": "#000000",
    "kfac": "#6644BB",
    "ekfac": "#6688FF",
    "adamw": "#884400",
    "muon": "#CC5577",
    "soap": "#22CCFF",
    "shampoo": "#551122",
    "singd": "#EE9988",
    "gauss_newton": "#222277",
}
OUTCOME_COLORS = {
    "supported": "#007777",
    "contradicted": "#AA0011",
    "no effect": "#2233AA",
    "undecided": "#8F6B00",
    "proved": "#335522",
    "not measured": "#6F6F6F",
}
"""Dark enough for letters on white: contrast of at least 4.5."""
COLORS = HEAD_COLORS | OPTIMIZER_COLORS | OUTCOME_COLORS
INK, RULE, ZONE = "#1A1A1A", "#8C8C8C", "#EEEEEE"
"""Letters, reference lines and the zone of practical equivalence."""

LABELS = {
    "gap": "GAP",
    "gap_lifted": "GAP, lifted (dimension control)",
    "covariance": "covariance (no root)",
    "gcp": "GCP (5-step root)",
    "gcp_exact": "GCP (exact root)",
    "gcp_log": "GCP (logarithm)",
    "dropcov": "DropCov",
    "sgd": "SGD",
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "shampoo": "Shampoo",
    "singd": "SINGD",
    "gauss_newton": "Gauss-Newton",
    "digits": "digits",
    "cifar10": "CIFAR-10",
    "cifar10_jpeg": "CIFAR-10 (JPEG)",
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet",
    "digits_net": "digits net",
    "digits_slim": "digits slim",
    "digits_small": "digits small",
    "digits_tiny": "digits tiny",
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
    "resnet50": "ResNet-50",
}

SOLID: tuple[float, ...] = ()
DASHES: dict[str, tuple[float, ...]] = {
    "gap_lifted": (3, 1),
    "covariance": (5, 1.5),
    "gcp_exact": (1, 1),
    "gcp_log": (4, 1, 1, 1),
    "dropcov": (6, 1, 1, 1, 1, 1),
    "ekfac": (3, 1),
    "adamw": (5, 1.5),
    "muon": (1, 1),
    "soap": (4, 1, 1, 1),
    "shampoo": (6, 1, 1, 1, 1, 1),
    "singd": (2, 2),
    "gauss_newton": (6, 2),
}
MOST_UNKNOWN = 6


def label(word: object) -> str:
    """The name of a head, an optimiser, a network or a data set for a reader; any other word as it is."""
    return LABELS.get(str(word), str(word))


def colors(words: Iterable[object]) -> dict[str, str]:
    """The colour of each word; words that the palette lacks (layers, targets) get tints of one hue that it leaves free.

    InputError for more than `MOST_UNKNOWN` of these, whose tints would look alike.
    """
    names = list(dict.fromkeys(map(str, words)))
    unknown = [name for name in names if name not in COLORS]
    if len(unknown) > MOST_UNKNOWN:
        raise InputError(
            f"{len(unknown)} words without a colour in one figure ({', '.join(unknown)[:80]}...): show at most {MOST_UNKNOWN}, "
            "or one in each panel"
        )
    tints = sns.cubehelix_palette(len(unknown), start=2.2, rot=0.15, light=0.7, dark=0.25).as_hex() if unknown else []
    return {name: COLORS.get(name) or tints[unknown.index(name)].upper() for name in names}


def dashes(words: Iterable[object]) -> dict[str, tuple[float, ...]]:
    """The dashes of each word's line, in line widths; empty for a solid one."""
    return {str(word): DASHES.get(str(word), SOLID) for word in words}
