"""What of a network's outputs the loss is a function of: one tensor, chosen or the only one, or several in a structure.

Index letters: n samples, K numbers of a sample. Several outputs `[n, ...]` are one `[n, K]`, side by side in the order of their
structure, and a loss of them gets the structure back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.curvature.matrix_free.loss_curvature import Loss, SumOverSamples, known, loss_name
from secondorder.errors import InputError, short

Output = str | int | Callable[[Any], Any]
"""A key or an attribute, an index, or a function of what a network returns."""


class NetworkOutputs:
    """What a network returns as one tensor, for a choice of Output; None: all that it returns.

    Raises InputError for another choice, and when called for outputs that make no such tensor.
    """

    def __init__(self, choice: Output | None = None) -> None:
        if choice is not None and (isinstance(choice, bool) or not (isinstance(choice, str | int) or callable(choice))):
            raise InputError(
                f"output {short(choice)}: must be a key or attribute, an index, or a function of the outputs"
            )
        self.choice = choice
        self._spec: pytree.TreeSpec | None = None
        self._leaves: list[torch.Size | None] = []

    @property
    def several(self) -> bool:
        """Whether the latest outputs were several tensors, or one in a structure."""
        return self._spec is not None

    def __call__(self, returned: Any, samples: int) -> Tensor:
        """The outputs `[n, ...]` of so many samples."""
        chosen = self._chosen(returned)
        if isinstance(chosen, Tensor):
            self._spec = None
            return chosen
        leaves, spec = pytree.tree_flatten(chosen)
        tensors = [leaf for leaf in leaves if leaf is not None]
        for leaf in tensors or [chosen]:
            _check(leaf, samples, type(chosen).__name__)
        if len({t.dtype for t in tensors}) > 1:
            raise InputError(
                f"the network returns numbers of {' and '.join(sorted(str(t.dtype) for t in tensors))}; choose by output="
            )
        self._spec, self._leaves = spec, [None if leaf is None else leaf.shape[1:] for leaf in leaves]
        return torch.cat([t.reshape(samples, t[0].numel()) for t in tensors], 1)

    def restored(self, z: Tensor) -> Any:
        """`[n, K]` in the structure that the network returns."""
        assert self._spec is not None
        parts = iter(z.split([shape.numel() for shape in self._leaves if shape is not None], 1))
        leaves = [None if shape is None else next(parts).reshape(len(z), *shape) for shape in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)

    def loss_of_one(self, loss: Loss) -> Loss:
        """A loss of the structure as one of `[n, K]`; InputError for a loss that takes one tensor."""
        if not self.several or not callable(loss) or isinstance(loss, type):
            return loss
        if known(loss):
            raise InputError(
                f"{loss_name(loss)} takes one tensor, the network returns several or a structure; choose by output= (a key or "
                "attribute, an index, or a function)"
            )
        if isinstance(loss, SumOverSamples):
            return SumOverSamples(LossOfStructure(loss.loss, self))
        return LossOfStructure(loss, self)

    def _chosen(self, returned: Any) -> Any:
        choice = self.choice
        if choice is None:
            return returned
        if callable(choice):
            return choice(returned)
        place = f"the network returns {type(returned).__name__}, of which there is no output={choice!r}"
        if isinstance(choice, int):
            if isinstance(returned, tuple | list) and -len(returned) <= choice < len(returned):
                return returned[choice]
            raise InputError(f"{place}; an index needs a tuple or list that is long enough")
        if isinstance(returned, Mapping) and choice in returned:
            return returned[choice]
        if isinstance(returned, Tensor | Mapping) or not hasattr(returned, choice):
            has = list(returned) if isinstance(returned, Mapping) else list(getattr(returned, "__dict__", {}))
            raise InputError(f"{place}; it has {short(has)}")
        return getattr(returned, choice)


@dataclass(frozen=True)
class LossOfStructure:
    """A loss of a structure of outputs as a function of these outputs `[n, K]` side by side."""

    loss: Loss
    outputs: NetworkOutputs

    def __call__(self, z: Tensor, labels: Any) -> Tensor:
        """The loss."""
        return self.loss(self.outputs.restored(z), labels)

    @property
    def __name__(self) -> str:
        return loss_name(self.loss)


def _check(leaf: Any, samples: int, kind: str) -> None:
    """InputError unless it is a tensor of floating-point numbers `[n, ...]`."""
    if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples and leaf.is_floating_point():
        return
    got = f"{leaf.dtype} of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
    within = "" if got == kind else f" within {kind}"
    raise InputError(
        f"the network returns {got}{within} for {samples} samples; choose by output= (a key, attribute, index or function) "
        "what the loss reads: floating-point tensors [N, ...]"
    )
