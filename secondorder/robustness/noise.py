"""Noise: each value of each channel of each pixel draws for itself, image n from generator n. Results are not clipped."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from secondorder.robustness.draws import normals, uniforms
from secondorder.robustness.pixels import Batch


def gaussian_noise(images: Batch, sd: float, generators: Sequence[Generator]) -> Batch:
    """x + e with e ~ N(0, sd^2)."""
    noise = normals(generators, images.shape[1:])
    noise *= np.float32(sd)
    noise += images
    return noise


def speckle_noise(images: Batch, sd: float, generators: Sequence[Generator]) -> Batch:
    """x + x e with e ~ N(0, sd^2)."""
    noise = normals(generators, images.shape[1:])
    noise *= np.float32(sd)
    noise *= images
    noise += images
    return noise


def shot_noise(images: Batch, photons: float, generators: Sequence[Generator]) -> Batch:
    """Poisson(c x) / c: the mean is x, the variance x / c; a white pixel counts c photons on average."""
    counts = np.empty_like(images)
    for count, image, generator in zip(counts, images, generators, strict=True):
        count[...] = generator.poisson(image * np.float64(photons))
    counts /= np.float32(photons)
    return counts


def impulse_noise(images: Batch, share: float, generators: Sequence[Generator]) -> Batch:
    """Salt and pepper: of all values half of the share become 1, half of it 0."""
    draws = uniforms(generators, images.shape[1:])
    salt, pepper = draws < share / 2, draws >= 1 - share / 2
    return np.where(salt, np.float32(1), np.where(pepper, np.float32(0), images))
