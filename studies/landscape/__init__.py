"""Landscape study: the smoothness of the loss over training."""
