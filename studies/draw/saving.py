"""How figures are saved: the same figure gives the same bytes."""

import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from studies.results import write_file


def save(figure: Figure, folder: Path, name: str, formats: Iterable[str] = ("svg", "png")) -> None:
    """Write ``<name>.svg`` and ``<name>.png``; the same figure gives the same bytes. The layout is computed once, and stays."""
    figure.draw_without_rendering()
    with mpl.rc_context(
        {
            "svg.hashsalt": name,
            "svg.fonttype": "path",
            "figure.constrained_layout.use": False,
            "figure.autolayout": False,
        }
    ):
        figure.set_layout_engine(None)
        for suffix in formats:
            buffer = io.BytesIO()
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
            content = buffer.getvalue()
            write_file(folder / f"{name}.{suffix}", content if suffix == "svg" else _with_few_colours(content))


def _with_few_colours(png: bytes) -> bytes:
    """The picture with a palette of 128 colours, a quarter of the bytes: enough for lines, letters and their smooth edges."""
    buffer = io.BytesIO()
    palette = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    palette.save(buffer, "png", optimize=True)
    return buffer.getvalue()
