"""Counter-based randomness: every draw is a pure function of its coordinates, so no order of calls can change it.

Index letters: ``N`` samples, ``B`` samples of a batch, ``D`` draws of one sample.
A generator with a state would tie a sample's augmentation to the batch, worker, rank or resume point that asked for it,
and to the global generators. Hashing (stream, seed, epoch, sample, draw) does neither, and is the same on every version
of torch and numpy.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secondorder.data.files import reason, shown
from secondorder.errors import InputError, check_seed, check_whole

Indices = Sequence[int] | NDArray[np.integer[Any]] | Tensor

# What a draw is for; the streams of one (seed, epoch) are independent of each other.
STREAMS = {"order": 0, "augmentation": 1, "subset": 2, "fake": 3, "sample": 4}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: consecutive counters land far apart


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, a bijection of 64 bits in which each input bit flips each output bit half of the time.

    Variant 13 of Stafford's constants, as in Steele, Lea & Flood (2014), *Fast splittable pseudorandom number
    generators*.
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def check_seed_and_epoch(seed: int, epoch: int) -> None:
    """Raise `InputError` unless both are whole numbers in [0, 2^63)."""
    check_seed(seed)
    check_seed(epoch, "epoch")


def checked_indices(indices: Indices, size: int) -> NDArray[np.int64]:
    """The indices as one row ``[B]`` in [0, size), the negative ones counted from the end.

    Raises:
        InputError: for what are no whole numbers.
        IndexError: for an index outside of [-size, size), as Python's loops over a sequence expect.
    """
    try:
        given = np.asarray(indices).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal length; tensors that numpy cannot have
        raise InputError(f"the indices are {shown(repr(indices))} ({reason(error, 60)}); use whole numbers") from error
    if not given.size:
        return np.empty(0, dtype=np.int64)
    if given.dtype.kind not in "iu":
        raise InputError(f"the indices are {shown(repr(indices))}; use whole numbers from {-size} to {size - 1}")
    low, high = int(given.min()), int(given.max())
    if not -size <= low <= high < size:
        raise IndexError(f"indices from {low} to {high} in a split of {size} images")
    positions = given.astype(np.int64)
    return np.where(positions < 0, positions + size, positions)


def uniforms(
    stream: str, seed: int, epoch: int, indices: Sequence[int] | NDArray[np.int64], draws: int
) -> NDArray[np.float64]:
    """Uniform numbers on [0, 1) ``[B, D]``: row b depends on (stream, seed, epoch, indices[b]) alone.

    Raises `InputError` for a seed or epoch outside [0, 2^63).
    """
    check_seed_and_epoch(seed, epoch)
    samples = np.asarray(indices, dtype=np.int64).astype(np.uint64)[:, None]  # [B, 1]
    words = (STREAMS[stream], seed, epoch, samples, np.arange(draws, dtype=np.uint64))
    state = np.zeros((1, 1), dtype=np.uint64)
    for word in words:  # absorb one coordinate after the other; the array grows to [B, D] by broadcasting
        state = _mix((state + _GOLDEN) ^ np.asarray(word, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53  # the 53 bits that a double holds


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Order ``[N]`` (int64) in which epoch ``epoch`` visits n samples, a pure function of (n, seed, epoch).

    Raises `InputError` for n < 0, and for a seed or epoch outside [0, 2^63).
    """
    if n < 0:
        raise InputError(f"n is {n}; a permutation has at least 0 entries")
    keys = uniforms("order", seed, epoch, np.arange(n), 1)[:, 0]
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def stratified_subset(labels: Tensor, size: int, seed: int = 0) -> Tensor:
    """Sorted indices ``[size]`` of a class-balanced subset of ``labels`` ``[N]``, part of every larger one of this ``seed``.

    Each class gives its share of the samples, to within one. Raises `InputError` unless 1 <= size <= N.
    """
    n = len(labels)
    check_whole("limit", size, 1, n, hint=f"; there are {n} images")
    keys = uniforms("subset", seed, 0, np.arange(n), 1)[:, 0]
    quantile = np.empty(n)
    for label in np.unique(labels.numpy()):
        members = np.flatnonzero(labels.numpy() == label)
        rank = np.argsort(np.argsort(keys[members]))
        quantile[members] = (rank + keys[members]) / len(members)  # spreads every class evenly over [0, 1)
    return torch.from_numpy(np.sort(np.argsort(quantile, kind="stable")[:size]))
