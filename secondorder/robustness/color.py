"""Brightness, contrast and saturation of batches."""

import numpy as np

from secondorder.robustness.pixels import Batch


def brightness(images: Batch, change: float) -> Batch:
    """V + change in HSV, clipped to [0, 1], without the way through HSV.

    Red, green and blue grow in proportion to V, their maximum. Black, which has no colour, becomes grey.
    """
    value = images.max(-1, keepdims=True)
    brighter = np.clip(value + np.float32(change), 0, 1)
    scale = np.divide(brighter, value, out=np.zeros_like(value), where=value > 0)
    return np.where(value > 0, images * scale, brighter)


def saturate(images: Batch, factor: float, shift: float) -> Batch:
    """S' = factor S + shift in HSV, clipped to [0, 1], without the way through HSV.

    With V the maximum of red, green and blue, a channel is V - (V - x) S' / S. Grey pixels, S = 0, have the hue of red, so that a
    shift reddens them. Images of one channel have no saturation and stay as they are.
    """
    if images.shape[-1] == 1:
        return images
    value = images.max(-1, keepdims=True)
    fall = value - images
    chroma = fall.max(-1, keepdims=True)  # V S
    saturation = np.divide(chroma, value, out=np.zeros_like(value), where=value > 0)
    wanted = np.clip(saturation * np.float32(factor) + np.float32(shift), 0, 1)
    red = np.array([0, 1, 1], dtype=np.float32)  # what falls below V when a grey pixel turns red
    unit_fall = np.where(chroma > 0, fall / np.where(chroma > 0, chroma, 1), red)
    return value - unit_fall * (value * wanted)


def contrast(images: Batch, factor: float) -> Batch:
    """(x - m) factor + m with the mean m of each channel of each image."""
    # exact in float64, in any order: sums of float32 numbers that are multiples of 2^-32 and fewer than 2^20
    mean = images.mean((1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    return (images - mean) * np.float32(factor) + mean
