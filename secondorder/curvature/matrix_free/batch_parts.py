"""How many samples of a batch are evaluated at once: measured on a probe of the batch, bounded by the memory."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from secondorder.curvature.matrix_free.backward_check import check_backward
from secondorder.curvature.matrix_free.captured_parameters import captured, tracked
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.graph import check_checkpoints, graph_nodes, saved_tensors, short_formats
from secondorder.curvature.matrix_free.layer_uses import LayerUse
from secondorder.curvature.matrix_free.memory import budget, check_memory
from secondorder.curvature.matrix_free.sample_coupling import COMPANY, sample_coupling
from secondorder.curvature.matrix_free.samples import Samples, check_call, described
from secondorder.curvature.matrix_free.trial import check_repeated, trial_samples
from secondorder.errors import InputError, check_whole

PROBE = 2  # samples; the fewest with which training-mode batch norm works and samples can interact


@dataclass(frozen=True)
class Probe:
    """What two samples tell about a batch: shape of one sample's outputs, bytes of its graph, what couples samples.

    Args:
        shapes: of the outputs of each use of the layers that were asked for.
    """

    outputs: torch.Size
    dtype: torch.dtype
    sample_bytes: int
    coupling: str | None
    shapes: Mapping[nn.Module, list[torch.Size]]


def probed(
    network: FrozenNetwork,
    images: Samples,
    layers: Mapping[nn.Module, nn.Module | None] | None = None,
    available: int | None = None,
) -> Probe:
    """Evaluate and differentiate the network on a few samples of a batch, as many as `available` bytes allow."""
    available = budget(None, network.device) if available is None else available
    x = images[:PROBE].detach()
    z, probe = evaluated(network, images, layers or {})
    network.check_finite(z, x)
    if past := captured(z, network.parameters):
        raise InputError(
            f"the network reads parameter {past[0]} past its module, from a list or a closure, where it is taken for a constant; "
            "read it as an attribute of its module"
        )
    with torch.enable_grad():  # for derivatives within the network
        check_repeated(network.outputs(x).detach(), z.detach())
    check_backward(network, z)
    few = trial_samples(images, available // max(1, probe.sample_bytes), COMPANY)
    return probe if probe.coupling else replace(probe, coupling=sample_coupling(network, images[few]))


def evaluated(
    network: FrozenNetwork, images: Samples, layers: Mapping[nn.Module, nn.Module | None]
) -> tuple[Tensor, Probe]:
    """Outputs of two samples, and what can be told of them without their numbers: of coupling what kinds of modules tell.

    InputError for a network that fails, or whose outputs have no curvature.
    """
    x = images[:PROBE].detach()
    try:
        with torch.enable_grad(), tracked(network.parameters.values()):
            z, uses, saved_bytes = _evaluated(network, x, layers)
    except InputError:
        raise
    except TypeError:
        if not isinstance(x, Tensor):
            check_call(network.module, x)
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise InputError(f"the network fails for images {described(images)}: {_first_line(error)}") from error
    if not z.is_floating_point():
        raise InputError(f"the network returns {z.dtype}; curvature needs outputs of real floating-point numbers")
    if z.numel() == 0:
        raise InputError(f"the network returns shape {list(z.shape)} for {len(x)} images: no outputs, no curvature")
    nodes = graph_nodes([z])
    check_checkpoints(nodes)
    if short := short_formats(nodes):
        raise InputError(
            f"the network computes in {short[0]}, too short for curvature; leave autocast or conversions out of its forward pass"
        )
    shapes: dict[nn.Module, list[torch.Size]] = {layer: [] for layer in layers}
    for use in uses:
        shapes[use.layer].append(use.output_shape)
    sample_bytes = saved_bytes // len(x) + x[:1].nbytes
    return z, Probe(z.shape[1:], z.dtype, sample_bytes, network.couples_samples(), shapes)


def _evaluated(
    network: FrozenNetwork, x: Samples, layers: Mapping[nn.Module, nn.Module | None]
) -> tuple[Tensor, list[LayerUse], int]:
    """Outputs, uses of the layers, and the bytes that the graph holds beside the parameters."""
    known = {t.untyped_storage()._cdata for t in (*network.weights.values(), *network.constants.values())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        with suppress(RuntimeError):  # zeros without storage, which forward mode has for tangents
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage.nbytes()
        return tensor

    def keep(tensor: Tensor) -> Tensor:
        return tensor

    try:
        with saved_tensors_hooks(note, keep):
            z, uses = network.outputs_and_uses(x, None, 0, layers)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        # A derivative by torch.func within the network rules out such hooks: what it has kept is read from the nodes.
        z, uses = network.outputs_and_uses(x, None, 0, layers)
        for tensor in saved_tensors(graph_nodes([z])):
            note(tensor)
    return z, uses, sum(saved.values())


def part_size(
    samples: int,
    chunk: int | None,
    sample_bytes: float,
    fixed_bytes: float,
    available: int,
    coupling: str | None,
    reserve: int = 0,
) -> int:
    """Samples in one part of a batch: `chunk`, by default as many as `available` bytes allow.

    A part takes `sample_bytes` for each of its samples and `fixed_bytes` however small it is; `coupling` says why a batch
    cannot be divided; where it can, the default leaves `reserve` bytes. Raises InputError when it would have to be, and when
    the memory does not suffice.
    """
    if chunk is not None:
        check_whole("chunk", chunk, hint="; or None (as many samples as the memory allows)")
    if coupling and chunk is not None and chunk < samples:
        raise InputError(f"chunk={chunk} would change the result: {coupling}; use chunk=None")
    if chunk is not None:
        size = min(chunk, samples)
    elif coupling or fixed_bytes + samples * sample_bytes <= available - reserve:
        size = samples
    else:
        size = max(1, int((available - reserve - fixed_bytes) // sample_bytes))
    way_out = (
        f"{coupling}, so use a smaller batch" if coupling and size > 1 else "use a smaller chunk or fewer parameters"
    )
    needed = fixed_bytes + size * sample_bytes
    check_memory(needed, available, f"this curvature with {size} of {samples} samples at a time", way_out)
    return size


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
