"""Perturbation sequences of ImageNet-P, Tiny-ImageNet-P and CIFAR-10-P (Hendrycks & Dietterich, ICLR 2019, arXiv 1903.12261).

`perturb` makes of each image a sequence of frames that change little from one to the next. Ten perturbations are the benchmark's,
four are for validation (speckle_noise, gaussian_blur, spatter, shear). Parameters are those of hendrycks/robustness at 8190fe32,
folder ImageNet-P/create_p, for images of 32, 64 and 224 pixels; images of other sides have those of the nearest, and lengths in
proportion to their side.

Difficulty. The three noises draw stronger noise at difficulty 2 and 3, and their frames are compared with the first, which is
clean. The other perturbations have the same frames at every difficulty d, and frames d apart are compared (`comparison`).

Differences from the published sets. ImageNet-P was stored as lossy video. Maps turn about the centre of the picture, (W - 1) / 2,
where torchvision of the time was half a pixel off; shear is x + y tan(angle), as torchvision has it today. Tiny-ImageNet-P
blurred the photographs at their own sizes before it reduced them to 64 pixels; here their side counts as 224.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import check_known, check_seed, check_whole
from secondorder.robustness import frames
from secondorder.robustness.checks import Indices, check_images, checked_indices
from secondorder.robustness.draws import generators
from secondorder.robustness.noise import gaussian_noise, shot_noise, speckle_noise
from secondorder.robustness.parameters import PARAMETERS, nearest_set
from secondorder.robustness.pixels import to_levels, to_unit

DIFFICULTIES = (1, 2, 3)
CHUNK = 2**20
"""Numbers of a frame that are computed at once, to bound the memory; it changes no pixel."""


@dataclass(frozen=True)
class Perturbation:
    """One perturbation: how its frames are made, and with which parameters in each set.

    ``parameters`` of a set are the arguments of ``make``; of a noise its level at each difficulty.
    """

    make: Callable[..., frames.Frames]
    parameters: Mapping[str, tuple[Any, ...]]
    count: Mapping[str, int]
    """Frames of a sequence."""
    noise: bool = False
    extra: bool = False
    """Whether it is one of the four that are no part of the mean flip rate."""
    least_side: int = 8
    """Pixels that the shorter side of a frame must have."""


THIRTY_ONE = {"cifar": 31, "tiny_imagenet": 31, "imagenet": 31}

SEQUENCES: dict[str, Perturbation] = {
    "gaussian_noise": Perturbation(
        partial(frames.noise, add=gaussian_noise),
        {"cifar": (0.02, 0.04, 0.06), "tiny_imagenet": (0.025, 0.05, 0.075), "imagenet": (0.03, 0.05, 0.08)},
        THIRTY_ONE,
        noise=True,
    ),
    "shot_noise": Perturbation(
        partial(frames.noise, add=shot_noise),
        {"cifar": (700, 400, 200), "tiny_imagenet": (500, 250, 125), "imagenet": (300, 120, 60)},
        THIRTY_ONE,
        noise=True,
    ),
    "motion_blur": Perturbation(  # radius, sigma, degrees a frame, reduction afterwards
        frames.motion_blur,
        {"cifar": (6, 1.8, 9), "tiny_imagenet": (14, 3, 5, 64 / 224), "imagenet": (10, 3, 4)},
        THIRTY_ONE | {"cifar": 21},
    ),
    "zoom_blur": Perturbation(
        frames.zoom_blur, {"cifar": (0.004,), "tiny_imagenet": (0.004,), "imagenet": (0.004,)}, THIRTY_ONE
    ),
    "snow": Perturbation(  # mean, sd, zoom of the flakes, radius, sigma of their blur
        frames.snow,
        {"cifar": (0.05, 0.3, 2, 10, 2), "tiny_imagenet": (0.05, 0.28, 2, 10, 2.5), "imagenet": (0.05, 0.3, 3, 14, 4)},
        THIRTY_ONE,
    ),
    "brightness": Perturbation(
        frames.brightness, {"cifar": (0.015,), "tiny_imagenet": (0.02,), "imagenet": (0.02,)}, THIRTY_ONE
    ),
    "translate": Perturbation(  # pixels in the first frame
        frames.translate,
        {"cifar": (-7,), "tiny_imagenet": (-15,), "imagenet": (-20,)},
        {"cifar": 16, "tiny_imagenet": 31, "imagenet": 41},
    ),
    "rotate": Perturbation(frames.rotate, {"cifar": (1,), "tiny_imagenet": (1,), "imagenet": (1,)}, THIRTY_ONE),
    "tilt": Perturbation(frames.tilt, {"cifar": (0.75,), "tiny_imagenet": (1,), "imagenet": (1,)}, THIRTY_ONE),
    "scale": Perturbation(  # factor in the first frame, growth a frame
        frames.scale, {"cifar": (0.7, 0.02), "tiny_imagenet": (0.4, 0.025), "imagenet": (0.4, 0.025)}, THIRTY_ONE
    ),
    "speckle_noise": Perturbation(
        partial(frames.noise, add=speckle_noise),
        {"cifar": (0.05, 0.07, 0.10), "tiny_imagenet": (0.05, 0.10, 0.15), "imagenet": (0.05, 0.10, 0.15)},
        THIRTY_ONE,
        noise=True,
        extra=True,
    ),
    "gaussian_blur": Perturbation(  # sigma in the first frame, growth a frame, where the filter ends in sigmas
        frames.gaussian_blur,
        {"cifar": (0.3, 0.015, 7.0), "tiny_imagenet": (0.35, 0.014, 7.0), "imagenet": (0.25, 0.035, 6.0)},
        THIRTY_ONE,
        extra=True,
    ),
    "spatter": Perturbation(  # mean, sd, sigma of their filter, threshold, shares that run down a frame, rows of the first share
        frames.spatter,
        {
            "cifar": (0.6, 0.265, 1.75, 0.7, (0.2, 0.8), 0),
            "tiny_imagenet": (0.6, 0.25, 1.75, 0.7, (0.2, 0.8), 0),
            "imagenet": (0.65, 0.27, 3.7, 0.69, (0.05, 0.1, 0.15, 0.7), -1),
        },
        THIRTY_ONE,
        extra=True,
    ),
    "shear": Perturbation(
        frames.shear, {"cifar": (1,), "tiny_imagenet": (1,), "imagenet": (1,)}, THIRTY_ONE, extra=True
    ),
}
"""Name -> perturbation: the 10 of the benchmark in the order of the paper, then the 4 for validation."""


def comparison(name: str, difficulty: int = 1) -> tuple[str, int]:
    """Which frames of a perturbation are compared: ("first", 1) of a noise, else ("previous", difficulty).

    Raises InputError for a name that is no key of SEQUENCES, and a difficulty that is not 1, 2 or 3.
    """
    check_known("perturbation", name, SEQUENCES)
    check_whole("difficulty", difficulty, DIFFICULTIES[0], DIFFICULTIES[-1])
    return ("first", 1) if SEQUENCES[name].noise else ("previous", difficulty)


def perturb(
    images: Tensor,
    name: str,
    difficulty: int = 1,
    *,
    seed: int = 0,
    indices: Indices | None = None,
    parameters: str | None = None,
    crop: int | None = None,
) -> Tensor:
    """Sequences uint8 ``[N, J, C, h, w]`` of the images, on their device.

    An image's frames depend on its pixels, its index, the name, difficulty, seed and parameters alone: any subset, order, batch
    or number of processes gives the same.

    Args:
        images: uint8 ``[N, C, H, W]``, 1 or 3 channels, sides of at least 8 pixels.
        name: key of SEQUENCES.
        difficulty: 1 to 3; the frames of all but the noises are the same (`comparison`).
        seed: of the random numbers.
        indices: numbers of the images in their data set; 0 to N - 1 by default.
        parameters: "cifar" (published for 32 pixels), "tiny_imagenet" (64) or "imagenet" (224); by default the nearest to the
            shorter side of a frame: the first up to 48 pixels, the second up to 144.
        crop: side of the frames, which are the middle of the images; by default they are as large as the images. ImageNet-P shows
            224 pixels of pictures with a shorter side of 256, so that their own border is moved, turned or scaled into the frame;
            without a crop black is, as in CIFAR-10-P.

    Raises:
        InputError: for anything else.
    """
    check_known("perturbation", name, SEQUENCES)
    check_whole("difficulty", difficulty, DIFFICULTIES[0], DIFFICULTIES[-1])
    check_seed(seed)
    row = SEQUENCES[name]
    images = check_images(images, row.least_side)
    numbers = checked_indices(indices, len(images))
    N, C, H, W = images.shape
    if crop is not None:
        check_whole("crop", crop, row.least_side, min(H, W), hint=f"; the images have {H} x {W} pixels")
    h, w = (H, W) if crop is None else (crop, crop)
    published = nearest_set(h, w) if parameters is None else parameters
    check_known("parameter set", published, PARAMETERS)

    arguments, count = row.parameters[published], row.count[published]
    ratio = min(h, w) / PARAMETERS[published].side
    sequences = torch.empty((N, count, C, h, w), dtype=torch.uint8, device=images.device)
    step = max(CHUNK // max(images[:1].numel(), 1), 1)
    for start in range(0, N, step):
        part = slice(start, start + step)
        levels = images[part].permute(0, 2, 3, 1).contiguous().cpu().numpy()
        draws = generators(seed, f"sequence of {name}", difficulty if row.noise else 0, numbers[part])
        scene = frames.Scene(to_unit(levels), h, w, count, draws, ratio)
        made = row.make(scene, arguments[difficulty - 1]) if row.noise else row.make(scene, *arguments)
        for j, frame in enumerate(made):
            sequences[part, j] = torch.from_numpy(to_levels(frame)).permute(0, 3, 1, 2).to(images.device)
    return sequences
