"""The loss around a network's weights or activations: smoothness along lines, planes, and directions for both.

line                `feature_landscape`, `weight_landscape`: loss variation, gradient predictiveness, effective beta-smoothness
plane               `landscape_plane`: the loss on a grid over two directions
directions          `parameter_directions`: eigenvectors, or any vectors over all parameters, in the shapes of the parameters
random_directions   `filter_normalised_direction`: random, at the scale of the network's own filters
optimiser_step      `optimiser_step`: where an optimiser is about to go
"""

from secondorder.landscape.directions import Direction, parameter_directions
from secondorder.landscape.line import (
    LandscapeLine,
    StemAndRest,
    equally_spaced,
    feature_landscape,
    weight_landscape,
)
from secondorder.landscape.optimiser_step import optimiser_step
from secondorder.landscape.plane import LandscapePlane, landscape_plane
from secondorder.landscape.random_directions import NORMALISATIONS, filter_normalised_direction

__all__ = [
    "NORMALISATIONS",
    "Direction",
    "LandscapeLine",
    "LandscapePlane",
    "StemAndRest",
    "equally_spaced",
    "feature_landscape",
    "filter_normalised_direction",
    "landscape_plane",
    "optimiser_step",
    "parameter_directions",
    "weight_landscape",
]
