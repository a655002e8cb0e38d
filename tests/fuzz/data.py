"""Data sets from mutilated folders and with absurd arguments."""

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from secondorder.data import DATASETS, ImageDataset, load_dataset

from .call import Call, arguments
from .values import absurd, named


def data(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((arguments_of, folder, folder, split))(random)


def arguments_of(random: Random) -> Call:
    """load_dataset with one absurd argument."""
    settings: dict[str, Any] = {
        "name": random.choice(("digits", "digits", "digits", "imagefolder", "cifar10")),
        "limit": 20,
    }
    field = random.choice(("name", "root", "download", "limit", "test_limit", "image_size"))
    value = absurd(random)
    if field == "image_size" and isinstance(value, int) and value > 64:
        value = random.choice((10**30, 10**400, 17))
    if field == "root" and isinstance(value, str):
        value = random.choice(("~nosuchuser/x", "\0", "x" * 5000, "/dev/null", "", "/proc/1/fd"))
    settings[field] = False if field == "download" else value
    if field in ("download", "root") and random.random() < 0.5:
        settings["name"] = random.choice([name for name in DATASETS if name != "fake"])
    call = f"load_dataset({arguments(settings)})"
    return Call(call, lambda: load_dataset(**settings), names=(field, named(value), "folder", "root"), pure=True)


def picture(random: Random) -> bytes:
    """An encoded image of some mode and size."""
    mode = random.choice(("RGB", "RGB", "L", "RGBA", "P", "1", "I;16", "CMYK", "F"))
    size = random.choice(((32, 32), (1, 1), (3, 50), (50, 3), (200, 1)))
    kind = (
        "TIFF"
        if mode == "F"
        else "JPEG"
        if mode == "CMYK"
        else random.choice(("PNG", "PNG", "JPEG") if mode == "RGB" else ("PNG",))
    )
    buffer = io.BytesIO()
    values = np.random.default_rng(random.getrandbits(30)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    converted = Image.fromarray(values[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    converted.save(buffer, kind)
    return buffer.getvalue()


DAMAGE = (
    "none", "empty file", "cut", "text", "flip", "remove class", "extra class", "remove split", "dangling link", "loop", "fifo",
    "folder as image", "hidden folder", "unreadable", "odd name", "bomb", "empty class", "file beside", "gif", "link to image",
)  # fmt: skip


def folder(random: Random) -> Call:
    """A folder of images in which something is wrong; loaded, and its first images read."""
    damage, twice = random.choice(DAMAGE), random.choice(DAMAGE)
    state = random.getrandbits(40)
    archives = random.random() < 0.15

    def run() -> ImageDataset:
        with tempfile.TemporaryDirectory() as name:
            root, own = Path(name), Random(state)
            write(root, own)
            for kind in (damage, twice):
                break_it(root, kind, own)
            if archives:
                in_archives(root)
            loaded = load_dataset(
                "cifar10_jpeg" if archives else "imagefolder", root, image_size=None if archives else 16
            )
            for part in (loaded.train, loaded.test):
                images, _ = part.batch(torch.arange(min(4, len(part))))
                assert images.isfinite().all(), "images that are not finite"
            return loaded

    return Call(f"{'archives' if archives else 'folder'} with {damage} and {twice}", run, pure=True, seconds=8.0)


def write(root: Path, random: Random) -> None:
    """Two classes of few images in two splits."""
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for n in range(2):
                (root / part / label / f"{n}.png").write_bytes(picture(random))


def break_it(root: Path, damage: str, random: Random) -> None:
    """Do one thing to one place of the tree."""
    files = sorted(path for path in root.rglob("*.png") if path.is_file())  # writing to a pipe would wait for a reader
    parts = sorted(path for path in root.glob("*/*") if path.is_dir())
    if not files or not parts:
        return
    file, label = random.choice(files), random.choice(parts)
    content = file.read_bytes() if file.is_file() else b""
    if damage == "empty file":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        file.write_text("no image")
    elif damage == "flip" and content:
        at = random.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
    elif damage == "remove class":
        shutil.rmtree(label)
    elif damage in ("extra class", "empty class"):
        (label.parent / "zebra").mkdir(exist_ok=True)
        if damage == "extra class":
            (label.parent / "zebra" / "1.png").write_bytes(content)
    elif damage == "remove split":
        shutil.rmtree(label.parent)
    elif damage == "hidden folder":
        (label.parent / ".hidden").mkdir(exist_ok=True)
    elif damage == "file beside":
        (root / "train.txt").write_text("x")
        (label.parent / "readme.png").write_bytes(content)
    elif damage == "odd name":
        (label / "\u00fc \u4e2d\n.png").write_bytes(content)
    elif damage == "bomb":
        file.write_bytes(bomb())
    elif damage == "gif":
        (label / "x.gif").write_bytes(content)
    elif damage == "unreadable":
        file.chmod(0)
        label.chmod(0o700)
    else:
        special(label, damage, file)


def special(label: Path, damage: str, file: Path) -> None:
    """What is no plain file."""
    place = label / "special.png"
    if place.exists() or place.is_symlink() or (label / "loop").is_symlink():
        return
    if damage == "dangling link":
        place.symlink_to("nowhere.png")
    elif damage == "loop":
        (label / "loop").symlink_to(label.parent)
    elif damage == "fifo":
        os.mkfifo(place)
    elif damage == "folder as image":
        place.mkdir()
    elif damage == "link to image":
        place.symlink_to(file)


def bomb() -> bytes:
    """A small file that says it has 10^10 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    return bytes(content)


def in_archives(root: Path) -> None:
    """The splits as archives, the folders gone."""
    for part, name in (("train", "train"), ("val", "test")):
        if (root / part).is_dir():
            with tarfile.open(root / f"{name}.tar.xz", "w:xz") as archive:
                archive.add(root / part, arcname=name)
            shutil.rmtree(root / part)


def split(random: Random) -> Call:
    """Indices and epochs of a split."""
    part = load_dataset("digits", limit=20, test_limit=10).train
    value = random.choice(
        (absurd(random), [0, 19], [20], [-21], torch.arange(3), [0.5], [[0, 1]], "0", -1, np.arange(2))
    )
    epoch = random.choice((absurd(random), 0, 3))

    def run() -> Any:
        part.set_epoch(random.choice((0, 1)), epoch)
        return part.batch(value) if random.random() < 0.7 else part[value]

    return Call(
        f"set_epoch(0, {arguments({'epoch': epoch})}), batch({arguments({'indices': value})})",
        run,
        pure=True,
        raises=(IndexError,),
    )
