"""On what formulas are tried before they are trusted: a few images of the batch, random vectors, and what counts as equal."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.samples import Samples, floating_tensors, tensors_of
from secondorder.errors import InputError

ALL, FEW, SHARE = 8, 2, 32
"""Images: of so many formulas are tried on all, of more on one in 32, but two: the fewest with which batch norm works in training
mode and images can act on one another."""


def has_numbers(x: Tensor) -> bool:
    """Whether a tensor holds numbers; those of an estimate of costs have shapes only, and nothing can be tried on them."""
    return not is_fake(x)


def all_finite(x: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite."""
    return not has_numbers(x) or bool(torch.isfinite(x).all())


def trial_count(N: int, most: int, few: int = FEW) -> int:
    """How many images of N: at most `most`, but two if there are; of more than ALL at least `few`."""
    return min(N if N <= ALL else max(few, N // SHARE), max(2, most), N)


def trial_samples(images: Samples, most: int, few: int = FEW) -> Tensor:
    """The places of a few images of a batch, in order: those with the largest norm, which no black one has; see `trial_count`."""
    N = len(images)
    count = trial_count(N, most, few)
    numbers = floating_tensors(images)
    if not numbers:
        return torch.arange(count, device=tensors_of(images)[0].device) * N // count
    return sum(squared_norms(t) for t in numbers).topk(count).indices.sort().values  # type: ignore[union-attr]


def squared_norms(x: Tensor) -> Tensor:
    """|x_n|^2 `[N]` of each sample of x `[N, ...]`, in the widest number format of the device."""
    return x.reshape(len(x), x[0].numel()).to(widest(x.device)).square().sum(1)


def random_like(x: Tensor, source: torch.Generator) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(x.shape, generator=source, dtype=x.dtype).to(x.device)


def sample_scales(x: Tensor, source: torch.Generator, different: int = 3) -> Tensor:
    """1, 2, 4, ... in random order, so many `different` ones, by sample of x `[n, ...]` and of its shape.

    Multiplying by powers of two changes no rounding.
    """
    powers = 2.0 ** (torch.randperm(len(x), generator=source) % different)
    return powers.to(x).view(-1, *[1] * (x.ndim - 1)).expand_as(x)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a . b in the widest format of the device."""
    wide = widest(a.device)
    return a.flatten().to(wide) @ b.flatten().to(wide)


def repeated(again: Tensor, z: Tensor) -> bool:
    """Whether outputs of another evaluation are these, up to the rounding of other kernels."""
    return not has_numbers(z) or bool(((again - z).abs() <= torch.finfo(z.dtype).eps ** 0.5 * z.abs().max()).all())


def check_repeated(again: Tensor, z: Tensor) -> None:
    """InputError for outputs that another evaluation has not `repeated`."""
    if not repeated(again, z):
        raise InputError(
            "the network's outputs differ from one evaluation to the next, by random numbers of a generator of its own or a "
            "state that it keeps; use eval(), or draw from torch's default generator"
        )
