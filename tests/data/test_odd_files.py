"""What lies in a data folder and is no ordinary image: hidden, forbidden, endless, absurdly large, without end.

Each is ignored or refused by name in one line, and nothing that could hang is ever opened.
"""

import contextlib
import errno
import io
import lzma
import os
import shutil
import signal
import socket
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from image_sets import (
    WRITERS,
    picture,
    write_fashion_mnist,
    write_image_folder,
    write_jpeg_archives,
    write_jpeg_folders,
)

from secondorder.data import DATASETS, decoding, jpeg, load_dataset
from secondorder.data.files import entries, open_regular, shown
from secondorder.errors import InputError


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """An opened FIFO waits for ever; here it fails after a minute."""

    def hung(*_: object) -> None:
        raise AssertionError("something that waits for ever was opened")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """The rights of an ordinary user: a superuser may read everything."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


# ------------------------------------------------------------------------------------- hidden things change nothing


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    before = load_dataset("imagefolder", tmp_path)
    for part in ("train", "val"):
        for hidden in (".ipynb_checkpoints", "n01/.ipynb_checkpoints", ".Trash-0/n01"):
            (tmp_path / part / hidden).mkdir(parents=True)
            picture(0).save(tmp_path / part / hidden / "0001-checkpoint.jpg")
        for hidden in (".DS_Store", "n01/.DS_Store", "n01/._0000.jpg"):
            (tmp_path / part / hidden).write_bytes(b"no image")
        (tmp_path / part / "README").write_text("no class")
    os.mkfifo(tmp_path / "train" / "n01" / "notes.txt")  # no image by its name: never looked at
    after = load_dataset("imagefolder", tmp_path)
    assert after.classes == before.classes
    for split in ("train", "test"):
        assert getattr(after, split).files.tolist() == getattr(before, split).files.tolist()
        assert getattr(after, split).labels.tolist() == getattr(before, split).labels.tolist()


def test_hidden_files_of_a_jpeg_set_are_left_out(tmp_path: Path) -> None:
    write_jpeg_folders(tmp_path)
    before = load_dataset("cifar10_jpeg", tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    picture(0).save(tmp_path / "train" / ".ipynb_checkpoints" / "a.jpg")
    (tmp_path / "train" / "cat" / "._0003.jpg").write_bytes(b"no image")
    after = load_dataset("cifar10_jpeg", tmp_path)
    assert len(after.train) == len(before.train)


def test_links_are_followed_and_folders_below_a_class_belong_to_it(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    before = load_dataset("imagefolder", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train" / "n02").rename(tmp_path / "elsewhere" / "n02")
    (tmp_path / "train" / "n02").symlink_to("../elsewhere/n02")
    image = tmp_path / "elsewhere" / "n02" / "0001.jpg"
    (image.parent / "more").mkdir()
    image.rename(tmp_path / "elsewhere" / "0001.jpg")
    (image.parent / "more" / "0001.jpg").symlink_to("../../0001.jpg")
    after = load_dataset("imagefolder", tmp_path)
    assert len(after.train) == len(before.train)
    assert sorted(Path(file).name for file in after.train.files) == sorted(Path(f).name for f in before.train.files)  # type: ignore[attr-defined]


def test_empty_class_is_refused_or_kept_when_told_so(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    for part in ("train", "val"):
        (tmp_path / part / "n00").mkdir()
    with pytest.raises(InputError, match=r"1 hold none \(n00\); delete .* allow_empty=True"):
        load_dataset("imagefolder", tmp_path)
    data = load_dataset("imagefolder", tmp_path, allow_empty=True)
    assert data.classes == ("n00", "n01", "n02")
    assert data.train.labels.unique().tolist() == [1, 2]
    with pytest.raises(InputError, match="allow_empty=True: digits has every class"):
        load_dataset("digits", allow_empty=True)


# ------------------------------------------------------------------------------------------------- what is refused


def replaced(path: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else in the place of ``path``."""

    def damage(root: Path) -> None:
        target = root / path
        if target.is_file() and not target.is_symlink():
            target.unlink()
        make(target)

    return damage


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def bytes_of(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces so many pixels and holds some zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def archive_of(*members: tuple[str, bytes, bytes]) -> Callable[[Path], object]:
    """A .tar.xz of members (name, type, content)."""

    def write(path: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, kind, content in members:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = kind, len(content), "cat/x.jpg"
                archive.addfile(info, io.BytesIO(content))
        path.write_bytes(lzma.compress(buffer.getvalue()))

    return write


FOLDERS, ARCHIVES, IMAGES, FASHION = write_jpeg_folders, write_jpeg_archives, write_image_folder, write_fashion_mnist
FIRST, RAW = "train/n01/0000.jpg", "FashionMNIST/raw/t10k-labels-idx1-ubyte"
LOOP = Path()

# (data set, how it is written, how it is damaged, what the line must say)
REFUSED: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], None], str]] = {
    "fifo": ("imagefolder", IMAGES, replaced(FIRST, os.mkfifo), "0000.jpg is a FIFO, which is not opened"),
    "link to a fifo": ("imagefolder", IMAGES, replaced(FIRST, link_to_a_fifo), "0000.jpg is a FIFO"),
    "socket": ("imagefolder", IMAGES, replaced(FIRST, a_socket), "0000.jpg is a socket"),
    "device": ("imagefolder", IMAGES, replaced(FIRST, lambda p: p.symlink_to("/dev/zero")), "is a character device"),
    "dangling": ("imagefolder", IMAGES, replaced(FIRST, lambda p: p.symlink_to("gone.jpg")), "dangling link: gone.jpg"),
    "dangling class": ("imagefolder", IMAGES, replaced("train/n03", lambda p: p.symlink_to("no")), "n03 is a dangling"),
    "dangling train": (
        "imagefolder",
        lambda root: (root / "val").mkdir(parents=True),
        replaced("train", lambda p: p.symlink_to("no")),
        "train is a dangling link",
    ),
    "link to itself": (
        "imagefolder",
        IMAGES,
        replaced(FIRST, lambda p: p.symlink_to(p.name)),
        "0000.jpg cannot be read",
    ),
    "loop": (
        "imagefolder",
        IMAGES,
        replaced("train/n01/up", lambda p: p.symlink_to("..")),
        "is a link back to a folder",
    ),
    "loop of two": ("imagefolder", IMAGES, replaced("train/n02/n", lambda p: p.symlink_to("../n02")), "link back to"),
    "zero bytes": ("imagefolder", IMAGES, replaced("val/n01/0001.jpg", bytes_of(b"")), "0001.jpg is empty; copy"),
    "text": (
        "imagefolder",
        IMAGES,
        replaced(FIRST, bytes_of(b"hello" * 99)),
        r"0000.jpg does not decode \(none of JPEG",
    ),
    "eps": ("imagefolder", IMAGES, replaced(FIRST, bytes_of(b"%!PS-Adobe-3.0 EPSF-3.0\n")), r"does not decode \(none"),
    "bomb": ("imagefolder", IMAGES, replaced(FIRST, bytes_of(png_header(60_000, 60_000))), "0000.jpg does not decode"),
    "jpeg fifo": ("cifar10_jpeg", FOLDERS, replaced("train/cat/0003.jpg", os.mkfifo), "cat/0003.jpg is a FIFO"),
    "jpeg dangling": (
        "cifar10_jpeg",
        FOLDERS,
        replaced("test/cat/a.png", lambda p: p.symlink_to("no")),
        "dangling link",
    ),
    "jpeg empty": ("cifar10_jpeg", FOLDERS, replaced("train/cat/0003.jpg", bytes_of(b"")), "0003.jpg is empty"),
    "jpeg bomb": (
        "cifar10_jpeg",
        FOLDERS,
        replaced("train/cat/0003.jpg", bytes_of(png_header(9000, 9000))),
        "cat/0003.jpg in .* has 9000x9000 pixels, not 32x32",
    ),
    "jpeg of absurd size": (
        "cifar10_jpeg",
        FOLDERS,
        replaced("train/cat/0003.jpg", bytes_of(bytes(2**20 + 1))),
        "0003.jpg has 1048577 bytes; at most 1048576",
    ),
    "fifo archive": ("cifar10_jpeg", ARCHIVES, replaced("train.tar.xz", os.mkfifo), "train.tar.xz is a FIFO"),
    "folder archive": ("cifar10_jpeg", ARCHIVES, replaced("test.tar.xz", Path.mkdir), "test.tar.xz is a folder"),
    "large member": (
        "cifar10_jpeg",
        ARCHIVES,
        replaced("train.tar.xz", archive_of(("cat/a.jpg", tarfile.REGTYPE, bytes(2**20 + 1)))),
        "cat/a.jpg in .*train.tar.xz has 1048577 bytes",
    ),
    "link in an archive": (
        "cifar10_jpeg",
        ARCHIVES,
        replaced("train.tar.xz", archive_of(("cat/a.jpg", tarfile.SYMTYPE, b""))),
        "cat/a.jpg in .*train.tar.xz is no regular file",
    ),
    "fifo in an archive": (
        "cifar10_jpeg",
        ARCHIVES,
        replaced("train.tar.xz", archive_of(("cat/a.jpg", tarfile.FIFOTYPE, b""))),
        "cat/a.jpg in .*train.tar.xz is no regular file",
    ),
    "raw fifo": ("fashion_mnist", FASHION, replaced(RAW, os.mkfifo), "t10k-labels-idx1-ubyte is a FIFO"),
}


