"""Pictures beside one another: what is done to an image, one row for each way to do it, or one below its name each."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from studies.draw.frame import SMALL, WIDTH, themed
from studies.draw.palette import INK

NAME = 1.15
"""Width of the name of a row, in inches."""


@themed
def strips(rows: Mapping[str, NDArray[np.uint8]], columns: int = 1) -> Figure:
    """The pictures [n, H, W, C] of each row beside its name; `columns` blocks of rows side by side, filled from the first on.

    All pictures are as wide as high; grey ones have C = 1.
    """
    side = (WIDTH / columns - NAME) / max(map(len, rows.values()))
    per_block = -(-len(rows) // columns)
    height = per_block * side
    figure = Figure(figsize=(WIDTH, height))
    for number, (name, pictures) in enumerate(rows.items()):
        block, row = divmod(number, per_block)
        left, bottom = block * WIDTH / columns + NAME, height - (row + 1) * side
        middle = ((left - 0.06) / WIDTH, (bottom + side / 2) / height)
        figure.text(*middle, name, ha="right", va="center", size=SMALL, color=INK)
        axes = figure.add_axes((left / WIDTH, bottom / height, len(pictures) * side / WIDTH, side / height))
        axes.imshow(_row(pictures), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
    return figure


def _row(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pictures side by side [H + 1, n (W + 1), 3], a white line below and beside each."""
    colored = np.broadcast_to(pictures, (*pictures.shape[:3], 3))
    return np.concatenate(np.pad(colored, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255), axis=1)


@themed
def gallery(pictures: Mapping[str, NDArray[np.uint8]], columns: int = 2) -> Figure:
    """Pictures [H, W, 3] of any shape below their names, `columns` beside one another, in their order row by row."""
    room = 0.22  # inches, for a name
    width = WIDTH / columns
    names = [*pictures]
    rows = [names[start : start + columns] for start in range(0, len(names), columns)]
    tall = {name: 0.97 * width * picture.shape[0] / picture.shape[1] for name, picture in pictures.items()}
    heights = [room + max(tall[name] for name in row) for row in rows]
    total = sum(heights)
    figure = Figure(figsize=(WIDTH, total))
    top = total
    for row, height in zip(rows, heights, strict=True):
        for column, name in enumerate(row):
            figure.text(column / columns, (top - room / 2) / total, name, va="center", size=SMALL, color=INK)
            place = (column / columns, (top - room - tall[name]) / total, 0.97 / columns, tall[name] / total)
            axes = figure.add_axes(place)
            axes.imshow(pictures[name], interpolation="antialiased", aspect="auto")
            axes.set_axis_off()
        top -= height
    return figure
