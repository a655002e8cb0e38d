"""Made-up results in the shape of real ones, for tests of figures and pages: FAKE, nothing here was measured."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from studies.draw import forest_row, seed_rows
from studies.judge import Claim, Comparison, Estimate, Judged, Ratio, complete
from studies.judge.estimates import Mean
from studies.page import outcome_of
from studies.statistics import geometric_interval, mean_interval

TEN = Ratio({"head": "gcp"}, {"head": "gap"}, margin=0.1)
STUDIES = {3: "curvature", 7: "convergence", 8: "robustness"}
CLAIMS = [replace(claim, study=STUDIES.get(claim.primary, claim.study)) for claim in complete([])]
CLAIMS[2] = replace(CLAIMS[2], compare=TEN)  # the real one has no margin, so there is nothing to draw
OUTCOMES = {
    "digits": [
        *["supported"] * 2,
        "proved",
        "no effect",
        *["undecided"] * 2,
        "contradicted",
        "undecided",
        "not measured",
    ],
    "cifar10": [
        *("supported", "undecided", "proved", "contradicted", "no effect", "supported", "no effect", "supported"),
        "not measured",
    ],
}
CENTERS = {
    "digits": (0.78, 0.80, 0.004, 1.02, 0.09, -0.09, -0.021, 0.985, 0.0),
    "cifar10": (0.84, 0.90, 0.005, 1.55, 0.03, -0.21, 0.001, 0.90, 0.0),
}


def made_up(value: float, low: float, high: float, by_seed: pd.DataFrame) -> Estimate:
    n, networks = len(by_seed) // by_seed.network.nunique(), by_seed.network.nunique()
    return Estimate(value, low, high, n, networks, 0, by_seed, 0, Mean(value, error=1.0), (0.0, 0.0))


def estimate(center: float, log: bool, spread: float, seeds: int, random: np.random.Generator) -> Estimate:
    effects = random.normal(np.log(center) if log else center, spread, seeds)
    effects = np.exp(effects) if log else effects
    found = geometric_interval(effects) if log else mean_interval(effects)
    table = pd.DataFrame({"network": "digits_net", "seed": range(seeds), "effect": effects})
    return made_up(found.estimate, found.low, found.high, table)


def judged_claims(dataset: str, seeds: int = 8) -> list[Judged]:
    """All claims judged on a data set, with made-up numbers near `CENTERS` and the outcomes of `OUTCOMES`."""
    random = np.random.default_rng(5)
    judged = []
    for claim, outcome, center in zip(CLAIMS, OUTCOMES[dataset], CENTERS[dataset], strict=True):
        if outcome == "not measured":
            judged.append(Judged(claim, dataset, None, outcome, np.nan, None, ""))
            continue
        low, high = claim.compare.zone
        log = claim.compare.scale == "log" and low > 0
        spread = (0.9 if outcome == "undecided" else 0.35) * (high - low) / 2
        found = estimate(center, log, spread, seeds, random)
        sentence = f"{claim.statement.rstrip('.')}: {outcome} on {dataset} (made-up numbers)."
        judged.append(Judged(claim, dataset, found, outcome, 0.012, 16 if outcome == "undecided" else None, sentence))
    return judged


def controls(dataset: str, seeds: int = 8) -> list[Judged]:
    """The claim's contrast with other heads in place of GCP: exploratory, without verdict words."""
    random = np.random.default_rng(6)
    names = {"covariance / GAP": 1.3, "exact root / GAP": 0.75, "GAP lifted / GAP": 0.98}
    claims = [Claim(name, f"{name}.", "landscape", "error, ratio", TEN, lambda records: records) for name in names]
    found = [estimate(center, True, 0.08, seeds, random) for center in names.values()]
    return [Judged(claim, dataset, e, "", np.nan, None, "") for claim, e in zip(claims, found, strict=True)]


def forest_table(judged: Sequence[Judged]) -> pd.DataFrame:
    """What `Forest` draws of judged claims."""
    rows = []
    for item in judged:
        found = outcome_of(item)
        row = forest_row(item.claim, item.dataset, item.outcome, (found.estimate, found.low, found.high))
        rows += [row, *seed_rows(row, found.by_seed)]
    return pd.DataFrame(rows)


def one_row(compare: Comparison, value: float, low: float, high: float, outcome: str) -> pd.DataFrame:
    """The forest table of an estimate with two seeds."""
    points = pd.DataFrame({"network": ["n"] * 2, "seed": [0, 1], "effect": [value, value]})
    claim = Claim("c", "C.", "s", "q", compare, lambda records: records, 1)
    return forest_table([Judged(claim, "digits", made_up(value, low, high, points), outcome, np.nan, None, "")])


def training(heads: Sequence[str], seeds: int) -> pd.DataFrame:
    """Made-up curves: columns head, seed, step, part, loss, low, high, predicted, variation."""
    random = np.random.default_rng(0)
    rows = []
    for (place, head), seed in itertools.product(enumerate(heads), range(seeds)):
        shift = random.normal(0, 0.08)
        for step in range(0, 210, 15):
            decay = np.exp(-step / (90 - 9 * place) + shift + random.normal(0, 0.03))
            loss = (2.3 - 0.12 * place) * decay + 0.05
            predicted = 75 * (loss * np.exp(random.normal(0, 0.15)) / 10) ** 2
            for part in ("late", "early"):
                variation = predicted * np.exp(random.normal(0.02, 0.05))
                shown = loss * (1 + (part == "late"))
                rows.append((head, seed, step, part, shown, 0.9 * loss, 1.3 * loss, predicted, variation))
    return pd.DataFrame(rows, columns=["head", "seed", "step", "part", "loss", "low", "high", "predicted", "variation"])
