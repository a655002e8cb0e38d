"""torchvision's detectors on the features of a classification network."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secondorder.data.images import Normalisation
from secondorder.errors import InputError, check_known, check_whole, one_line, short
from secondorder.transfer.pyramid import FeaturePyramid
from secondorder.untouched import undrawn_if_refused

TASKS = ("boxes", "masks")
KINDS = ("rcnn", "fcos")
"""Two stages (Faster R-CNN, with masks Mask R-CNN) or one (FCOS, boxes alone)."""
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ANCHOR = 8.0
"""Side of the anchors in strides of their level: torchvision's 32 pixels at stride 4."""
GROUPS = 32
"""Of the group normalisation in the head of FCOS."""


@undrawn_if_refused()
def detector(
    network: nn.Module,
    classes: int,
    *,
    task: str = "boxes",
    kind: str = "rcnn",
    adaptation: str = "none",
    frozen: bool = False,
    width: int = 256,
    hidden: int = 1024,
    roi_size: int = 7,
    anchors: Sequence[float | Sequence[float]] | None = None,
    normalisation: Normalisation | None = None,
    image_size: tuple[int, int] | None = None,
    **options: Any,
) -> nn.Module:
    """A detector whose backbone is a feature pyramid on a copy of a network's convolutions.

    It is torchvision's `FasterRCNN`, `MaskRCNN` or `FCOS` and is called as such: in training mode with lists of images
    ``[C, H, W]`` on [0, 1] and of targets, which gives a dictionary of losses; in eval mode with images, which gives for each a
    dictionary of ``boxes`` ``[n, 4]`` (x1, y1, x2, y2 in pixels), ``labels`` ``[n]``, ``scores`` ``[n]`` and, with masks,
    ``masks`` ``[n, 1, H, W]`` on [0, 1]. It is returned in training mode.

    Batch normalisation of the network is trained, in batches of detection; with `frozen` it stays in eval mode, with the
    statistics that it has (`model.backbone.recalibrate` renews them). Images are not resized unless `image_size` is given,
    whereas torchvision's detectors resize whatever comes to 800 pixels.

    Args:
        network: a `Network`, or a model that `replace_pooling` takes apart. It is left as it is.
        classes: K; labels are 1 to K, 0 is the background.
        task: "boxes", or "masks" for boxes and masks.
        kind: "rcnn" (Faster or Mask R-CNN) or "fcos", which has boxes alone.
        adaptation: for a ResNet trained with GCP, whose last stage has stride 1: "gcp_d" gives its first convolutions stride 2,
            "gcp_m" puts a max-pooling in front of it, "none" leaves it.
        frozen: keep the network's weights and statistics; the pyramid and what is above it are trained.
        width: channels of the pyramid; a multiple of 32 for FCOS.
        hidden: units of the box head (two layers).
        roi_size: positions a side that the box head sees of a region; the mask head sees twice as many.
        anchors: for each level, the pooled one included, one or several sides of square anchors in pixels, which come with ratios
            1/2, 1 and 2 besides. None: 8 times the stride. Not for FCOS, which has none.
        normalisation: of the images that the network was trained on; None: that of ImageNet.
        image_size: (least, most) pixels of the shorter and the longer side to which images are resized, (800, 1333) as published;
            None: they are taken as they are.
        options: of torchvision's class, such as ``rpn_post_nms_top_n_train`` or ``box_score_thresh``.

    Raises:
        InputError: for other arguments, and as `FeaturePyramid`.
        MissingLibraryError: without torchvision.

    Source: Ren et al. (2015), He et al. (2017), Tian et al. (2019); adaptations: Wang et al. (2020).
    """
    check_known("task", task, TASKS)
    check_known("kind", kind, KINDS)
    _check_sizes(classes=classes, width=width, hidden=hidden, roi_size=roi_size)
    if kind == "fcos" and (task == "masks" or anchors is not None or width % GROUPS):
        raise InputError(f"kind 'fcos' has no masks and no anchors, and a width that is a multiple of {GROUPS}")
    pyramid = FeaturePyramid(network, width, adaptation=adaptation, frozen=frozen)
    made = _torchvision(kind, task)
    given = _of_images(pyramid, normalisation or IMAGENET, image_size)
    if kind == "fcos":
        given |= {"num_classes": classes + 1} | _points(pyramid)
    else:
        given |= {"num_classes": None} | _regions(pyramid, classes + 1, task, hidden, roi_size, anchors)
    _check_options(made, options, given)
    model = made(pyramid, **given, **options)
    model.transform.size_divisible = pyramid.strides[-1]
    if image_size is None:
        model.transform.resize = unresized
    return model.to(next(pyramid.parameters()).device)


