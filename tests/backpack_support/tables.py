"""The support matrix: which quantity BackPACK can compute of which layer, found by running, and of which network."""

from functools import cache
from pathlib import Path

import pandas as pd
from torch import nn

from secondorder.curvature.backpack.conversion import Twin, backpack_network
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.support import QUANTITIES, accepts
from secondorder.errors import InputError

from .layers import LAYERS, layer_network
from .networks import NETWORKS, SPOT_CHECKS, network_case
from .reference import Truth, largest_error, largest_scale_error, mean_error, truth_of

DOCUMENT = "secondorder/curvature/README.md"
"""Where the tables stand, from the root of the repository."""
BEGIN, END = "<!-- support matrix -->\n", "<!-- end of support matrix -->"

DRAWS: dict[str, dict[str, int]] = {
    "DiagGGNMC": {"mc_samples": 1600},
    "BatchDiagGGNMC": {"mc_samples": 1600},
    "SqrtGGNMC": {"mc_samples": 800},
    "KFAC": {"mc_samples": 1600},
    "WeightSharingKFAC": {"mc_samples": 1600},
    "WeightSharingKFAC, reduce": {"mc_samples": 1600},
    "DiagHessianMC": {"draws": 16000},
    "BatchDiagHessianMC": {"draws": 8000},
}
"""Monte-Carlo quantity -> with how many draws it is compared with the truth."""

EXACT = 1e-12  # largest error of an exact quantity, relative to the largest entry
RANDOM = 0.2  # mean error of a Monte-Carlo quantity at this many draws; a missing term is above it
SCALE = 0.11  # error of its scale for a parameter; of two values that differ by a factor of 1.25, at most one is within


@cache
def support_matrix() -> pd.DataFrame:
    """Layers (rows) by quantities (columns), each entry found by running the smallest network with that layer in float64.

    "exact": equal to the dense matrices of torch.func. "mc": equal in the mean, as far as DRAWS can tell.
    "passed on": right for the other layers; this layer's own parameters get none. "refused": with an error that says why.
    "wrong" does not occur; a test sees to it. The frame is computed once in a process; do not write into it.
    """
    return pd.DataFrame({quantity: support_of_layers(quantity) for quantity in QUANTITIES})


@cache
def support_of_layers(quantity: str) -> dict[str, str]:
    """One column of the support matrix, computed once in a process; do not write into it."""
    return {layer: entry(layer, quantity) for layer in LAYERS}


def entry(layer: str, quantity: str) -> str:
    """One entry of the support matrix."""
    network, images, labels = layer_network(layer)
    count = 1 if quantity == "KFRA" else len(images)  # of more samples KFRA is an approximation
    batch, loss = (images[:count], labels[:count]), nn.CrossEntropyLoss()
    try:
        extension = QUANTITIES[quantity](**DRAWS.get(quantity, {}))
        found = backpack_quantity(network, loss, batch, extension, seed=0)
    except InputError:
        return "refused"
    truth = layer_truth(layer, count)
    if quantity in DRAWS:
        unbiased = mean_error(quantity, found, truth) <= RANDOM and largest_scale_error(quantity, found, truth) <= SCALE
        result = "mc" if unbiased else "wrong"
    else:
        result = "exact" if largest_error(quantity, found, truth) <= EXACT else "wrong"
    own = [name for name in truth.parts if name.startswith("1.")]
    return "passed on" if own and not set(own) & set(found) and result != "wrong" else result


@cache
def layer_truth(layer: str, count: int) -> Truth:
    """The ground truth of the network with this layer, for so many samples."""
    network, images, labels = layer_network(layer)
    return truth_of(network, nn.CrossEntropyLoss(), (images[:count], labels[:count]))


@cache
def support_of_networks() -> pd.DataFrame:
    """Whole networks (rows) by quantities (columns), at small images and few classes in float64.

    "exact": run, and equal to autograd at the first normalisation and at the classifier. "accepted" and "refused": what
    `supports` says; every layer of an accepted network is in the support matrix.
    """
    return pd.DataFrame({q: {name: network_entry(name, q) for name in NETWORKS} for q in QUANTITIES})


def network_entry(name: str, quantity: str) -> str:
    """One entry of the table of networks."""
    case = network_case(name)
    if quantity not in SPOT_CHECKS:
        return "accepted" if accepts(network_twin(name), quantity) else "refused"
    batch = case.images, case.labels
    found = backpack_quantity(case.network, nn.CrossEntropyLoss(), batch, QUANTITIES[quantity]())
    return "exact" if SPOT_CHECKS[quantity](case, found) <= EXACT else "wrong"


@cache
def network_twin(name: str) -> Twin:
    """The twin of the network."""
    return backpack_network(network_case(name).network)


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown; quantities with the same entries share a column."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for quantity in table.columns:
        columns.setdefault(tuple(table[quantity]), []).append(quantity)
    lines = [
        "| | " + " | ".join("<br>".join(names) for names in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [f"| {row} | " + " | ".join(entries) + " |" for row, *entries in zip(table.index, *columns, strict=True)]
    return "\n".join(lines)


def section(networks: pd.DataFrame | None = None) -> str:
    """Both tables as they stand in DOCUMENT between BEGIN and END.

    networks: in place of running them, which takes its time.
    """
    second = support_of_networks() if networks is None else networks
    return f"{markdown(support_matrix())}\n\n{markdown(second)}\n"


def in_document() -> str:
    """The tables that DOCUMENT shows."""
    text = (Path(__file__).parents[2] / DOCUMENT).read_text()
    assert BEGIN in text, f"{DOCUMENT} lacks the marker {BEGIN.strip()}"
    return text.split(BEGIN)[1].split(END)[0]