def raised(load: Callable[[], object]) -> str:
    """The one line of the InputError."""
    with pytest.raises(InputError) as caught:
        load()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 300
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_odd_file_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    name, write, damage, pattern = REFUSED[case]
    write(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(InputError, match=pattern):
        load_dataset(name, tmp_path / "data")
    raised(lambda: load_dataset(name, tmp_path / "data"))


def test_long_and_unprintable_paths_keep_the_line_short(tmp_path: Path) -> None:
    root = tmp_path / ("long" * 50) / ("a\nb" * 30)
    write_image_folder(root)
    assert "does not decode" in raised(lambda: (root / FIRST).write_bytes(b"x") and load_dataset("imagefolder", root))
    (root / "train" / ("c" * 250)).mkdir()
    assert "in one only" in raised(lambda: load_dataset("imagefolder", root))
    for name in WRITERS:
        if DATASETS[name].markers:  # the others are read from no folder
            raised(lambda name=name: load_dataset(name, root / "none" / ("x" * 200)))
            raised(lambda name=name: load_dataset(name, root / "val"))
    assert shown("a" * 500).endswith("a" * 50)
    assert len(shown("a" * 500)) == 80


BAD_ROOTS = ["~nosuchuser/x", "a" * 5000, "a\0b", "\udcff", 3, ["x"]]


@pytest.mark.parametrize("root", BAD_ROOTS, ids=range(len(BAD_ROOTS)))
def test_bad_root_is_one_line(root: Any) -> None:
    for name in ("imagefolder", "cifar10"):
        raised(lambda name=name: load_dataset(name, root))


def test_bad_cache_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jpeg_folders(tmp_path)
    monkeypatch.setenv("SECONDORDER_CACHE", "~nosuchuser/x")
    assert "SECONDORDER_CACHE ~nosuchuser/x names a user" in raised(lambda: load_dataset("cifar10_jpeg", tmp_path))


def test_cache_that_is_a_fifo_is_not_opened(tmp_path: Path) -> None:
    write_jpeg_archives(tmp_path)
    load_dataset("cifar10_jpeg", tmp_path)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
        os.mkfifo(file)
    assert len(load_dataset("cifar10_jpeg", tmp_path).train) == 30


@pytest.mark.parametrize(
    ("name", "write", "path", "words"),
    [
        ("imagefolder", IMAGES, "train/n01", "the folder .*n01 cannot be read .*Permission denied"),
        ("imagefolder", IMAGES, "train", "the folder .*train cannot be read .*Permission denied"),
        ("imagefolder", IMAGES, "", "cannot be read .*Permission denied"),
        ("imagefolder", IMAGES, FIRST, "0000.jpg cannot be read .*Permission denied"),
        ("cifar10_jpeg", FOLDERS, "train/cat", "the folder .*cat cannot be read .*Permission denied"),
        ("cifar10_jpeg", FOLDERS, "train", "the folder .*train cannot be read .*Permission denied"),
        ("cifar10_jpeg", FOLDERS, "train/cat/0003.jpg", "0003.jpg cannot be read .*Permission denied"),
        ("cifar10_jpeg", ARCHIVES, "train.tar.xz", "train.tar.xz cannot be read .*Permission denied"),
        ("fashion_mnist", FASHION, RAW, "Fashion-MNIST .* may not be read .*Permission denied"),
        ("fashion_mnist", FASHION, "FashionMNIST", "FashionMNIST.* cannot be read .*Permission denied"),
    ],
)
def test_forbidden_file_or_folder_is_named(
    open_folder: Path, tmp_path: Path, name: str, write: Callable[[Path], None], path: str, words: str
) -> None:
    root = open_folder / "data"
    write(root)
    load_dataset(name, root)  # imports what an ordinary user may not be allowed to import
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (root / path).chmod(0)
    try:
        with ordinary_user(), pytest.raises(InputError, match=words) as caught:
            load_dataset(name, root)
    finally:
        (root / path).chmod(0o700)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300


# ---------------------------------------------------------------------------------------------------- absurd sizes


@pytest.mark.parametrize("size", [99999999999999999999, 4097, 10**400, 0, -1, 2.5, "8", True])
def test_absurd_image_size_is_refused_before_anything_is_read(size: Any) -> None:
    message = raised(lambda: load_dataset("imagefolder", "/nonexistent", image_size=size))
    assert "image_size must be a whole number" in message
    assert "from 1 to 4096" in message


def test_image_of_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 299 * 260)
    monkeypatch.setattr(decoding, "_rgb", lambda image, name: image if image.width < 300 else pytest.fail(name))
    data = load_dataset("imagefolder", tmp_path)
    large = next(n for n, file in enumerate(data.train.files) if file.endswith("n02/0001.jpg"))  # type: ignore[attr-defined]
    assert "n02/0001.jpg has 300x260 pixels; at most 77740 are decoded" in raised(lambda: data.train.batch([large]))


