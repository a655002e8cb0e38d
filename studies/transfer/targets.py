"""The other tasks: images of another data set, windows around the objects of detection data, and the scenes themselves."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from secondorder.data import DATASETS, ImageDataset, Normalisation, epoch_order, load_dataset
from secondorder.data.datasets import VARIABLE
from secondorder.errors import InputError
from secondorder.transfer import (
    PRESETS,
    CocoAnnotations,
    CocoDataset,
    TrainingTransform,
    find_splits,
    read_coco,
    training_transform,
)
from studies.backbones import evenly_spaced

OF_A_CLASS = 150
"""Windows of a class and split at most, evenly spaced."""


@dataclass(frozen=True)
class Scenes:
    """How a COCO-format data set is shown to detectors and probes."""

    masks: bool = False
    """Whether its objects have masks, which are detected, too."""
    size: tuple[int, int] | None = None
    """Height and width that images are resized to before training."""
    crop: int | None = None
    """Side of the random windows that detectors are trained on; None: whole images."""
    contrast: tuple[float, float] | None = None
    """Percentiles that are stretched to black and white."""
    window: int = 64
    """Pixels a side, of the file's image, of the windows around objects that a linear probe classifies."""
    image_size: tuple[int, int] | None = None
    """Pixels of the shorter and longer side that a detector resizes to."""


SCENES = {
    "nuclei": Scenes(masks=True, crop=96, contrast=(1.0, 99.8)),
    "bccd": Scenes(size=(120, 160), window=128),
    "coco": Scenes(masks=True, image_size=(800, 1333)),
}
"""By the name of the folder in the data root; a folder that is not here has boxes, and images as they are."""
FLIPS = ("horizontal", "vertical")
FAKE_SIDE = 256
"""Pixels a side of the images of a dry run, of a data set of unknown size."""
FAKE_CLASSES = {"coco": 80, "nuclei": 1}


def scenes_of(name: str) -> Scenes:
    """How the data set of a folder is shown."""
    return SCENES.get(name, Scenes())


def files_of(name: str, root: Path | None) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """(annotations, images) for training and for testing: of the first split called train..., and val... or else test...

    InputError when one is missing, or the folder, which lies in the data root.
    """
    place = os.environ.get(VARIABLE) if root is None else root
    if name not in PRESETS and not (place and (Path(place) / name).is_dir()):
        where = f"a folder in {place}" if place else "a folder in a --data-root"
        raise InputError(f"{name} is neither {where} nor a data set of images: {', '.join(DATASETS)}; see --data-root")
    splits = find_splits(place, name) if name in PRESETS else find_splits(place and Path(place) / name)
    found = []
    for beginnings in (("train",), ("val", "test")):
        names = [split for beginning in beginnings for split in splits if split.startswith(beginning)]
        if not names:
            raise InputError(
                f"{name} has the splits {', '.join(splits)}: one called {' or '.join(beginnings)} is needed"
            )
        found.append(splits[names[0]])
    return found[0], found[1]


def digest_of(name: str, root: Path | None) -> str:
    """12 digits of the sha256 of both annotation files; "" for a data set of images with labels."""
    if name in DATASETS:
        return ""
    return hashlib.sha256(b"".join(file.read_bytes() for file, _ in files_of(name, root))).hexdigest()[:12]


def annotations_of(name: str, root: Path | None, masks: bool) -> tuple[CocoAnnotations, CocoAnnotations]:
    """The checked annotations for training and testing."""
    train, test = (read_coco(*files, masks=masks) for files in files_of(name, root))
    if train.categories != test.categories:
        raise InputError(
            f"{name}: training and test data have different categories, {train.categories} and {test.categories}"
        )
    return train, test


def shown(
    name: str, annotations: CocoAnnotations, masks: bool, transform: TrainingTransform | None = None
) -> CocoDataset:
    """The data set of a folder's annotations, resized and stretched as it is shown."""
    of = scenes_of(name)
    return CocoDataset(annotations, masks=masks, size=of.size, contrast=of.contrast, transform=transform)


def scenes(
    name: str, root: Path | None, images: int, test_images: int, seed: int, augmented: bool = True
) -> tuple[CocoDataset, CocoDataset]:
    """As many training images as asked for (all if there are fewer), drawn by the seed, and test images, evenly spaced."""
    of = scenes_of(name)
    train, test = annotations_of(name, root, of.masks)
    drawn = epoch_order(len(train.images), seed, 0)[:images].tolist()
    chosen = evenly_spaced(len(test.images), test_images).tolist()
    window = training_transform(of.crop, FLIPS) if augmented else None
    return shown(name, train.subset(drawn), of.masks, window), shown(name, test.subset(chosen), of.masks)


