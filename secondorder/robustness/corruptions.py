"""The 15 + 4 corruptions of CIFAR-10-C, Tiny ImageNet-C and ImageNet-C, on batches of images of any size.

Hendrycks & Dietterich (2019), *Benchmarking neural network robustness to common corruptions and perturbations*. The formulas and
parameters are those of the published code; the random numbers are not, so that sets made here have the published distribution and
not the published pixels. Two differences are larger: frost has procedural textures in place of five photographs (`frost`), and
ImageNet-C's files have gone through JPEG of quality 85 on top.

Kept, because networks were measured on it: glass_blur copies pixels where it means to exchange them (`blur.scatter`), the two
strongest defocus blurs at 224 pixels brighten by 1 % (`kernels.disk_kernel`), elastic_transform at 224 pixels has the parameters
of 244, motion blur rounds to 8 bits and all else is cut off. Not kept: the overflow of water above 8 bits, and 0 / 0 where there
is none.

Scaling. Parameters are published for one side; r = side / published side, with the images' shorter side, and at r = 1 nothing is
scaled. Lengths in pixels are in proportion to the image, whatever has no length stays:

- gaussian_blur, defocus_blur, motion_blur: radius and standard deviation times r; for r < 1 the published kernel is shrunk
  instead (`kernels`), which is the same where the kernel is large and still blurs where it is smaller than a pixel.
- glass_blur: the Gaussian likewise, the moves times r, rounded up or down at random.
- snow: zoom of the flakes times r, at least 1, motion blur as above. spatter: filters as gaussian_blur, with liquid on as large a
  share of the image. frost: the scale of the texture times r.
- elastic_transform: all displacements and the filter times r.
- zoom_blur, fog, pixelate: relative to the side already; at r = 1 zooms have the published grid, which rounds to whole pixels, at
  other sides they are exact.
- noises, brightness, contrast, saturate, all weights and thresholds: stay. jpeg_compression: stays, its blocks have 8 pixels
  in images of any size.

Grey images, of one channel, are corrupted like colour images of three equal channels, with grey frost, water and mud; noise draws
once a pixel, and saturate leaves them as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from secondorder.errors import check_known, check_seed, check_whole
from secondorder.robustness import blur, color, compression, geometry, noise, spatter, weather
from secondorder.robustness.checks import Indices, check_images, checked_indices
from secondorder.robustness.draws import angles, generators, uniforms
from secondorder.robustness.frost import add_frost, frosted_panes
from secondorder.robustness.parameters import parameter_set
from secondorder.robustness.pixels import Batch, to_levels, to_unit
from secondorder.robustness.plasma import plasma

SEVERITIES = 5
CHUNK = 2**18
"""Numbers of a batch that are corrupted at once, to bound the memory; it changes no pixel."""

Draws: TypeAlias = Sequence[Generator]


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption: how it is grouped and computed.

    Args:
        group: "noise", "blur", "weather" or "digital".
        function: (images ``[N, H, W, C]`` in [0, 1], setting of `parameters`, generators, ratio r) to images, not yet clipped.
        random: whether each image needs a generator; without, there are none.
        extra: whether it is one of the four that are no part of the mean corruption error.
        least_side: pixels that the shorter side must have.
    """

    group: str
    function: Callable[[Batch, Any, Draws, float], Batch]
    random: bool = True
    extra: bool = False
    least_side: int = 8


def _defocus_blur(images: Batch, setting: tuple[float, float], draws: Draws, ratio: float) -> Batch:
    radius, alias_sigma = setting
    return blur.defocus_blur(images, radius, alias_sigma, ratio)


def _glass_blur(images: Batch, setting: tuple[float, int, int], draws: Draws, ratio: float) -> Batch:
    sigma, reach, times = setting
    return blur.glass_blur(images, sigma, reach, times, draws, ratio)


def _motion_blur(images: Batch, setting: tuple[float, float], draws: Draws, ratio: float) -> Batch:
    radius, sigma = setting
    return blur.motion_blur(images, radius, sigma, angles(draws, -45, 45), ratio)


def _zoom_blur(images: Batch, setting: tuple[int, float], draws: Draws, ratio: float) -> Batch:
    count, step = setting
    return blur.zoom_blur(images, np.arange(1, 1 + (count - 0.5) * step, step), centred=ratio != 1)


def _snow(images: Batch, setting: tuple[float, ...], draws: Draws, ratio: float) -> Batch:
    mean, sd, zoom, threshold, radius, sigma, blend = setting
    _, H, W, _ = images.shape
    flakes = weather.snow_layer(draws, H, W, mean, sd, max(zoom * ratio, 1.0), threshold)
    streaks = blur.motion_blur(flakes, radius, sigma, angles(draws, -135, -45), ratio)
    return weather.add_snow(images, streaks, blend)


