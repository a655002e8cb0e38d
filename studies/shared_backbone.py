"""One trained backbone under another pooling head, with the classifier that suits it."""

import copy

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from secondorder.data import ImageDataset
from secondorder.networks import Network
from secondorder.pooling import pooling_head

BATCH = 512


def can_share(model: nn.Module) -> bool:
    """Whether the backbone's last feature map goes straight into the pooling: a reduction would have to be trained anew."""
    return isinstance(model, Network) and len(model.head.reduction) == 0  # type: ignore[arg-type]


def with_head(
    model: nn.Module, pooling: str, data: ImageDataset, weight_decay: float, iterations: int = 1000
) -> Network:
    """A copy of the model (in eval mode, of one sample at a time) with another head and a classifier fitted on its features.

    The classifier minimises mean cross-entropy + weight_decay / 2 |W|^2 over the training images, not augmented
    (scikit-learn's L-BFGS), so that every head is compared at its own best classifier of the same features.
    """
    assert isinstance(model, Network)
    parameter = next(model.parameters())
    head = pooling_head(pooling, model.head.in_channels).to(parameter)  # type: ignore[arg-type]
    shared = copy.deepcopy(model)
    with torch.no_grad():
        features = torch.cat([
            head(shared.features(shared.stem(data.train.plain(part)[0].to(parameter))))
            for part in torch.arange(len(data.train)).split(BATCH)
        ])  # fmt: skip
    count = len(features)
    fit = LogisticRegression(C=1 / (count * weight_decay), max_iter=iterations)
    fit.fit(features.double().cpu().numpy(), data.train.labels.numpy())
    classifier = nn.Linear(head.out_features, data.num_classes).to(parameter)
    with torch.no_grad():
        classifier.weight.copy_(torch.as_tensor(fit.coef_))
        classifier.bias.copy_(torch.as_tensor(fit.intercept_))
    return Network(shared.stem, shared.features, head, classifier).eval()