def unresized(image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Image and target as they are, in place of torchvision's resizing."""
    return image, target


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_whole(name, value)


def _torchvision(kind: str, task: str) -> type[Any]:
    """Torchvision's class."""
    from torchvision.models import detection

    if kind == "fcos":
        return detection.FCOS
    return detection.MaskRCNN if task == "masks" else detection.FasterRCNN


def _of_images(
    pyramid: FeaturePyramid, normalisation: Normalisation, image_size: tuple[int, int] | None
) -> dict[str, Any]:
    """What a detector is told about its images."""
    if not isinstance(normalisation, Normalisation) or len(normalisation.mean) != pyramid.in_channels:
        raise InputError(
            f"normalisation {short(normalisation)}: must be a Normalisation of {pyramid.in_channels} channels"
        )
    if image_size is None:
        sides = (1, 1)  # for which nothing is resized
    else:
        if not isinstance(image_size, tuple | list) or len(image_size) != 2:
            raise InputError(f"image_size {short(image_size)}: must be two numbers of pixels, (800, 1333), or None")
        for side in image_size:
            check_whole("image_size", side)
        sides = (image_size[0], image_size[1])
    mean, std = list(normalisation.mean), list(normalisation.std)
    return {"min_size": sides[0], "max_size": sides[1], "image_mean": mean, "image_std": std}


def _points(pyramid: FeaturePyramid) -> dict[str, Any]:
    """The one point of FCOS at every position."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = tuple((float(stride),) for stride in _strides(pyramid))
    return {"anchor_generator": AnchorGenerator(sizes, ((1.0,),) * len(sizes))}


def _regions(
    pyramid: FeaturePyramid,
    outputs: int,
    task: str,
    hidden: int,
    roi_size: int,
    anchors: Sequence[float | Sequence[float]] | None,
) -> dict[str, Any]:
    """Anchors of the first stage and heads of the second."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    width = pyramid.out_channels
    sizes = _anchor_sizes(anchors, _strides(pyramid))
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(pyramid.names, roi_size, sampling_ratio=2),
        "box_head": TwoMLPHead(width * roi_size**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, outputs),
    }
    if task == "masks":
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

        parts["mask_roi_pool"] = MultiScaleRoIAlign(pyramid.names, 2 * roi_size, sampling_ratio=2)
        parts["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
        parts["mask_predictor"] = MaskRCNNPredictor(width, width, outputs)
    return parts


def _strides(pyramid: FeaturePyramid) -> list[int]:
    """Those of the levels and of the pooled one."""
    return [*pyramid.strides, 2 * pyramid.strides[-1]]


def _anchor_sizes(
    anchors: Sequence[float | Sequence[float]] | None, strides: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    if anchors is None:
        return tuple((ANCHOR * stride,) for stride in strides)
    if not isinstance(anchors, Sequence) or isinstance(anchors, str) or len(anchors) != len(strides):
        raise InputError(
            f"anchors {short(anchors)}: must be sides for each of {len(strides)} levels, strides {strides}"
        )
    sizes = tuple(tuple(level) if isinstance(level, Sequence) else (level,) for level in anchors)
    for side in (side for level in sizes for side in level or (0,)):
        if not isinstance(side, int | float) or not 0 < side < float("inf"):
            raise InputError(f"anchors {short(anchors)}: a side must be a number of pixels above 0, not {short(side)}")
    return sizes


def _check_options(made: type, options: dict[str, Any], given: Mapping[str, Any]) -> None:
    """InputError for an option that torchvision's class does not have, or that this function gives it."""
    known = {*inspect.signature(made.__init__).parameters} - {"self", "backbone", "kwargs", *given}  # type: ignore[misc]
    for name in options:
        if name not in known:
            raise InputError(one_line(f"option {name!r}: {made.__name__} takes besides {', '.join(sorted(known))}"))
