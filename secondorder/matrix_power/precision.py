"""Full precision of float32 matrix products, whatever the switches of PyTorch say, and autocast off.

`torch.set_float32_matmul_precision("medium")` makes products of bfloat16 numbers, "high" and `allow_tf32` of TF32 numbers: too
coarse for roots and eigenvalues. The switch belongs to the process, so the first of several threads that compute at the same
time turns it and the last turns it back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

FULL = ("ieee", "none")
"""Settings of a backend under which float32 products are float32 products."""


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Autocast off on the device of x and float32 products in full precision, also in other threads meanwhile.

    Inside torch.compile only autocast is turned off: a compiled program keeps the precision it was compiled with.
    """
    with _without_autocast(x), _products_in_full_precision():
        yield


@contextmanager
def _without_autocast(x: Tensor) -> Iterator[None]:
    if torch.amp.is_autocast_available(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield


@contextmanager
def _products_in_full_precision() -> Iterator[None]:
    if torch.compiler.is_compiling():
        yield
        return
    turned = _SWITCH.turn()
    try:
        yield
    finally:
        if turned:
            _SWITCH.turn_back()


class _Switch:
    """PyTorch's switches of float32 products, turned by the first who needs it and turned back by the last."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._overall: str | None = None
        self._backends: tuple[str, ...] = ()

    def turn(self) -> bool:
        """Whether `turn_back` is owed: not where products are in full precision anyway, nor in what torch.compile reads."""
        if torch.compiler.is_compiling():
            return False
        if not self._users and all(value in FULL for value in _backend_values()):  # the usual case, without a lock
            return False
        with self._lock:
            if not self._users:
                self._overall, self._backends = _overall_value(), _backend_values()
                torch.set_float32_matmul_precision("highest")
            self._users += 1
        return True

    def turn_back(self) -> None:
        """Restores what `turn` found, after the last user."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if self._overall is not None:
                torch.set_float32_matmul_precision(self._overall)
            for backend, value, now in zip(_BACKENDS, self._backends, _backend_values(), strict=True):
                if value != now:
                    backend.fp32_precision = value


_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def _backend_values() -> tuple[str, ...]:
    return tuple(backend.fp32_precision for backend in _BACKENDS)


def _overall_value() -> str | None:
    """The switch of all backends, or None when they were set apart, which PyTorch has no word for and raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_SWITCH = _Switch()
