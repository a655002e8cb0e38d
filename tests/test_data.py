"""Data sets: exact values, purity of the augmentation, every form on disk, every kind of damage."""

import json
import lzma
import pickle
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from secondorder.data import DATASETS, ImageDataset, PaddedCrop, ResizedCrop, epoch_order, load_dataset, readers
from secondorder.data import jpeg as jpeg_module
from secondorder.data.sampling import STREAMS, stratified_subset, uniforms
from secondorder.errors import InputError

CIFAR10_CLASSES = DATASETS["cifar10_jpeg"].classes or ()
TRAIN, TEST = 30, 20  # images of the small sets written here


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Smooth random colours: JPEG would turn noise into mush."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def write_tree(root: Path, splits: dict[str, int], classes: tuple[str, ...], sizes: list[tuple[int, int]]) -> None:
    for part, count in splits.items():
        for n in range(count):
            folder = root / part / classes[n % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            seed = n + 1000 * len(part)
            picture(seed, *sizes[n % len(sizes)]).save(folder / f"{n:04d}.jpg", quality=75)


def write_jpeg_folders(root: Path) -> None:
    write_tree(root, {"train": TRAIN, "test": TEST}, CIFAR10_CLASSES, [(32, 32)])


def write_jpeg_archives(root: Path) -> None:
    write_jpeg_folders(root / "unpacked")
    for part in ("train", "test"):
        buffer = BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(root / "unpacked" / part, arcname=part)
        padding = bytes(1 << 20)  # as tape blocks end: a reader that stops at the last file never sees the checksum
        (root / f"{part}.tar.xz").write_bytes(lzma.compress(buffer.getvalue() + padding))


def write_image_folder(root: Path) -> None:
    write_tree(root, {"train": 8, "val": 4}, ("n01", "n02"), [(40, 30), (300, 260), (25, 90), (32, 32)])


def write_cifar(folder: str, label_key: str, meta: str, meta_key: str, classes: int) -> Callable[[Path], None]:
    """The published pickles, in a smaller number of images: five (or one) train batches and a test batch."""

    def write(root: Path) -> None:
        (root / folder).mkdir(parents=True)
        train_files = [f"data_batch_{k}" for k in range(1, 6)] if folder == "cifar-10-batches-py" else ["train"]
        test_file = "test_batch" if folder == "cifar-10-batches-py" else "test"
        for file, count in [(f, TRAIN // len(train_files)) for f in train_files] + [(test_file, TEST)]:
            rng = np.random.default_rng(len(file) + count)
            batch = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8)}
            (root / folder / file).write_bytes(pickle.dumps(batch | {label_key: [n % classes for n in range(count)]}))
        (root / folder / meta).write_bytes(pickle.dumps({meta_key: [f"class {k}" for k in range(classes)]}))

    return write


def write_fashion_mnist(root: Path) -> None:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        header = b"".join(size.to_bytes(4, "big") for size in (0x803, count, 28, 28))  # the idx format
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + rng.bytes(count * 28 * 28))
        header = b"".join(size.to_bytes(4, "big") for size in (0x801, count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(n % 10 for n in range(count)))


# How a small copy of each data set is written; a new row of DATASETS needs one here.
WRITERS: dict[str, Callable[[Path], None] | None] = {
    "digits": None,
    "cifar10": write_cifar("cifar-10-batches-py", "labels", "batches.meta", "label_names", 10),
    "cifar10_jpeg": write_jpeg_archives,
    "cifar100": write_cifar("cifar-100-python", "fine_labels", "meta", "fine_label_names", 100),
    "fashion_mnist": write_fashion_mnist,
    "imagefolder": write_image_folder,
    "fake": None,
}


@pytest.fixture(autouse=True)
def small_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect the small copies, whose checksums differ from the published ones; keep the cache in the test's folder."""
    monkeypatch.setenv("SECONDORDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SECONDORDER_DATA", raising=False)
    monkeypatch.setattr(readers, "FAKE_IMAGES", (TRAIN, TEST))
    for name in ("cifar10", "cifar10_jpeg", "cifar100", "fashion_mnist", "fake"):
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], expected=(TRAIN, TEST)))


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision accept pickles with other checksums than the published ones."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.fixture(params=DATASETS)
def data(request: pytest.FixtureRequest, tmp_path: Path, trusted: None) -> ImageDataset:
    write = WRITERS[request.param]
    if write is not None:
        write(tmp_path / "data")
    return load_dataset(request.param, tmp_path / "data")


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


