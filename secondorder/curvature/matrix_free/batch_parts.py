"""How many samples of a batch are evaluated at once: measured on a probe of the batch, bounded by the memory."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.memory import check_memory
from secondorder.errors import InputError

PROBE = 2  # samples; the fewest with which training-mode batch norm works and samples can interact


@dataclass(frozen=True)
class Probe:
    """What two samples tell about a batch: shape of one sample's outputs, bytes of its graph, what couples samples."""

    outputs: torch.Size
    dtype: torch.dtype
    sample_bytes: int
    coupling: str | None


def probed(network: FrozenNetwork, images: Tensor) -> Probe:
    """Evaluate and differentiate the network on the first samples of a batch."""
    x = images[:PROBE].detach()
    if x.is_floating_point():
        x.requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (*network.weights.values(), *network.constants.values())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        z = network.outputs(x)
    network.check_finite(z, x)
    coupling = network.couples_samples() or _interaction(z, x)
    return Probe(z.shape[1:], z.dtype, sum(saved.values()) // len(x) + x[0].nbytes, coupling)


def part_size(
    samples: int, chunk: int | None, sample_bytes: float, fixed_bytes: float, available: int, coupling: str | None
) -> int:
    """Samples in one part of a batch: `chunk`, by default as many as `available` bytes allow.

    A part takes `sample_bytes` for each of its samples and `fixed_bytes` however small it is; `coupling` says why a batch
    cannot be divided. Raises InputError when it would have to be, and when the memory does not suffice.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk {chunk!r}: must be a whole number of samples >= 1, or None (what the memory allows)")
    if coupling and chunk is not None and chunk < samples:
        raise InputError(f"chunk={chunk} would change the result: {coupling}; use chunk=None")
    if chunk is not None:
        size = min(chunk, samples)
    elif coupling or fixed_bytes + samples * sample_bytes <= available:
        size = samples
    else:
        size = max(1, int((available - fixed_bytes) // sample_bytes))
    way_out = (
        f"{coupling}, so use a smaller batch" if coupling and size > 1 else "use a smaller chunk or fewer parameters"
    )
    needed = fixed_bytes + size * sample_bytes
    check_memory(needed, available, f"this curvature with {size} of {samples} samples at a time", way_out)
    return size


def _interaction(z: Tensor, x: Tensor) -> str | None:
    """A module that nobody knows couples samples when the first output has a gradient at the second image."""
    if len(x) < 2 or not x.requires_grad or not z.requires_grad:
        return None
    direction = torch.linspace(1, 2, z[0].numel(), dtype=z.dtype, device=z.device).view_as(z[0])
    with torch.enable_grad():
        gradient = torch.autograd.grad(z[0], x, direction, allow_unused=True)[0]
    return (
        "the network lets images act on one another's outputs"
        if gradient is not None and bool(gradient[1].any())
        else None
    )
