"""How many samples of a batch are evaluated at once: measured on a probe of the batch, bounded by the memory."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from secondorder.curvature.matrix_free.captured_parameters import captured, tracked
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.graph import check_nodes, saved_tensors
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.memory import budget, check_memory
from secondorder.curvature.matrix_free.sample_coupling import COMPANY, sample_coupling
from secondorder.curvature.matrix_free.samples import Samples, check_call, described
from secondorder.curvature.matrix_free.trial import FEW, trial_samples
from secondorder.errors import InputError, check_whole


@dataclass(frozen=True)
class Probe:
    """What two samples tell about a batch: shape of one sample's outputs, bytes of its graph, what couples samples.

    Args:
        shapes: of the outputs of each use of the layers that were asked for.
        told: what couples samples, as far as kinds of modules tell.
        ask: the same, as far as numbers tell.
    """

    outputs: torch.Size
    dtype: torch.dtype
    sample_bytes: int
    shapes: Mapping[nn.Module, list[torch.Size]]
    told: str | None
    ask: Callable[["Probe"], str | None] | None = None

    @cached_property
    def coupling(self) -> str | None:
        """Why samples cannot be evaluated apart, or None: asked when it matters, which it does not for products with all."""
        return self.told or (self.ask(self) if self.ask else None)


def probed(
    network: FrozenNetwork,
    images: Samples,
    layers: Mapping[nn.Module, nn.Module | None] | None = None,
    available: int | None = None,
) -> tuple[Probe, Linearisation]:
    """What two samples tell, and these, linearised; how samples are coupled is asked of as few as `available` bytes allow."""
    available = budget(None, network.device) if available is None else available

    def ask(probe: Probe) -> str | None:
        few = trial_samples(images, available // max(1, probe.sample_bytes), COMPANY)
        return sample_coupling(network, images[few])

    probe, part = evaluated(network, images, trial_samples(images, FEW), layers or {}, ask)
    if past := captured(part.graph, network.parameters):
        raise InputError(
            f"the network reads parameter {past[0]} past its module, from a list or a closure, where it is taken for a constant; "
            "read it as an attribute of its module"
        )
    return probe, part


def evaluated(
    network: FrozenNetwork,
    images: Samples,
    rows: slice | Tensor,
    layers: Mapping[nn.Module, nn.Module | None],
    ask: Callable[[Probe], str | None] | None = None,
) -> tuple[Probe, Linearisation]:
    """What few samples tell, those in the given rows, and these, linearised; without `ask` what needs no numbers of them.

    InputError for a network that fails, or whose outputs have no curvature.
    """
    few = images[rows].detach()
    try:
        with tracked(network.parameters.values()):
            part, saved_bytes = _linearised(network, few, layers)
    except InputError:
        raise
    except TypeError:
        if not isinstance(few, Tensor):
            check_call(network.module, few)
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if "does not require grad" in str(error) and network.differentiates_constants():
            return evaluated(network, images, rows, layers, ask)
        raise InputError(f"the network fails for images {described(images)}: {_first_line(error)}") from error
    if not part.z.is_floating_point():
        raise InputError(f"the network returns {part.z.dtype}; curvature needs outputs of real floating-point numbers")
    if part.z.numel() == 0:
        shape = [len(few), *part.outputs]
        raise InputError(f"the network returns shape {shape} for {len(few)} images: no outputs, no curvature")
    check_nodes(part.nodes)
    shapes: dict[nn.Module, list[torch.Size]] = {layer: [] for layer in layers}
    for use in part.uses:
        shapes[use.layer].append(use.output_shape)
    sample_bytes = saved_bytes // len(few) + few[:1].nbytes
    return Probe(part.outputs, part.z.dtype, sample_bytes, shapes, network.couples_samples(), ask), part


def _linearised(
    network: FrozenNetwork, x: Samples, layers: Mapping[nn.Module, nn.Module | None]
) -> tuple[Linearisation, int]:
    """The samples, linearised, and the bytes that their graph holds beside the parameters."""
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
            part = Linearisation(network, x, slice(None), 0, layers)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        # A derivative by torch.func within the network rules out such hooks: what it has kept is read from the nodes.
        part = Linearisation(network, x, slice(None), 0, layers)
        for tensor in saved_tensors(part.nodes):
            note(tensor)
    return part, sum(saved.values())


def part_size(
    samples: int,
    chunk: int | None,
    sample_bytes: float,
    fixed_bytes: float,
    available: int,
    coupling: Callable[[], str | None],
    reserve: int = 0,
) -> int:
    """Samples in one part of a batch: `chunk`, by default as many as `available` bytes allow.

    A part takes `sample_bytes` for each of its samples and `fixed_bytes` however small it is; `coupling` says why a batch
    cannot be divided, and is asked where it would be; where it can, the default leaves `reserve` bytes. Raises InputError when
    it would have to be, and when the memory does not suffice.
    """
    if chunk is not None:
        check_whole("chunk", chunk, hint="; or None (as many samples as the memory allows)")
    if chunk is not None:
        if chunk < samples and (why := coupling()):
            raise InputError(f"chunk={chunk} would change the result: {why}; use chunk=None")
        size = min(chunk, samples)
    elif fixed_bytes + samples * sample_bytes <= available - reserve or coupling():
        size = samples
    else:
        size = max(1, int((available - reserve - fixed_bytes) // sample_bytes))
    needed = fixed_bytes + size * sample_bytes
    if needed > available:
        why = coupling() if size > 1 else None
        way_out = f"{why}, so use a smaller batch" if why else "use a smaller chunk or fewer parameters"
        check_memory(needed, available, f"this curvature with {size} of {samples} samples at a time", way_out)
    return size


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
