"""Figures: a few kinds, each a frozen description (data) whose `draw` is a function of a tidy table alone."""

from studies.draw.curves import Bands, Curves
from studies.draw.forest import Forest, mini
from studies.draw.judged import forest_row, forest_table, in_margins
from studies.draw.maps import Heatmap, Scatter
from studies.draw.palette import COLORS, LABELS

__all__ = [
    "COLORS",
    "LABELS",
    "Bands",
    "Curves",
    "Forest",
    "Heatmap",
    "Scatter",
    "forest_row",
    "forest_table",
    "in_margins",
    "mini",
]
