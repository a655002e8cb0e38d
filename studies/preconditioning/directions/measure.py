"""Two heads on one backbone: does a GCP head's gradient point where K-FAC turns the GAP head's gradient (theory T6.1)?

For the weights of every convolution of the backbone, g is the gradient of the mean cross-entropy under a head, and P the K-FAC
preconditioner of the network with the GAP head, both with batch norm in training mode, as training has them: with its
statistics as constants, gradients under all heads share a part along the scale of the features that training does not have.
Rows, each for a layer (in the network's order) or for "all":

    measure          of                                  head               setting
    plain            cos(g_head, g_gap)                  every other head   ""
    preconditioned   cos(g_head, P g_gap)                every other head   damping, or natural gradient
    partial          the same beside their part along    every other head   damping, or natural gradient
                     g_gap
    turn             cos(g_gap, P g_gap)                 gap                damping, or natural gradient
    cg_residual, cg_iterations,
    cg_converged                 of the natural gradient gap                natural gradient

`batch` is WHOLE for the gradient of all reference images at once, which are also those of P, and else the number of a
mini-batch: its noise is common to the gradients under all heads, and may hide or feign what they share. The controls: a
covariance head without the root; a GCP head with random weights in its classifier; a GCP head fitted to permuted labels, whose
gradients are taken with them too. Everything is in float32: float64
changes no cosine by more than 1e-3, and takes twice as long.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secondorder.networks import Network
from secondorder.preconditioning import (
    Alignment,
    KFACDirections,
    alignment,
    loss_gradient,
    natural_gradient_direction,
    partial_correlation,
)
from secondorder.preconditioning.directions import Direction
from studies.preconditioning.situation import Row, Situation, row
from studies.shared_backbone import evenly_spaced

PART = "directions"
ALL = "all"
"""The layer of rows of all convolutions as one vector."""
WHOLE = -1
"""The `batch` of the gradient of the reference images."""
NATURAL = "natural gradient"
"""The setting with the exact Gauss-Newton matrix of the reference images, over all convolutions together."""
NATURAL_DAMPING = 0.01
"""Relative, as K-FAC's default is."""
CONTROLS = ("covariance", "random", "permuted")
"""Heads for which "GCP acts like K-FAC" predicts less than for GCP."""


Gradients = Mapping[str, Mapping[int, Direction]]
"""The gradient under each head of each mini-batch, and of the reference images."""


@dataclass(frozen=True)
class Head:
    """A network on the shared backbone, and the labels of all training images that its gradients are taken with."""

    network: Network
    labels: Tensor


def measure(situation: Situation) -> list[Row]:
    """The rows of one backbone."""
    heads, batches = every_head(situation), numbered_batches(situation)
    gap = heads["gap"].network
    convolutions = backbone_convolutions(gap)
    gradients = {name: head_gradients(head, batches, convolutions) for name, head in heads.items()}
    indices, images = batches[WHOLE]
    reference = images, heads["gap"].labels[indices]
    kfac = KFACDirections(gap, reference, params=convolutions)
    found = [*plain_rows(gradients), *kfac_rows(kfac, gradients, situation.settings.dampings)]
    if situation.settings.natural_gradient:
        found += natural_rows(gap, reference, gradients)
    return found


def numbered_batches(situation: Situation) -> dict[int, tuple[Tensor, Tensor]]:
    """By `batch`: the numbers of the images among all training images, and the images in float32."""
    batches = zip(situation.mini_batch_indices(), situation.mini_batches(), strict=True)
    found = {number: (indices, images.float()) for number, (indices, (images, _)) in enumerate(batches)}
    everything = evenly_spaced(len(situation.data.train), situation.settings.reference_images)
    return found | {WHOLE: (everything, situation.reference[0].float())}


def backbone_convolutions(network: Network) -> list[str]:
    """The names of the weights of the convolutions in stem and features, first to last."""
    modules = dict(network.named_modules())
    names = (name for name, _ in network.named_parameters() if name.startswith(("stem.", "features.")))
    return [n for n in names if n.endswith(".weight") and isinstance(modules[n.removesuffix(".weight")], nn.Conv2d)]


