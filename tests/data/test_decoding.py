"""Every kind of pixel against files made by hand: 8-bit RGB with an honest meaning, or a refusal by name."""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secondorder.data import load_dataset
from secondorder.data.decoding import decode, decode_stream, upright_size
from secondorder.errors import InputError


def png(depth: int, kind: int, rows: Sequence[bytes], width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written out byte by byte: bits of a sample, colour type, packed rows, further chunks."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def sixteen(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def saved(mode: str, pixels: bytes, width: int, form: str = "tiff", **options: Any) -> bytes:
    """One row of pixels as Pillow writes them."""
    buffer = io.BytesIO()
    Image.frombytes(mode, (width, 1), pixels).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(values: Sequence[int], bits: int, photometric: int) -> bytes:
    """A grey TIFF of one row, little-endian, 16 bits in memory for each value when ``bits`` is 16, else packed 12."""
    if bits == 16:
        pixels = struct.pack(f"<{len(values)}H", *values)
    else:
        word = int("".join(f"{v:012b}" for v in values), 2)
        pixels = word.to_bytes(len(values) * 12 // 8, "big")
    tags = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(pixels)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


PALETTE = bytes([10, 20, 30, 200, 100, 50])
GREY16 = (0, 257, 511, 32768, 65535, 65278)
GREY8 = [0, 1, 2, 128, 255, 254]  # round(v / 257)
HIGH8 = [0, 1, 1, 128, 255, 254]  # the high byte, of colours


def grey(*values: int) -> list[list[int]]:
    return [[v, v, v] for v in values]


# name: (file, its one row of pixels)
READ: dict[str, tuple[bytes, list[list[int]]]] = {
    "png, 1 bit": (png(1, 0, [b"\xa0"], 4), grey(255, 0, 255, 0)),
    "png, 2 bits": (png(2, 0, [b"\x1b"], 4), grey(0, 85, 170, 255)),
    "png, 4 bits": (png(4, 0, [b"\x0f\x71"], 4), grey(0, 255, 119, 17)),
    "png, grey": (png(8, 0, [bytes([0, 7, 255])], 3), grey(0, 7, 255)),
    "png, grey with tRNS": (png(8, 0, [bytes([0, 7, 255])], 3, (b"tRNS", sixteen(7))), grey(0, 7, 255)),
    "png, grey of 16 bits": (png(16, 0, [sixteen(*GREY16)], 6), grey(*GREY8)),
    "png, grey of 16 bits with tRNS": (png(16, 0, [sixteen(*GREY16)], 6, (b"tRNS", sixteen(257))), grey(*GREY8)),
    "png, rgb": (png(8, 2, [bytes([1, 2, 3, 4, 5, 6])], 2), [[1, 2, 3], [4, 5, 6]]),
    "png, rgb with tRNS": (
        png(8, 2, [bytes([1, 2, 3, 4, 5, 6])], 2, (b"tRNS", sixteen(1, 2, 3))),
        [[1, 2, 3], [4, 5, 6]],
    ),
    "png, rgb of 16 bits": (png(16, 2, [sixteen(*GREY16)], 2), [HIGH8[:3], HIGH8[3:]]),
    "png, rgb of 16 bits with tRNS": (
        png(16, 2, [sixteen(*GREY16)], 2, (b"tRNS", sixteen(0, 257, 511))),
        [HIGH8[:3], HIGH8[3:]],
    ),
    "png, palette": (
        png(8, 3, [bytes([0, 1, 0])], 3, (b"PLTE", PALETTE)),
        [[10, 20, 30], [200, 100, 50], [10, 20, 30]],
    ),
    "png, palette of 1 bit": (png(1, 3, [b"\x40"], 2, (b"PLTE", PALETTE)), [[10, 20, 30], [200, 100, 50]]),
    "png, palette with tRNS": (
        png(8, 3, [bytes([0, 1])], 2, (b"PLTE", PALETTE), (b"tRNS", bytes([0, 128]))),
        [[10, 20, 30], [200, 100, 50]],
    ),
    "png, grey and alpha": (png(8, 4, [bytes([9, 0, 200, 255])], 2), grey(9, 200)),
    "png, grey and alpha of 16 bits": (png(16, 4, [sixteen(511, 0, 65535, 65535)], 2), grey(1, 255)),
    "png, rgb and alpha": (png(8, 6, [bytes([1, 2, 3, 0, 4, 5, 6, 255])], 2), [[1, 2, 3], [4, 5, 6]]),
    "png, rgb and alpha of 16 bits": (png(16, 6, [sixteen(511, 0, 65535, 0)], 1), [[1, 0, 255]]),
    "pgm": (b"P5 3 1 255\n" + bytes([0, 7, 255]), grey(0, 7, 255)),
    "pgm of 16 bits": (b"P5 6 1 65535\n" + sixteen(*GREY16), grey(*GREY8)),
    "ppm of 16 bits": (b"P6 2 1 65535\n" + sixteen(*GREY16), [GREY8[:3], GREY8[3:]]),
    "pbm": (b"P4 4 1\n\xa0", grey(0, 255, 0, 255)),  # here 1 is black
    "tiff, grey of 16 bits": (tiff(GREY16, 16, 1), grey(*GREY8)),
    "tiff, white is 0": (tiff([65535 - v for v in GREY16], 16, 0), grey(*GREY8)),
    "tiff, grey of 12 bits": (tiff([0, 4095, 2048, 16], 12, 1), grey(0, 255, 128, 1)),
    "tiff, 1 bit": (saved("1", b"\x40", 2), grey(0, 255)),
    "tiff, cmyk": (
        saved("CMYK", bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 255]), 3),
        [[255, 255, 255], [0, 255, 255], [0, 0, 0]],
    ),
    "bmp": (saved("RGB", bytes([1, 2, 3, 4, 5, 6]), 2, "bmp"), [[1, 2, 3], [4, 5, 6]]),
    "gif": (saved("L", bytes([3, 200]), 2, "gif"), grey(3, 200)),
    "webp": (saved("RGB", bytes([1, 2, 3, 4, 5, 6]), 2, "webp", lossless=True), [[1, 2, 3], [4, 5, 6]]),
}


