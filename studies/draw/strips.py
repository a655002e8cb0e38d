"""Rows of pictures: what is done to an image, one row for each way to do it."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from studies.draw.frame import SMALL, WIDTH, themed
from studies.draw.palette import INK

NAME = 1.25
"""Width of the name of a row, in inches."""


@themed
def strips(rows: Mapping[str, NDArray[np.uint8]], columns: int = 1) -> Figure:
    """The pictures [n, H, W, C] of each row beside its name; `columns` blocks of rows side by side, filled from the first on."""
    most = max(map(len, rows.values()))
    side = (WIDTH / columns - NAME) / most
    per_block = -(-len(rows) // columns)
    height = per_block * side * 1.04
    figure = Figure(figsize=(WIDTH, height))
    for number, (name, pictures) in enumerate(rows.items()):
        block, row = divmod(number, per_block)
        left, bottom = block * WIDTH / columns, height - (row + 1) * side * 1.04
        figure.text(
            (left + NAME - 0.06) / WIDTH, (bottom + side / 2) / height, name, ha="right", va="center", size=SMALL, color=INK
        )
        for column, picture in enumerate(pictures):
            place = ((left + NAME + column * side) / WIDTH, bottom / height, 0.96 * side / WIDTH, 0.96 * side / height)
            axes = figure.add_axes(place)
            axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    return figure
