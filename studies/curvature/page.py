"""What a reader is shown of the curvature study, computed from its records."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import gmean

from studies.curvature import claims as stated
from studies.curvature.claims import AFTER, WEIGHTS, accuracies, of_weights, trained
from studies.curvature.measures import EIGENVALUE, HEAD, HESSIAN, KFAC
from studies.draw import Curves, Forest, forest_row, seed_rows
from studies.draw.numbers import estimate_words
from studies.draw.palette import label
from studies.engine.study import Results
from studies.judge import Claim, Estimate, Judged, estimate, primary
from studies.page import Fold, Picture, Table
from studies.training import trained_so

ALL = "all networks"


def folds(results: Results) -> Sequence[Fold]:
    """A fold about the claim, and one about how well GGN, K-FAC and Hessian agree."""
    results = replace(results, records=_in_order(results))
    judged = results.of(primary(4).name)
    explored = (stated.EXACT, stated.WITHOUT_SOFTMAX, stated.OTHER_MEASURE, *stated.OTHER_WEIGHTS)
    claim = Fold(
        judged=judged,
        sentences=[*reached(results), *exact_root(results), *_without_softmax(results)],
        pictures=[*_forest(results, judged), *_spectra(results)],
        controls=results.of(*(claim.name for claim in stated.CONTROLS)),
        exploratory=results.of(*(claim.name for claim in explored)),
        tables=_conditions(results),
        method=[_method(results)],
        provenance=results.provenance,
    )
    agreement = Fold(
        title="GGN, K-FAC and Hessian",
        sentences=list(_agreement(results)),
        exploratory=results.of(stated.FIDELITY.name, stated.OUTSIDE.name),
        method=["As for claim 4."],
        provenance=results.provenance,
    )
    return [claim, agreement]


def _in_order(results: Results) -> pd.DataFrame:
    """The records with networks and heads in the order of the settings."""
    settings = results.origins.settings
    names = [settings["training"]["network"], *settings["networks"], *settings["heads"], *settings["put_on"]]
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return results.records.sort_values(["network", "head"], key=lambda names: names.map(order), kind="stable")


def reached(results: Results) -> Iterator[str]:
    """How many networks reach the stated accuracy, and count."""
    table = accuracies(results.records)
    if table.empty:
        return
    counts = table.value >= table.stated
    each = ", ".join(f"{label(name)} {sum(c)} of {len(c)}" for name, c in counts.groupby(table.network, sort=False))
    accurate = f"; these have {100 * table.value.min():.1f} to {100 * table.value.max():.1f} %" * bool(counts.all())
    yield f"Only networks with a test top-1 of at least {100 * table.stated.iloc[0]:g} % count: {each}{accurate}."


def _found(results: Results, claim: Claim) -> tuple[Estimate | None, str]:
    """The estimate of a claim on the first data set, and its words; None where nothing was measured."""
    found = next((case.estimate for case in results.of(claim.name)), None)
    return found, "" if found is None else estimate_words(found.value, found.low, found.high)


def exact_root(results: Results) -> Iterator[str]:
    """Whether the blocks follow the head, which the exact root conditions better."""
    heads = results.records[results.records.quantity == HEAD].groupby("head").value.median()
    found, words = _found(results, stated.EXACT)
    if found is None or not {"gcp", "gcp_exact"} <= {*heads.index} or not np.isfinite(heads).all():
        return
    steps, exact = heads["gcp"], heads["gcp_exact"]
    better = "does not condition the head better than"
    if steps > exact:
        better = f"conditions the head {steps / exact:.3g} times better than"
    end = "whether the blocks follow is not decided"
    if found.high < exact / steps:
        end = "the blocks gain more than the head"
    elif found.low > exact / steps:
        end = "the blocks gain less than the head, so its conditioning is not all that conditions the weights"
        if found.low <= 1 <= found.high:
            end = "the blocks do not follow, so the head's conditioning is not what conditions the weights"
    yield (
        f"The exact root {better} 5 steps (median condition number of its Jacobian {exact:.3g} against {steps:.3g}); λ₁ / λₖ of "
        f"the blocks below it, exact / 5 steps, is {words}: {end}."
    )


def _without_softmax(results: Results) -> Iterator[str]:
    if words := _found(results, stated.WITHOUT_SOFTMAX)[1]:
        yield (
            "Part of a block's conditioning is the softmax, whose Hessian differs between images as the classifier's confidence "
            f"does: without it (squared error) GCP / GAP is {words}."
        )


def _agreement(results: Results) -> Iterator[str]:
    """K-FAC's fidelity under each head, and how much of the Hessian is not GGN."""
    explored = results.origins.settings["training"]["network"]
    for what, values, words in (
        ("Cosine of K-FAC (expand) and GGN blocks", partial(trained, quantity=KFAC), "after training"),
        ("‖H − G‖ / ‖H‖ of the last convolution", partial(of_weights, quantity=HESSIAN), "at initial weights"),
    ):
        table = values(results.records)
        means = table[table.network == explored].groupby("head", sort=False).value.mean()
        if len(means):
            each = ", ".join(f"{label(head)} {value:.2f}" for head, value in means.items())
            yield f"{what}, {label(explored)} {words}: {each}."


