"""A user's own data: any map-style `Dataset` of (image, label), or a `DataLoader` over one, in the form of this package.

A sample may draw random numbers from torch's, numpy's and Python's global generators (torchvision's transforms do). They
are seeded for each sample, so that it is a function of (seed, epoch, index) here too, whichever process makes it.
"""

import contextlib
import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, default_collate

from secondorder.data.datasets import ImageDataset
from secondorder.data.files import reason, shown
from secondorder.data.images import ImageSplit
from secondorder.data.sampling import Indices, checked_indices, epoch_order, uniforms
from secondorder.errors import InputError, check_whole

OWN = re.compile(r"own(-[A-Za-z0-9_.]+)*")
"""Names that a user gives to own data and networks in a `Run`: own, own-flowers, own-vit-small."""

DIGESTED = 8  # samples of each split that a digest is made of


def is_own(name: object) -> bool:
    """Whether a name is of a user's own data or network, and so in no table."""
    return isinstance(name, str) and OWN.fullmatch(name) is not None


class OwnSplit(ImageSplit):
    """A user's data set, or loader, as a split; position i is the sampler's i-th choice in this epoch, else sample i.

    Of a loader the data set, sampler, ``collate_fn`` and ``num_workers`` are used.

    Raises:
        InputError: for data without length or indices, and a loader that cuts the batches itself.
    """

    def __init__(self, source: Any) -> None:
        loader = source if isinstance(source, DataLoader) else None
        self.dataset: Any = loader.dataset if loader is not None else source
        check_map_style(self.dataset)
        if loader is not None and loader.batch_size is None:
            raise InputError("the DataLoader has a batch_sampler, or no batches; give it a sampler and a batch_size")
        if loader is not None and isinstance(loader.sampler, DistributedSampler):
            raise InputError("the DataLoader has a DistributedSampler; leave it out: processes share every batch here")
        shuffled = loader is None or (type(loader.sampler) is RandomSampler and not loader.sampler.replacement)
        self.sampler: Any = None if shuffled or loader is None else loader.sampler
        self.batch_size: int | None = None if loader is None else loader.batch_size
        self.collate: Any = default_collate if loader is None else loader.collate_fn
        self.workers = 0 if loader is None else loader.num_workers
        self._seed_and_epoch = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._chosen: tuple[tuple[int, int], list[int]] | None = None

    def __len__(self) -> int:
        return len(self.dataset if self.sampler is None else self.sampler)

    def order(self, seed: int, epoch: int) -> Tensor:
        """Order ``[N]`` of an epoch: shuffled by the seed, or as the loader's own sampler has it."""
        return epoch_order(len(self), seed, epoch) if self.sampler is None else torch.arange(len(self))

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """The labels ``[N]`` of all samples, each of which is made for it."""
        return self.batch(range(len(self)))[1]

    def batch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Samples ``[B, ...]`` and labels ``[B]`` int64; raises `InputError` for what is no pair of such tensors."""
        seed, epoch = self._seed_and_epoch.tolist()
        chosen = [self._index(n, seed, epoch) for n in checked_indices(indices, len(self)).tolist()]
        seeds = (uniforms("sample", seed, epoch, chosen, 1)[:, 0] * 2**32).astype(np.int64).tolist()
        samples = []
        with generators_kept():
            for index, value in zip(chosen, seeds, strict=True):
                seed_generators(value)
                samples.append(self.dataset[index])
            kind = type(self.dataset).__name__
            return checked_batch(_collated(samples, self.collate, kind), kind)

    def plain(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """`batch` as in epoch 0 of seed 0: what the user's transforms draw is not known here."""
        before = self._seed_and_epoch.clone()
        self._seed_and_epoch.zero_()
        try:
            return self.batch(indices)
        finally:
            self._seed_and_epoch.copy_(before)

    def _images(self, positions: Any, u: Any) -> Tensor:
        raise NotImplementedError("`batch` makes images and labels in one")

    def _index(self, position: int, seed: int, epoch: int) -> int:
        """The index in the data set of a position in the epoch's order of the sampler."""
        if self.sampler is None:
            return position
        if self._chosen is None or self._chosen[0] != (seed, epoch):
            with generators_kept():
                value = int(uniforms("sample", seed, epoch, [-1], 1)[0, 0] * 2**32)
                seed_generators(value)
                if isinstance(getattr(self.sampler, "generator", None), torch.Generator):
                    self.sampler.generator.manual_seed(value)
                if hasattr(self.sampler, "set_epoch"):
                    self.sampler.set_epoch(epoch)
                self._chosen = (seed, epoch), [int(n) for n in self.sampler]
        return self._chosen[1][position]