def fake_scenes(folder: Path, name: str, images: int) -> CocoDataset:
    """Noise of the size that a data set's images are shown in, with eight objects each, written into a folder."""
    of = scenes_of(name)
    height, width = of.image_size or of.size or (of.crop or FAKE_SIDE,) * 2
    (folder / "annotations").mkdir()
    (folder / "train").mkdir()
    files, objects = [], []
    for n in range(images):
        pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        Image.fromarray(pixels.numpy()).save(folder / "train" / f"{n}.png")
        files.append({"id": n, "file_name": f"{n}.png", "height": height, "width": width})
        for k in range(8):
            x, y, w, h = k * width / 8, (k % 3) * height / 4, width / 8, height / 5
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            objects.append(
                {
                    "id": 8 * n + k,
                    "image_id": n,
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [corners],
                }
            )
    categories = [{"id": k, "name": str(k)} for k in range(1, 1 + FAKE_CLASSES.get(name, 3))]
    table = {"images": files, "annotations": objects, "categories": categories}
    file = folder / "annotations" / "instances_train.json"
    file.write_text(json.dumps(table))
    return shown(name, read_coco(file, folder / "train", masks=of.masks), of.masks)


@dataclass(frozen=True)
class Labelled:
    """Normalised images ``[N, C, H, W]`` with a class each, for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def labelled(name: str, root: Path | None, like: ImageDataset) -> Labelled:
    """The images of a data set, or windows around the objects of a COCO-format one, in the shape of the images of `like`."""
    if name not in DATASETS:
        train, test = annotations_of(name, root, masks=False)
        (images, labels), (test_images, test_labels) = (
            windows(of, scenes_of(name).window, like.image_size) for of in (train, test)
        )
        return Labelled(normalised(images, like), labels, normalised(test_images, like), test_labels)
    data = load_dataset(name, root, image_size=like.image_size)
    parts = []
    for split in (data.train, data.test):
        images, labels = split.plain(evenly_spaced(len(split)))
        parts += [_with_channels(images, like.in_channels), labels]
    return Labelled(*parts)


def windows(annotations: CocoAnnotations, window: int, size: int) -> tuple[Tensor, Tensor]:
    """Squares around the middles of objects, resized: uint8 ``[N, 3, size, size]`` and classes ``[N]`` from 0 on.

    Of each class evenly spaced ones, `OF_A_CLASS` at most, no crowds; black beyond the edge of an image.
    """
    data = CocoDataset(annotations)
    places = [(n, one) for n, objects in enumerate(annotations.objects) for one in objects if not one.crowd]
    chosen = []
    for label in range(1, len(annotations.classes) + 1):
        own = [place for place in places if place[1].label == label]
        chosen += [own[k] for k in evenly_spaced(len(own), OF_A_CLASS).tolist()] if own else []
    chosen.sort(key=lambda place: place[0])
    pictures, labels, current, padded = [], [], -1, torch.empty(0)
    for n, one in chosen:
        if n != current:
            current, padded = n, F.pad(data[n][0].as_subclass(Tensor), (window,) * 4)
        x, y, w, h = one.box
        left, top = round(x + w / 2 - window / 2), round(y + h / 2 - window / 2)
        square = padded[:, top + window : top + 2 * window, left + window : left + 2 * window]
        small = F.interpolate(square[None].float(), (size, size), mode="bilinear", antialias=True)
        pictures.append(small.round().to(torch.uint8))
        labels.append(one.label - 1)
    return torch.cat(pictures), torch.tensor(labels)


def pixels_with_foreground(data: CocoDataset) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[n, 3, H, W]`` and 1 where a pixel belongs to an object, else 0, ``[n, H, W]``.

    InputError for images of several sizes.
    """
    samples = [data[n] for n in range(len(data))]
    images = [image.as_subclass(Tensor) for image, _ in samples]
    if len({image.shape for image in images}) > 1:
        raise InputError("a dense probe needs images of one size; leave --dense without this data set")
    masks = [(target["masks"].as_subclass(Tensor) > 0).any(0).long() for _, target in samples]
    return torch.stack(images), torch.stack(masks)


def normalised(images: Tensor, like: ImageDataset) -> Tensor:
    """Images uint8 ``[N, 3, H, W]`` as a network that was trained on another data set takes them."""
    unit = _with_channels(images.float() / 255, like.in_channels)
    return Normalisation(like.mean, like.std).standardise_(unit)


def _with_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images repeated, or the mean of colours."""
    if images.shape[1] == channels:
        return images
    return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images.mean(1, keepdim=True)
