"""Units of measure for matrices and features: dividing by about the largest entry keeps all numbers in the range of the format.

With the unit c `[..., 1, 1]` of a sample x, x / c has entries below 2, so that no square of them leaves the range of
numbers, whatever the scale of x. A sample with an entry that is not finite has the unit NaN: x / c and all that follows from
it are NaN, in this sample and in no other, and nothing waits for the device to find out.
"""

import torch
from torch import Tensor

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}
"""Number format -> whole numbers of its size, and the bits of the exponent."""


def unit(x: Tensor) -> Tensor:
    """c `[..., 1, 1]`, the power of two next below the largest |entry| of x `[..., C, M]`; NaN unless x is finite, 1 for zeros.

    A power of two makes x / c exact. It is at least the smallest normal number, because x / c of a smaller c would overflow;
    zeros have no scale, and a small one would make their second derivatives 0 times infinity.
    """
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    largest = largest.masked_fill(largest == 0, 1)
    whole, exponent = _EXPONENT[x.dtype]
    c = (largest.clamp_min(torch.finfo(x.dtype).tiny).view(whole) & exponent).view(x.dtype)
    return c + 0 * largest  # NaN for NaN and infinity


def power(c: Tensor, exponent: float) -> tuple[Tensor, ...]:
    """Factors whose product is c^exponent; NaN stays NaN.

    Two when the power may leave the range of numbers: multiplying by one after the other gives what is representable, and
    infinity or zero otherwise, but never 0 times infinity.
    """
    if exponent == 0:
        return (1 + 0 * c,)
    if exponent == 1:
        return (c,)
    half = (c ** (exponent / 2)).clamp_max(torch.finfo(c.dtype).max)
    return half, half