def check_map_style(dataset: object) -> None:
    """Raise `InputError` for what has no length or indices, and for words, tensors and types, which hold no samples."""
    sized = all(hasattr(dataset, name) for name in ("__len__", "__getitem__"))
    if isinstance(dataset, Mapping):  # by number it may hold samples, by word it does not
        sized = 0 in dataset or not dataset
    if not sized or isinstance(dataset, IterableDataset | Tensor | np.ndarray | np.generic | str | bytes | type):
        kind = type(dataset).__name__ if isinstance(dataset, Dataset) else shown(repr(dataset), 40)
        raise InputError(f"the dataset {kind} has no length or indices; use a map-style torch.utils.data.Dataset")


def _collated(samples: list[Any], collate: Any, kind: str) -> Any:
    """The samples of a data set ``kind`` as a batch."""
    if not samples:
        raise InputError(f"the dataset {kind} is asked for no sample; a batch has at least one")
    try:
        return collate(samples)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"the samples of {kind} make no batch ({reason(error)}); each is (tensor, label)") from error


def checked_batch(batch: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The images ``[B, ...]`` and labels ``[B]`` int64 of a batch of a data set ``kind``.

    Raises:
        InputError: for anything else, images of whole numbers among them.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(
            f"a batch of the dataset {kind} is {type(batch).__name__}, not (images, labels); each sample is (image, label)"
        )
    images, labels = batch
    if not isinstance(images, Tensor) or (images.ndim == 4 and not images.is_floating_point()):
        what = f"{images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"images of {kind} are {what}; make them floating-point tensors, with v2.ToDtype(float32, scale=True)"
        )
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.shape != images.shape[:1]
    ):
        what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"labels of {kind} are {what}; use a whole number for each of the {len(images)} samples")
    return images, labels.to(torch.int64)


def seed_generators(value: int) -> None:
    """Seed the generators that a transform may draw from, on the CPU."""
    torch.default_generator.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002  the user's code may draw from it
    random.seed(value)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Give the caller's random states back at the end."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def own_dataset(
    name: str,
    train: Dataset[Any] | DataLoader[Any],
    test: Dataset[Any] | DataLoader[Any],
    *,
    num_classes: int | None = None,
    label: str | None = None,
) -> ImageDataset:
    """A user's train and test data as an `ImageDataset`, for `train(Run(dataset=name, ...), ...)`.

    Args:
        name: own, or own- and a word: what the `Run` calls the data.
        train: map-style data set of (image float ``[C, H, W]``, label); other tensors serve a network of the user's. Or a
            `DataLoader` over one: its batches must have the run's size, and with ``shuffle=True`` the run shuffles; any other
            sampler is drawn anew in each epoch, its generators seeded by the run's seed and the epoch.
        test: the same, of which every sample is used once.
        num_classes: number of classes; None: that of ``train.classes``, else unknown, which a network of the user's may do
            with.
        label: name in figures and tables; None: ``name``.

    Raises:
        InputError: for a bad name, data without length, an empty split, and samples that are no such pairs.
    """
    if not is_own(name):
        raise InputError(
            f"own data is called {shown(repr(name))}; call it own, or own- and a word of letters and digits"
        )
    splits = {"train": OwnSplit(train), "test": OwnSplit(test)}
    for part, split in splits.items():
        if len(split) == 0:
            raise InputError(f"the {part} data set {type(split.dataset).__name__} has no samples")
    classes = _classes(splits["train"].dataset)
    count = num_classes if num_classes is not None else len(classes)
    if num_classes is not None:
        check_whole("num_classes", num_classes)
    images, _ = splits["train"].plain([0])
    shape = tuple(images.shape[1:])
    channels = shape[0] if shape else 1
    provenance: dict[str, object] = {
        "source": type(splits["train"].dataset).__qualname__,
        "samples_sha256": _digest(splits.values()),
        "train_images": len(splits["train"]),
        "test_images": len(splits["test"]),
    }
    return ImageDataset(
        name=name,
        label=label or name,
        train=splits["train"],
        test=splits["test"],
        num_classes=count,
        in_channels=channels,
        image_size=min(shape[1:]) if len(shape) == 3 else 1,
        classes=classes if len(classes) == count else tuple(str(n) for n in range(count)),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        provenance=provenance,
    )


def _classes(dataset: Any) -> tuple[str, ...]:
    """The names of the classes as torchvision's data sets have them, also behind `Subset`; none when they are not known."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return tuple(str(name) for name in getattr(dataset, "classes", ()))


def _digest(splits: Any) -> str:
    """16 digits of the sha256 of evenly spaced samples: other data under the same name are told apart by it."""
    sha = hashlib.sha256()
    for split in splits:
        chosen = np.unique(np.linspace(0, len(split) - 1, DIGESTED).astype(int))
        for index in chosen.tolist():  # one by one: samples may differ in shape
            images, labels = split.plain([index])
            values = images.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            sha.update(f"{len(split)} {list(images.shape)} {images.dtype} {labels.tolist()}".encode() + values)
    return sha.hexdigest()[:16]
