"""Published parameters of the corruptions, for images of 32, 64 and 224 pixels (Hendrycks & Dietterich 2019).

From `hendrycks/robustness` at 8190fe32: `ImageNet-C/create_c/make_cifar_c.py`, `make_tinyimagenet_c.py`, `make_imagenet_c.py`.
What the numbers are, in their order, lengths in pixels:

    gaussian_noise, speckle_noise, gaussian_blur    standard deviation
    shot_noise          photons that a white pixel counts
    impulse_noise       share of the values
    defocus_blur        radius; standard deviation of the softening
    glass_blur          standard deviation; largest move; repetitions
    motion_blur         radius; standard deviation
    zoom_blur           number of zooms; step of their factors, from 1 on
    snow                mean; standard deviation; zoom; threshold; radius and standard deviation of the blur; share of the image
    frost               weight of the image; of the frost; scale of the frost
    fog                 weight; decay
    brightness          added to V of HSV
    spatter             mean; standard deviation; that of the filter; threshold; opacity, or filter of the mud; 0 water, 1 mud
    contrast            factor
    elastic_transform   largest displacement; standard deviation of its filter; largest move of the affine map's three points
    pixelate            share of the side
    jpeg_compression    quality
    saturate            factor of S of HSV; added to it
"""

from dataclasses import dataclass
from typing import Any

from secondorder.errors import check_known


@dataclass(frozen=True)
class ParameterSet:
    """Parameters of each corruption at severities 1 to 5, and the side in pixels of the images that they were published for."""

    side: int
    settings: dict[str, tuple[Any, Any, Any, Any, Any]]


PARAMETERS: dict[str, ParameterSet] = {
    "cifar": ParameterSet(
        32,
        {
            "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
            "shot_noise": (500, 250, 100, 75, 50),
            "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
            "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
            "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
            "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
            "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
            "zoom_blur": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
            "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
            "snow": (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
            "frost": ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
            "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
            "spatter": (
                (0.62, 0.1, 0.7, 0.7, 0.5, 0),
                (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                (0.65, 0.3, 1, 0.69, 0.5, 0),
                (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                (0.65, 0.1, 0.5, 0.68, 0.6, 1),
            ),
            "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
            "elastic_transform": (
                (32 * 0, 32 * 0, 32 * 0.08),
                (32 * 0.05, 32 * 0.2, 32 * 0.07),
                (32 * 0.08, 32 * 0.06, 32 * 0.06),
                (32 * 0.1, 32 * 0.04, 32 * 0.05),
                (32 * 0.1, 32 * 0.03, 32 * 0.03),
            ),
            "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
            "jpeg_compression": (80, 65, 58, 50, 40),
            "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        },
    ),
    "tiny_imagenet": ParameterSet(
        64,
        {
            "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
            "shot_noise": (250, 100, 50, 30, 15),
            "impulse_noise": (0.01, 0.02, 0.05, 0.08, 0.14),
            "speckle_noise": (0.15, 0.2, 0.25, 0.3, 0.35),
            "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
            "glass_blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
            "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
            "zoom_blur": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
            "gaussian_blur": (0.5, 0.75, 1, 1.25, 1.5),
            "snow": (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
            ),
            "frost": ((1, 0.3, 0.3), (0.9, 0.4, 0.3), (0.8, 0.45, 0.3), (0.75, 0.5, 0.3), (0.7, 0.55, 0.3)),
            "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
            "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
            "spatter": (
                (0.62, 0.1, 0.7, 0.7, 0.6, 0),
                (0.65, 0.1, 0.8, 0.7, 0.6, 0),
                (0.65, 0.3, 1, 0.69, 0.6, 0),
                (0.65, 0.1, 0.7, 0.68, 0.6, 1),
                (0.65, 0.1, 0.5, 0.67, 0.6, 1),
            ),
            "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
            "elastic_transform": (
                (64 * 0, 64 * 0, 64 * 0.08),
                (64 * 0.05, 64 * 0.3, 64 * 0.06),
                (64 * 0.1, 64 * 0.08, 64 * 0.06),
                (64 * 0.1, 64 * 0.03, 64 * 0.03),
                (64 * 0.16, 64 * 0.03, 64 * 0.02),
            ),
            "pixelate": (0.9, 0.8, 0.7, 0.6, 0.5),
            "jpeg_compression": (65, 58, 50, 40, 25),
            "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
        },
    ),
    "imagenet": ParameterSet(
        224,
        {
            "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
            "shot_noise": (60, 25, 12, 5, 3),
            "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
            "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
            "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
            "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
            "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
            "zoom_blur": ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
            "gaussian_blur": (1, 2, 3, 4, 6),
            "snow": (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
            "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
            "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
            "spatter": (
                (0.65, 0.3, 4, 0.69, 0.6, 0),
                (0.65, 0.3, 3, 0.68, 0.6, 0),
                (0.65, 0.3, 2, 0.68, 0.5, 0),
                (0.65, 0.3, 1, 0.65, 1.5, 1),
                (0.67, 0.4, 1, 0.65, 1.5, 1),
            ),
            "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
            "elastic_transform": (  # 244 in the published code, for images of 224
                (244 * 2, 244 * 0.7, 244 * 0.1),
                (244 * 2, 244 * 0.08, 244 * 0.2),
                (244 * 0.05, 244 * 0.01, 244 * 0.02),
                (244 * 0.07, 244 * 0.01, 244 * 0.02),
                (244 * 0.12, 244 * 0.01, 244 * 0.02),
            ),
            "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
            "jpeg_compression": (25, 18, 15, 10, 7),
            "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        },
    ),
}


def nearest_set(H: int, W: int) -> str:
    """The key of PARAMETERS whose side is nearest to the shorter side: up to 48 pixels CIFAR's, up to 144 Tiny ImageNet's."""
    return min(PARAMETERS, key=lambda name: abs(PARAMETERS[name].side - min(H, W)))


def parameter_set(name: str | None, H: int, W: int) -> ParameterSet:
    """The set of that name, or the nearest one for None. Raises InputError for an unknown name."""
    if name is None:
        name = nearest_set(H, W)
    check_known("parameter set", name, PARAMETERS)
    return PARAMETERS[name]
