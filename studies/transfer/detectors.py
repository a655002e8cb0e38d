"""Detectors that are trained on the features of a network, for small budgets, and their precision."""

import base64
import io
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from secondorder.data import Normalisation
from secondorder.training import Snapshot
from secondorder.transfer import (
    CocoDataset,
    DetectionMetrics,
    Prediction,
    Target,
    detection_metrics,
    detections,
    detector,
    fine_tune,
)
from secondorder.untouched import same_randomness
from studies.engine.records import Row
from studies.transfer.targets import fake_scenes, scenes, scenes_of

FROZEN = ", frozen"
"""Ends the quantities of detectors on a frozen network."""
PRECISIONS = ("AP", "AP50", "AP75")
THIRDS = ("smallest", "middle", "largest")
PICTURE = "picture"
"""Quantity of a picture: `layer` is its data URI, value the average precision of boxes on it, index its rank from below."""
SHOWN = 0.5
"""Score above which a detection is drawn."""
TALLEST = 256
"""Pixels that a picture is enlarged to, by a whole factor."""
RECALIBRATED = 64
"""Training images at most that a frozen network's batch-norm statistics are renewed on."""


@dataclass(frozen=True)
class Model:
    """Size and training of a detector."""

    width: int = 64
    """Channels of the pyramid."""
    hidden: int = 128
    """Units of the box head."""
    roi_size: int = 5
    """Positions a side that the box head sees of a region."""
    proposals: int = 200
    """Regions of an image that reach the second stage, of twice as many before suppression."""
    sampled: int = 64
    """Regions of an image that the box head is trained on."""
    adaptation: str = "none"
    """What is done to a last stage of stride 1 where the published GAP network has stride 2: none, gcp_d or gcp_m."""
    images: int = 60
    """Training images, drawn by the seed (all if there are fewer)."""
    test_images: int = 30
    """Test images, evenly spaced."""
    batch_size: int = 4
    """Images a step."""
    learning_rate: float = 0.02
    """The highest, after the warm-up."""


@dataclass(frozen=True)
class Detection:
    """A data set, with the digest of its annotations, and a detector that is trained on it."""

    data: str
    digest: str
    epochs: int
    frozen: bool
    adapted: bool
    """Whether the model's adaptation is made."""
    pictures: bool
    """Whether the worst and the best test image are drawn."""
    model: Model


def measure_detector(at: Snapshot, of: Detection, root: Path | None) -> Iterator[Row]:
    """COCO's precisions of boxes and masks after training, by threshold and by thirds of the objects' areas."""
    model = of.model
    train, test = scenes(of.data, root, model.images, model.test_images, at.run.seed)
    made = build(at, of, train)
    fine_tune(
        made, train, epochs=of.epochs, batch_size=model.batch_size, learning_rate=model.learning_rate, seed=at.run.seed
    )
    arm, found, extremes = FROZEN if of.frozen else "", detections(made, test), Extremes(test)
    for task, metrics in detection_metrics(test, extremes.watched(found) if of.pictures else found).items():
        for name, value in _numbers(metrics).items():
            quantity = f"{'box' if task == 'boxes' else 'mask'} {name}{arm}"
            yield {"layer": of.data, "quantity": quantity, "setting": float(of.epochs), "value": value}
    for index, (value, uri) in enumerate(extremes.pictures()):
        yield {"layer": uri, "quantity": f"{PICTURE}, {of.data}", "index": index, "value": value}


FAKE_IMAGES = 1
"""Of a step in a dry run: one of 800 pixels takes a minute on a CPU."""


def dry_steps(of: Detection) -> float:
    """How many of its steps the training has; detections of a test image cost about a third of a step of one."""
    model = of.model
    return (model.images * of.epochs + model.test_images / 3) / FAKE_IMAGES


def measure_dry(at: Snapshot, of: Detection) -> Iterator[Row]:
    """One step of training, of all weights, on fake images of the right size."""
    with tempfile.TemporaryDirectory() as folder:
        data = fake_scenes(Path(folder), of.data, FAKE_IMAGES)
        made = build(at, replace(of, frozen=False), data)
        (loss,) = fine_tune(made, data, epochs=1, batch_size=FAKE_IMAGES)
    yield {"layer": of.data, "quantity": "loss", "value": loss}


