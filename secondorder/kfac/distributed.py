"""Several processes that train one model: factors summed in one bucket, each inverse computed by one process and sent to all."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from secondorder.kfac.inverses import State

Contents = dict[str, State]
"""Tensors and plain values of each layer, by key."""


class Processes:
    """The processes that share one model; alone without torch.distributed, or when they are told to stay apart."""

    def __init__(self, together: bool) -> None:
        self.together = together

    @property
    def world(self) -> int:
        """The number of processes that share the model, 1 without torch.distributed."""
        return dist.get_world_size() if self.together and dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The number of this process, from 0 to `world` - 1."""
        return dist.get_rank() if self.world > 1 else 0

    def sum_in_one_bucket(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes: one all-reduce for all tensors of one number format.

        Counts that are kept on the CPU travel with the tensors of the device, and come back together.
        """
        if self.world == 1 or not tensors:
            return
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            places = [
                [t for t in tensors if t.dtype == dtype and (t.device == device) == there] for there in (True, False)
            ]
            bucket = torch.cat([tensor.reshape(-1).to(device) for same in places for tensor in same])
            dist.all_reduce(bucket)
            shares = bucket.split([sum(tensor.numel() for tensor in same) for same in places])
            for same, share in zip(places, shares, strict=True):
                summed = share.to(same[0].device).split([tensor.numel() for tensor in same]) if same else ()
                for tensor, numbers in zip(same, summed, strict=True):
                    tensor.copy_(numbers.view_as(tensor))

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows `[..., R, D]` of all processes, one after another; R may differ between them."""
        if self.world == 1:
            return rows
        own = torch.tensor([rows.shape[-2]], device=rows.device)
        each = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(each, own)  # messages of one collective have one size: the rows are padded to the longest
        counts = torch.cat(each).tolist()
        if max(counts) == 0:
            return rows
        padded = F.pad(rows, (0, 0, 0, max(counts) - rows.shape[-2])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[..., :count, :] for part, count in zip(parts, counts, strict=True)], -2)

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """The process that inverts each layer, so that all have about as much to do."""
        loads = [0.0] * self.world
        chosen = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owner = min(range(len(loads)), key=loads.__getitem__)
            loads[owner] += costs[name]
            chosen[name] = owner
        return chosen

    def computed_by_owners(
        self,
        names: Sequence[str],
        owner: Mapping[str, int],
        compute: Callable[[list[str]], Contents],
        device: torch.device,
    ) -> Contents:
        """What `compute` makes of the names (tensors and plain values by key), each name done by its owner and sent to all."""
        mine = compute([name for name in names if owner[name] == self.rank])
        if self.world == 1:
            return mine
        results: Contents = {}
        for source in sorted({owner[name] for name in names}):
            results |= self._broadcast(mine if source == self.rank else {}, source, device)
        return {name: results[name] for name in names if name in results}

    def _broadcast(self, content: Contents, source: int, device: torch.device) -> Contents:
        """One message with shapes and plain values, and one with all numbers of each format."""
        layout = {
            name: {
                key: (value.shape, value.dtype) if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }
            for name, entries in content.items()
        }
        message = [layout]
        dist.broadcast_object_list(message, source, device=device if device.type != "cpu" else None)
        layout = message[0]
        places = [
            (name, key, value)
            for name, entries in layout.items()
            for key, value in entries.items()
            if isinstance(value, tuple)
        ]
        received: Contents = {
            name: {key: value for key, value in entries.items() if not isinstance(value, tuple)}
            for name, entries in layout.items()
        }
        for dtype in sorted({value[1] for *_, value in places}, key=str):
            same = [place for place in places if place[2][1] == dtype]
            sizes = [value[0].numel() for *_, value in same]
            if source == self.rank:
                values = [content[name][key] for name, key, _ in same]
                bucket = torch.cat([value.reshape(-1) for value in values if isinstance(value, Tensor)])
            else:
                bucket = torch.empty(sum(sizes), dtype=dtype, device=device)
            dist.broadcast(bucket, source)
            for (name, key, value), numbers in zip(same, bucket.split(sizes), strict=True):
                received[name][key] = numbers.view(value[0]).clone()  # or one tensor would keep the whole bucket
        return received
