"""Optimiser study: K-FAC and other optimisers against tuned SGD."""
