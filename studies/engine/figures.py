"""The figures of a page as images in TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image

from secondorder.training.tensorboard import fresh_writer

FIGURES = "figures"


def write_figures(events: Path, folder: Path) -> None:
    """Write the PNG files of a folder of results as images, by their names, in one event file of ``figures`` inside `events`."""
    writer = fresh_writer(events / FIGURES)
    for file in sorted(folder.glob("*.png")):
        with Image.open(file) as image:
            writer.add_image(file.stem, np.asarray(image.convert("RGB")), dataformats="HWC")
    writer.close()
