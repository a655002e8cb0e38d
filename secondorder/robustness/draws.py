"""Random numbers of one image: a generator for each (seed, name, severity, index), whatever else is drawn.

Any subset, order, batch size or number of processes therefore gives an image the same pixels.
"""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray


def generators(seed: int, name: str, severity: int, indices: Iterable[int]) -> list[Generator]:
    """A generator for each image, independent of all others.

    Philox is a block cipher of a counter: the key is (seed, index), and the upper half of the counter's 256 bits is (severity,
    CRC-32 of the name), so that no two streams share a block before 2^128 blocks are drawn.

    Args:
        seed: of all draws, in [0, 2^64).
        name: of the corruption or perturbation.
        severity: whole number, in [0, 2^64).
        indices: numbers of the images in their data set, each in [0, 2^64).
    """
    counter = np.array([0, 0, severity, zlib.crc32(name.encode())], dtype=np.uint64)
    return [Generator(Philox(counter=counter, key=np.array([seed, index], dtype=np.uint64))) for index in indices]


def normals(generators: Sequence[Generator], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal numbers ``[N, *shape]``, row n from generator n."""
    numbers = np.empty((len(generators), *shape), dtype=np.float32)
    for row, generator in zip(numbers, generators, strict=True):
        generator.standard_normal(dtype=np.float32, out=row)
    return numbers


def uniforms(generators: Sequence[Generator], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform numbers on [0, 1) ``[N, *shape]``, multiples of 2^-24, row n from generator n."""
    numbers = np.empty((len(generators), *shape), dtype=np.float32)
    for row, generator in zip(numbers, generators, strict=True):
        generator.random(dtype=np.float32, out=row)
    return numbers


def angles(generators: Sequence[Generator], low: float, high: float) -> list[float]:
    """One angle in [low, high) degrees of each generator."""
    return [generator.uniform(low, high) for generator in generators]
