"""What a network is called with, and the labels: a tensor `[N, ...]`, or several in a structure that is handled like one.

A mapping of inputs is passed on by name, f(**inputs), a tuple or list by position, f(*inputs), and what lies deeper as it is:
({"words": w},) calls f({"words": w}).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secondorder.errors import InputError, short

CONSTANTS = (type(None), bool, int, float, str)
"""What a structure may hold beside tensors: the same for all samples."""


class SampleTree:
    """A mapping, tuple or list of tensors `[N, ...]`: counted, indexed, copied and moved like one tensor of N samples.

    Raises InputError for anything in it that is neither such a tensor nor of CONSTANTS, and calls the structure `what`.
    """

    def __init__(self, structure: Any, what: str = "inputs") -> None:
        structure = dict(structure) if isinstance(structure, Mapping) else structure
        if isinstance(structure, dict) and not all(isinstance(key, str) for key in structure):
            raise InputError(f"{what} by name: names must be strings, got {short(list(structure))}")
        named, self.spec = pytree.tree_flatten_with_path(structure)
        self.names = [pytree.keystr(path) for path, _ in named]
        self.leaves: list[Any] = [leaf for _, leaf in named]
        if not tensors_of(self):
            raise InputError(f"{what} of type {type(structure).__name__} hold no tensor; give tensors [N, ...]")
        N = len(next((t for t in tensors_of(self) if t.ndim), ""))
        for name, leaf in zip(self.names, self.leaves, strict=True):
            if isinstance(leaf, Tensor):
                if leaf.ndim == 0 or len(leaf) != N:
                    raise InputError(
                        f"{what}{name} of shape {list(leaf.shape)}: its first dimension must be that of the {N} samples; use "
                        ".expand() for what all samples share"
                    )
            elif not isinstance(leaf, CONSTANTS):
                raise InputError(
                    f"{what}{name} is of type {type(leaf).__name__}; it must be a tensor [N, ...], a number, a string or None"
                )

    @property
    def structure(self) -> Any:
        """The mapping, tuple or list with its tensors, as it was given (a mapping as a dict)."""
        return pytree.tree_unflatten(self.leaves, self.spec)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "SampleTree":
        """The same structure with `function` of each tensor in its place; constants stay."""
        made = object.__new__(SampleTree)
        made.spec, made.names = self.spec, self.names
        made.leaves = [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return made

    def __len__(self) -> int:
        return len(tensors_of(self)[0])

    def __getitem__(self, rows: Any) -> "SampleTree":
        return self.mapped(lambda t: t[rows])

    def detach(self) -> "SampleTree":
        """The same structure with its tensors detached from their graphs, in the same memory."""
        return self.mapped(Tensor.detach)

    def clone(self) -> "SampleTree":
        """The same structure with copies of its tensors."""
        return self.mapped(Tensor.clone)

    def to(self, device: torch.device, *, copy: bool = False) -> "SampleTree":
        """The same structure with its tensors on a device; `copy`: copies also of those that are there already."""
        return self.mapped(lambda t: t.to(device, copy=copy))

    def double(self) -> "SampleTree":
        """The same structure with its floating-point tensors in float64; tensors of integers stay."""
        return self.mapped(lambda t: t.double() if t.is_floating_point() else t)

    def is_floating_point(self) -> bool:
        """Whether all tensors of the structure are of floating-point numbers."""
        return all(t.is_floating_point() for t in tensors_of(self))

    @property
    def requires_grad(self) -> bool:
        """Whether any tensor of the structure requires gradients."""
        return any(t.requires_grad for t in tensors_of(self))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the structure."""
        return sum(t.nbytes for t in tensors_of(self))


Samples = Tensor | SampleTree


def tensors_of(samples: Samples) -> list[Tensor]:
    """The tensors `[N, ...]` of samples, one or several, in the order of the structure."""
    return [samples] if isinstance(samples, Tensor) else [leaf for leaf in samples.leaves if isinstance(leaf, Tensor)]


def floating_tensors(samples: Samples) -> list[Tensor]:
    """The tensors of samples that are of floating-point numbers, which have gradients."""
    return [t for t in tensors_of(samples) if t.is_floating_point()]


def arguments_of(samples: Samples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments with which a network is called with these samples."""
    if isinstance(samples, Tensor):
        return (samples,), {}
    structure = samples.structure
    return ((), structure) if isinstance(structure, dict) else (tuple(structure), {})


def check_call(network: nn.Module, samples: Samples) -> None:
    """InputError for a structure whose names or places are not those of the network's arguments, as far as these are known."""
    args, kwargs = arguments_of(samples)
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the network cannot be called with inputs {described(samples)}: {error}; a mapping is passed on by name, a tuple by "
            "position, ({...},) as one argument"
        ) from None


def joined(parts: Iterable[Samples]) -> Samples:
    """Samples `[n, ...]` of several parts, all of one structure, as one `[N, ...]` in their order."""
    first, *rest = parts
    if isinstance(first, Tensor):
        return torch.cat([first, *rest])  # type: ignore[list-item]
    others = [iter(tensors_of(part)) for part in rest]
    return first.mapped(lambda t: torch.cat([t, *(next(tensors) for tensors in others)]))


def described(samples: Samples) -> str:
    """Shapes for a message: ``[8, 3, 32, 32]``, or ``['words']: [8, 16], ['mask']: [8, 16]``."""
    if isinstance(samples, Tensor):
        return str(list(samples.shape))
    shapes = zip(samples.names, samples.leaves, strict=True)
    return ", ".join(f"{name}: {list(leaf.shape)}" for name, leaf in shapes if isinstance(leaf, Tensor))
