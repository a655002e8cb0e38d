"""Is the backward pass of a pooling head a preconditioner? The mathematics as code."""

from secondorder.curvature.conjugate_gradients import CGSolution, conjugate_gradients
from secondorder.preconditioning.alignment import (
    Alignment,
    Bootstrap,
    alignment,
    bootstrap_interval,
    partial_correlation,
)
from secondorder.preconditioning.backward import FORMS, BackwardOperator, backward_operator, gcp_backward
from secondorder.preconditioning.directions import loss_gradient, orthogonal_direction
from secondorder.preconditioning.features import varying_images
from secondorder.preconditioning.head_functions import HEAD_FUNCTIONS
from secondorder.preconditioning.head_spectrum import HeadSpectrum, head_spectrum
from secondorder.preconditioning.kfac_directions import KFACDirections, kfac_direction
from secondorder.preconditioning.natural_gradient import NaturalGradient, natural_gradient_direction
from secondorder.preconditioning.whitening import whitened_features

__all__ = [
    "FORMS",
    "HEAD_FUNCTIONS",
    "Alignment",
    "BackwardOperator",
    "Bootstrap",
    "CGSolution",
    "HeadSpectrum",
    "KFACDirections",
    "NaturalGradient",
    "alignment",
    "backward_operator",
    "bootstrap_interval",
    "conjugate_gradients",
    "gcp_backward",
    "head_spectrum",
    "kfac_direction",
    "loss_gradient",
    "natural_gradient_direction",
    "orthogonal_direction",
    "partial_correlation",
    "varying_images",
    "whitened_features",
]