def every_head(situation: Situation) -> dict[str, Head]:
    """The heads of the study and the two other controls; what is random is fixed by the seed."""
    labels = situation.data.train.labels
    random = np.random.default_rng([situation.seed, len(labels)])  # not the numbers that draw the mini-batches
    permuted = labels[torch.from_numpy(random.permutation(len(labels)))]
    networks = situation.training_heads.items()
    heads = {name: Head(copy.deepcopy(network).float(), labels) for name, network in networks}
    heads["random"] = Head(with_random_classifier(heads["gcp"].network, random), labels)
    heads["permuted"] = Head(situation.with_head("gcp", permuted).float().train(), permuted)
    return heads


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


def head_gradients(
    head: Head, batches: Mapping[int, tuple[Tensor, Tensor]], convolutions: list[str]
) -> dict[int, Direction]:
    """The gradient of each batch by its number."""
    return {
        number: loss_gradient(head.network, (images, head.labels[indices].to(images.device)), params=convolutions)
        for number, (indices, images) in batches.items()
    }


def plain_rows(gradients: Gradients) -> Iterator[Row]:
    """cos(g_head, g_gap)."""
    for head in others(gradients):
        for batch, g_gap in gradients["gap"].items():
            yield from rows(alignment, [gradients[head][batch], g_gap], head, "", "plain", batch)


def kfac_rows(kfac: KFACDirections, gradients: Gradients, dampings: Sequence[float]) -> Iterator[Row]:
    """Everything with P of K-FAC, factors of the reference images, at every damping."""
    for damping in dampings:
        for batch, g_gap in gradients["gap"].items():
            yield from compared(gradients, batch, kfac.direction(g_gap, damping), damping)


def natural_rows(gap: Network, reference: tuple[Tensor, Tensor], gradients: Gradients) -> Iterator[Row]:
    """Everything with P the inverse of the exact Gauss-Newton matrix, to three digits, of the reference images' gradient."""
    found = natural_gradient_direction(
        gap, reference, NATURAL_DAMPING, gradient=gradients["gap"][WHOLE], tolerance=1e-3, iterations=300
    )
    yield from compared(gradients, WHOLE, found.direction, NATURAL)
    solution = found.solution
    measures = {"residual": solution.residual, "iterations": solution.iterations, "converged": solution.converged}
    for name, value in measures.items():
        yield row(PART, ALL, "gap", NATURAL, f"cg_{name}", value, WHOLE)


def compared(gradients: Gradients, batch: int, P_g: Direction, setting: object) -> Iterator[Row]:
    """P g_gap against g_gap, and against the gradients under the other heads."""
    g_gap = gradients["gap"][batch]
    yield from rows(alignment, [g_gap, P_g], "gap", setting, "turn", batch)
    for head in others(gradients):
        g_head = gradients[head][batch]
        yield from rows(alignment, [g_head, P_g], head, setting, "preconditioned", batch)
        yield from rows(partial_correlation, [g_head, P_g, g_gap], head, setting, "partial", batch)


def others(gradients: Gradients) -> list[str]:
    """The heads that are compared with GAP."""
    return [head for head in gradients if head != "gap"]


def rows(
    compare: Callable[..., Alignment], directions: list[Direction], head: str, setting: object, measure: str, batch: int
) -> Iterator[Row]:
    """A row for each layer and one for all, to five digits: more is noise, and there are many rows.

    A layer of which a gradient is zero has no angle and no row.
    """
    found = compare(*directions)
    flat = [name for name in directions[0] if not all(bool(direction[name].any()) for direction in directions)]
    for layer, value in found.layers.items():
        if f"{layer}.weight" not in flat:
            yield row(PART, layer, head, setting, measure, round(value, 5), batch)
    if len(flat) < len(found.layers):
        yield row(PART, ALL, head, setting, measure, round(found.whole, 5), batch)
