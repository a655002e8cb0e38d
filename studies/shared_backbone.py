"""One trained backbone under another pooling head, with the classifier that suits it."""

import copy
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from secondorder.data import ImageDataset
from secondorder.errors import InputError
from secondorder.networks import NETWORKS, Network
from secondorder.pooling import PoolingHead, pooling_head

BATCH = 256
MOST_IMAGES, STEPS = 2000, 300
"""Training images and steps of L-BFGS at most for the classifier."""


def evenly_spaced(total: int, count: int) -> Tensor:
    """`count` (or all) of the indices below `total`, evenly spaced: of images in the order of their classes, all classes."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()


def published_stride(backbone: str) -> int | None:
    """The last stride of the published GCP network, for every head: then networks differ in nothing but the head."""
    strides = NETWORKS[backbone].last_stride if backbone in NETWORKS else None
    return None if strides is None else strides[1]


def check_sharing(data: ImageDataset, weight_decay: float) -> None:
    """InputError unless a classifier can be fitted: a penalty, and images of every class."""
    if weight_decay <= 0:
        raise InputError(f"weight_decay {weight_decay}: a shared backbone needs a positive one; or share none")
    classes = len(data.train.labels[evenly_spaced(len(data.train), MOST_IMAGES)].unique())
    if classes < data.num_classes:
        raise InputError(
            f"only {classes} of {data.num_classes} classes among the training images; use more, or share none"
        )


def with_head(
    model: nn.Module,
    pooling: str,
    data: ImageDataset,
    weight_decay: float,
    labels: Tensor | None = None,
    most_images: int = MOST_IMAGES,
) -> Network:
    """A copy of a Network (in eval mode) with another pooling and a classifier fitted on its features; a reduction stays.

    The classifier minimises mean cross-entropy + weight_decay / 2 |W|^2 over evenly spaced training images, not augmented
    (scikit-learn's L-BFGS), so that every head is compared at a classifier of its own for the same features. `labels` of all
    training images replace the given ones, as a control. At most `most_images` images are used.
    """
    assert isinstance(model, Network)
    old = model.head
    assert isinstance(old, PoolingHead)
    shared = copy.deepcopy(model)
    assert isinstance(shared.head, PoolingHead)
    parameter = next(model.parameters())
    reduced = [part.out_channels for part in old.reduction if isinstance(part, nn.Conv2d)]
    channels = reduced[-1] if reduced else old.in_channels
    layers = pooling_head(pooling, channels)
    head = PoolingHead(old.in_channels, shared.head.reduction, layers.layers, layers.out_features).to(parameter).eval()
    indices = evenly_spaced(len(data.train), most_images)
    with torch.no_grad():
        features = torch.cat([
            head(shared.features(shared.stem(data.train.plain(part)[0].to(parameter))))
            for part in indices.split(BATCH)
        ])  # fmt: skip
    weight, bias = _fitted(features, (data.train.labels if labels is None else labels)[indices], weight_decay)
    classifier = nn.Linear(head.out_features, data.num_classes).to(parameter)
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)
    return Network(shared.stem, shared.features, head, classifier).eval()


def _fitted(features: Tensor, labels: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Weight `[K, D]` and bias `[K]` of the classifier; of two classes each gets half of scikit-learn's one row."""
    fit = LogisticRegression(C=1 / (len(features) * weight_decay), max_iter=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early it is the same procedure for every head
        fit.fit(features.double().cpu().numpy(), labels.numpy())
    weight, bias = fit.coef_, fit.intercept_
    if len(weight) == 1:
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return torch.as_tensor(weight), torch.as_tensor(bias)
