"""Encoded images to 8-bit RGB: every kind of pixel with an honest meaning, nothing of absurd size, and upright.

8-bit pixels stay as they are, whatever their mode; grey is repeated in three channels, palettes are looked up, CMYK is
(255 - C)(255 - K)/255 and so on. Grey of b > 8 bits becomes round(255 v / (2^b - 1)), that is v / 257 of 16 bits; of 16 bits
in colour (or grey with alpha) Pillow gives the high byte alone, at most one level less. Transparency is left out, as
torchvision has it: the stored colour counts. Floating-point and 32-bit pixels have no white and are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from secondorder.data.files import open_regular, reason, shown
from secondorder.errors import InputError
from secondorder.optional import needed_by

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Formats of Pillow that are tried, by the file's contents; others (EPS, say) run other programs."""

MAX_PIXELS = 89_478_485
"""The largest image that is decoded, 256 MiB of RGB: where Pillow begins to warn."""

_ORIENTATION = 0x0112  # the EXIF tag: how the camera was held
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations whose width and height change places


def decode(file: str) -> Image.Image:
    """RGB image of a file.

    Raises:
        InputError: naming the file when it is no regular file, cannot be read, does not decode, is too large, or its
            pixels have no meaning as 8-bit RGB.
    """
    with open_regular(file) as stream:
        return decode_stream(stream, shown(file))


def decode_stream(stream: BinaryIO, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """RGB image of an open file, ``name`` in messages; ``size`` (width, height) is the only one that is accepted.

    Size and kind of pixels are looked at before any pixel is decoded. Raises `InputError` as `decode`.
    """
    with needed_by("an image file"):
        from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(stream, formats=FORMATS) as image:
            _check_size(image, name, size)
            rgb = _rgb(image, name)
            orientation = _orientation(image)  # after decoding: a PNG has it at its end, and Pillow itself turns a TIFF
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise _unknown_format(name) from error
    except Exception as error:  # a damaged file can fail anywhere in its decoder
        raise _damaged(name, error) from error
    return rgb.transpose(Image.Transpose[_UPRIGHT[orientation]]) if orientation in _UPRIGHT else rgb


def upright_size(file: str) -> tuple[int, int]:
    """Width and height of what `decode` gives, by the file's header alone where that is enough (not of PNG and TIFF).

    Raises:
        InputError: as `decode`, of what the header shows.
    """
    with needed_by("an image file"):
        from PIL import Image, UnidentifiedImageError
    name = shown(file)
    with open_regular(file) as stream:
        try:
            with Image.open(stream, formats=FORMATS) as image:
                _check_size(image, name, None)
                if image.format in (
                    "PNG",
                    "TIFF",
                ):  # a PNG has its orientation at its end, and Pillow itself turns a TIFF
                    image.load()
                width, height = image.size
                turned = _orientation(image) in _SIDEWAYS
        except InputError:
            raise
        except UnidentifiedImageError as error:
            raise _unknown_format(name) from error
        except Exception as error:  # a damaged file can fail anywhere in its decoder
            raise _damaged(name, error) from error
    return (height, width) if turned else (width, height)


def _unknown_format(name: str) -> InputError:
    return InputError(f"{name} does not decode (none of {', '.join(FORMATS)}); replace or remove it")


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name} does not decode ({reason(error)}); replace or remove it")


def _check_size(image: Image.Image, name: str, size: tuple[int, int] | None) -> None:
    """Raise `InputError` for an image of another size than ``size``, or of more than MAX_PIXELS."""
    if size is not None and image.size != size:
        raise InputError(f"{name} has {image.width}x{image.height} pixels, not {size[0]}x{size[1]}; copy it again")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{name} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are decoded; make it smaller"
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image, 1 where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF can fail anywhere, and the picture is none the worse
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The decoded image in RGB."""
    deep_grey = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not deep_grey:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise InputError(
            f"{name} has {kind} pixels (mode {image.mode}), which have no white; save it with 8 or 16 bits"
        )
    image.load()
    if deep_grey:
        return _deep_grey(image)
    image.info.pop("transparency", None)  # Pillow would warn that the colours alone are taken
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits; a TIFF says how many, and whether white is 0."""
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    white = 2 ** int(tags.get(258, (16,))[0]) - 1
    grey = np.asarray(image).astype(np.uint32)
    if tags.get(262) == 0:
        grey = white - grey
    from PIL import Image

    return Image.fromarray(((grey * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
