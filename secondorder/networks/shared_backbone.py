"""One trained backbone under other poolings, each with a classifier that is fitted to its features."""

import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, check_number
from secondorder.networks.composition import Network
from secondorder.optional import needed_by
from secondorder.pooling import PoolingHead, pooling_head
from secondorder.pooling.layout import as_maps

STEPS = 3000
"""Steps of L-BFGS for a classifier, at most."""


def maps_below_pooling(network: nn.Module, images: Tensor) -> Tensor:
    """What the pooling of a network sees of images: its features `[N, C, H, W]`, after the reduction of the head.

    Raises InputError for a network whose head is no `PoolingHead`.
    """
    own, head = _with_head(network)
    maps: Tensor = head.reduction(as_maps(own.features(own.stem(images)), head.layout))
    return maps


def _with_head(network: nn.Module) -> tuple[Network, PoolingHead]:
    if not (isinstance(network, Network) and isinstance(network.head, PoolingHead)):
        raise InputError(
            f"{type(network).__name__}: must be a Network whose head is a PoolingHead; see replace_pooling"
        )
    return network, network.head


class SharedBackbone:
    """The backbone of a network, with the reduction of its head, under other poolings.

    The features of all images are computed once, with the statistics that the network has as constants: those of a batch with
    `frozen_at`. The network itself stays as it is.

    Args:
        network: a `Network` with a `PoolingHead`, in eval mode.
        batches: images and labels `[n]` that classifiers are fitted to, not augmented; a data loader, for example.
        penalty: of the classifiers, which minimise mean cross-entropy + penalty / 2 |W|^2 (scikit-learn's L-BFGS).

    Raises:
        InputError: for another network, one in training mode, a penalty that is not positive, and no images.
    """

    def __init__(self, network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], penalty: float) -> None:
        self.network, _ = _with_head(network)
        if network.training:
            raise InputError("a network in training mode has no features of a single image; use .eval(), or frozen_at")
        check_number("penalty", penalty, 0, math.inf, "()")
        self.penalty = penalty
        parameter = next(network.parameters())
        with torch.no_grad():
            found = [(maps_below_pooling(network, images.to(parameter)), labels) for images, labels in batches]
        if not found:
            raise InputError("needs images to fit classifiers to, got no batch")
        self._maps = [maps for maps, _ in found]
        self.labels = torch.cat([labels for _, labels in found])

    def under(self, pooling: str, labels: Tensor | None = None) -> Network:
        """The backbone under a key of POOLINGS with a fitted classifier, a copy in eval mode.

        `labels`, as many as there are images, replace the given ones, as a control. Raises InputError for another pooling, and
        unless all classes of the network are among the labels; MissingLibraryError without scikit-learn.
        """
        chosen, classes = self.labels if labels is None else labels, self.network.num_classes
        if chosen.shape != self.labels.shape or len(chosen.unique()) != classes:
            raise InputError(
                f"labels {list(chosen.shape)} of {len(chosen.unique())} classes, for {len(self.labels)} images and a network of "
                f"{classes} classes; use images of every class"
            )
        own, old = _with_head(copy.deepcopy(self.network))
        parameter = next(own.parameters())
        reduced = [part.out_channels for part in old.reduction if isinstance(part, nn.Conv2d)]
        made = pooling_head(pooling, reduced[-1] if reduced else old.in_channels)
        head = PoolingHead(old.in_channels, old.reduction, made.layers, made.out_features, old.layout)
        head = head.to(parameter).eval()
        with torch.no_grad():
            pooled = torch.cat([head.layers(part) for part in self._maps])
        weight, bias = _fitted(pooled, chosen, self.penalty)
        classifier = nn.Linear(head.out_features, len(weight)).to(parameter)
        with torch.no_grad():
            classifier.weight.copy_(weight)
            classifier.bias.copy_(bias)
        return Network(own.stem, own.features, head, classifier, layout=own.layout).eval()


def _fitted(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight `[K, D]` and bias `[K]` of the classifier; of two classes each gets half of scikit-learn's one row."""
    with needed_by("a shared backbone"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    fit = LogisticRegression(C=1 / (len(features) * penalty), max_iter=STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fit.fit(features.double().cpu().numpy(), labels.cpu().numpy())
    if any(issubclass(one.category, ConvergenceWarning) for one in caught):  # which advises on settings of scikit-learn
        steps = int(fit.n_iter_.max())
        warnings.warn(
            f"a classifier of a shared backbone has not converged in {steps} steps; raise its penalty {penalty:g}",
            stacklevel=3,
        )
    weight, bias = torch.as_tensor(fit.coef_), torch.as_tensor(fit.intercept_)
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias
