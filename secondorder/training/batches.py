"""The batches of one epoch, in an order that depends on (seed, epoch) alone."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from secondorder.data import ImageSplit
from secondorder.data.own import OwnSplit
from secondorder.errors import InputError
from secondorder.training.processes import share


class _Shares(Dataset[Any]):
    """This process's share of each batch, or the `InputError` that it gives, in one line as it is."""

    def __init__(self, split: OwnSplit, shares: list[Tensor]) -> None:
        self.split, self.shares = split, shares

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | InputError:
        try:
            return self.split.batch(self.shares[number])
        except InputError as error:
            return error


def batches(
    split: ImageSplit, order: Tensor, batch_size: int, start: int = 0, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches of an epoch from number ``start`` on: indices of the whole batch, and this process's images and labels of it.

    The last partial batch of ``order`` [N] is dropped, so that every step averages over as many images. ``workers``
    threads prepare batches ahead, or processes where samples draw from the global generators, which threads would share;
    they change the time, never the batches.
    """
    parts = [part for part in order.split(batch_size) if len(part) == batch_size][start:]
    if isinstance(split, OwnSplit) and (workers or split.workers):
        ahead_of_time = _Shares(split, [share(part) for part in parts])
        loader = DataLoader(
            ahead_of_time, batch_size=None, num_workers=workers or split.workers, generator=torch.Generator()
        )
        for part, result in zip(parts, loader, strict=True):
            if isinstance(result, InputError):
                raise result
            yield part, *result
        return
    if not workers:
        for part in parts:
            yield part, *split.batch(share(part))
        return
    pool, ahead = ThreadPoolExecutor(workers), deque(parts)
    prepared = deque(pool.submit(split.batch, share(ahead.popleft())) for _ in range(min(2 * workers, len(parts))))
    try:
        for part in parts:
            images, labels = prepared.popleft().result()
            if ahead:
                prepared.append(pool.submit(split.batch, share(ahead.popleft())))
            yield part, images, labels
    finally:
        pool.shutdown(cancel_futures=True)