def build(at: Snapshot, of: Detection, train: CocoDataset) -> Any:
    """The detector on a copy of the network, weights drawn by the seed of the run; if frozen, with new batch-norm statistics."""
    with same_randomness():
        torch.manual_seed(at.run.seed)
        made = _detector(at, of, len(train.classes))
    if of.frozen:
        train.set_epoch(at.run.seed, 0)
        device = next(at.model.parameters()).device
        images = [train[n][0].as_subclass(Tensor).to(device) / 255 for n in range(min(RECALIBRATED, len(train)))]
        batch, _ = made.transform(images)  # normalised, and padded to one size
        made.backbone.recalibrate(batch.tensors)
    return made


def _detector(at: Snapshot, of: Detection, classes: int) -> Any:
    model, seen = of.model, scenes_of(of.data)
    return detector(
        at.model,
        classes,
        task="masks" if seen.masks else "boxes",
        adaptation=model.adaptation if of.adapted else "none",
        frozen=of.frozen,
        width=model.width,
        hidden=model.hidden,
        roi_size=model.roi_size,
        normalisation=Normalisation(at.data.mean, at.data.std),
        image_size=seen.image_size,
        rpn_pre_nms_top_n_train=2 * model.proposals,
        rpn_pre_nms_top_n_test=2 * model.proposals,
        rpn_post_nms_top_n_train=model.proposals,
        rpn_post_nms_top_n_test=model.proposals,
        rpn_batch_size_per_image=2 * model.sampled,
        box_batch_size_per_image=model.sampled,
    )


def _numbers(metrics: DetectionMetrics) -> dict[str, float]:
    thirds = {f"AP, {name} third": ap for name, ap in zip(THIRDS, metrics.size_terciles, strict=True)}
    return {name: metrics.numbers[name] for name in PRECISIONS} | thirds


class Extremes:
    """The test images of the worst and the best precision, of those with objects, with what was found there."""

    def __init__(self, test: CocoDataset) -> None:
        self.test = test
        self.kept: list[tuple[float, int, Prediction]] = []

    def watched(self, found: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions; the worst and the best are kept."""
        for n, (target, prediction) in enumerate(zip(self.test.truth(), found, strict=True)):
            yield prediction
            (metrics, *_) = detection_metrics([target], [prediction], classes=self.test.classes).values()
            if not math.isnan(metrics.numbers["AP"]):
                ranked = sorted([*self.kept, (metrics.numbers["AP"], n, prediction)], key=lambda one: one[:2])
                self.kept = [ranked[0], ranked[-1]] if len(ranked) > 1 else ranked

    def pictures(self) -> Iterator[tuple[float, str]]:
        """Precision and picture of each, the worst first: truth at the left, detections at the right."""
        for value, n, prediction in self.kept:
            image, truth = self.test[n]
            shown = {key: part[prediction["scores"] > SHOWN] for key, part in prediction.items()}
            pair = torch.cat([drawn(image.as_subclass(Tensor), one) for one in (truth, shown)], dim=2)
            yield value, data_uri(pair)


def drawn(image: Tensor, objects: Target | Prediction) -> Tensor:
    """The image uint8 [3, H, W], enlarged, with boxes and masks of objects."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    factor = max(1, TALLEST // image.shape[1])
    large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if "masks" in objects and len(objects["masks"]):
        masks = objects["masks"].as_subclass(Tensor).reshape(-1, *image.shape[1:]) > 0.5
        masks = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        large = draw_segmentation_masks(large, masks, alpha=0.35, colors="#0072B2")
    boxes = objects["boxes"].as_subclass(Tensor)
    colors = ["#E69F00", "#D55E00", "#009E73"]
    named = [colors[(int(label) - 1) % len(colors)] for label in objects["labels"]]
    return draw_bounding_boxes(large, boxes * factor, colors=named) if len(boxes) else large


def data_uri(image: Tensor) -> str:
    """The image uint8 [3, H, W] as a JPEG inside an address."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
