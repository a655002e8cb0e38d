"""Part B measured: forms of GCP's backward pass against the exact one, for the gradient that a fitted head sends down.

At a layer's features X, dL/dZ is that of the mean cross-entropy of a fitted GCP head (published, 5 Newton-Schulz steps); the same
dL/dZ goes through every form, so that only the backward map differs. `newton_schulz` is the published head's own backward pass.
Rows of the part "forms", the form as `setting`: `cosine` and `relative_error` of dL/dX, over all images together, against the
exact form, and `weight_cosine` and `weight_relative_error` of the gradient of the convolution below, dL/dX dX/dW, what the
published table compares.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from secondorder.networks import Network
from secondorder.pooling import PoolingHead
from secondorder.preconditioning import FORMS, gcp_backward
from studies.preconditioning.forms.layers import cut_networks, last_convolution
from studies.preconditioning.situation import Row, Situation, row

PART = "forms"
NEWTON_SCHULZ = "newton_schulz"
EXACT = "exact"


def measure(situation: Situation) -> list[Row]:
    """The rows of one backbone, layer by layer; a layer whose gradient is zero has none."""
    images, labels = situation.some_images(situation.settings.images)
    rows = []
    for layer, network in cut_networks(situation):
        compared = compare(network, images.double(), labels)
        rows += [row(PART, layer, "gcp", form, name, value) for (form, name), value in compared.items()]
    return rows


def compare(network: Network, images: Tensor, labels: Tensor) -> dict[tuple[str, str], float]:
    """(form, measure) -> value, for a network with a GCP head."""
    head = network.head
    assert isinstance(head, PoolingHead)
    weight = last_convolution(network).weight
    network.requires_grad_(False)
    weight.requires_grad_()
    with torch.enable_grad():
        X = head.reduction(network.features(network.stem(images)))
        gradients = backward_passes(network, head, X.detach(), labels)
        of_weight = {
            form: torch.autograd.grad(X, weight, gradient, retain_graph=True)[0] for form, gradient in gradients.items()
        }
    result = {}
    for prefix, found in (("", gradients), ("weight_", of_weight)):
        exact = found.pop(EXACT).flatten()
        if exact.norm() > 0:
            for form, gradient in found.items():
                for name, value in against(gradient.flatten(), exact).items():
                    result[form, prefix + name] = value
    return result


def backward_passes(network: Network, head: PoolingHead, X: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Form -> dL/dX `[N, C, H, W]`, all of the same dL/dZ."""
    X = X.requires_grad_()
    z = head.layers(X)
    (g,) = torch.autograd.grad(cross_entropy(network.classifier(z), labels), z, retain_graph=True)
    (published,) = torch.autograd.grad(z, X, g)
    return {NEWTON_SCHULZ: published, **{form: gcp_backward(X, g, form) for form in FORMS}}


def against(gradient: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine and relative error; a gradient of zero has no cosine."""
    result = {"relative_error": float((gradient - exact).norm() / exact.norm())}
    if gradient.norm() > 0:
        result["cosine"] = float(gradient @ exact / (gradient.norm() * exact.norm()))
    return result
