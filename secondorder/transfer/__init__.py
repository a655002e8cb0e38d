"""Transfer: do features of a classification network serve detection, segmentation and other tasks?

from secondorder.transfer import CocoDataset, detection_metrics, detections, detector, find_splits, fine_tune, read_coco
from secondorder.transfer import training_transform

splits = find_splits(root, "nuclei")  # or any folder with annotations/instances_<split>.json and <split>/
window = training_transform(crop=96, flips=("horizontal", "vertical"))
train = CocoDataset(read_coco(*splits["train"], masks=True), masks=True, transform=window)
val = CocoDataset(read_coco(*splits["val"], masks=True), masks=True)

model = detector(network, len(train.classes), task="masks", adaptation="gcp_m", frozen=True)
losses = fine_tune(model, train, epochs=8)  # SGD; or a loop of your own over model(images, targets)

metrics = detection_metrics(val, detections(model, val))
metrics["masks"].numbers["AP50"]
"""

from secondorder.transfer.augmentation import FLIPS, TrainingTransform, training_transform
from secondorder.transfer.coco import PRESETS, CocoAnnotations, find_splits, read_coco
from secondorder.transfer.dataset import CocoDataset, Target, collate
from secondorder.transfer.detector import IMAGENET, KINDS, TASKS, detector
from secondorder.transfer.evaluated import Prediction
from secondorder.transfer.fine_tuning import detections, fine_tune
from secondorder.transfer.metrics import NUMBERS, DetectionMetrics, detection_metrics
from secondorder.transfer.probes import POOLED, DenseScore, dense_probe, few_shot, linear_probe, pooled_features
from secondorder.transfer.pyramid import ADAPTATIONS, FeaturePyramid
from secondorder.transfer.records import CHECKS, CocoImage, CocoObject

__all__ = [
    "ADAPTATIONS",
    "CHECKS",
    "FLIPS",
    "IMAGENET",
    "KINDS",
    "NUMBERS",
    "POOLED",
    "PRESETS",
    "TASKS",
    "CocoAnnotations",
    "CocoDataset",
    "CocoImage",
    "CocoObject",
    "DenseScore",
    "DetectionMetrics",
    "FeaturePyramid",
    "Prediction",
    "Target",
    "TrainingTransform",
    "collate",
    "dense_probe",
    "detection_metrics",
    "detections",
    "detector",
    "few_shot",
    "find_splits",
    "fine_tune",
    "linear_probe",
    "pooled_features",
    "read_coco",
    "training_transform",
]
