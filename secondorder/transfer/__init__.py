"""Transfer: do features of a classification network serve detection and segmentation?

from secondorder.transfer import detector

model = detector(network, classes=3, adaptation="gcp_m", frozen=True)
losses = model.train()(images, targets)
"""

from secondorder.transfer.detector import IMAGENET, KINDS, TASKS, detector
from secondorder.transfer.probes import POOLED, DenseScore, dense_probe, few_shot, linear_probe, pooled_features
from secondorder.transfer.pyramid import ADAPTATIONS, FeaturePyramid

__all__ = [
    "ADAPTATIONS",
    "IMAGENET",
    "KINDS",
    "POOLED",
    "TASKS",
    "DenseScore",
    "FeaturePyramid",
    "dense_probe",
    "detector",
    "few_shot",
    "linear_probe",
    "pooled_features",
]
