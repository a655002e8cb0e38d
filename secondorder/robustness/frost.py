"""Frost on a window pane: a procedural texture of needles of ice, and its mixture with images.

The published code cuts its frost from five photographs by third parties. The panes here have their colours and contrasts
(`PANES`) and structure on the same scales, but are other pictures: errors on this frost cannot be compared with published ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from secondorder.robustness.draws import normals, uniforms
from secondorder.robustness.pixels import Batch, luma
from secondorder.robustness.plasma import plasma

Field = NDArray[np.float32]


@dataclass(frozen=True)
class Pane:
    """A frosted pane: mean colour, standard deviation of the brightness, and whether needles are lighter (1) or darker (-1)."""

    color: tuple[float, float, float]
    contrast: float
    needles: int


PANES = (
    Pane((0.30, 0.58, 0.65), 0.06, 1),
    Pane((0.78, 0.79, 0.83), 0.08, -1),
    Pane((0.78, 0.79, 0.83), 0.08, -1),
    Pane((0.56, 0.62, 0.67), 0.10, 1),
    Pane((0.40, 0.44, 0.49), 0.14, 1),
)
"""Measured on the five photographs, of which the second and third are the same; each image draws one of them."""
DRIFT = 0.04
"""Standard deviation of the mean brightness over cuts from one photograph."""
LENGTH = 24
"""Pixels of the longest needle in a photograph of the original size."""
NEEDLES = 8
"""Of a crystal."""
FAN = math.radians(90)
"""Angle over which the needles of a crystal spread."""
SLOW_SHARE = 0.3
"""Share of the variance that is a slow change of the brightness over the pane."""


def add_frost(images: Batch, panes: Batch, image_weight: float, frost_weight: float) -> Batch:
    """Weighted sum of images and frosted panes ``[N, H, W, 3]`` (grey for grey images); not clipped."""
    frost = panes if images.shape[-1] == 3 else luma(panes)
    return np.float32(image_weight) * images + np.float32(frost_weight) * frost


def frosted_panes(generators: Sequence[Generator], H: int, W: int, scale: float) -> Batch:
    """Panes ``[N, H, W, 3]`` in [0, 1], an independent one from each generator.

    Args:
        generators: one a pane.
        H: rows.
        W: columns.
        scale: size of the structure, 1 as in the photographs.
    """
    kinds = [PANES[generator.integers(len(PANES))] for generator in generators]
    drift = normals(generators, (1, 1)) * np.float32(DRIFT)
    color = np.array([kind.color for kind in kinds], dtype=np.float32)[:, None, None]
    contrast, sign = (
        np.array(values, dtype=np.float32)[:, None, None]
        for values in ([kind.contrast for kind in kinds], [kind.needles for kind in kinds])
    )
    slow = _standardized(plasma(generators, H, W, 1.6))
    needles = _standardized(crystals(generators, H, W, LENGTH * scale))
    relief = contrast * (math.sqrt(SLOW_SHARE) * slow + math.sqrt(1 - SLOW_SHARE) * sign * needles)
    return np.clip(color + (drift + relief)[..., None], 0, 1).astype(np.float32)


def crystals(generators: Sequence[Generator], H: int, W: int, length: float) -> Field:
    """Light ``[N, H, W]`` of needles of ice, which fan out from the centres of crystals and fade towards their tips.

    Args:
        generators: one a field.
        H: rows.
        W: columns.
        length: of the longest needle, pixels; the shortest has a quarter of it.
    """
    N, margin = len(generators), length / 2
    count = math.ceil(4 * (H + 2 * margin) * (W + 2 * margin) / (NEEDLES * max(length, 1)))
    draws = uniforms(generators, (count, 3 + 2 * NEEDLES))
    row, column, direction = (draws[..., i, None, None] for i in range(3))  # [N, crystals, 1, 1]
    angle = 2 * math.pi * direction + FAN * (draws[..., 3 : 3 + NEEDLES, None] - 0.5)  # [N, crystals, needles, 1]
    reach = length * (0.25 + 0.75 * draws[..., 3 + NEEDLES :, None])
    steps = math.ceil(length)  # of at most a pixel
    way = (np.arange(steps, dtype=np.float32) + 0.5) / np.float32(steps)
    rows = row * (H + 2 * margin) - margin + reach * way * np.sin(angle)
    columns = column * (W + 2 * margin) - margin + reach * way * np.cos(angle)
    light = reach * np.sqrt(way) * (1 - way)
    return _points(rows.reshape(N, -1), columns.reshape(N, -1), light.reshape(N, -1), H, W)


def _points(rows: Field, columns: Field, light: Field, H: int, W: int) -> Field:
    """Fields ``[N, H, W]`` with the light of points ``[N, P]`` in the pixels where they lie."""
    N = len(rows)
    r, c = np.floor(rows).astype(np.int32), np.floor(columns).astype(np.int32)
    inside = (r >= 0) & (r < H) & (c >= 0) & (c < W)
    pixel = np.where(inside, r * np.int32(W) + c, H * W)  # one pixel more for the light that falls beside
    pixel += (H * W + 1) * np.arange(N, dtype=np.int32)[:, None]
    field = np.bincount(pixel.ravel(), light.ravel(), minlength=N * (H * W + 1)).reshape(N, H * W + 1)
    return field[:, :-1].reshape(N, H, W).astype(np.float32)


def _standardized(fields: Field) -> Field:
    """Fields ``[N, H, W]`` of mean 0 and variance 1 each; a flat one becomes 0."""
    standardized = np.empty_like(fields)
    for field, result in zip(
        fields, standardized, strict=True
    ):  # one by one: a batch must not change the order of the sums
        result[...] = (field - field.mean()) / max(field.std(), 1e-6)
    return standardized
