"""Detectors: torchvision's own with our features, images as they come, and boxes that are learned."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN

from secondorder.data.images import Normalisation
from secondorder.errors import InputError
from secondorder.networks import network, replace_pooling
from secondorder.transfer import detector

SMALL: dict[str, Any] = {"width": 32, "hidden": 32, "roi_size": 3}


def backbone(pooling: str = "gcp") -> nn.Module:
    torch.manual_seed(0)
    return network("cifar_resnet8", pooling, 4)


def example(masks: bool = False) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes: a bright square on a dark ground, and nothing."""
    images = [torch.zeros(3, 32, 32), torch.full((3, 24, 40), 0.1)]
    images[0][:, 8:20, 10:22] = 1.0
    targets = [
        {"boxes": torch.tensor([[10.0, 8.0, 22.0, 20.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    if masks:
        targets[0]["masks"] = (images[0][:1] > 0.5).to(torch.uint8)
        targets[1]["masks"] = torch.zeros(0, 24, 40, dtype=torch.uint8)
    return images, targets


@pytest.mark.parametrize(
    ("options", "kind", "losses"),
    [
        ({}, FasterRCNN, {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}),
        (
            {"task": "masks"},
            MaskRCNN,
            {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask"},
        ),
        ({"kind": "fcos"}, FCOS, {"classification", "bbox_regression", "bbox_ctrness"}),
    ],
)
def test_a_step_and_detections(options: dict[str, Any], kind: type, losses: set[str]) -> None:
    model: Any = detector(backbone(), 2, **SMALL, **options)
    images, targets = example(masks=options.get("task") == "masks")
    assert model.training
    found = model(images, targets)
    assert {type(model)} == {kind}
    assert set(found) == losses
    sum(found.values()).backward()
    reached = [p.grad is not None for p in model.backbone.parameters()]
    assert all(reached)
    for detections, image in zip(model.eval()(images), images, strict=True):
        assert {"boxes", "labels", "scores"} <= set(detections)
        assert set(detections["labels"].tolist()) <= {1, 2}
        if "masks" in detections:
            assert detections["masks"].shape[1:] == (1, *image.shape[1:])


def test_images_are_taken_as_they_are() -> None:
    seen = Normalisation((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    model: Any = detector(backbone(), 2, **SMALL, normalisation=seen)
    images, targets = example()
    batch, kept = model.transform(images, targets)
    assert batch.image_sizes == [(32, 32), (24, 40)]
    assert batch.tensors.shape == (2, 3, 32, 40)
    mean, std = (torch.tensor(values)[:, None, None] for values in (seen.mean, seen.std))
    torch.testing.assert_close(batch.tensors[1, :, :24], (images[1] - mean) / std)
    assert torch.equal(kept[0]["boxes"], targets[0]["boxes"])
    model = detector(backbone(), 2, **SMALL, image_size=(64, 80))
    resized, _ = model.transform(images[:1])
    assert resized.image_sizes == [(64, 64)]


def test_strides_sizes_and_classes() -> None:
    model: Any = detector(backbone(), 2, **SMALL, anchors=[4, [6, 8.5], 12], box_detections_per_img=7)
    assert model.rpn.anchor_generator.sizes == ((4,), (6, 8.5), (12,))
    assert model.roi_heads.box_predictor.cls_score.out_features == 3
    assert model.roi_heads.detections_per_img == 7
    plain: Any = detector(backbone(), 2, **SMALL)
    assert plain.rpn.anchor_generator.sizes == ((16.0,), (32.0,), (64.0,))
    single: Any = detector(backbone(), 2, **SMALL, kind="fcos")
    points = single.anchor_generator
    assert points.sizes == ((2.0,), (4.0,), (8.0,))
    assert set(points.num_anchors_per_location()) == {1}


def test_a_box_is_learned_on_frozen_features() -> None:
    torch.manual_seed(0)
    model: Any = detector(backbone(), 2, **SMALL, anchors=[12, 16, 24], frozen=True, rpn_post_nms_top_n_train=50)
    images, targets = example()
    mean = torch.stack([images[0], images[0].flip(1)])
    model.backbone.recalibrate(model.transform.normalize(mean))
    before = [p.clone() for p in model.backbone.features.parameters()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        optimizer.step()
    best = model.eval()(images[:1])[0]
    assert best["labels"][0] == 2
    assert (best["boxes"][0] - targets[0]["boxes"][0]).abs().max() < 3
    assert all(torch.equal(p, q) for p, q in zip(before, model.backbone.features.parameters(), strict=True))


def test_a_network_of_ones_own() -> None:
    from torchvision.models import resnet18

    own: Any = replace_pooling(resnet18(num_classes=3), "gcp", reduced_channels=8, last_stride=1)
    model: Any = detector(own, 3, **SMALL, task="masks", adaptation="gcp_m")
    assert model.backbone.strides == [4, 8, 16, 32]
    own.features.layer4[0].conv1.weight.data.fill_(7.0)
    assert not (model.backbone.features.layer4[0].conv1.weight == 7).any()  # a copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "keypoints"}, "task 'keypoints'"),
        ({"kind": "yolo"}, "kind 'yolo'"),
        ({"classes": 0}, "classes must be .* got 0"),
        ({"hidden": 1.5}, "hidden must be .* got 1.5"),
        ({"roi_size": 0}, "roi_size must be .* got 0"),
        ({"kind": "fcos", "task": "masks"}, "'fcos' has no masks"),
        ({"kind": "fcos", "width": "wide"}, "width must be .* got 'wide'"),
        ({"kind": "fcos", "width": 20}, "a multiple of 32"),
        ({"kind": "fcos", "anchors": [1, 2, 3]}, "no anchors"),
        ({"anchors": [8, 16]}, r"each of 3 levels, strides \[2, 4, 8\]"),
        ({"anchors": [8, [], 16]}, "above 0, not 0"),
        ({"anchors": [8, -1, 16]}, "above 0, not -1"),
        ({"normalisation": Normalisation((0.5,), (0.5,))}, "must be a Normalisation of 3 channels"),
        ({"image_size": 800}, r"image_size 800: must be two numbers of pixels, \(800, 1333\), or None"),
        ({"image_size": (0, 8)}, "image_size must be .* got 0"),
        ({"nms": 0.5}, "option 'nms': FasterRCNN takes besides .*box_nms_thresh"),
        ({"num_classes": 3}, "option 'num_classes'"),
        ({"min_size": 3}, "option 'min_size'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"network": backbone("gap"), "classes": 2} | SMALL | change
    with pytest.raises(InputError, match=message) as raised:
        detector(**arguments)
    assert "\n" not in str(raised.value)