@pytest.mark.parametrize("case", READ)
def test_pixels(tmp_path: Path, case: str) -> None:
    content, expected = READ[case]
    (tmp_path / "image.png").write_bytes(content)  # the contents say what it is, whatever the name
    image = decode(str(tmp_path / "image.png"))
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (saved("F", struct.pack("=2f", 0.5, 1.0), 2), "x has floating-point pixels .mode F."),
        (b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.5, 1.0), "x has floating-point pixels .mode F."),
        (saved("I", struct.pack("=2i", 5, 70_000), 2), "x has 32-bit pixels .mode I."),
        (png(8, 2, [bytes(6)], 2)[:44], "x does not decode"),
        (b"", "x does not decode .none of JPEG, PNG"),
    ],
    ids=["float tiff", "float pfm", "32 bits", "cut", "nothing"],
)
def test_pixels_without_a_meaning_are_refused(content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        decode_stream(io.BytesIO(content), "x")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300


# How the stored picture has to be turned for each EXIF orientation, as an operation on the array [H, W, C].
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
    0: lambda a: a,  # no orientation that there is
    99: lambda a: a,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["png", "webp", "tiff"])
def test_exif_orientation(orientation: int, form: str) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "webp" else {}
    Image.fromarray(stored).save(buffer, form, exif=exif, **options)
    image = decode_stream(io.BytesIO(buffer.getvalue()), "x")
    assert np.array_equal(np.asarray(image), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["png", "webp", "tiff", "jpeg"])
def test_the_size_is_that_of_the_decoded_image(orientation: int, form: str, tmp_path: Path) -> None:
    exif, file = Image.Exif(), tmp_path / f"x.{form}"
    exif[0x0112] = orientation
    Image.new("RGB", (3, 2)).save(file, exif=exif)
    assert upright_size(str(file)) == decode(str(file)).size == ((2, 3) if orientation in (5, 6, 7, 8) else (3, 2))


@pytest.mark.parametrize("content", [b"", b"no image", png(8, 2, [b"123"], 2), png(8, 2, [], 90_000_000)])
def test_a_size_that_cannot_be_told(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.png (does not decode|has 90000000x)") as caught:
        upright_size(str(file))
    with pytest.raises(InputError) as decoded:
        decode(str(file))
    assert str(caught.value).split("(")[0] == str(decoded.value).split("(")[0]


def test_damaged_exif_leaves_the_picture() -> None:
    stored = np.full((2, 3, 3), 7, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "png", exif=b"Exif\0\0no tags at all")
    assert np.array_equal(np.asarray(decode_stream(io.BytesIO(buffer.getvalue()), "x")), stored)


def test_image_folder_turns_before_it_crops(tmp_path: Path) -> None:
    """A photograph held upright, stored lying: its left half white, so its upper half when turned by 90 degrees."""
    stored = np.zeros((256, 256, 3), np.uint8)
    stored[:, :128] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(stored).save(tmp_path / part / name / "0.jpg", exif=exif)
    image, _ = load_dataset("imagefolder", tmp_path).test[0]
    assert (image[:, 10] > 1).all()
    assert (image[:, -10] < -1).all()
