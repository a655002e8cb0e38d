"""FLOPs and live bytes of a program that runs on tensors without numbers (FakeTensor): each operation is seen, none is done.

FLOPs are those of matrix products, convolutions and attention by the formulas of `torch.utils.flop_counter` (a multiplication
and an addition are two), and of decompositions by those here; operations entry by entry are not counted. Bytes are those of all
tensors that are alive at one time, as the graph of autograd keeps them and Python's references end; what a kernel allocates for
itself (im2col of a convolution in float64, workspaces) is not seen.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

aten = torch.ops.aten


def convolution_backward_flops(
    gradient: Tensor, x: Tensor, w: Tensor, *rest: Any, out_val: object = None, **named: Any
) -> int:
    """Each gradient of a convolution, also of a grouped one, takes as much as the convolution; that of the bias nothing."""
    transposed, mask = rest[4], rest[-1]
    return sum(mask[:2]) * conv_flop_count(list(x.shape), list(w.shape), list(gradient.shape), transposed)


def eigh_flops(A: Tensor, *rest: Any, out_val: Sequence[Tensor], **named: Any) -> int:
    """Of matrices `[*, n, n]`: 4/3 n^3 for eigenvalues, 9 n^3 with eigenvectors (Golub and Van Loan, section 8.3)."""
    n = A.shape[-1]
    return A[..., 0, 0].numel() * (9 * n**3 if out_val[1].numel() else 4 * n**3 // 3)


def qr_flops(A: Tensor, *rest: Any, out_val: object = None, **named: Any) -> int:
    """Of matrices `[*, m, n]` with k = min(m, n): 2 (2 m n k - (m + n) k^2 + 2/3 k^3) for Q and R (section 5.2)."""
    m, n = A.shape[-2:]
    k = min(m, n)
    return A[..., 0, 0].numel() * 2 * (2 * m * n * k - (m + n) * k**2 + 2 * k**3 // 3)


def vector_flops(*args: Tensor, out_val: object = None, **named: Any) -> int:
    """Of a matrix, the last argument but one, and a vector, or of two vectors."""
    return 2 * args[-2].numel()


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    **dict.fromkeys((aten.mv, aten.addmv, aten.addmv_, aten.dot), vector_flops),
    aten.convolution_backward: convolution_backward_flops,
    aten._linalg_eigh: eigh_flops,
    aten.linalg_qr: qr_flops,
}
"""Operation -> its FLOPs, called like the operation and with what it returned."""


class Meter(TorchDispatchMode):
    """Counts while it is entered; what was alive when it was left counts when it is entered again.

    flops: since the beginning; live, peak: bytes now, and the most of all times; drawn: whether random numbers were asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live = self.peak = 0
        self.drawn = False
        self._storages: set[int] = set()

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Let tensors, which must outlive the meter, and views of them count as nothing."""
        self._storages |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Any operation as it is, but for zeros without storage, which FakeTensor products have on another device."""
        if func is aten._efficientzerotensor.default:
            return torch.zeros((), **(kwargs or {})).expand(args[0])
        result = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        self.drawn |= torch.Tag.nondeterministic_seeded in func.tags
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size
