"""Which function each corruption is, of which numbers: composed here once more, at the published side and at half of it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.random import Generator

from secondorder.robustness import (
    CORRUPTIONS,
    blur,
    color,
    compression,
    corrupt,
    frost,
    geometry,
    noise,
    plasma,
    spatter,
    weather,
)
from secondorder.robustness.draws import generators
from secondorder.robustness.pixels import Batch, to_levels

H, W = 16, 20
Case = Callable[[Batch, list[Generator]], Batch]


def drawn_angles(draws: list[Generator], low: float, high: float) -> list[float]:
    return [low + (high - low) * generator.random() for generator in draws]


def corners(draws: list[Generator]) -> np.ndarray:
    return np.stack([2 * generator.random((3, 2), dtype=np.float32).astype(float) - 1 for generator in draws])


def snow(
    x: Batch, g: list[Generator], side: tuple[int, int], setting: tuple[float, ...], zoom: float, ratio: float
) -> Batch:
    mean, sd, threshold, radius, sigma, blend = setting
    flakes = weather.snow_layer(g, *side, mean, sd, zoom, threshold)
    return weather.add_snow(x, blur.motion_blur(flakes, radius, sigma, drawn_angles(g, -135, -45), ratio), blend)


def elastic(
    x: Batch, g: list[Generator], side: tuple[int, int], alpha: float, sigma: float, affine: float, ratio: float
) -> Batch:
    moved = affine * ratio * corners(g)
    return geometry.elastic(x, moved, geometry.smooth_displacements(g, *side, alpha, sigma, ratio))


HALF: dict[str, Case] = {
    "gaussian_noise": lambda x, g: noise.gaussian_noise(x, 0.09, g),
    "shot_noise": lambda x, g: noise.shot_noise(x, 75, g),
    "impulse_noise": lambda x, g: noise.impulse_noise(x, 0.05, g),
    "defocus_blur": lambda x, g: blur.defocus_blur(x, 1, 0.2, 0.5),
    "glass_blur": lambda x, g: blur.glass_blur(x, 0.25, 1, 2, g, 0.5),
    "motion_blur": lambda x, g: blur.motion_blur(x, 8, 2, drawn_angles(g, -45, 45), 0.5),
    "zoom_blur": lambda x, g: blur.zoom_blur(x, [1 + i / 100 for i in range(21)], centred=True),
    "snow": lambda x, g: snow(x, g, (H, W), (0.25, 0.3, 0.6, 12, 6, 0.85), 2.25 / 2, 0.5),
    "frost": lambda x, g: frost.add_frost(x, frost.frosted_panes(g, H, W, 0.1), 0.85, 0.4),
    "fog": lambda x, g: weather.add_fog(x, plasma.plasma(g, H, W, 2), 1),
    "brightness": lambda x, g: color.brightness(x, 0.2),
    "contrast": lambda x, g: color.contrast(x, 0.3),
    "elastic_transform": lambda x, g: elastic(x, g, (H, W), 3.2, 1.28, 1.6, 0.5),
    "pixelate": lambda x, g: compression.pixelate(x, 0.75),
    "jpeg_compression": lambda x, g: compression.jpeg(x, 50),
    "speckle_noise": lambda x, g: noise.speckle_noise(x, 0.16, g),
    "gaussian_blur": lambda x, g: blur.gaussian_blur(x, 0.8, ratio=0.5),
    "spatter": lambda x, g: spatter.add_mud(x, spatter.liquid_layer(g, H, W, 0.65, 0.1, 0.7, 0.69, 0.5), 0.6, 0.5),
    "saturate": lambda x, g: color.saturate(x, 2, 0.1),
}
"""CIFAR's severity 4 of images of 16 x 20."""

OTHERS: dict[str, tuple[str, int, tuple[int, int], Case]] = {
    "zooms of the published grid": ("zoom_blur", 3, (32, 32), lambda x, g: blur.zoom_blur(x, np.arange(1, 1.16, 0.01))),
    "the last of them": ("zoom_blur", 5, (32, 32), lambda x, g: blur.zoom_blur(x, np.arange(1, 1.26, 0.01))),
    "flakes of a pixel": ("snow", 2, (H, W), lambda x, g: snow(x, g, (H, W), (0.1, 0.2, 0.5, 10, 4, 0.9), 1, 0.5)),
    "water": (
        *("spatter", 1, (H, W)),
        lambda x, g: spatter.add_water(x, spatter.liquid_layer(g, H, W, 0.62, 0.1, 0.7, 0.7, 0.5), 0.5),
    ),
    "larger than 244": (
        *("elastic_transform", 3, (224, 336)),
        lambda x, g: elastic(x, g, (224, 336), 244 * 0.05, 244 * 0.01, 244 * 0.02, 1),
    ),
    "twice the published side": ("gaussian_blur", 4, (448, 448), lambda x, g: blur.gaussian_blur(x, 8)),
}


def check(name: str, severity: int, side: tuple[int, int], case: Case) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *side, 3), dtype=np.uint8)
    images[:, 4:12] = images[:, 4:5]  # stripes too, which a blur leaves
    x = images.astype(np.float32) / np.float32(255)
    expected = to_levels(case(x, generators(6, name, severity, [7, 1])))
    corrupted = corrupt(torch.from_numpy(images).permute(0, 3, 1, 2), name, severity, seed=6, indices=[7, 1])
    assert (corrupted.permute(0, 2, 3, 1).numpy() == expected).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_at_half_the_published_side(name: str) -> None:
    check(name, 4, (H, W), HALF[name])


@pytest.mark.parametrize("case", OTHERS)
def test_other_sides(case: str) -> None:
    check(*OTHERS[case])
