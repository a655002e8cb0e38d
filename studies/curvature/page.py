"""What a reader is shown of the curvature study, computed from its records."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from studies.curvature.claims import (
    CONTROLS,
    EXACT,
    FIDELITY,
    OTHER_MEASURE,
    OTHER_WEIGHTS,
    OUTSIDE,
    WEIGHTS,
    WITHOUT_SOFTMAX,
    accuracies,
    initial,
    trained,
)
from studies.curvature.measures import EIGENVALUE, HEAD, HESSIAN, KFAC
from studies.draw import Curves, Forest, forest_row
from studies.draw.numbers import estimate_words
from studies.draw.palette import label
from studies.engine.study import Results
from studies.judge import Claim, Judged, estimate, primary
from studies.page import Fold, Picture, Table

ALL = "all networks"


def folds(results: Results) -> Sequence[Fold]:
    """A fold about the claim, and one about how well GGN, K-FAC and Hessian agree."""
    results = replace(results, records=_in_order(results))
    judged = results.of(primary(4).name)
    sentences = [*reached(results), *exact_root(results), *_without_softmax(results)]
    claim = Fold(
        judged=judged,
        sentences=sentences,
        pictures=[*_forest(results, judged), *_spectra(results)],
        controls=results.of(*(claim.name for claim in CONTROLS)),
        exploratory=results.of(*(claim.name for claim in (EXACT, WITHOUT_SOFTMAX, OTHER_MEASURE, *OTHER_WEIGHTS))),
        tables=_conditions(results),
        method=[_method(results)],
        provenance=results.provenance,
    )
    agreement = Fold(
        title="GGN, K-FAC and Hessian",
        sentences=list(_agreement(results)),
        exploratory=results.of(FIDELITY.name, OUTSIDE.name),
        method=["As for claim 4."],
        provenance=results.provenance,
    )
    return [claim, agreement]


def _in_order(results: Results) -> pd.DataFrame:
    """The records with networks and heads in the order of the settings."""
    settings, records = results.origins.settings, results.records
    names = [settings["training"]["network"], *settings["networks"], *settings["heads"], *settings["put_on"]]
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return records.sort_values(["network", "head"], key=lambda names: names.map(order), kind="stable")


def reached(results: Results) -> Iterator[str]:
    """How many networks count."""
    table = accuracies(results.records)
    if table.empty:
        return
    counts = table.assign(counts=table.value >= table.stated).groupby("network", sort=False).counts
    each = ", ".join(f"{label(name)} {sum(group)} of {len(group)}" for name, group in counts)
    yield (
        f"Only networks with a test top-1 of at least {100 * table.stated.iloc[0]:g} % count: {each}; these have "
        f"{100 * table.value.min():.1f} to {100 * table.value.max():.1f} %."
        if (table.value >= table.stated).all()
        else f"Only networks with a test top-1 of at least {100 * table.stated.iloc[0]:g} % count: {each}."
    )


def _words(judged: Sequence[Judged]) -> str:
    """The estimate with its interval; empty where nothing was measured."""
    found = judged[0].estimate if judged else None
    return "" if found is None else estimate_words(found.value, found.low, found.high)


def exact_root(results: Results) -> Iterator[str]:
    """Whether the blocks follow the head, which the exact root conditions better."""
    heads = results.records[results.records.quantity == HEAD].groupby("head").value.median()
    judged = results.of(EXACT.name)
    found = judged[0].estimate if judged else None
    if found is None or not {"gcp", "gcp_exact"} <= {*heads.index} or not np.isfinite(heads).all():
        return
    steps, exact = heads["gcp"], heads["gcp_exact"]
    better = (
        f"conditions the head {steps / exact:.3g} times better than"
        if steps > exact
        else "does not condition the head better than"
    )
    if found.low <= 1 <= found.high and found.low > exact / steps:
        end = "the blocks do not follow, so the head's conditioning is not what conditions the weights"
    elif found.low > exact / steps:
        end = "the blocks gain less than the head, so its conditioning is not all that conditions the weights"
    elif found.high < exact / steps:
        end = "the blocks gain more than the head"
    else:
        end = "whether the blocks follow is not decided"
    yield (
        f"The exact root {better} 5 steps (median condition number of its Jacobian {exact:.3g} against {steps:.3g}); λ₁ / λₖ of "
        f"the blocks below it, exact / 5 steps, is {_words(judged)}: {end}."
    )


def _without_softmax(results: Results) -> Iterator[str]:
    if words := _words(results.of(WITHOUT_SOFTMAX.name)):
        yield (
            "Part of a block's conditioning is the softmax, whose Hessian differs between images as the classifier's confidence "
            f"does: without it (squared error) GCP / GAP is {words}."
        )


def _agreement(results: Results) -> Iterator[str]:
    """K-FAC's fidelity under each head, and how much of the Hessian is not GGN."""
    explored = results.origins.settings["training"]["network"]
    for what, values, words in (
        ("Cosine of K-FAC (expand) and GGN blocks", partial(trained, quantity=KFAC), "after training"),
        ("‖H − G‖ / ‖H‖ of the last convolution", partial(initial, quantity=HESSIAN), "at initial weights"),
    ):
        table = values(results.records)
        means = table[table.network == explored].groupby("head", sort=False).value.mean()
        each = ", ".join(f"{label(head)} {value:.2f}" for head, value in means.items())
        if each:
            yield f"{what}, {label(explored)} {words}: {each}."


