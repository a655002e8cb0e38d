"""The torch data set of a COCO file: (image, target) as torchvision's detectors take them.

Index letters: ``n`` objects of an image, ``C`` = 3 channels, ``H`` rows, ``W`` columns, ``K`` classes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from secondorder.data.decoding import decode
from secondorder.data.images import check_image_size
from secondorder.data.own import generators_kept, seed_generators
from secondorder.data.sampling import check_seed_and_epoch, checked_indices, uniforms
from secondorder.errors import InputError, check_flag, check_number, short
from secondorder.optional import needed_by
from secondorder.transfer.coco import CocoAnnotations
from secondorder.transfer.segmentation import decoded

Target = dict[str, Any]
"""torchvision's target of an image: ``boxes`` (x1, y1, x2, y2) ``[n, 4]``, ``labels`` ``[n]`` 1..K, ``area`` and ``iscrowd``
``[n]``, ``image_id``, and where asked for ``masks`` uint8 ``[n, H, W]``."""

Transform = Callable[[Any, Target], tuple[Any, Target]]


class CocoDataset(Dataset[tuple[Any, Target]]):
    """Sample i is (`tv_tensors.Image` uint8 ``[C, H, W]``, target), a pure function of (seed, epoch, i).

    Boxes are float32 `tv_tensors.BoundingBoxes`, masks `tv_tensors.Mask`; an image without objects has 0 of them. `set_epoch`
    chooses what a random transform draws, from torch's, numpy's or Python's global generators, which are as before afterwards.

    Args:
        annotations: of `read_coco`.
        masks: whether targets have masks; the annotations must have been read with them.
        crowds: whether targets have crowd regions, which no detector shall learn as objects. `truth` has them always.
        size: height and width that images, boxes and masks are resized to, areas in proportion; None: as they are.
        contrast: two percentiles of an image's own levels, such as (1, 99.8), that become black and white, after resizing;
            None: levels as they are.
        transform: of (image, target), after resizing, such as `training_transform(...)` or one of torchvision.transforms.v2.

    Raises:
        InputError: for masks that were not read, and a size or percentiles that are none.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        *,
        masks: bool = False,
        crowds: bool = False,
        size: tuple[int, int] | None = None,
        contrast: tuple[float, float] | None = None,
        transform: Transform | None = None,
    ) -> None:
        if not isinstance(annotations, CocoAnnotations):
            raise InputError(f"annotations are {short(annotations)}; give read_coco(file, images)")
        check_flag("masks", masks)
        check_flag("crowds", crowds)
        if masks and not annotations.masks:
            raise InputError("masks=True, but the annotations have none; read them with read_coco(..., masks=True)")
        if size is not None:
            if not isinstance(size, tuple | list) or len(size) != 2:
                raise InputError(f"size must be (height, width) or None, got {short(size)}")
            for side in size:
                check_image_size(side)
        if contrast is not None:
            if not isinstance(contrast, tuple | list) or len(contrast) != 2:
                raise InputError(f"contrast must be two percentiles or None, got {short(contrast)}")
            check_number("the lower percentile of contrast", contrast[0], 0, 100, "[)")
            check_number("the upper percentile of contrast", contrast[1], contrast[0], 100, "(]")
        if transform is not None and not callable(transform):
            raise InputError(f"transform must be a function of (image, target) or None, got {short(transform)}")
        self.annotations, self.masks, self.crowds = annotations, masks, crowds
        self.size, self.contrast, self.transform = size, contrast, transform
        # In shared memory, so that workers that live on from epoch to epoch see a change of epoch too.
        self._seed_and_epoch = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.annotations.images)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 1..K, in the order of the category ids."""
        return self.annotations.classes

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw the transforms of epoch ``epoch`` of the run with seed ``seed`` from now on."""
        check_seed_and_epoch(seed, epoch)
        self._seed_and_epoch[0], self._seed_and_epoch[1] = seed, epoch

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        """The sample; raises `InputError` for an image that does not decode to its size, IndexError outside of the data."""
        positions = checked_indices([index], len(self))
        if len(positions) != 1:
            raise InputError(f"the index of a sample is {short(index)}; give one whole number")
        n = int(positions[0])
        image, target = self._image(n), self._target(n, self.crowds, torch.float32)
        if self.transform is None:
            return image, target
        seed, epoch = self._seed_and_epoch.tolist()
        with generators_kept():
            seed_generators(int(uniforms("sample", seed, epoch, [n], 1)[0, 0] * 2**32))
            return self.transform(image, target)

    def truth(self) -> Iterator[Target]:
        """What predictions are compared with: every image's target, crowds too, boxes float64, no transform; reads no image."""
        return (self._target(n, True, torch.float64) for n in range(len(self)))

    def _size(self, n: int) -> tuple[int, int]:
        image = self.annotations.images[n]
        return (image.height, image.width) if self.size is None else (self.size[0], self.size[1])

    def _image(self, n: int) -> Any:
        """The image ``[C, H, W]``, resized."""
        with needed_by("a COCO-format data set"):
            from torchvision import tv_tensors
            from torchvision.transforms.v2 import functional
        record = self.annotations.images[n]
        pixels = np.array(decode(str(record.file)))  # [H, W, C]
        if pixels.shape[:2] != (record.height, record.width):
            raise InputError(f"{record.file.name} has changed: image {record.id} is of another size; read it again")
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        size = self._size(n)
        if size != pixels.shape[:2]:
            image = functional.resize(image, list(size), antialias=True)
        return image if self.contrast is None else tv_tensors.wrap(stretched(image, *self.contrast), like=image)

    def _target(self, n: int, crowds: bool, dtype: torch.dtype) -> Target:
        """The target of an image, resized."""
        with needed_by("a COCO-format data set"):
            from torchvision import tv_tensors
        image, (height, width) = self.annotations.images[n], self._size(n)
        objects = [one for one in self.annotations.objects[n] if crowds or not one.crowd]
        down, across = height / image.height, width / image.width
        xywh = torch.tensor([one.box for one in objects], dtype=torch.float64).reshape(-1, 4)
        corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)  # [n, 4]
        corners *= torch.tensor([across, down, across, down], dtype=torch.float64)
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(corners.to(dtype), format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([one.label for one in objects], dtype=torch.int64),
            "image_id": image.id,
            "area": torch.tensor([one.area * down * across for one in objects], dtype=dtype),
            "iscrowd": torch.tensor([one.crowd for one in objects], dtype=torch.int64),
        }
        if self.masks:
            masks = torch.from_numpy(decoded([one.mask for one in objects if one.mask], image.height, image.width))
            target["masks"] = tv_tensors.Mask(_resized_masks(masks, height, width))
        return target


def stretched(image: Tensor, low: float, high: float) -> Tensor:
    """An image uint8 ``[C, H, W]`` whose levels at two percentiles, over all channels, become 0 and 255; one level stays 0."""
    levels = np.percentile(image.numpy(), (low, high))
    scale = 255 / max(float(levels[1] - levels[0]), 1.0)
    return ((image.as_subclass(Tensor).double() - float(levels[0])) * scale).clamp(0, 255).round().to(torch.uint8)


def _resized_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks ``[n, H, W]`` by the nearest pixel."""
    if masks.shape[1:] == (height, width):
        return masks
    if not len(masks):
        return masks.new_zeros(0, height, width)
    return F.interpolate(masks[:, None], size=(height, width), mode="nearest-exact")[:, 0]


def collate(samples: Sequence[tuple[Any, Target]]) -> tuple[list[Any], list[Target]]:
    """The ``collate_fn`` of a `DataLoader`: images and targets as lists, since images differ in size and objects in number."""
    return [image for image, _ in samples], [target for _, target in samples]
