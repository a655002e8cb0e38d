"""Does the gradient under a GCP head point where K-FAC turns the gradient under the GAP head?

For the weights of every convolution, g is the gradient of the mean cross-entropy of one large batch under a head, and P the K-FAC
preconditioner of the network with the GAP head, with factors of the same images. Batch norm is in training mode. Rows, of each
convolution and of `ALL`, all of them as one vector:

    PLAIN      cos(g_head, g_gap)                       other heads
    WITH_P     cos(g_head, P g_gap)                     other heads      setting: the damping of P
    TURN       cos(g_gap, P g_gap)                      gap              setting: the damping of P
    PARTIAL    cos of what is left of g_head and of P g_gap without their parts along g_gap, the partial correlation

An unrelated P, which turns g_gap as far but in a random direction, gives WITH_P = PLAIN TURN and PARTIAL = 0 in expectation: only
PARTIAL is evidence. The controls: a GCP head with random weights in its classifier, and one fitted to permuted labels, whose
gradients are taken with them too.
"""

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from secondorder.kfac.options import DAMPING
from secondorder.networks import Network
from secondorder.preconditioning import (
    KFACDirections,
    alignment,
    loss_gradient,
    natural_gradient_direction,
    partial_correlation,
)
from secondorder.preconditioning.directions import Direction
from studies.preconditioning.backbone import Backbone, Row, convolutions
from studies.shared_backbone import evenly_spaced

PLAIN, WITH_P, TURN, PARTIAL = "cosine", "cosine with P", "turn by P", "partial correlation"
ALL = "all convolutions"
RANDOM, PERMUTED, NATURAL = "random classifier", "permuted labels", "natural gradient"
"""Ends of names of quantities: two controls, and P the inverse of the exact Gauss-Newton matrix of all convolutions."""
RESIDUAL = "residual of the natural gradient"


def gradient_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of all heads and controls, in float32: float64 changes no cosine by more than 1e-3."""
    images, indices = backbone.batch[0].float(), evenly_spaced(len(backbone.data.train), backbone.measures.images)
    cases = {name: (copy.deepcopy(network).float(), labels) for name, (network, labels) in every_head(backbone).items()}
    gap, labels = cases["gap"]
    names, reference = convolutions(gap), (images, labels[indices].to(images.device))
    gradients = {
        name: loss_gradient(network, (images, given[indices].to(images.device)), params=names)
        for name, (network, given) in cases.items()
    }
    g_gap = gradients.pop("gap")
    for head, g in gradients.items():
        yield from _rows(head, (PLAIN,), np.nan, g, g_gap)
    kfac = KFACDirections(gap, reference, params=names)
    for damping in sorted({*backbone.measures.dampings, DAMPING}):
        yield from compared(gradients, g_gap, kfac.direction(g_gap, damping), damping)
    if backbone.measures.natural_gradient:
        solved = natural_gradient_direction(gap, reference, DAMPING, gradient=g_gap, tolerance=1e-3, iterations=300)
        yield from compared(gradients, g_gap, solved.direction, DAMPING, NATURAL)
        yield {"quantity": RESIDUAL, "setting": DAMPING, "value": float(solved.solution.residual)}


def compared(
    gradients: Mapping[str, Direction], g_gap: Direction, P_g: Direction, damping: float, *which: str
) -> Iterator[Row]:
    """P g_gap against g_gap, and against the gradients under the other heads; `which` names P if it is not K-FAC."""
    yield from _rows("gap", (TURN, *which), damping, g_gap, P_g)
    for head, g in gradients.items():
        yield from _rows(head, (WITH_P, *which), damping, g, P_g)
        yield from _rows(head, (PARTIAL, *which), damping, g, P_g, g_gap)


def every_head(backbone: Backbone) -> dict[str, tuple[Network, Tensor]]:
    """Networks and labels [N] of all training images by head, and two controls; what is random in these is that of the seed."""
    labels = backbone.data.train.labels
    random = np.random.default_rng([backbone.seed, len(labels)])
    permuted = labels[torch.from_numpy(random.permutation(len(labels)))]
    heads = {head: (network, labels) for head, network in backbone.networks.items()}
    heads[f"gcp, {RANDOM}"] = with_random_classifier(backbone.networks["gcp"], random), labels
    return heads | {f"gcp, {PERMUTED}": (backbone.under("gcp", permuted), permuted)}


def with_random_classifier(fitted: Network, random: np.random.Generator) -> Network:
    """A copy whose classifier has normal weights with the norm of the fitted ones, and no bias."""
    network = copy.deepcopy(fitted)
    classifier = network.classifier
    assert isinstance(classifier, nn.Linear)
    with torch.no_grad():
        weight = torch.from_numpy(random.standard_normal(classifier.weight.shape)).to(classifier.weight)
        classifier.weight.copy_(weight * classifier.weight.norm() / weight.norm())
        classifier.bias.zero_()
    return network


def _rows(head: str, words: tuple[str, ...], setting: float, *directions: Mapping[str, Tensor]) -> Iterator[Row]:
    """The cosine of two directions, or the partial correlation given a third, of each layer and of all.

    A layer of which a direction is zero has no angle and no row.
    """
    found = (alignment if len(directions) == 2 else partial_correlation)(*directions)
    name, _, variant = head.partition(", ")
    row = {"head": name, "quantity": ", ".join(filter(None, (words[0], variant, *words[1:]))), "setting": setting}
    for layer, value in found.layers.items():
        if all(bool(direction[f"{layer}.weight"].any()) for direction in directions):
            yield row | {"layer": layer, "value": value}
    yield row | {"layer": ALL, "value": found.whole}
