"""Head conditioning: singular values of the Jacobian d svec(Z) / dX of pooling heads at the features X of real images.

Rows, of each head: `CONDITION`, the median over images of the largest / smallest singular value on the range, and `WORST`, the
largest of any image; their setting is the number of Newton-Schulz steps of the published head. `FEATURES` is the condition number
of the features' covariance, the median over images.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from secondorder.pooling import PoolingHead
from secondorder.preconditioning import HEAD_FUNCTIONS, head_spectrum
from studies.preconditioning.backbone import PUBLISHED, Backbone, Measures, Row

CONDITION, WORST, FEATURES = "head condition", "largest head condition", "feature condition"
CONSTANT = 1e-12
"""Features whose variance is at most this share of their mean square are constant: they have no covariance."""


def head_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of all heads; NaN where the features of every image are constant."""
    features = head_features(backbone)
    features = features[varying(features)]
    for head, options in variants(backbone.measures):
        values = head_spectrum(features, head, **options).condition if len(features) else torch.tensor([torch.nan])
        row = {"head": head, "setting": float(next(iter(options.values()), torch.nan))}
        yield row | {"quantity": CONDITION, "value": float(values.quantile(0.5))}
        yield row | {"quantity": WORST, "value": float(values.max())}
    if len(features):
        kappa = head_spectrum(features, "covariance").feature_condition
        yield {"quantity": FEATURES, "value": float(kappa.quantile(0.5))}


def variants(measures: Measures) -> list[tuple[str, dict[str, Any]]]:
    """Heads with their options: those of the study and the logarithm, and the published one with every number of steps."""
    plain = [head for head in (*measures.heads, "gcp_log") if head in HEAD_FUNCTIONS and head != "gcp"]
    steps = sorted({*measures.newton_schulz_steps, PUBLISHED})
    return [*((head, {}) for head in dict.fromkeys(plain)), *(("gcp", {"num_iter": n}) for n in steps)]


@torch.no_grad()
def head_features(backbone: Backbone) -> Tensor:
    """Features `[N, C, H, W]` below the pooling, after the reduction, in float64, normalised as in the large batch."""
    network = copy.deepcopy(backbone.shared.model).double()
    assert isinstance(network.head, PoolingHead)
    images, _ = backbone.images(backbone.measures.head_images)
    features: Tensor = network.head.reduction(network.features(network.stem(images.double())))
    return features.cpu()


def varying(features: Tensor) -> Tensor:
    """Which images `[N]` have features that are not the same at all positions."""
    x = features.flatten(2)
    return x.var(-1, correction=0).sum(1) > CONSTANT * x.square().mean(-1).sum(1)
