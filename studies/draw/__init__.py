"""Figures: a few kinds, each a frozen description (data) whose `draw` is a function of a tidy table alone."""

from studies.draw.contours import Contours
from studies.draw.curves import Curves, Scatter
from studies.draw.forest import Forest, mini
from studies.draw.judged import case_rows, forest_row, in_margins, seed_rows
from studies.draw.maps import Heatmap
from studies.draw.palette import LABELS
from studies.draw.strips import gallery, strips

__all__ = [
    "LABELS",
    "Contours",
    "Curves",
    "Forest",
    "Heatmap",
    "Scatter",
    "case_rows",
    "forest_row",
    "gallery",
    "in_margins",
    "mini",
    "seed_rows",
    "strips",
]
