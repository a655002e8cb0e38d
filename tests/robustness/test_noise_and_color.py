"""Noise by its moments, colours against HSV pixel by pixel, Pillow's codecs called directly."""

import colorsys
import io
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from secondorder.robustness.color import brightness, contrast, saturate
from secondorder.robustness.compression import jpeg, pixelate
from secondorder.robustness.draws import generators
from secondorder.robustness.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from secondorder.robustness.pixels import luma, to_levels, to_unit

COUNT = 4 * 40 * 40 * 3
FLAT = np.full((4, 40, 40, 3), 0.4, dtype=np.float32)


@pytest.mark.parametrize(
    ("noise", "strength", "variance", "kurtosis"),
    [
        (gaussian_noise, 0.3, 0.3**2, 3),
        (speckle_noise, 0.3, (0.4 * 0.3) ** 2, 3),
        (shot_noise, 5, 0.4 / 5, 3 + 1 / 2),  # Poisson of mean 2: kurtosis 3 + 1 / mean
    ],
)
def test_moments(noise: object, strength: float, variance: float, kurtosis: float) -> None:
    """Mean and variance to four standard errors, sqrt(v / n) and v sqrt((k - 1) / n); one channel says nothing of another."""
    noisy = noise(FLAT, strength, generators(0, "moments", 1, range(4))).astype(float)  # type: ignore[operator]
    assert noisy.mean() == pytest.approx(0.4, abs=4 * math.sqrt(variance / COUNT))
    assert noisy.var() == pytest.approx(variance, abs=4 * variance * math.sqrt((kurtosis - 1) / COUNT))
    between = np.corrcoef(noisy.reshape(-1, 3).T)[np.triu_indices(3, 1)]
    assert np.abs(between).max() < 4 / math.sqrt(COUNT / 3)


def test_noise_adds_its_draws() -> None:
    images = np.random.default_rng(0).random((2, 8, 9, 3), dtype=np.float32)
    draws = np.stack([g.standard_normal((8, 9, 3), dtype=np.float32) for g in generators(1, "a", 2, [3, 4])])
    assert gaussian_noise(images, 0.2, generators(1, "a", 2, [3, 4])) == pytest.approx(images + 0.2 * draws)
    assert speckle_noise(images, 0.2, generators(1, "a", 2, [3, 4])) == pytest.approx(
        images * (1 + 0.2 * draws), abs=1e-6
    )
    counts = np.stack([g.poisson(x * 60.0) for g, x in zip(generators(1, "a", 2, [3, 4]), images, strict=True)])
    assert shot_noise(images, 60, generators(1, "a", 2, [3, 4])) == pytest.approx(counts / 60)


@pytest.mark.parametrize("share", [0.01, 0.27])
def test_impulses_have_their_share(share: float) -> None:
    """Half of it salt, half pepper, to four standard errors; all other values stay."""
    noisy = impulse_noise(FLAT, share, generators(0, "impulses", 1, range(4)))
    error = 4 * math.sqrt(share / 2 * (1 - share / 2) / COUNT)
    assert (noisy == 1).mean() == pytest.approx(share / 2, abs=error)
    assert (noisy == 0).mean() == pytest.approx(share / 2, abs=error)
    assert ((noisy == 0) | (noisy == 1) | (noisy == FLAT)).all()


def colors() -> NDArray[np.float32]:
    """All mixtures of six levels of red, green and blue, black, white and greys among them ``[1, 36, 6, 3]``."""
    steps = np.linspace(0, 1, 6, dtype=np.float32)
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(1, 36, 6, 3)


@pytest.mark.parametrize("change", [0.05, 0.5, -0.225, 0])
def test_brightness_is_v_of_hsv(change: float) -> None:
    for before, after in zip(colors().reshape(-1, 3), brightness(colors(), change).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.tolist())
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, s, min(max(v + change, 0), 1)), abs=1e-6)


@pytest.mark.parametrize(("factor", "shift"), [(0.3, 0), (0.1, 0), (2, 0.1), (30, 0.2)])
def test_saturate_is_s_of_hsv(factor: float, shift: float) -> None:
    for before, after in zip(colors().reshape(-1, 3), saturate(colors(), factor, shift).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.tolist())
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, min(s * factor + shift, 1), v), abs=1e-6)


def test_contrast_keeps_the_mean_of_each_channel_of_each_image() -> None:
    images = np.random.default_rng(0).random((2, 9, 8, 3), dtype=np.float32)
    changed = contrast(images, 0.3)
    mean = images.astype(float).mean((1, 2), keepdims=True)
    assert changed == pytest.approx(mean + 0.3 * (images - mean), abs=1e-6)


def test_luma() -> None:
    images = np.array([[[[0.2, 0.5, 1.0]]]], dtype=np.float32)
    assert luma(images) == pytest.approx(0.299 * 0.2 + 0.587 * 0.5 + 0.114)
    assert (luma(images[..., :1]) == images[..., :1]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_codecs_are_pillows(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 17, 24, channels), dtype=np.uint8)
    compressed, coarse = jpeg(to_unit(levels), 30), pixelate(to_unit(levels), 0.65)
    for n in range(2):
        picture = Image.fromarray(levels[n].squeeze())
        stream = io.BytesIO()
        picture.save(stream, format="jpeg", quality=30)
        assert (to_levels(compressed)[n].squeeze() == np.asarray(Image.open(stream))).all()
        boxes = picture.resize((15, 11), Image.Resampling.BOX).resize((24, 17), Image.Resampling.BOX)
        assert (to_levels(coarse)[n].squeeze() == np.asarray(boxes)).all()


def test_pixels_are_means_of_boxes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 1)).astype(np.float32)
    means = images.reshape(1, 4, 2, 6, 2, 1).mean((2, 4)).repeat(2, 1).repeat(2, 2)
    assert np.abs(255 * pixelate(images / 255, 0.5) - means).max() <= 1  # Pillow rounds each axis
