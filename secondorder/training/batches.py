"""The batches of one epoch, in an order that depends on (seed, epoch) alone."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from secondorder.data import ImageSplit
from secondorder.training.processes import share


def batches(
    split: ImageSplit, order: Tensor, batch_size: int, start: int = 0, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """From batch ``start`` on: the indices of the whole batch, and this process's images and labels of it.

    The last partial batch of ``order`` [N] is dropped, so that every step averages over as many images. ``workers``
    threads prepare batches ahead; they change the time, never the batches.
    """
    parts = [part for part in order.split(batch_size) if len(part) == batch_size][start:]
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