def _forest(results: Results, judged: Sequence[Judged]) -> Iterator[Picture]:
    """GCP / GAP: a row is a network at some weights."""
    rows = [row for case in judged for row in _forest_rows(results.records, case)]
    if rows:
        figure = Forest("network", groups="weights", x_label="λ₁ / λₖ, GCP / GAP").draw(pd.DataFrame(rows))
        yield Picture(
            "curvature_4",
            f"{judged[0].sentence} λ₁ / λₖ of GGN blocks at half of the possible rank, geometric mean over three convolutions, "
            "GCP / GAP: left of 1 is better conditioned. Points are seeds, lines 95 % intervals.",
            figure,
        )


def _forest_rows(records: pd.DataFrame, case: Judged) -> Iterator[dict[str, object]]:
    """Of each network at each of WEIGHTS and, of the trained ones, of all together."""
    claim, records = case.claim, records[records.dataset == case.dataset]
    for weights, values in WEIGHTS.items():
        table = values(records)
        networks = list(table.network.unique())
        for network in networks:
            yield from _row(claim, case.dataset, "", weights, label(network), table[table.network == network])
        if values is claim.values and len(networks) > 1:
            yield from _row(claim, case.dataset, case.outcome, weights, ALL, table)


def _row(
    claim: Claim, dataset: str, outcome: str, weights: str, network: str, table: pd.DataFrame
) -> Iterator[dict[str, object]]:
    """An estimate and its seeds."""
    found = estimate(claim.compare, table)
    if found is None:
        return
    named = {"weights": weights, "network": network}
    row = forest_row(claim, dataset, outcome, (found.value, found.low, found.high)) | named
    yield row
    for effect in found.by_seed.effect if network != ALL else ():
        yield row | {"seed": 0, "estimate": effect, "low": np.nan, "high": np.nan, "numbers": ""}


def _spectra(results: Results) -> Iterator[Picture]:
    """Spectra of the last convolution of trained networks."""
    records = results.records
    table = records[(records.quantity == EIGENVALUE) & (records.trained_under != "")]
    if table.empty:
        return
    largest = table.groupby(["network", "head", "seed"]).value.transform("max")
    table = table.assign(share=table.value / largest, rank=table["index"])
    figure = Curves(
        "rank", "share", panels="network", x_label="rank", y_label="eigenvalue / largest", mean="geometric", log="xy"
    )
    yield Picture(
        "curvature_spectra",
        f"{_flattest(table)} Eigenvalues of the last convolution's GGN block after training to λₖ: flatter is better.",
        figure.draw(table),
    )


def _flattest(table: pd.DataFrame) -> str:
    """Under which head the least of the eigenvalues is the largest, by network."""
    least = table[table["rank"] == table.groupby("network")["rank"].transform("max")]
    level = np.log(least.share.where(least.share > 0)).groupby([least.network, least["head"]]).mean()
    best = [f"{label(network)} under {label(level[network].idxmax())}" for network in dict.fromkeys(least.network)]
    return f"Flattest: {', '.join(best)}."


def _conditions(results: Results) -> list[Table]:
    """λ₁ / λₖ of each head: geometric means over seeds."""
    rows = [
        {
            "weights": weights,
            "network": label(network),
            "head": label(head),
            "λ₁ / λₖ": np.exp(np.log(some).mean()),
            "seeds": len(some),
        }
        for weights, values in WEIGHTS.items()
        for (network, head), some in values(results.records).dropna().groupby(["network", "head"], sort=False).value
    ]
    caption = "Geometric means over convolutions and seeds."
    return [Table("curvature_conditions", caption, pd.DataFrame(rows))] if rows else []


def _method(results: Results) -> str:
    s = results.origins.settings
    training, limits = s["training"], s["limits"]
    data = results.origins.data.get("label", training["dataset"])
    networks = ", ".join(map(label, (training["network"], *s["networks"])))
    shared = f" Put on trained backbones, classifiers fitted anew by logistic regression: {', '.join(map(label, s['put_on']))}."
    return (
        f"{networks} on {data}, SGD, {training['epochs']} epochs, batch {training['batch_size']}, learning rate "
        f"{training['learning_rate']:g} ({training['schedule']}). GGN blocks of the first, middle and last convolution: mean "
        f"cross-entropy of {limits['images']} training images that the seed draws, batch norm in training mode and "
        f"differentiated, {limits['precision']}, spectra in float64. With N images and K classes a block of P weights has at "
        "most r = min(P, N (K − 1)) eigenvalues under every head; k = r / 2. Intervals: seeds within networks (random effects)."
    ) + shared * bool(s["put_on"] and s["explored_seeds"])
