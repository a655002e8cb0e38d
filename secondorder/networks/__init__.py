"""Image classifiers made of a stem, features, a pooling head and a linear classifier."""

from secondorder.networks.backbones import NETWORKS, Backbone
from secondorder.networks.composition import Network, network
from secondorder.networks.frozen_statistics import frozen_at
from secondorder.networks.published import load_published
from secondorder.networks.replacement import replace_pooling
from secondorder.networks.shared_backbone import SharedBackbone, maps_below_pooling

__all__ = [
    "NETWORKS",
    "Backbone",
    "Network",
    "SharedBackbone",
    "frozen_at",
    "load_published",
    "maps_below_pooling",
    "network",
    "replace_pooling",
]