# The forms of CIFAR-10 (JPEG), and the cache


@pytest.mark.parametrize("name", ["cifar10", "cifar10_jpeg"])
@pytest.mark.parametrize("write", [write_jpeg_archives, write_jpeg_folders])
@pytest.mark.parametrize("below", ["", "cifar10-jpeg"])
def test_every_form_of_jpeg_set_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], None], below: str
) -> None:
    write(tmp_path / "data" / below)
    monkeypatch.setenv("SECONDORDER_DATA", str(tmp_path / "data"))
    data = load_dataset(name)
    assert (data.name, data.label) == ("cifar10_jpeg", "CIFAR-10 (JPEG)")
    assert data.classes == CIFAR10_CLASSES
    assert "Pillow" in str(data.provenance["decoder"])
    write_jpeg_folders(tmp_path / "reference")
    for part, split in (("train", data.train), ("test", data.test)):
        files = sorted((tmp_path / "reference" / part).glob("*/*"))
        assert torch.equal(split.labels, torch.tensor([CIFAR10_CLASSES.index(file.parent.name) for file in files]))
        expected = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])
        assert np.array_equal(split.images.numpy(), expected)  # type: ignore[attr-defined]


def test_the_original_is_preferred_to_its_jpeg_copy(tmp_path: Path, trusted: None) -> None:
    write_jpeg_folders(tmp_path)
    WRITERS["cifar10"](tmp_path)  # type: ignore[misc]
    assert load_dataset("cifar10", tmp_path).label == "CIFAR-10"
    assert load_dataset("cifar10_jpeg", tmp_path).label == "CIFAR-10 (JPEG)"


