"""Does the gradient under a GCP head point where K-FAC turns the gradient under the GAP head?

For the weights of every convolution, g is the gradient of the mean cross-entropy of one large batch under a head, and P the K-FAC
preconditioner of the network with the GAP head, with factors of the same images. Batch norm is in training mode. Rows, of each
convolution and of `ALL`, all of them as one vector:

    PLAIN      cos(g_head, g_gap)                       other heads
    WITH_P     cos(g_head, P g_gap)                     other heads      setting: the damping of P
    TURN       cos(g_gap, P g_gap)                      gap              setting: the damping of P
    PARTIAL    cos of what is left of g_head and of P g_gap without their parts along g_gap, the partial correlation

The last three also of other P: the natural gradient, powers of K-FAC's (1/2 is what methods with the root of a curvature take),
and U V^T of g_gap = U diag(s) V^T, Muon's.

An unrelated P, which turns g_gap as far but in a random direction, gives WITH_P = PLAIN TURN and PARTIAL = 0 in expectation: only
PARTIAL is evidence. The controls: a GCP head with random weights in its classifier, and one fitted to permuted labels, whose
gradients are taken with them too.
"""

import copy
from collections.abc import Iterator
from typing import Any

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
    orthogonal_direction,
    partial_correlation,
)
from secondorder.preconditioning.directions import Direction
from studies.backbones import convolutions, evenly_spaced
from studies.engine.records import Row
from studies.preconditioning.backbone import Backbone

PLAIN, WITH_P, TURN, PARTIAL = "cosine", "cosine with P", "turn by P", "partial correlation"
ALL = "all convolutions"
RANDOM, PERMUTED, NATURAL = "random classifier", "permuted labels", "natural gradient"
"""Ends of names of quantities: two controls, and P the inverse of the exact Gauss-Newton matrix of all convolutions."""
POWERS, MUON = {"P^1/4": 0.25, "P^1/2": 0.5}, "Muon"
"""Further ends: K-FAC's P to a power, and the orthogonalised gradient, which has no damping."""
RESIDUAL = "residual of the natural gradient"


def gradient_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of all heads and controls, in float32: float64 changes no cosine by more than 1e-3."""
    (images, labels), indices = backbone.batch, evenly_spaced(len(backbone.data.train), backbone.measures.images)
    images, gap = images.float(), copy.deepcopy(backbone.networks["gap"]).float()
    names = convolutions(gap)
    gradients = {
        name: loss_gradient(copy.deepcopy(network).float(), (images, given[indices].to(images.device)), params=names)
        for name, (network, given) in every_head(backbone).items()
    }
    g_gap = gradients.pop("gap")
    kfac = KFACDirections(gap, (images, labels), params=names)
    dampings = sorted({*backbone.measures.dampings, DAMPING})
    turned = {(damping, ""): kfac.direction(g_gap, damping) for damping in dampings}
    turned |= {(DAMPING, f", {name}"): kfac.direction(g_gap, DAMPING, power) for name, power in POWERS.items()}
    turned[np.nan, f", {MUON}"] = orthogonal_direction(g_gap)
    if backbone.measures.natural_gradient:
        options: dict[str, Any] = {"gradient": g_gap, "tolerance": 1e-3, "iterations": 300}
        solved = natural_gradient_direction(gap, (images, labels), DAMPING, **options)
        turned[DAMPING, f", {NATURAL}"] = solved.direction
        yield {"quantity": RESIDUAL, "setting": DAMPING, "value": float(solved.solution.residual)}
    for head, g in gradients.items():
        yield from _rows(head, PLAIN, "", np.nan, g, g_gap)
    for (damping, which), P_g in turned.items():
        yield from _rows("gap", TURN, which, damping, g_gap, P_g)
        for head, g in gradients.items():
            yield from _rows(head, WITH_P, which, damping, g, P_g)
            yield from _rows(head, PARTIAL, which, damping, g, P_g, g_gap)


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


def _rows(head: str, words: str, which: str, setting: float, *directions: Direction) -> Iterator[Row]:
    """The cosine of two directions, or the partial correlation given a third, of each layer and of all.

    `which` names a P that is not K-FAC's. A layer of which a direction is zero has no angle and no row.
    """
    found = (alignment if len(directions) == 2 else partial_correlation)(*directions)
    name, comma, variant = head.partition(",")
    row = {"head": name, "quantity": f"{words}{comma}{variant}{which}", "setting": setting}
    for layer, value in found.layers.items():
        if all(bool(direction[f"{layer}.weight"].any()) for direction in directions):
            yield row | {"layer": layer, "value": value}
    yield row | {"layer": ALL, "value": found.whole}
