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
import torch
from tqdm import tqdm

from secondorder.data.cache import Arrays, cached
from secondorder.data.decoding import decode_stream
from secondorder.data.files import exists, folders_in, images_in, open_regular, reason, shown
from secondorder.data.row import Row, Source, Split
from secondorder.errors import InputError
from secondorder.optional import needed_by

SUFFIXES = (".jpg", ".jpeg", ".png")

ARCHIVE = ".tar.xz"

MAX_FILE = 2**20
"""The largest encoded image, in bytes; CIFAR's have about 1 KiB."""

MAX_ARCHIVE = 2**29
"""The most bytes that an archive may unpack to; the 50,000 images take about 100 MB."""


def decoder() -> str:
    """Versions of what turns JPEG files into pixels."""
    with needed_by("a data set of JPEG files"):
        import PIL
        from PIL import features
    libjpeg = features.version("libjpeg_turbo") or features.version("jpg")
    return f"Pillow {PIL.__version__}, libjpeg {libjpeg}"


def read_jpeg_classes(row: Row, root: Path, download: bool) -> Source:
    """The first of ``row.markers`` (each a folder or archive of the train split) and the test split beside it."""
    train = next(root / marker for marker in row.markers if exists(root / marker))
    test = train.with_name(train.name.replace("train", "test"))
    provenance: dict[str, object] = {"decoder": decoder()}
    splits: list[Split] = []
    for name, path in (("train", train), ("test", test)):
        is_archive = path.name.endswith(ARCHIVE)
        if not exists(path):
            raise InputError(f"{row.label}: {train.name} is in {shown(train.parent)}, but {path.name} is not beside it")
        try:
            fingerprint = (_archive_fingerprint if is_archive else _folder_fingerprint)(path)
            arrays = _decoded(row, path, fingerprint, is_archive)
        except OSError as error:
            raise InputError(f"{row.label}: {shown(path)} cannot be read ({reason(error)})") from error
        splits.append((torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])))
        if is_archive:
            provenance[f"{name}_sha256"] = fingerprint
    provenance["source"] = "archives" if train.name.endswith(ARCHIVE) else "folders"
    return Source(splits[0], splits[1], row.classes or (), provenance)


def _archive_fingerprint(path: Path) -> str:
    """Sha256 of the archive."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # any file has readinto


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
            raise InputError(
                f"{shown(path)} holds the class folder {shown(class_name, 40)!r}; {row.label} has {', '.join(row.classes)}"
            )
        images[row.classes.index(class_name), file] = _pixels(
            row, f"{shown(class_name, 25)}/{shown(file, 40)} in {shown(path)}", content
        )
    order = sorted(images)
    labels = np.array([label for label, _ in order], dtype=np.int64)
    empty = [name for label, name in enumerate(row.classes) if label not in labels]
    if empty:
        raise InputError(f"{shown(path)} holds no images of class {', '.join(empty)}; copy it again")
    return {"images": np.stack([images[key] for key in order]), "labels": labels}


def _pixels(row: Row, name: str, content: bytes) -> np.ndarray:
    """Pixels ``[C, H, W]`` of one encoded image."""
    image = decode_stream(io.BytesIO(content), name, (row.image_size, row.image_size))
    return np.asarray(image).transpose(2, 0, 1)


class _Bounded(io.RawIOBase):
    """A stream that refuses to give more than MAX_ARCHIVE bytes: a few kilobytes of .xz can hold terabytes of zeros."""

    def __init__(self, stream: lzma.LZMAFile, name: str) -> None:
        self.stream, self.name, self.given = stream, name, 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most 1 MiB of them."""
        content = self.stream.read(min(size, 1 << 20) if size >= 0 else 1 << 20)
        self.given += len(content)
        if self.given > MAX_ARCHIVE:
            raise InputError(f"{self.name} unpacks to more than {MAX_ARCHIVE} bytes; copy it again")
        return content


def _archive_members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class, file name and content of each image of ``path``, read as a stream and never written to disk."""
    try:
        with open_regular(path) as packed, lzma.open(packed) as unpacked:
            stream = _Bounded(unpacked, shown(path))
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    class_name, file = ("/" + member.name).split("/")[-2:]
                    if not file.lower().endswith(SUFFIXES) or file.startswith(".") or member.isdir():
                        continue
                    yield class_name, file, _member_content(archive, member, path)
            while stream.read(1 << 20):  # the tar file ends before the archive's checksum, which is checked at its end
                pass
    except (lzma.LZMAError, tarfile.TarError, EOFError, MemoryError) as error:
        raise InputError(f"{shown(path)} is truncated or corrupt ({reason(error)}); copy it again") from error


def _member_content(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    """The bytes of one image; `InputError` for a link, a FIFO or a device, and for one of absurd size."""
    name = f"{shown(member.name, 60)} in {shown(path)}"
    if member.size > MAX_FILE:
        raise InputError(f"{name} has {member.size} bytes; an image here has at most {MAX_FILE}; copy it again")
    content = archive.extractfile(member) if member.isfile() else None
    if content is None:
        raise InputError(f"{name} is no regular file; copy it again")
    return content.read()


def _folder_members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class, file name and content of each image under ``path``."""
    for file in _files(path):
        with open_regular(file, MAX_FILE) as stream:
            yield file.parent.name, file.name, stream.read()


def _files(path: Path) -> Iterator[Path]:
    """Images ``path/<class>/<file>``."""
    for name in folders_in(path):
        yield from map(Path, images_in(path / name, SUFFIXES, below=False))