def test_cache_is_used_and_a_damaged_one_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jpeg_archives(tmp_path)
    decoded: list[Path] = []
    decode_all = jpeg_module._decode_all
    monkeypatch.setattr(
        jpeg_module, "_decode_all", lambda row, path, m: decoded.append(path) or decode_all(row, path, m)
    )
    first = load_dataset("cifar10_jpeg", tmp_path).train.batch(range(TRAIN))
    assert len(decoded) == 2
    assert equal(load_dataset("cifar10_jpeg", tmp_path).train.batch(range(TRAIN)), first)
    assert len(decoded) == 2
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2  # no temporary file is left
    whole = files[0].read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    other = BytesIO()
    np.savez(other, images=np.zeros((TRAIN, 3, 8, 8), np.uint8), labels=np.zeros(TRAIN, np.int64))
    for damage in (whole[: len(whole) // 2], b"", bytes(flipped), b"no archive", other.getvalue()):
        files[0].write_bytes(damage)
        decoded.clear()
        assert equal(load_dataset("cifar10_jpeg", tmp_path).train.batch(range(TRAIN)), first)
        assert len(decoded) == 1
        assert files[0].read_bytes() != damage


def test_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jpeg_folders(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECONDORDER_CACHE", str(tmp_path / "file" / "cache"))  # a folder below a file cannot be made
    assert len(load_dataset("cifar10_jpeg", tmp_path).train) == TRAIN


# Bad input: (data set, how it is written, how it is damaged, options, what the line must say)


def truncate(file: str, keep: float = 0.6) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        content = (root / file).read_bytes()
        (root / file).write_bytes(content[: int(len(content) * keep)])

    return damage


def flip_bit(file: str, position: int | None = None) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        content = bytearray((root / file).read_bytes())
        content[len(content) // 2 if position is None else position] ^= 1
        (root / file).write_bytes(content)

    return damage


def remove(path: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for file in [root / path] if (root / path).is_file() else list((root / path).iterdir()):
            file.unlink()

    return damage


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)

    return damage


def png(width: int, height: int) -> bytes:
    buffer = BytesIO()
    picture(0, width, height).save(buffer, "png")
    return buffer.getvalue()


FOLDERS, ARCHIVES, IMAGES = write_jpeg_folders, write_jpeg_archives, write_image_folder
CIFAR, FASHION = WRITERS["cifar10"], write_fashion_mnist
RAW = "FashionMNIST/raw"

BAD_SETS = {
    "empty root": (
        "cifar10",
        None,
        None,
        r"cifar10 is not in .*cifar-10-batches-py, or for CIFAR-10 \(JPEG\): train,.*",
    ),
    "empty root, images": ("imagefolder", None, None, "imagefolder is not in .*looked for train; pass --data-root"),
    "cut archive": ("cifar10", ARCHIVES, truncate("train.tar.xz"), "train.tar.xz is truncated or corrupt"),
    "nearly whole archive": ("cifar10", ARCHIVES, truncate("test.tar.xz", 0.99), "test.tar.xz is truncated or corrupt"),
    "no archive": ("cifar10", ARCHIVES, overwrite("train.tar.xz", b"x" * 999), "train.tar.xz is truncated or corrupt"),
    "empty archive": ("cifar10", ARCHIVES, overwrite("train.tar.xz", b""), "train.tar.xz is truncated or corrupt"),
    "flipped bit": (
        "cifar10",
        ARCHIVES,
        flip_bit("train.tar.xz"),
        "train.tar.xz.* (is truncated or corrupt|not decode)",
    ),
    "wrong checksum": ("cifar10", ARCHIVES, flip_bit("train.tar.xz", -28), "train.tar.xz is truncated or corrupt"),
    "one archive": ("cifar10", ARCHIVES, remove("test.tar.xz"), "test.tar.xz is not beside it"),
    "missing image": ("cifar10", FOLDERS, remove("train/cat/0003.jpg"), "train has 29 images, expected 30"),
    "empty class": ("cifar10", FOLDERS, remove("test/dog"), "test holds no images of class dog"),
    "other class": ("cifar10", FOLDERS, overwrite("train/pig/0.jpg", b""), "holds the class folder 'pig'"),
    "cut image": ("cifar10", FOLDERS, truncate("train/cat/0003.jpg"), "cat/0003.jpg in .*train does not decode"),
    "no image": ("cifar10", FOLDERS, overwrite("test/cat/0003.jpg", b"x"), "cat/0003.jpg in .*test does not decode"),
    "other size": ("cifar10", FOLDERS, overwrite("test/cat/0003.jpg", png(31, 32)), "cat/0003.jpg .* has 31x32 pixels"),
    "cut pickle": ("cifar10", CIFAR, truncate("cifar-10-batches-py/data_batch_2"), "CIFAR-10 .*corrupt.*--download"),
    "lost pickle": ("cifar10", CIFAR, remove("cifar-10-batches-py/data_batch_2"), "CIFAR-10 .*corrupt.*--download"),
    "cut idx": ("fashion_mnist", FASHION, truncate(f"{RAW}/train-images-idx3-ubyte"), "Fashion.*corrupt.*--download"),
    "lost idx": ("fashion_mnist", FASHION, remove(f"{RAW}/t10k-labels-idx1-ubyte"), "Fashion.*corrupt.*--download"),
    "no val": (
        "imagefolder",
        FOLDERS,
        lambda root: (root / "test").rename(root / "x"),
        "is no image folder: looked for",
    ),
    "empty folder": ("imagefolder", IMAGES, remove("train/n02"), "train is no folder of class folders.*n02"),
    "no classes": (
        "imagefolder",
        IMAGES,
        lambda root: (root / "val").rename(root / "train/n01/val"),
        "no image folder",
    ),
    "extra class": ("imagefolder", IMAGES, overwrite("val/n03/0.png", png(5, 5)), "in one only: n03"),
    "no first image": ("imagefolder", IMAGES, overwrite("train/n01/0000.jpg", b"x"), "n01/0000.jpg does not decode"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_damaged_set_is_one_clear_line(tmp_path: Path, case: str) -> None:
    name, write, damage, pattern = BAD_SETS[case]
    root = tmp_path / "data"
    root.mkdir()
    if write is not None:
        write(root)
    if damage is not None:
        damage(root)
    with pytest.raises(InputError, match=pattern) as caught:
        load_dataset(name, root)
    assert "\n" not in str(caught.value)


def test_image_that_fails_during_training_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    truncate("train/n02/0003.jpg")(tmp_path)
    with pytest.raises(InputError, match=r"n02/0003.jpg does not decode \(.*\); replace or remove it"):
        load_dataset("imagefolder", tmp_path).train.batch(range(8))


BAD_OPTIONS = {
    "data set": (("cifar11", None), {}, "unknown data set 'cifar11'; choose one of: digits, "),
    "no root": (("cifar10", None), {}, "cifar10 needs the folder .* pass --data-root or set SECONDORDER_DATA"),
    "absent root": (("cifar100", "absent"), {}, "data root absent is no folder; .* --download"),
    "limit 0": (("digits", None), {"limit": 0}, "limit is 0; .* from 1 to 1437"),
    "limit above": (("digits", None), {"limit": 1438}, "limit is 1438; .* from 1 to 1437"),
    "limit 2.5": (("digits", None), {"limit": 2.5}, "limit is 2.5; "),
    "test_limit": (("digits", None), {"test_limit": 361}, "test_limit is 361; .* from 1 to 360"),
    "image_size": (("digits", None), {"image_size": 0}, "image_size is 0; "),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_one_clear_line(case: str) -> None:
    arguments, options, pattern = BAD_OPTIONS[case]
    with pytest.raises(InputError, match=pattern) as caught:
        load_dataset(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_limit_above_an_image_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    with pytest.raises(InputError, match=r"limit is 9; .* from 1 to 8"):
        load_dataset("imagefolder", tmp_path, limit=9)


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (0, -1), (2**63, 0), (0.5, 0), (0, True)])
def test_bad_seed_or_epoch(seed: int, epoch: int) -> None:
    with pytest.raises(InputError, match="must be a whole number"):
        load_dataset("digits").train.set_epoch(seed, epoch)
    with pytest.raises(InputError, match="must be a whole number"):
        epoch_order(5, seed, epoch)


def test_download_happens_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise URLError("no network")

    for module in (torchvision.datasets.cifar, torchvision.datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    for name, row in DATASETS.items():
        if row.downloadable:
            with pytest.raises(InputError, match=f"^{name} is not in .*--download"):
                load_dataset(name, tmp_path)
            with pytest.raises(InputError, match=f"^{row.label} could not be downloaded to .*") as caught:
                load_dataset(name, tmp_path, download=True)
            assert "\n" not in str(caught.value)


def test_forbidden_file_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: None) -> None:
    """A superuser may read everything, so the refusal is put in by hand."""

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    write_jpeg_archives(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(InputError, match=r"train.tar.xz cannot be read .*Permission denied"):
            load_dataset("cifar10", tmp_path)
    WRITERS["cifar10"](tmp_path)  # type: ignore[misc]
    monkeypatch.setattr(pickle, "load", refuse)
    with pytest.raises(InputError, match=r"CIFAR-10 .* may not be read .*Permission denied"):
        load_dataset("cifar10", tmp_path)
