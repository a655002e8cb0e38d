"""The Jacobian J = df/dw of the outputs of N samples, part by part.

One `Linearisation` holds the graph of one part of the batch; a batch that is too large for the memory is evaluated part by part,
anew for every product.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor, nn

from secondorder.curvature.matrix_free.backward_check import check_backward
from secondorder.curvature.matrix_free.batch_stream import BatchStream
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.graph import check_nodes, custom_functions
from secondorder.curvature.matrix_free.linearisation import Linearisation, RandomPullBack
from secondorder.curvature.matrix_free.memory import BLOCK_BYTES
from secondorder.curvature.matrix_free.sample_coupling import COUPLED, layers_mix
from secondorder.curvature.matrix_free.samples import Samples, tensors_of
from secondorder.curvature.matrix_free.separable_losses import LossParts
from secondorder.curvature.matrix_free.trial import FEW, check_repeated, repeated, trial_samples
from secondorder.curvature.resuming.keys import Key, digest
from secondorder.errors import InputError

SHOWN = 64
"""Outputs by which a long run knows a network again."""


class Jacobian:
    """J of a batch of N images in parts of `chunk` samples; a single part is evaluated once and kept.

    `coupled` says whether samples of the batch act on one another, or tells when it is asked, `layers` are those whose uses are
    recorded, `block_bytes` may be held at one time beside the graph, `few` are two samples that have been linearised already.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        images: Samples | BatchStream,
        chunk: int,
        coupled: bool | Callable[[], bool] = False,
        layers: Mapping[nn.Module, nn.Module | None] | None = None,
        block_bytes: int = BLOCK_BYTES,
        few: Linearisation | None = None,
    ) -> None:
        self.network = network
        self.images = images
        self.chunk = chunk
        self._coupled = coupled
        self.layers = layers or {}
        self.block_bytes = block_bytes
        self.forward_mode: bool | None = None
        """Whether forward mode gives the same J as reverse mode (`adjoint_check`); None: not known yet."""
        self.tried_functions: set[str] = set()
        """Autograd Functions of others whose second derivatives have been tried."""
        self.twice_differentiable = False
        """Whether second derivatives have been found to be right (`second_derivatives`)."""
        self._few = few
        self._pulled: RandomPullBack | None = None
        """That of `_few`."""
        self._kept: Linearisation | None = None
        self._expected: tuple[Tensor, Tensor] | None = None
        """Places of few images and their outputs, which the whole batch shall have, too."""
        self._backward_is_linear = False
        self._linear_parts: set[int] = set()
        """The first samples of the parts in which it has been found to be so."""
        self._parts_apart: set[int] = set()
        """The first samples of the parts in whose layers images have been found not to act on one another, or have."""
        self._looked_at: set[int] = set()
        """The first samples of the parts whose graphs have been looked at."""
        self._fingerprint: Key | None = None

    @cached_property
    def coupled(self) -> bool:
        """Whether samples of the batch act on one another. For products it does not matter, and is not asked."""
        return self._coupled() if callable(self._coupled) else self._coupled

    @property
    def width(self) -> int:
        """K, the numbers in the outputs of a sample."""
        return next(self.parts()).z.shape[1]

    @property
    def part_count(self) -> int:
        """How many parts the batch has."""
        return -(-len(self.images) // self.chunk)

    def parts(self, first: int = 0) -> Iterator[Linearisation]:
        """The linearised parts in the order of the samples, from the part number `first` on.

        InputError when the network's parameters have changed.
        """
        self.network.check_unchanged()
        N = len(self.images)
        if self.chunk < N:
            for part in range(first, self.part_count):
                start = part * self.chunk
                yield self.linearised(slice(start, min(start + self.chunk, N)), part)
            return
        if first > 0:
            return
        if self._kept is None:
            self._few = self._pulled = None
            self._kept = self.linearised(slice(0, N), 0)
        self._check_expected(self._kept)
        yield self._kept

    def trial(self, most: int | None = None) -> Linearisation:
        """Few images to try formulas on, at `most` so many; all where there are no more, or the network does not take few."""
        assert not isinstance(self.images, BatchStream)
        chosen = trial_samples(self.images, self.chunk if most is None else most)
        if self._few is not None and len(chosen) == len(self._few.z):
            return self._few
        if len(chosen) < len(self.images):
            with suppress(RuntimeError, ValueError, IndexError):
                return Linearisation(self.network, self.images[chosen], slice(None), 0, self.layers)
        return next(self.parts())

    def random_pull_back(self, few: Linearisation) -> RandomPullBack:
        """That of a `trial`, which several checks share."""
        if few is not self._few:
            return few.random_pull_back()
        if self._pulled is None:
            self._pulled = few.random_pull_back()
        return self._pulled

    def check_backward(self, at_once: bool = False) -> None:
        """InputError unless outputs are the same in every evaluation and J^T is linear: for what is made of J^T u alone.

        Products J^T M J v are tried by forward mode (`adjoint_check`, `product_check`), which tells as much. Unless it must be
        `at_once`, outputs are compared with those of the whole batch when `parts` first has these.
        """
        if not self._backward_is_linear and self.network.has_numbers:
            few = self.trial(FEW)
            check_backward(few, self.random_pull_back(few))
            if at_once or self._kept is not None or self.chunk < len(self.images):
                self._check_again(few.images, few.z)
            else:
                self._expected = trial_samples(self.images, FEW), few.z  # type: ignore[arg-type]
            self._backward_is_linear = True

    def _check_expected(self, whole: Linearisation) -> None:
        """InputError unless outputs that few images had are the same in another evaluation, first of all in that of the batch."""
        if self._expected is not None:
            rows, z = self._expected
            if not repeated(whole.z[rows], z):  # or these images act on one another
                self._check_again(self.images[rows], z)  # type: ignore[index]
            self._expected = None

    def _check_again(self, images: Samples, z: Tensor) -> None:
        """The same of an evaluation of nothing but these images."""
        check_repeated(self.network.outputs(images).reshape(z.shape).detach(), z)

    def check_part(self, part: Linearisation) -> None:
        """InputError unless J^T is linear at a part, where few images may not tell: with hooks and Functions of a user."""
        if part.rows.start not in self._linear_parts and self.network.has_numbers:
            if part.hooked or custom_functions(part.nodes):
                check_backward(part, part.random_pull_back())
            self._linear_parts.add(part.rows.start)

    def check_apart(self, part: Linearisation) -> None:
        """Notice images that act on one another in calls of layers of a part, which few of them may not have shown.

        InputError where the batch is divided.
        """
        if not self.coupled and part.rows.start not in self._parts_apart:
            if layers_mix(part):
                self.found_coupled()
            self._parts_apart.add(part.rows.start)

    def found_coupled(self) -> None:
        """Images act on one another. InputError where the batch is divided."""
        if self.chunk < len(self.images) or isinstance(self.images, BatchStream):
            raise InputError(
                f"a division of the batch into parts of {self.chunk} would change the result: {COUPLED}; use chunk=None and "
                "one batch"
            )
        self.__dict__["coupled"] = True

    def samples(self, count: int) -> Iterable[int]:
        """The places of so many samples, which are pulled back one after the other and take as much each."""
        return range(count)

    def linearised(self, rows: slice, part: int) -> Linearisation:
        """Some samples of the batch with a graph of their own.

        InputError for one that has no right curvature, as of an expert that the few samples of the trials have not come by.
        """
        made = Linearisation(self.network, self.images, rows, part, self.layers)
        if rows.start not in self._looked_at and self.network.has_numbers:
            check_nodes(made.nodes)
            if self.network.replaces_functions(made.nodes):
                return self.linearised(rows, part)
            self._looked_at.add(rows.start)
        return made

    def fingerprint(self, loss: LossParts) -> Key:
        """What J and a loss are made from, as a long run notes it, with some outputs and the loss of the first part."""
        if self._fingerprint is None:
            first = next(self.parts())
            value = loss.part(first.rows).value(first.z).detach()
            self._fingerprint = {
                **self.network.fingerprint(),
                **self._data_fingerprint(),
                "chunk": self.chunk,
                "the outputs": first.z.flatten()[:SHOWN].clone(),
                "the loss": value.reshape(1),
            }
        return self._fingerprint | {"the loss's settings and labels": digest(loss.settings)}

    def _data_fingerprint(self) -> Key:
        return {"the images": digest(tensors_of(self.images))}  # type: ignore[arg-type]


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector `[P]`, each flattened row by row."""
    return torch.cat([t.reshape(-1) for t in tensors])


def shaped(vector: Tensor, network: FrozenNetwork, names: Sequence[str]) -> dict[str, Tensor]:
    """A vector `[P]` as one tensor for each named parameter, of its shape and type."""
    weights = [network.weights[name] for name in names]
    parts = vector.split([w.numel() for w in weights])
    return {name: part.view_as(w).to(w.dtype) for name, part, w in zip(names, parts, weights, strict=True)}


def batched(vectors: Tensor, network: FrozenNetwork, names: Sequence[str]) -> dict[str, Tensor]:
    """Vectors `[P, R]` as one tensor `[R, ...]` for each named parameter."""
    weights = [network.weights[name] for name in names]
    parts = vectors.split([w.numel() for w in weights])
    return {
        name: part.mT.reshape(-1, *w.shape).to(w.dtype) for name, part, w in zip(names, parts, weights, strict=True)
    }
