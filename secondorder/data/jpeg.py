"""CIFAR-10 (JPEG): small JPEG files in class folders, or in one .tar.xz for each split, decoded once into memory.

Pixels depend on the JPEG decoder, so the versions of Pillow and of its libjpeg belong to the provenance.
"""

import hashlib
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features
from tqdm import tqdm

from secondorder.data.cache import Arrays, cached
from secondorder.data.row import Row, Source, Split
from secondorder.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png")

ARCHIVE = ".tar.xz"


def decoder() -> str:
    """Versions of what turns JPEG files into pixels."""
    libjpeg = features.version("libjpeg_turbo") or features.version("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {libjpeg}"


def read_jpeg_classes(row: Row, root: Path, download: bool) -> Source:
    """The first of ``row.markers`` (each a folder or archive of the train split) and the test split beside it."""
    train = next(root / marker for marker in row.markers if (root / marker).exists())
    test = train.with_name(train.name.replace("train", "test"))
    provenance: dict[str, object] = {"decoder": decoder()}
    splits: list[Split] = []
    for name, path in (("train", train), ("test", test)):
        is_archive = path.name.endswith(ARCHIVE)
        if not (path.is_file() if is_archive else path.is_dir()):
            raise InputError(f"{row.label}: {train.name} is in {train.parent}, but {path.name} is not beside it")
        try:
            fingerprint = (_archive_fingerprint if is_archive else _folder_fingerprint)(path)
            arrays = _decoded(row, path, fingerprint, is_archive)
        except OSError as error:
            raise InputError(f"{row.label}: {path} cannot be read ({' '.join(str(error).split())})") from error
        splits.append((torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])))
        if is_archive:
            provenance[f"{name}_sha256"] = fingerprint
    provenance["source"] = "archives" if train.name.endswith(ARCHIVE) else "folders"
    return Source(splits[0], splits[1], row.classes or (), provenance)


def _archive_fingerprint(path: Path) -> str:
    """Sha256 of the archive."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_fingerprint(path: Path) -> str:
    """Sha256 of the names, sizes and times of change of the files: they change when the contents do."""
    lines = (f"{file.relative_to(path)}\0{(s := file.stat()).st_size}\0{s.st_mtime_ns}" for file in _files(path))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _decoded(row: Row, path: Path, fingerprint: str, is_archive: bool) -> Arrays:
    """Pixels ``images`` ``[N, C, H, W]`` and ``labels`` ``[N]`` of one split, from the cache when it has them."""
    settings = f"{fingerprint} {decoder()} {row.classes} {row.image_size}"
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]

    def valid(arrays: Arrays) -> bool:
        images, labels = arrays["images"], arrays["labels"]
        shape = (row.in_channels, row.image_size, row.image_size)
        return images.dtype == np.uint8 and images.shape[1:] == shape and labels.shape == images.shape[:1]

    members = _archive_members(path) if is_archive else _folder_members(path)
    return cached(f"cifar10_jpeg-{key}", lambda: _decode_all(row, path, members), valid)


def _decode_all(row: Row, path: Path, members: Iterator[tuple[str, str, bytes]]) -> Arrays:
    """Decode every member, sorted by class and file name, so that all forms of the data set agree."""
    assert row.classes is not None
    images: dict[tuple[int, str], np.ndarray] = {}
    for class_name, file, content in tqdm(
        members, desc=f"decoding {row.label} {path.name}", unit=" images", disable=None
    ):
        if class_name not in row.classes:
            raise InputError(f"{path} holds the class folder {class_name!r}; {row.label} has {', '.join(row.classes)}")
        images[row.classes.index(class_name), file] = _pixels(row, f"{class_name}/{file} in {path}", content)
    order = sorted(images)
    labels = np.array([label for label, _ in order], dtype=np.int64)
    empty = [name for label, name in enumerate(row.classes) if label not in labels]
    if empty:
        raise InputError(f"{path} holds no images of class {', '.join(empty)}; copy it again")
    return {"images": np.stack([images[key] for key in order]), "labels": labels}


def _pixels(row: Row, name: str, content: bytes) -> np.ndarray:
    """Pixels ``[C, H, W]`` of one encoded image."""
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} does not decode ({type(error).__name__}); copy it again") from error
    if image.size != (row.image_size, row.image_size):
        raise InputError(f"{name} has {image.width}x{image.height} pixels; {row.label} has {row.image_size} squared")
    return np.asarray(image).transpose(2, 0, 1)


def _archive_members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class, file name and content of each image of ``path``, read as a stream and never written to disk."""
    try:
        with lzma.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and member.name.lower().endswith(SUFFIXES):
                    class_name, file = ("/" + member.name).split("/")[-2:]
                    yield class_name, file, content.read()
            while stream.read(1 << 20):  # the tar file ends before the archive's checksum, which is checked at its end
                pass
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} is truncated or corrupt ({type(error).__name__}: {error}); copy it again") from error


def _folder_members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class, file name and content of each image under ``path``."""
    for file in _files(path):
        yield file.parent.name, file.name, file.read_bytes()


def _files(path: Path) -> Iterator[Path]:
    """Images ``path/<class>/<file>``."""
    return (file for file in path.glob("*/*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
