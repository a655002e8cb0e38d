"""What pooling heads do at the features X of real images: singular values of their Jacobian, and GCP's backward pass.

Rows of `head_rows`, of each head: `CONDITION`, the median over images of the largest / smallest singular value of d svec(Z) / dX
on the range, and `WORST`, the largest of any image; their setting is the number of Newton-Schulz steps of the published head.
`FEATURES` is the condition number of the features' covariance, the median over images.

Rows of `backward_rows`: dL/dZ of the mean cross-entropy under a fitted GCP head goes through every form of dZ/dX in `FORMS` of
`secondorder.preconditioning`, so that these differ in the backward map alone; `NEWTON_SCHULZ` is the published head's own. With
the form as layer, the cosine to the exact form of dL/dX over all images together and of the gradient dL/dW = dL/dX dX/dW of the
last convolution, which the published table compares.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from secondorder.networks import maps_below_pooling
from secondorder.preconditioning import FORMS, HEAD_FUNCTIONS, gcp_backward, head_spectrum, varying_images
from studies.backbones import convolutions
from studies.engine.records import Row
from studies.preconditioning.backbone import PUBLISHED, Backbone

CONDITION, WORST, FEATURES = "head condition", "largest head condition", "feature condition"
NEWTON_SCHULZ, EXACT = "newton_schulz", "exact"
COSINES = {of: f"cosine to the exact backward pass, {of}" for of in ("dL/dX", "dL/dW")}


@torch.no_grad()
def head_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of all heads, and of the logarithm, at features with the statistics of the large batch; NaN where all are constant."""
    measures = backbone.measures
    images, _ = backbone.images(measures.head_images)
    features = maps_below_pooling(copy.deepcopy(backbone.frozen).double(), images.double()).cpu()
    features = features[varying_images(features)]
    plain = [h for h in dict.fromkeys((*measures.heads, "gcp_log")) if h in HEAD_FUNCTIONS and h != "gcp"]
    cases: list[tuple[str, dict[str, Any]]] = [(head, {}) for head in plain]
    cases += [("gcp", {"num_iter": n}) for n in sorted({*measures.newton_schulz_steps, PUBLISHED})]
    for head, options in cases:
        values = head_spectrum(features, head, **options).condition if len(features) else torch.tensor([torch.nan])
        row = {"head": head, "setting": float(options.get("num_iter", torch.nan))}
        yield row | {"quantity": CONDITION, "value": float(values.quantile(0.5))}
        yield row | {"quantity": WORST, "value": float(values.max())}
    if len(features):
        kappa = head_spectrum(features, "covariance").feature_condition
        yield {"quantity": FEATURES, "value": float(kappa.quantile(0.5))}


def backward_rows(backbone: Backbone) -> Iterator[Row]:
    """Rows of the GCP head; NaN where a gradient is zero."""
    images, labels = backbone.images(backbone.measures.head_images)
    network = copy.deepcopy(backbone.networks["gcp"]).double()
    below, weight = maps_below_pooling(network, images.double()), network.get_parameter(convolutions(network)[-1])
    X = below.detach().requires_grad_()
    z = network.head.layers(X)  # type: ignore[operator]
    (g,) = torch.autograd.grad(cross_entropy(network.classifier(z), labels), z, retain_graph=True)
    features = {NEWTON_SCHULZ: torch.autograd.grad(z, X, g)[0], **{form: gcp_backward(X, g, form) for form in FORMS}}
    weights = {f: torch.autograd.grad(below, weight, dX, retain_graph=True)[0] for f, dX in features.items()}
    for quantity, gradients in zip(COSINES.values(), (features, weights), strict=True):
        exact = gradients.pop(EXACT).flatten()
        for form, gradient in gradients.items():
            cosine = float(gradient.flatten() @ exact / (gradient.norm() * exact.norm()))
            yield {"head": "gcp", "layer": form, "quantity": quantity, "value": cosine}
