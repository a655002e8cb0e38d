"""The published approximation of GCP's backward pass against the exact one, at the features below the pooling.

dL/dZ is that of the mean cross-entropy under a fitted GCP head, and goes through every form of dZ/dX in `FORMS` of
`secondorder.preconditioning`, so that these differ in the backward map alone; `NEWTON_SCHULZ` is the published head's own. Rows,
the form as layer: the cosine to the exact form, of dL/dX over all images together and of the gradient dL/dW = dL/dX dX/dW of the
last convolution, which the published table compares.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from secondorder.networks import Network
from secondorder.pooling import PoolingHead
from secondorder.preconditioning import FORMS, gcp_backward
from studies.preconditioning.backbone import Backbone, Row, convolutions

NEWTON_SCHULZ, EXACT = "newton_schulz", "exact"
COSINE = "cosine to the exact backward pass"
FEATURES, WEIGHTS = "dL/dX", "dL/dW"


def backward_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of the GCP head; NaN where a gradient is zero."""
    images, labels = backbone.images(backbone.measures.head_images)
    network = copy.deepcopy(backbone.networks["gcp"]).double()
    for of, gradients in backward_gradients(network, images.double(), labels).items():
        exact = gradients[EXACT].flatten()
        for form in (name for name in gradients if name != EXACT):
            gradient = gradients[form].flatten()
            cosine = float(gradient @ exact / (gradient.norm() * exact.norm()))
            yield {"head": "gcp", "layer": form, "quantity": f"{COSINE}, {of}", "value": cosine}


def backward_gradients(network: Network, images: Tensor, labels: Tensor) -> Mapping[str, Mapping[str, Tensor]]:
    """dL/dX `[N, C, H, W]` and dL/dW of the last convolution, by form, all of the same dL/dZ."""
    assert isinstance(network.head, PoolingHead)
    weight = network.get_parameter(convolutions(network)[-1])
    below = network.head.reduction(network.features(network.stem(images)))
    X = below.detach().requires_grad_()
    z = network.head.layers(X)
    (g,) = torch.autograd.grad(cross_entropy(network.classifier(z), labels), z, retain_graph=True)
    (published,) = torch.autograd.grad(z, X, g)
    gradients = {NEWTON_SCHULZ: published, **{form: gcp_backward(X, g, form) for form in FORMS}}
    weights = {f: torch.autograd.grad(below, weight, dX, retain_graph=True)[0] for f, dX in gradients.items()}
    return {FEATURES: gradients, WEIGHTS: weights}
