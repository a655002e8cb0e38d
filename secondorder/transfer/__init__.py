"""Transfer: COCO-format data sets of any user, and COCO's numbers of detectors.

from secondorder.transfer import CocoDataset, collate, detection_metrics, find_splits, read_coco, training_transform

splits = find_splits(root, "nuclei")  # or any folder with annotations/instances_<split>.json and <split>/
window = training_transform(crop=96, flips=("horizontal", "vertical"))
train = CocoDataset(read_coco(*splits["train"], masks=True), masks=True, transform=window)
val = CocoDataset(read_coco(*splits["val"], masks=True), masks=True)
train.set_epoch(seed, epoch)
image, target = train[0]

metrics = detection_metrics(val, (detector([image / 255])[0] for image, _ in val))
metrics["masks"].numbers["AP50"]
"""

from secondorder.transfer.augmentation import FLIPS, TrainingTransform, training_transform
from secondorder.transfer.coco import PRESETS, CocoAnnotations, find_splits, read_coco
from secondorder.transfer.dataset import CocoDataset, Target, collate
from secondorder.transfer.evaluated import Prediction
from secondorder.transfer.metrics import NUMBERS, DetectionMetrics, detection_metrics
from secondorder.transfer.records import CHECKS, CocoImage, CocoObject

__all__ = [
    "CHECKS",
    "FLIPS",
    "NUMBERS",
    "PRESETS",
    "CocoAnnotations",
    "CocoDataset",
    "CocoImage",
    "CocoObject",
    "DetectionMetrics",
    "Prediction",
    "Target",
    "TrainingTransform",
    "collate",
    "detection_metrics",
    "find_splits",
    "read_coco",
    "training_transform",
]
