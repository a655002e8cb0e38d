"""Frames of the perturbation sequences of a batch of pictures, one frame of all pictures at a time.

Each function is a row of `sequences.SEQUENCES`: it takes a `Scene` and the row's parameters, and yields the frames j = 0, ...,
J - 1 as batches ``[N, h, w, C]``. Lengths are in pixels of the published side; `Scene.ratio` brings them to the side at hand.

Index letters: ``N`` pictures, ``H`` rows, ``W`` columns of the pictures, ``h`` rows, ``w`` columns of the frames, ``C`` channels,
``J`` frames.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness import blur, color, warp
from secondorder.robustness.pixels import Batch, cut_to_levels, round_to_levels
from secondorder.robustness.spatter import add_water, liquid_layer
from secondorder.robustness.weather import add_snow, snow_layer

Frames = Iterator[Batch]


@dataclass(frozen=True)
class Scene:
    """Pictures ``[N, H, W, C]`` in [0, 1], of which frames show the middle h x w pixels, and a generator for each."""

    pictures: Batch
    h: int
    w: int
    count: int
    """Frames J of a sequence."""
    generators: Sequence[Generator]
    ratio: float
    """Shorter side of a frame / published side."""

    @property
    def cropped(self) -> Batch:
        """The middle of the pictures ``[N, h, w, C]``."""
        H, W = self.pictures.shape[1:3]
        top, left = warp.crop_corner(H, W, self.h, self.w)
        return self.pictures[:, top : top + self.h, left : left + self.w]

    @property
    def steps(self) -> range:
        """j - (J - 1) / 2, for sequences that are the picture itself in the middle."""
        return range(-(self.count // 2), self.count - self.count // 2)


def noise(scene: Scene, level: float, *, add: Callable[[Batch, float, Sequence[Generator]], Batch]) -> Frames:
    """The picture, then the picture with new noise in each frame."""
    images = scene.cropped
    yield images
    for _ in range(1, scene.count):
        yield add(images, level, scene.generators)


def motion_blur(scene: Scene, radius: float, sigma: float, turn: float, reduced: float = 1.0) -> Frames:
    """Motion blur whose direction turns by `turn` degrees a frame, to 0 in the last.

    Lengths are in pixels of a picture that was reduced to the frame afterwards, by the factor `reduced`.
    """
    for j in range(scene.count):
        yield _smeared(scene.cropped, radius, sigma, turn * (j - (scene.count - 1)), scene.ratio * reduced)


def zoom_blur(scene: Scene, step: float) -> Frames:
    """The mean of the zooms 1 + step i, i = 0, ..., j."""
    H, W = scene.pictures.shape[1:3]
    zooms = _warped(scene, (warp.scaling(H, W, 1 + step * i) for i in range(scene.count)))
    total = np.zeros_like(scene.cropped)
    for j, zoomed in enumerate(zooms):
        total += zoomed
        yield total / np.float32(j + 1)


def snow(scene: Scene, mean: float, sd: float, zoom: float, radius: float, sigma: float) -> Frames:
    """Snow of the same flakes, whose direction of fall turns by 4 degrees a frame, from -150 degrees."""
    images = scene.cropped
    layer = snow_layer(scene.generators, scene.h, scene.w, mean, sd, max(zoom * scene.ratio, 1.0), threshold=0.5)
    for j in range(scene.count):
        yield add_snow(images, _smeared(layer, radius, sigma, 4 * j - 150, scene.ratio), blend=0.85)


def brightness(scene: Scene, step: float) -> Frames:
    """Step more V of HSV in each frame, the picture itself in the middle."""
    images = scene.cropped
    for i in scene.steps:
        yield color.brightness(images, step * i)


def translate(scene: Scene, first: int) -> Frames:
    """Moved to the right, by a pixel more in each frame, from `first` pixels; black beyond the picture."""
    return _warped(scene, (warp.translation(scene.ratio * (first + j)) for j in range(scene.count)))


def rotate(scene: Scene, step: float) -> Frames:
    """Turned clockwise, by `step` degrees more in each frame, the picture itself in the middle; black beyond the picture."""
    H, W = scene.pictures.shape[1:3]
    return _warped(scene, (warp.rotation(H, W, step * i) for i in scene.steps))


def tilt(scene: Scene, step: float) -> Frames:
    """Turned in space, by `step` degrees more in each frame; fades to black beyond the picture; rounded, not cut, to 8 bits."""
    H, W = scene.pictures.shape[1:3]
    maps = (warp.tilting(H, W, step * i, scene.ratio) for i in scene.steps)
    return (round_to_levels(frame) for frame in _warped(scene, maps, blend=True))


def scale(scene: Scene, first: float, step: float) -> Frames:
    """Enlarged by first + step j; black beyond the picture."""
    H, W = scene.pictures.shape[1:3]
    return _warped(scene, (warp.scaling(H, W, first + step * j) for j in range(scene.count)))


def shear(scene: Scene, step: float) -> Frames:
    """Leaning by `step` degrees more in each frame, the picture itself in the middle; black beyond the picture."""
    H, W = scene.pictures.shape[1:3]
    return _warped(scene, (warp.shearing(H, W, step * i) for i in scene.steps))


def gaussian_blur(scene: Scene, first: float, step: float, truncate: float) -> Frames:
    """Gaussian filters of standard deviation first + step j."""
    images = scene.cropped
    for j in range(scene.count):
        yield blur.gaussian_blur(images, first + step * j, truncate, scene.ratio)


def spatter(
    scene: Scene, mean: float, sd: float, sigma: float, threshold: float, run: Sequence[float], start: int
) -> Frames:
    """Drops of water that run down: in each frame the share run[k] of the liquid moves by start + k rows."""
    images = scene.cropped
    layer = liquid_layer(scene.generators, scene.h, scene.w, mean, sd, sigma, threshold, ratio=scene.ratio)
    rows = scene.ratio * (start + np.arange(len(run)))
    reach = math.ceil(np.abs(rows).max())
    # each share is split linearly between the two rows beside the one to which it moves
    moves = np.maximum(1 - np.abs(np.arange(-reach, reach + 1)[:, None] - rows), 0) @ np.asarray(run)
    for _ in range(scene.count):
        yield add_water(images, layer, opacity=0.6)
        layer = ndimage.convolve1d(layer, moves, axis=1, mode="constant")


def _smeared(images: Batch, radius: float, sigma: float, angle: float, ratio: float) -> Batch:
    """Motion blur of all images at one angle, lengths times ratio: they are the channels of one image, which is blurred once."""
    N, h, w, C = images.shape
    together = np.ascontiguousarray(images.transpose(1, 2, 0, 3)).reshape(1, h, w, N * C)
    blurred = blur.motion_blur(together, radius, sigma, [angle], ratio)
    return blurred.reshape(h, w, N, C).transpose(2, 0, 1, 3)


def _warped(scene: Scene, maps: Iterable[NDArray[np.float64]], *, blend: bool = False) -> Frames:
    """The pictures under each map, ``[N, h, w, C]``; in 8 bits as from Pillow unless the border blends."""
    H, W = scene.pictures.shape[1:3]
    points = warp.crop_points(H, W, scene.h, scene.w)
    for matrix in maps:
        frame = warp.read(warp.reading(matrix, points, H, W, blend=blend), scene.pictures, scene.h, scene.w)
        yield frame if blend else cut_to_levels(frame)
