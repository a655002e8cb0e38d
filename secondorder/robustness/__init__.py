"""Corruptions of images."""
