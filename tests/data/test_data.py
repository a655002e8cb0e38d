"""Data sets: exact values, purity of the augmentation, every form on disk, every kind of damage."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from image_sets import (
    TEST,
    TRAIN,
    WRITERS,
    write_image_folder,
    write_jpeg_folders,
)
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from secondorder.data import DATASETS, ImageDataset, PaddedCrop, ResizedCrop, epoch_order, load_dataset
from secondorder.data.sampling import STREAMS, stratified_subset, uniforms


def equal(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


# Every row


def test_samples_have_the_stated_form(data: ImageDataset) -> None:
    row = DATASETS[data.name]
    assert (data.label, data.image_size, data.in_channels) == (row.label, row.image_size, row.in_channels)
    assert data.num_classes == len(data.classes) > 1
    assert data.provenance["train_images"] == len(data.train)
    assert json.loads(json.dumps(data.provenance)) == data.provenance
    for split in (data.train, data.test):
        image, label = split[0]
        assert image.shape == (data.in_channels, data.image_size, data.image_size)
        assert image.dtype == torch.float32
        assert type(label) is int
        images, labels = split.batch(range(len(split)))
        unit = images * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
        assert unit.min() > -1e-6
        assert unit.max() < 1 + 1e-6
        assert unit.std() > 0.05
        assert labels.dtype == torch.int64
        assert 0 <= labels.min() <= labels.max() < data.num_classes
        assert torch.equal(labels, split.labels)


def test_batch_equals_samples_one_by_one(data: ImageDataset) -> None:
    for split in (data.train, data.test):
        split.set_epoch(3, 7)
        indices = [3, 0, -1, 2, 3]
        images, labels = split.batch(indices)
        for n, index in enumerate(indices):
            assert torch.equal(images[n], split[index][0])
            assert labels[n] == split[index][1]
        assert equal(split.batch(torch.tensor(indices)), (images, labels))
        [loaded] = DataLoader(Subset(split, [3, 0, len(split) - 1, 2, 3]), batch_size=5)
        assert equal(tuple(loaded), (images, labels))
        assert split.batch([])[0].shape == (0, *images.shape[1:])
        for outside in (len(split), -len(split) - 1):
            with pytest.raises(IndexError, match="in a split of"):
                split[outside]


def test_sample_is_pure_in_seed_epoch_and_index(data: ImageDataset) -> None:
    train = data.train
    train.set_epoch(0, 1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = train.batch(range(8))
    backwards = [train[n] for n in reversed(range(8))]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    assert torch.equal(torch.stack([image for image, _ in reversed(backwards)]), first[0])
    torch.manual_seed(99)
    for seed, epoch in ((0, 2), (1, 1)):
        train.set_epoch(seed, epoch)
        augmented = DATASETS[data.name].augmentation is not None
        assert torch.equal(train.batch(range(8))[0], first[0]) is not augmented
    train.set_epoch(0, 1)
    assert equal(train.batch(range(8)), first)
    held_out = data.test.batch(range(4))
    data.test.set_epoch(1, 5)
    assert equal(data.test.batch(range(4)), held_out)


def test_image_size_and_limits(data: ImageDataset, tmp_path: Path) -> None:
    small = load_dataset(data.name, tmp_path / "data", limit=6, image_size=11)
    assert small.image_size == 11
    assert len(small.train) == 6
    assert len(small.test) == max(1, round(len(data.test) * 6 / len(data.train)))
    for split in (small.train, small.test):
        images, labels = split.batch(range(len(split)))
        assert images.shape == (len(labels), data.in_channels, 11, 11)
        assert torch.equal(images[-1], split[len(split) - 1][0])
    assert len(load_dataset(data.name, tmp_path / "data", limit=6, test_limit=2).test) == 2


# Values


def test_digits_are_split_by_class_and_normalised_as_stated() -> None:
    data = load_dataset("digits")
    assert (len(data.train), len(data.test), data.num_classes) == (1437, 360, 10)
    for split, low, high in ((data.train, 139, 147), (data.test, 35, 37)):
        assert low <= torch.bincount(split.labels).min() <= torch.bincount(split.labels).max() <= high
    everything = data.train.batch(range(1437))[0].double()
    assert abs(everything.mean()) < 1e-3  # the row states four decimals of a mean over a std of 0.376
    assert abs(everything.std() - 1) < 1e-3
    rows = {
        pixels.numpy().tobytes() for split in (data.train, data.test) for pixels in split.batch(range(len(split)))[0]
    }
    assert len(rows) == 1797  # every image once: none in both splits


def test_memory_images_equal_torchvisions_transforms(tmp_path: Path, trusted: None) -> None:
    WRITERS["cifar10"](tmp_path)  # type: ignore[misc]
    data = load_dataset("cifar10", tmp_path)
    original = torchvision.datasets.CIFAR10(tmp_path, train=False)
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(data.mean), list(data.std))]
    for n in range(TEST):
        torch.testing.assert_close(data.test[n][0], v2.Compose(steps)(original[n][0]).as_subclass(Tensor))
        assert data.test[n][1] == original[n][1]
    assert data.classes == tuple(original.classes)


def test_padded_crop_equals_slicing() -> None:
    images = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8)
    u = np.random.default_rng(0).random((40, 3))
    result = PaddedCrop(padding=2)(images, u)
    for n in range(40):
        padded = np.pad(images[n].numpy(), ((0, 0), (2, 2), (2, 2)))
        top, left = int(5 * u[n, 0]), int(5 * u[n, 1])
        crop = padded[:, top : top + 9, left : left + 7]
        assert np.array_equal(result[n].numpy(), crop[:, :, ::-1] if u[n, 2] < 0.5 else crop)
    assert torch.equal(PaddedCrop(padding=0, flip=False)(images, u), images)


def test_resized_crop_boxes_fit_and_have_the_stated_law() -> None:
    crop, u = ResizedCrop(), uniforms("augmentation", 0, 0, range(4000), ResizedCrop.draws)
    boxes = np.array([crop.box(400, 500, row) for row in u])
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 400).all()
    assert (left + w <= 500).all()
    share = h * w / (400 * 500)
    assert 0.079 < share.min() < 0.09
    assert share.max() > 0.95
    small = share < 0.4  # below that every box fits, so that the area is uniform and the log-ratio is centred
    assert abs(share[small].mean() - 0.24) < 0.01
    ratio = (w / h)[small]
    assert abs(np.log(ratio).mean()) < 0.01
    assert 0.74 < ratio.min() < ratio.max() < 1.35
    assert abs(np.mean([crop.mirrored(row) for row in u]) - 0.5) < 0.03
    assert crop.box(10, 1000, np.full(23, 0.99)) == (0, 493, 10, 13)  # nothing fits: central, the widest ratio


def test_image_folder_equals_pillow(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    data = load_dataset("imagefolder", tmp_path, image_size=28)
    assert data.classes == ("n01", "n02")
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    mean, std = np.array(data.mean), np.array(data.std)
    files = sorted((tmp_path / "val").glob("*/*"))
    for n, file in enumerate(files):
        with Image.open(file) as image:
            short = 32 / min(image.size)
            resized = image.resize((int(image.width * short), int(image.height * short)), Image.Resampling.BILINEAR)
        left, top = round((resized.width - 28) / 2), round((resized.height - 28) / 2)
        pixels = np.asarray(resized.crop((left, top, left + 28, top + 28))) / 255
        expected = ((pixels - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(data.test[n][0].numpy(), expected, atol=1e-5)  # float32
    data.train.set_epoch(5, 2)
    for n, file in enumerate(sorted((tmp_path / "train").glob("*/*"))):
        u = uniforms("augmentation", 5, 2, [n], 23)[0]
        with Image.open(file) as image:
            top, left, h, w = ResizedCrop().box(image.height, image.width, u)
            crop = image.crop((left, top, left + w, top + h)).resize((28, 28), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop)[:, :: -1 if u[-1] < 0.5 else 1] / 255
        expected = ((pixels - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(data.train[n][0].numpy(), expected, atol=1e-5)


# Randomness


def test_uniforms_equal_splitmix_in_whole_numbers() -> None:
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64 from seed 0
    for seed, epoch in ((0, 0), (2**63 - 1, 12)):
        result = uniforms("augmentation", seed, epoch, [0, 5, 49_999], 3)
        for b, index in enumerate((0, 5, 49_999)):
            for draw in range(3):
                state = 0
                for word in (STREAMS["augmentation"], seed, epoch, index, draw):
                    state = mix((state + 0x9E3779B97F4A7C15) % 2**64 ^ word)
                assert result[b, draw] == (state >> 11) / 2**53


def test_uniforms_are_even_and_independent() -> None:
    tables = [uniforms("augmentation", s, e, range(20_000), 3) for s, e in ((0, 0), (0, 1), (1, 0))]
    columns = np.concatenate(tables, axis=1)
    counts = np.stack([np.bincount((9 * column).astype(int), minlength=9) for column in columns.T])
    chi_square = ((counts - 20_000 / 9) ** 2 / (20_000 / 9)).sum(1)
    assert chi_square.max() < 27.9  # 8 degrees of freedom: p = 0.0005 for each of nine columns, fixed seeds
    correlations = np.corrcoef(np.concatenate([columns[:-1], columns[1:]], axis=1).T) - np.eye(18)
    assert abs(correlations).max() < 5 / np.sqrt(20_000)


def test_epoch_order_is_a_fixed_permutation() -> None:
    order = epoch_order(1000, 3, 4)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, epoch_order(1000, 3, 4))
    assert not torch.equal(order, epoch_order(1000, 3, 5))
    assert not torch.equal(order, epoch_order(1000, 4, 4))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert epoch_order(0, 0, 0).shape == (0,)
    # Frozen: another order would make runs from older checkpoints end differently.
    assert epoch_order(8, 0, 0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]


def test_subset_is_class_balanced_and_nested() -> None:
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)[torch.randperm(1000)]
    smaller: set[int] = set()
    for size in (1, 7, 50, 333, 1000):
        subset = stratified_subset(labels, size)
        assert len(set(subset.tolist())) == size
        assert smaller <= set(subset.tolist())
        smaller = set(subset.tolist())
        shares = torch.bincount(labels[subset], minlength=3)
        assert (shares - size * torch.tensor([0.5, 0.3, 0.2])).abs().max() <= 1


def test_persistent_workers_follow_the_epoch(tmp_path: Path) -> None:
    write_jpeg_folders(tmp_path)
    train = load_dataset("cifar10_jpeg", tmp_path).train
    loader = DataLoader(train, batch_size=7, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        train.set_epoch(1, epoch)
        images = torch.cat([images for images, _ in loader])
        assert torch.equal(images, train.batch(range(TRAIN))[0])
