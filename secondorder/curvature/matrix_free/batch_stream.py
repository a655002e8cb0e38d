"""The samples of a data set that is read batch by batch, anew for every product: a DataLoader, a list of batches.

Curvature of a data set is a sum over batches, so that every pass must find the same ones. The first pass takes a checksum of each
batch, later ones compare. Passes draw different random numbers, so that a data set which shuffles or augments is found out; the
user's own random numbers are as before.

Index letters: N samples of the data set.
"""

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler
from torch.utils.data import WeightedRandomSampler as Weighted
from torch.utils.data.distributed import DistributedSampler

from secondorder.curvature.matrix_free.batches import Batch, batch_of, joined_batches
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.samples import Samples, SampleTree, tensors_of
from secondorder.curvature.matrix_free.trial import ALL, trial_samples
from secondorder.curvature.resuming.keys import Key, digest
from secondorder.curvature.resuming.long_run import watched
from secondorder.errors import InputError

WAY_OUT = "use shuffle=False and no random transforms, or list(loader) for one draw of them"
END = object()


class BatchStream:
    """N samples, indexed like one tensor of them; at one time one batch is held, and a few samples to try formulas on.

    Raises InputError for what cannot be read again and again, for batches that differ in more than their number of samples, and,
    in later passes, for batches that are not those of the first.
    """

    def __init__(self, data: Iterable[Any], network: FrozenNetwork) -> None:
        check_readable(data)
        self._data = data
        self._network = network
        self._reads = 0
        self._checksums: list[int] = []
        self._starts = [0]
        self._current: tuple[slice, Batch] | None = None
        few: Batch | None = None
        kind: object = None
        for number, batch in enumerate(watched(self._read(), "checksums of the data", _length(data))):
            batch.check(network)
            self._checksums.append(checksum(batch))
            self._starts.append(self._starts[-1] + len(batch))
            if few is None:
                kind = batch.kind
                network.differentiates_images = batch.requires_grad
            check_alike(number, batch, kind, network.differentiates_images)
            batch = batch.on(network.device)
            chosen = batch[trial_samples(batch.inputs, ALL, ALL)]
            few = chosen if few is None else joined_batches([few, chosen])
            few = few[trial_samples(few.inputs, ALL, ALL)]
        if few is None:
            raise InputError("the data set has no batches; give at least one")
        self.few = few
        """Of all samples the largest, ALL at most."""

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, rows: slice) -> Samples:
        """The inputs of some samples of one batch."""
        return self.part(rows).inputs

    @property
    def sizes(self) -> list[int]:
        """The number of samples of each batch."""
        return [end - start for start, end in zip(self._starts, self._starts[1:], strict=False)]

    @property
    def largest(self) -> int:
        """The number of samples of the largest batch."""
        return max(self.sizes)

    def fingerprint(self) -> Key:
        """Sizes and checksums of all batches, as a long run notes them."""
        batches = zip(self.sizes, self._checksums, strict=True)
        return {"the number of batches": self.count} | {f"batch {i}": digest(both) for i, both in enumerate(batches)}

    @property
    def count(self) -> int:
        """The number of batches that one pass over the data gives."""
        return len(self._checksums)

    @property
    def largest_bytes(self) -> int:
        """Bytes of the inputs and labels of the largest batch."""
        return self.few.nbytes * self.largest // len(self.few)

    def copied(self) -> Batch:
        """The first batch as a copy, which is all there is where there is one."""
        return next(self.batches())[1].on(self._network.device, copy=True)

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """All batches in order, with the places of their samples. InputError where one is not that of the first pass."""
        count = 0
        for number, batch in enumerate(self._read()):
            if number == self.count:
                raise InputError(f"the data set had {number} batches at first, and has more now; {WAY_OUT}")
            if checksum(batch) != self._checksums[number]:
                raise InputError(
                    f"batch {number} differs from one pass over the data to the next (or was changed since): a sum over batches "
                    f"needs the same ones in each; {WAY_OUT}"
                )
            self._current = slice(*self._starts[number : number + 2]), batch.on(self._network.device)
            yield self._current
            self._current = None  # loaders use their memory again
            count = number + 1
        if count < self.count:
            raise InputError(
                f"the data set had {self.count} batches at first, and {count} in a later pass; give what can be read again and "
                "again: a DataLoader, or list(batches)"
            )

    def number(self, rows: slice) -> int:
        """The number, from 0, of the batch to which the samples `rows` of the data set belong."""
        return bisect_right(self._starts, rows.start) - 1

    def part(self, rows: slice) -> Batch:
        """Some samples of one batch: the present one, or else one that is read now."""
        return self.whole(rows)[self.within(rows)]

    def whole(self, rows: slice) -> Batch:
        """The batch to which the samples `rows` of the data set belong: the present one, or one that is read now."""
        number = self.number(rows)
        if self._current is None or self._current[0].start != self._starts[number]:
            next(batch for index, batch in enumerate(self.batches()) if index == number)
        assert self._current is not None
        return self._current[1]

    def within(self, rows: slice) -> slice:
        """The places of some samples within their batch."""
        start = self._starts[self.number(rows)]
        return slice(rows.start - start, rows.stop - start)

    def _read(self) -> Iterator[Batch]:
        """The batches as the user gives them, each read with other random numbers."""
        with self._random_numbers():
            batches = iter(self._data)
        while True:
            with self._random_numbers():
                batch = next(batches, END)
            if batch is END:
                return
            yield batch_of(batch)

    def _random_numbers(self):  # type: ignore[no-untyped-def]
        self._reads += 1
        return self._network.random.replayed(self._reads)


