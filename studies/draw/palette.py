"""One palette for all figures: a colour means one thing, and a word has the same name, colour and dashes everywhere.

Heads, optimisers and outcomes do not share a colour. Within each of these groups the colours stay apart for readers without red,
green or blue cones too (`tests/test_draw.py` measures it); dashes tell the lines of a group apart without any colour.
"""

from collections.abc import Iterable

import seaborn as sns

from secondorder.errors import InputError

Look = tuple[str, str, tuple[float, ...]]
"""Name for a reader, colour, and dashes of a line in line widths, none for a solid one."""
HEADS: dict[str, Look] = {
    "gap": ("GAP", "#555555", ()),
    "gap_lifted": ("GAP, lifted (dimension control)", "#AABBCC", (3, 1)),
    "covariance": ("covariance (no root)", "#D55E00", (5, 1.5)),
    "gcp": ("GCP (5-step root)", "#0072B2", ()),
    "gcp_exact": ("GCP (exact root)", "#009E73", (1, 1)),
    "gcp_log": ("GCP (logarithm)", "#550066", (4, 1, 1, 1)),
    "dropcov": ("DropCov", "#E69F00", (6, 1, 1, 1, 1, 1)),
    "random": ("random (no pretraining)", "#BB77FF", (2, 1)),
}
OPTIMIZERS: dict[str, Look] = {
    "sgd": ("SGD", "#000000", ()),
    "kfac": ("K-FAC", "#6644BB", ()),
    "kfac_adam": ("K-FAC, Adam step", "#BBDD00", (4, 1.5, 1, 1.5)),
    "ekfac": ("EKFAC", "#6688FF", (3, 1)),
    "adamw": ("AdamW", "#884400", (5, 1.5)),
    "muon": ("Muon", "#CC5577", (1, 1)),
    "soap": ("SOAP", "#22CCFF", (4, 1, 1, 1)),
    "shampoo": ("Shampoo", "#551122", (6, 1, 1, 1, 1, 1)),
    "singd": ("SINGD", "#EE9988", (2, 2)),
    "gauss_newton": ("Gauss-Newton", "#222277", (6, 2)),
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
LOOKS = HEADS | OPTIMIZERS
HEAD_COLORS, OPTIMIZER_COLORS = ({word: look[1] for word, look in group.items()} for group in (HEADS, OPTIMIZERS))
COLORS = HEAD_COLORS | OPTIMIZER_COLORS | OUTCOME_COLORS
INK, RULE, ZONE = "#1A1A1A", "#8C8C8C", "#EEEEEE"
"""Letters, reference lines and the zone of practical equivalence."""

LABELS = {word: name for word, (name, _, _) in LOOKS.items()} | {
    "gap_at_stride_of_gcp": "GAP, stride of GCP",
    "digits": "digits",
    "digits_0_to_4": "digits 0 to 4",
    "digits_5_to_9": "digits 5 to 9",
    "cifar10": "CIFAR-10",
    "cifar10_jpeg": "CIFAR-10 (JPEG)",
    "cifar100": "CIFAR-100",
    "nuclei": "nuclei",
    "bccd": "blood cells",
    "digits_net": "digits net",
    "digits_slim": "digits slim",
    "digits_small": "digits small",
    "digits_tiny": "digits tiny",
    "resnet50": "ResNet-50",
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
    return {str(word): LOOKS[str(word)][2] if str(word) in LOOKS else () for word in words}
