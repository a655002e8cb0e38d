"""Image data sets: `load_dataset` gives two splits of normalised images, a pure function of (seed, epoch, sample)."""

from secondorder.data.augmentation import PaddedCrop, ResizedCrop
from secondorder.data.datasets import DATASETS, ImageDataset, load_dataset
from secondorder.data.images import ImageArray, ImageFiles, ImageSplit, Normalisation
from secondorder.data.own import own_dataset
from secondorder.data.row import Row, Source
from secondorder.data.sampling import epoch_order, stratified_subset

__all__ = [
    "DATASETS",
    "ImageArray",
    "ImageDataset",
    "ImageFiles",
    "ImageSplit",
    "Normalisation",
    "PaddedCrop",
    "ResizedCrop",
    "Row",
    "Source",
    "epoch_order",
    "load_dataset",
    "own_dataset",
    "stratified_subset",
]
