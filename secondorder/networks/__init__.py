"""Image classifiers made of a stem, features, a pooling head and a linear classifier."""

from secondorder.networks.backbones import NETWORKS, Backbone
from secondorder.networks.composition import Network, network
from secondorder.networks.replacement import replace_pooling

__all__ = ["NETWORKS", "Backbone", "Network", "network", "replace_pooling"]
