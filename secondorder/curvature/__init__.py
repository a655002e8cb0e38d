"""Curvature of a network's loss."""