def test_strip_that_would_grow_without_bound_is_refused(tmp_path: Path) -> None:
    """The short side of a test image becomes 256 pixels, so that of 1 x 50,000 the other would have 12.8 million."""
    write_image_folder(tmp_path)
    picture(0, 50_000, 1).save(tmp_path / "val" / "n01" / "strip.png")
    data = load_dataset("imagefolder", tmp_path)
    assert "has 50000x1 pixels: too long a strip" in raised(lambda: data.test.batch(range(len(data.test))))
    assert data.train.batch(range(len(data.train)))[0].isfinite().all()


def test_archive_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jpeg_archives(tmp_path)
    monkeypatch.setattr(jpeg, "MAX_ARCHIVE", 2**22)
    whole = (tmp_path / "train.tar.xz").read_bytes()
    for bomb in (whole + lzma.compress(bytes(2**23)), lzma.compress(bytes(2**23))):
        (tmp_path / "train.tar.xz").write_bytes(bomb)
        assert "unpacks to more than 4194304 bytes" in raised(lambda: load_dataset("cifar10_jpeg", tmp_path))


def test_file_of_absurd_size_is_not_handed_to_torchvision(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    os.truncate(tmp_path / RAW, 2**30 + 1)  # sparse: it takes no room
    message = raised(lambda: load_dataset("fashion_mnist", tmp_path))
    assert "t10k-labels-idx1-ubyte has 1073741825 bytes; at most 1073741824" in message


def test_folders_and_files_that_change_under_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot be read .*{os.strerror(errno.ENOTDIR)}"):
        entries(tmp_path / "file")
    with pytest.raises(InputError, match="gone does not exist"):
        open_regular(tmp_path / "gone")
