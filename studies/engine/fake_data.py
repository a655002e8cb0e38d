"""Random pixels with the shape of a data set, for a dry run."""

from functools import lru_cache

import torch

from secondorder.data import DATASETS, ImageArray, ImageDataset, Row
from secondorder.errors import unknown

# Training images and classes where the table of data sets leaves them open: ILSVRC 2012.
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
CLASSES = {
    "imagefolder": IMAGENET_CLASSES, "fake": IMAGENET_CLASSES, "cifar100": 100, "digits_0_to_4": 5, "digits_5_to_9": 5,
}  # fmt: skip


def row_of(dataset: str) -> Row:
    """The row of a data set; InputError for one that is in no table, a user's own."""
    if dataset not in DATASETS:
        raise unknown("data set", dataset, DATASETS)
    return DATASETS[dataset]


def images_of(dataset: str, limit: int | None) -> int:
    """How many training images a data set has, with a limit."""
    expected = row_of(dataset).expected
    return limit or (expected[0] if expected else IMAGENET_IMAGES)


@lru_cache(maxsize=4)
def fake_data(dataset: str, images: int, image_size: int | None = None) -> ImageDataset:
    """Random pixels and labels with the shape, number of classes and normalisation of `dataset`, labelled fake."""
    row = row_of(dataset)
    size, classes = image_size or row.image_size, CLASSES.get(dataset, 10)
    generator = torch.Generator().manual_seed(0)
    shape = (images, row.in_channels, size, size)
    pixels = torch.randint(row.maximum + 1, shape, dtype=torch.uint8, generator=generator)
    split = ImageArray(pixels, torch.arange(images) % classes, row.normalisation(), None, size)
    return ImageDataset(
        name=dataset,
        label=f"fake data shaped like {row.label}",
        train=split,
        test=split,
        num_classes=classes,
        in_channels=row.in_channels,
        image_size=size,
        classes=tuple(str(n) for n in range(classes)),
        mean=row.mean,
        std=row.std,
        provenance={"source": "random pixels"},
    )
