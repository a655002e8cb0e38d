"""One trained backbone under another pooling head, with the classifier that suits it."""

import copy
import warnings
from functools import cached_property

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from secondorder.data import ImageDataset
from secondorder.errors import InputError
from secondorder.networks import Network
from secondorder.pooling import PoolingHead, pooling_head

BATCH = 256
MOST_IMAGES, STEPS = 2000, 3000
"""Training images and steps of L-BFGS at most for the classifier."""


def evenly_spaced(total: int, count: int) -> Tensor:
    """`count` (or all) of the indices below `total`, evenly spaced: of images in the order of their classes, all classes."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()


def check_sharing(data: ImageDataset, weight_decay: float) -> None:
    """InputError unless a classifier can be fitted: a penalty, and images of every class."""
    if weight_decay <= 0:
        raise InputError(f"weight_decay {weight_decay}: a shared backbone needs a positive one; or share none")
    classes = len(data.train.labels[evenly_spaced(len(data.train), MOST_IMAGES)].unique())
    if classes < data.num_classes:
        raise InputError(
            f"only {classes} of {data.num_classes} classes among the training images; use more, or share none"
        )


class SharedBackbone:
    """A Network in eval mode whose backbone, with the reduction of its head, gets other poolings.

    Classifiers are fitted on at most `most_images` evenly spaced training images, not augmented, whose features are computed
    once for all heads.
    """

    def __init__(
        self, model: nn.Module, data: ImageDataset, weight_decay: float, most_images: int = MOST_IMAGES
    ) -> None:
        assert isinstance(model, Network)
        assert not model.training
        self.model = model
        self.data = data
        self.weight_decay = weight_decay
        self.indices = evenly_spaced(len(data.train), most_images)

    @cached_property
    def _features(self) -> list[Tensor]:
        """`[n, C, H, W]` of parts of the images, after the reduction."""
        model, parameter = self.model, next(self.model.parameters())
        assert isinstance(model.head, PoolingHead)
        with torch.no_grad():
            return [
                model.head.reduction(model.features(model.stem(self.data.train.plain(part)[0].to(parameter))))
                for part in self.indices.split(BATCH)
            ]

    def with_head(self, pooling: str, labels: Tensor | None = None) -> Network:
        """A copy of the network with this pooling and a classifier fitted on its features, in eval mode.

        The classifier minimises mean cross-entropy + weight_decay / 2 |W|^2 (scikit-learn's L-BFGS), so that every head is
        compared at a classifier of its own for the same features. `labels` of all training images replace the given ones, as
        a control.
        """
        shared, data, parameter = copy.deepcopy(self.model), self.data, next(self.model.parameters())
        old = shared.head
        assert isinstance(old, PoolingHead)
        reduced = [part.out_channels for part in old.reduction if isinstance(part, nn.Conv2d)]
        layers = pooling_head(pooling, reduced[-1] if reduced else old.in_channels)
        head = PoolingHead(old.in_channels, old.reduction, layers.layers, layers.out_features).to(parameter).eval()
        with torch.no_grad():
            pooled = torch.cat([head.layers(part) for part in self._features])
        own = (data.train.labels if labels is None else labels)[self.indices]
        weight, bias = _fitted(pooled, own, self.weight_decay)
        classifier = nn.Linear(head.out_features, data.num_classes).to(parameter)
        with torch.no_grad():
            classifier.weight.copy_(weight)
            classifier.bias.copy_(bias)
        return Network(shared.stem, shared.features, head, classifier).eval()


def _fitted(features: Tensor, labels: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Weight `[K, D]` and bias `[K]` of the classifier; of two classes each gets half of scikit-learn's one row."""
    fit = LogisticRegression(C=1 / (len(features) * weight_decay), max_iter=STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fit.fit(features.double().cpu().numpy(), labels.numpy())
    if any(issubclass(one.category, ConvergenceWarning) for one in caught):  # which advises on settings of scikit-learn
        steps = int(fit.n_iter_.max())
        warnings.warn(
            f"a classifier of a shared backbone has not converged in {steps} steps; raise weight_decay {weight_decay:g}",
            stacklevel=3,
        )
    weight, bias = fit.coef_, fit.intercept_
    if len(weight) == 1:
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return torch.as_tensor(weight), torch.as_tensor(bias)
