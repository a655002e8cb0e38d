"""Sums over the parts of the data, which a long run keeps as far as they are.

A sum is made in units: of each part of the data those of a loop over columns, in the same order every time. What was in the sum
when it was written is not evaluated again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from secondorder.curvature.resuming.keys import Key
from secondorder.curvature.resuming.long_run import BEGUN, RECORD, LongRun, active, within

T = TypeVar("T")
P = TypeVar("P", covariant=True)


class Parts(Protocol[P]):
    """What gives parts of data in order, from the part number `first` on."""

    def parts(self, first: int = 0) -> Iterator[P]:
        """The parts of the data in order, from the part number `first` on."""

    @property
    def part_count(self) -> int:
        """How many parts the data have."""


class Sums:
    """Sums that are made by ``with sums: for part in sums.parts(jacobian): for unit in sums.units(columns): ...``.

    Without a `long_run` the loops are as they would be without sums.

    Args:
        what: how a long run calls it.
        key: what it is made from.
        state: the sums, by name: tensors that are added to in place.
        get, set: in place of `state`, what gives the sums as plain tensors and structures, and takes them back.
        vectors: by which a unit counts in the progress, with units of single columns or slices of them; None: a part counts once.
    """

    def __init__(
        self,
        what: str,
        key: Callable[[], Key],
        state: dict[str, Tensor] | None = None,
        *,
        get: Callable[[], Any] | None = None,
        set: Callable[[Any], None] | None = None,
        vectors: int | None = None,
    ) -> None:
        self._what, self._key, self._vectors = what, key, vectors
        self._get: Callable[[], Any] = get or (lambda: state)
        self._set = set or (lambda found: _fill(state or {}, found))
        self._run: LongRun | None = None
        self.part = self.unit = 0
        """The numbers of the present part and of the unit in it."""
        self.finished = False
        """Whether the sums have been made before."""

    def __enter__(self) -> "Sums":
        self._run = active()
        self._stack = ExitStack()
        if self._run is not None:
            self._step = self._run.begin(self._what, self._key)
            self._stack.callback(self._run.end, self._step)
            self._bar = next((s.bar for s in reversed(self._run.steps[:-1])), self._step.bar)
            with self._stack:
                self.finished, value = self._run.find(self._step, RECORD)
                if self.finished:
                    self._set(value)
                else:
                    begun, value = self._run.find(self._step, BEGUN)
                    if begun and value is not None:
                        self.part, self.unit = value["at"]
                        self._set(value["sums"])
                self._stack = self._stack.pop_all()
            self._stack.enter_context(within(step_of_sum=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._run is not None and kind is None and not self.finished:
                self._run.keep(self._step, _copies(self._get()))

    def parts(self, data: Parts[P]) -> Iterator[P]:
        """The parts of the data that are not in the sums."""
        if self._run is None:
            yield from data.parts()
            return
        count, each = data.part_count, self._vectors or 1
        self._bar.expect(count, each)
        self._bar.advance((count if self.finished else self.part) * each)
        if self.finished:
            return
        for part in data.parts(self.part):
            yield part
            self.part, self.unit = self.part + 1, 0
            if self._vectors is None:
                self._bar.advance(1)
            self._write()

    def units(self, items: Iterable[T]) -> Iterator[T]:
        """The units of the present part that are not in the sums."""
        if self._run is None:
            yield from items
            return
        for number, item in enumerate(items):
            if number >= self.unit:
                yield item
                self.unit = number + 1
                self._write()
            if self._vectors is not None:
                self._bar.advance(item.stop - item.start if isinstance(item, slice) else 1)

    def _write(self) -> None:
        assert self._run is not None
        if self._run.due():
            self._run.write(self._step, {"at": [self.part, self.unit], "sums": self._get()})


def _fill(state: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        tensor.copy_(found[name])


def _copies(value: Any) -> Any:
    """The value with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copies(item) for name, item in value.items()}
    return [_copies(item) for item in value] if isinstance(value, list) else value