def _frost(images: Batch, setting: tuple[float, float, float], draws: Draws, ratio: float) -> Batch:
    image_weight, frost_weight, scale = setting
    _, H, W, _ = images.shape
    return add_frost(images, frosted_panes(draws, H, W, scale * ratio), image_weight, frost_weight)


def _fog(images: Batch, setting: tuple[float, float], draws: Draws, ratio: float) -> Batch:
    weight, decay = setting
    _, H, W, _ = images.shape
    return weather.add_fog(images, plasma(draws, H, W, decay), weight)


def _spatter(images: Batch, setting: tuple[float, ...], draws: Draws, ratio: float) -> Batch:
    mean, sd, sigma, threshold, strength, is_mud = setting
    _, H, W, _ = images.shape
    layer = spatter.liquid_layer(draws, H, W, mean, sd, sigma, threshold, ratio)
    return spatter.add_mud(images, layer, strength, ratio) if is_mud else spatter.add_water(images, layer, strength)


def _elastic(images: Batch, setting: tuple[float, float, float], draws: Draws, ratio: float) -> Batch:
    alpha, sigma, affine = setting
    _, H, W, _ = images.shape
    corners = (2 * uniforms(draws, (3, 2)).astype(np.float64) - 1) * (affine * ratio)
    return geometry.elastic(images, corners, geometry.smooth_displacements(draws, H, W, alpha, sigma, ratio))


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption("noise", lambda x, c, draws, r: noise.gaussian_noise(x, c, draws)),
    "shot_noise": Corruption("noise", lambda x, c, draws, r: noise.shot_noise(x, c, draws)),
    "impulse_noise": Corruption("noise", lambda x, c, draws, r: noise.impulse_noise(x, c, draws)),
    "defocus_blur": Corruption("blur", _defocus_blur, random=False),
    "glass_blur": Corruption("blur", _glass_blur),
    "motion_blur": Corruption("blur", _motion_blur),
    "zoom_blur": Corruption("blur", _zoom_blur, random=False),
    "snow": Corruption("weather", _snow),
    "frost": Corruption("weather", _frost),
    "fog": Corruption("weather", _fog),
    "brightness": Corruption("weather", lambda x, c, draws, r: color.brightness(x, c), random=False),
    "contrast": Corruption("digital", lambda x, c, draws, r: color.contrast(x, c), random=False),
    "elastic_transform": Corruption("digital", _elastic),
    "pixelate": Corruption("digital", lambda x, c, draws, r: compression.pixelate(x, c), random=False),
    "jpeg_compression": Corruption("digital", lambda x, c, draws, r: compression.jpeg(x, c), random=False),
    "speckle_noise": Corruption("noise", lambda x, c, draws, r: noise.speckle_noise(x, c, draws), extra=True),
    "gaussian_blur": Corruption(
        "blur", lambda x, c, draws, r: blur.gaussian_blur(x, c, ratio=r), random=False, extra=True
    ),
    "spatter": Corruption("weather", _spatter, extra=True),
    "saturate": Corruption("digital", lambda x, c, draws, r: color.saturate(x, *c), random=False, extra=True),
}
"""Name -> corruption: the 15 of the mean corruption error in the published order, then the four extra ones."""


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    indices: Indices | None = None,
    parameters: str | None = None,
) -> Tensor:
    """The images ``[N, C, H, W]`` corrupted, of the same dtype, device and memory format.

    What becomes of an image depends on its pixels and index, name, severity, seed and parameters alone: any subset, order, batch
    or number of processes gives the same. Neither the input nor the state of any global generator changes.

    Args:
        images: uint8, 1 or 3 channels, sides of at least 8 pixels.
        name: key of CORRUPTIONS.
        severity: 1 to 5, or 0 for a copy of the images.
        seed: of the random numbers.
        indices: numbers of the images in their data set; 0 to N - 1 by default.
        parameters: "cifar" (published for 32 pixels), "tiny_imagenet" (64) or "imagenet" (224); by default the nearest to the
            shorter side: the first up to 48 pixels, the second up to 144.

    Raises:
        InputError: for anything else.
    """
    check_known("corruption", name, CORRUPTIONS)
    check_whole("severity", severity, 0, SEVERITIES)
    check_seed(seed)
    corruption = CORRUPTIONS[name]
    images = check_images(images, corruption.least_side)
    numbers = checked_indices(indices, len(images))
    H, W = images.shape[2:]
    published = parameter_set(parameters, H, W)
    if severity == 0 or not numbers:
        return images.clone()

    setting, ratio = published.settings[name][severity - 1], min(H, W) / published.side
    corrupted = torch.empty_like(images)
    step = max(CHUNK // images[0].numel(), 1)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        levels = images[part].permute(0, 2, 3, 1).contiguous().cpu().numpy()
        draws = generators(seed, name, severity, numbers[part]) if corruption.random else []
        result = to_levels(corruption.function(to_unit(levels), setting, draws, ratio))
        corrupted[part] = torch.from_numpy(result).permute(0, 3, 1, 2).to(images.device)
    return corrupted