def check_alike(number: int, batch: Batch, kind: object, requires_grad: bool) -> None:
    """InputError for a batch that differs from the first one in more than the number of samples."""
    if batch.kind != kind:
        raise InputError(
            f"batch {number} has samples of another shape, type or structure than batch 0; pad them to one (collate_fn)"
        )
    if batch.requires_grad != requires_grad:
        raise InputError(f"the images of batch {number} require gradients and those of batch 0 do not, or the reverse")


def check_readable(data: Any) -> None:
    """InputError for data that are no batches, or not the same ones in the same order each time they are read."""
    kind = type(data).__name__
    if isinstance(data, Iterator):
        raise InputError(f"a {kind} can be read once, curvature reads the data for every product; use list(batches)")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise InputError(f"{kind} gives samples, no batches; use DataLoader(dataset, batch_size=...)")
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise InputError(f"a batch is a pair (inputs, labels), or data are an iterable of such batches; got {kind}")
    if not isinstance(data, DataLoader):
        return
    for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None)):
        if isinstance(sampler, RandomSampler | SubsetRandomSampler | Weighted):
            raise InputError(f"the DataLoader draws its samples at random ({type(sampler).__name__}); {WAY_OUT}")
        if isinstance(sampler, DistributedSampler):
            raise InputError("the DataLoader has a DistributedSampler: a part of the data; use one of all samples")


def _length(data: Iterable[Any]) -> int | None:
    """The number of batches, where the data tell it."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def checksum(batch: Batch) -> int:
    """A CRC-32 of the numbers, types, shapes and constants of a batch's inputs and labels: equal for equal batches."""
    value = 0
    for samples in (batch.inputs, batch.labels):
        for tensor in tensors_of(samples):
            numbers = tensor.detach().cpu().contiguous()
            value = zlib.crc32(f"{numbers.dtype}{list(numbers.shape)}".encode(), value)
            value = zlib.crc32(numbers.flatten().view(torch.uint8).numpy().data, value)
        if isinstance(samples, SampleTree):
            constants = [leaf for leaf in samples.leaves if not isinstance(leaf, torch.Tensor)]
            value = zlib.crc32(repr(constants).encode(), value)
    return value
