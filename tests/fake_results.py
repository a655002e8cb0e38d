"""Made-up results in the shape of real ones, for tests of figures and pages: FAKE, nothing here was measured."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Compare:
    """Stands for a comparison of `studies.judge`."""

    claimed: str
    zone: tuple[float, float]
    scale: str


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float
    n: int
    networks: int
    by_seed: pd.DataFrame
    left_out: int = 0
    has_interval: bool = True


@dataclass(frozen=True)
class Claim:
    name: str
    statement: str
    study: str
    quantity: str
    compare: Compare
    primary: int = 0


@dataclass(frozen=True)
class Judged:
    claim: Claim
    dataset: str
    estimate: Estimate | None
    outcome: str
    p_holm: float = float("nan")
    seeds_needed: int | None = None
    sentence: str = ""


TEN = Compare("below", (0.9, 1.1), "log")
CLAIMS = [
    Claim("smoother loss", "The loss is smoother under GCP.", "landscape",
          "error of the first-order prediction |L(X − ηg) − L + η|g|²| / (η|g|²), GCP / GAP", TEN, 1),
    Claim("predictive gradients", "Gradients are more predictive under GCP.", "landscape", "|g(η) − g| / |g|, GCP / GAP", TEN, 2),
    Claim("the head preconditions", "The GCP head preconditions the features.", "curvature",
          "median condition number of the head's Jacobian, exact root / none", TEN, 3),
    Claim("better conditioned curvature", "The weights' curvature is better conditioned.", "curvature",
          "λ₁ / λₖ of GGN blocks, GCP / GAP", Compare("below", (0.8, 1.2), "log"), 4),
    Claim("K-FAC-like gradient", "The gradient of GCP is like K-FAC's of GAP.", "preconditioning",
          "partial correlation of g_GCP with P g_GAP given g_GAP", Compare("above", (-0.1, 0.1), "fisher"), 5),
    Claim("superfluous second order", "Second-order steps gain less under GCP.", "optimisers",
          "interaction in log steps to target, GCP − GAP", Compare("below", (-0.1, 0.1), "log"), 6),
    Claim("rapid decay", "GCP converges under rapid decay of the learning rate.", "convergence",
          "accuracy of GCP, fast schedule − GAP, normal one", Compare("above", (-0.005, 0.005), "logit"), 7),
    Claim("robust", "GCP is more robust to corruptions.", "robustness", "relative mCE, GCP / GAP",
          Compare("below", (0.95, 1.05), "log"), 8),
    Claim("transfers", "GCP backbones transfer better.", "", "AP of a fine-tuned detector, GCP − GAP backbone",
          Compare("above", (-0.5, 0.5), "identity"), 9),
]  # fmt: skip
OUTCOMES = {
    "digits": (
        "supported",
        "supported",
        "proved",
        "no effect",
        "undecided",
        "undecided",
        "contradicted",
        "undecided",
        "not measured",
    ),
    "cifar10": (
        "supported",
        "undecided",
        "proved",
        "contradicted",
        "no effect",
        "supported",
        "no effect",
        "supported",
        "not measured",
    ),
}
CENTERS = {
    "digits": (0.78, 0.80, 0.004, 1.02, 0.09, -0.09, -0.021, 0.985, 0.0),
    "cifar10": (0.84, 0.90, 0.005, 1.55, 0.03, -0.21, 0.001, 0.90, 0.0),
}


def estimate(
    center: float, log: bool, spread: float, seeds: int, networks: Sequence[str], random: np.random.Generator
) -> Estimate:
    points = [(n, s, random.normal(np.log(center) if log else center, spread)) for n in networks for s in range(seeds)]
    table = pd.DataFrame(points, columns=["network", "seed", "effect"])
    mean, half = table.effect.mean(), stats.t.ppf(0.975, seeds - 1) * table.effect.std() / np.sqrt(seeds)
    if log:
        table["effect"] = np.exp(table.effect)
        return Estimate(
            float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half)), seeds, len(networks), table
        )
    return Estimate(float(mean), float(mean - half), float(mean + half), seeds, len(networks), table)


def judged_claims(dataset: str, seeds: int = 8, claims: Sequence[Claim] = CLAIMS) -> list[Judged]:
    """All claims judged on a data set, with made-up numbers near `CENTERS` and the outcomes of `OUTCOMES`."""
    random = np.random.default_rng(5)
    judged = []
    for claim, outcome, center in zip(claims, OUTCOMES[dataset], CENTERS[dataset], strict=True):
        if outcome == "not measured":
            judged.append(Judged(claim, dataset, None, outcome))
            continue
        low, high = claim.compare.zone
        log = claim.compare.scale == "log" and low > 0
        spread = (0.9 if outcome == "undecided" else 0.35) * (high - low) / 2
        made = estimate(center, log, spread, seeds, ["digits_net"], random)
        sentence = f"{claim.statement.rstrip('.')}: {outcome} on {dataset} (made-up numbers)."
        needed = 16 if outcome == "undecided" else None
        judged.append(Judged(claim, dataset, made, outcome, 0.012, needed, sentence))
    return judged


def controls(dataset: str, seeds: int = 8) -> list[Judged]:
    """The claim's contrast with other heads in place of GCP: exploratory, without verdict words."""
    random = np.random.default_rng(6)
    names = {"covariance / GAP": 1.3, "exact root / GAP": 0.75, "GAP lifted / GAP": 0.98}
    return [
        Judged(Claim(name, f"{name}.", "landscape", "first-order error, ratio", TEN), dataset,
               estimate(center, True, 0.08, seeds, ["digits_net"], random), "")
        for name, center in names.items()
    ]  # fmt: skip


def training(
    heads: Sequence[str] = ("gap", "gap_lifted", "covariance", "gcp", "gcp_exact"), seeds: int = 5
) -> pd.DataFrame:
    """Made-up curves: columns head, seed, step, part, loss, low, high, gradient, variation."""
    random = np.random.default_rng(0)
    rows = []
    for (place, head), seed in itertools.product(enumerate(heads), range(seeds)):
        shift = random.normal(0, 0.08)
        for step in range(0, 210, 15):
            loss = (2.3 - 0.12 * place) * np.exp(-step / (90 - 9 * place)) * np.exp(
                shift + random.normal(0, 0.03)
            ) + 0.05
            gradient = loss * np.exp(random.normal(0, 0.15)) / 10
            for part in ("late", "early"):
                rows.append((head, seed, step, part, loss * (1 + (part == "late")), 0.9 * loss, 1.3 * loss, 75 * gradient**2,
                             75 * gradient**2 * np.exp(random.normal(0.02, 0.05))))  # fmt: skip
    return pd.DataFrame(rows, columns=["head", "seed", "step", "part", "loss", "low", "high", "predicted", "variation"])


@dataclass(frozen=True)
class Provenance:
    """Stands for `studies.results.Provenance`."""

    versions: dict[str, str] = field(default_factory=lambda: {"python": "3.11.9", "torch": "2.11"})
