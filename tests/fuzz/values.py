"""Values that no argument should take, and numbers at the ends of every format."""

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 10**3, 2**31, 2**63, 10**30, -(10**30), 10**400,
    0.0, -0.0, 0.5, 1.0, 2.5, -0.5, 1e-300, 5e-324, 1e300, math.inf, -math.inf, math.nan,
    np.float64(0.5), np.float32(0.25), np.int64(3), np.float64("nan"), Decimal("0.1"), Fraction(1, 3), 1j,
)  # fmt: skip
TENSORS: tuple[Any, ...] = (
    torch.tensor(2), torch.tensor(0.5), torch.tensor([1.0, 2.0]), torch.zeros(0), torch.tensor(math.nan),
)  # fmt: skip
THINGS: tuple[Any, ...] = (
    True, False, None, "", "1", "x", "gcp", "mean", "\u00fc\u4e2d\U0001f600", "a\nb", "x" * 1000, b"1", [], [1], [[]], (1, 2), {},
    {"a": 1}, set(), range(3), slice(2), Path("x"), len, int, torch.nn.ReLU, torch.nn.ReLU(), torch.float32, np.zeros(2),
    Ellipsis, NotImplemented,
)  # fmt: skip


def absurd(random: Random) -> Any:
    """Any value."""
    return random.choice(random.choice((NUMBERS, NUMBERS, THINGS, THINGS, TENSORS)))


def named(value: Any) -> str:
    """The beginning of a value's words, as an error would print it."""
    return repr(value).split("\\n")[0].split("\n")[0][:12]


SCALES = {
    torch.float16: (1e-4, 1e-2, 1.0, 30.0),
    torch.bfloat16: (1e-30, 1e-3, 1.0, 1e3, 1e15),
    torch.float32: (1e-40, 1e-30, 1e-23, 1e-15, 1e-3, 1.0, 1e3, 1e15, 1e18, 1e20, 1e30, 1e37),
    torch.float64: (1e-310, 1e-200, 1e-150, 1e-100, 1e-3, 1.0, 1e3, 1e100, 1e150, 1e200, 1e300),
}
"""Sizes of features in each format, some at its ends."""


def generator(random: Random) -> torch.Generator:
    """Random numbers of torch that the call decides."""
    return torch.Generator().manual_seed(random.getrandbits(40))


def normal(random: Random, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=generator(random), dtype=torch.float64).to(dtype)


def bad_tensor(random: Random, like: Tensor) -> Tensor | Any:
    """Something that is not a finite real tensor of this shape."""
    kind = random.choice(BAD)
    if kind == "dtype":
        return like.to(random.choice((torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)))
    if kind == "shape":
        return random.choice((like.flatten(), like[None], like[..., 0], like[0], like.sum(), like[..., None, None]))
    if kind == "empty":
        return like[:0] if random.random() < 0.5 else like[..., :0]
    if kind == "nan" and like.is_floating_point():
        broken = like.clone()
        broken.view(-1)[random.randrange(like.numel())] = random.choice((math.nan, math.inf, -math.inf))
        return broken
    if kind == "meta":
        return like.to("meta")
    return random.choice((like.tolist(), like.numpy(), None, "x", 3, [like], {"x": like}))


BAD = ("dtype", "shape", "empty", "nan", "meta", "kind")