def _forest(results: Results, judged: Sequence[Judged]) -> Iterator[Picture]:
    """GCP / GAP: a row is a network at some weights or, of the trained ones, all networks together."""
    rows = []
    for case in judged:
        for weights, values in WEIGHTS.items():
            table = values(results.records[results.records.dataset == case.dataset])
            for network, part in table.groupby("network", sort=False):
                one = estimate(case.claim.compare, part)
                if one is not None:
                    row = forest_row(case.claim, case.dataset, "", one.seen) | {"weights": weights}
                    own = [row, *seed_rows(row, one.by_seed)]
                    rows += [one_row | {"network": label(network)} for one_row in own]
            if weights == AFTER and table.network.nunique() > 1 and case.estimate is not None:
                row = forest_row(case.claim, case.dataset, case.outcome, case.estimate.seen)
                rows.append(row | {"weights": weights, "network": ALL})
    if rows:
        figure = Forest("network", groups="weights", x_label="λ₁ / λₖ, GCP / GAP").draw(pd.DataFrame(rows))
        yield Picture(
            "curvature_4",
            f"{judged[0].sentence} λ₁ / λₖ of GGN blocks at half of the possible rank, geometric mean over three convolutions, "
            "GCP / GAP: left of 1 is better conditioned. Points are seeds, lines 95 % intervals.",
            figure,
        )


def _spectra(results: Results) -> Iterator[Picture]:
    """Spectra of the last convolution of trained networks, and under which head the least eigenvalue is the largest share."""
    table = results.records[(results.records.quantity == EIGENVALUE) & (results.records.trained_under != "")]
    if table.empty:
        return
    largest = table.groupby(["network", "head", "seed"]).value.transform("max")
    table = table.assign(share=table.value / largest, rank=table["index"])
    least = table[table["rank"] == table.groupby("network")["rank"].transform("max")]
    level = np.log(least.share.where(least.share > 0)).groupby([least.network, least["head"]]).mean()
    flattest = ", ".join(f"{label(name)} under {label(level[name].idxmax())}" for name in least.network.unique())
    curves = Curves("rank", "share", panels="network", y_label="eigenvalue / largest", mean="geometric", log="xy")
    words = f"Flattest: {flattest}. Eigenvalues of the last convolution's GGN block after training to λₖ: flatter is better."
    yield Picture("curvature_spectra", words, curves.draw(table))


def _conditions(results: Results) -> list[Table]:
    """λ₁ / λₖ of each head: geometric means over seeds."""
    table = pd.concat([values(results.records).assign(weights=weights) for weights, values in WEIGHTS.items()]).dropna()
    if table.empty:
        return []
    table = table.assign(network=table.network.map(label), head=table["head"].map(label))
    seeds = table.groupby(["weights", "network", "head"], sort=False).value
    found = pd.DataFrame({"λ₁ / λₖ": seeds.agg(gmean), "seeds": seeds.size()})
    return [Table("curvature_conditions", "Geometric means over convolutions and seeds.", found.reset_index())]


def _method(results: Results) -> str:
    settings = results.origins.settings
    limits, names = settings["limits"], (settings["training"]["network"], *settings["networks"])
    method = (
        f"{trained_so(results.origins, ', '.join(map(label, names)))}. GGN blocks of the first, middle and last convolution: "
        f"mean cross-entropy of {limits['images']} training images that the seed draws, batch norm in training mode and "
        f"differentiated, {limits['precision']}, spectra in float64. With N images and K classes a block of P weights has at "
        "most r = min(P, N (K − 1)) eigenvalues under every head; k = r / 2. Intervals: seeds within networks (random effects)."
    )
    if settings["put_on"] and settings["explored_seeds"]:
        heads = ", ".join(map(label, settings["put_on"]))
        method += f" Put on trained backbones, classifiers fitted anew by logistic regression: {heads}."
    return method
