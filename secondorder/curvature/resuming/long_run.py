"""A long computation: its folder of records, its progress, and what of it is going on now.

The records are those of products and sums, in order. A process that is started again runs the same code, and finds the records
of what had been done in place of doing it: Lanczos has its vectors again from its products. What a finished algorithm returned
takes the place of the records that it was made from.
"""

import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from tqdm import tqdm

import secondorder
from secondorder.atomic import exclusive
from secondorder.curvature.resuming.journal import BEGUN, LOCK, RECORD, Journal, Place, Record
from secondorder.curvature.resuming.keys import Key, digest
from secondorder.curvature.resuming.progress import Bar
from secondorder.errors import InputError, check_flag, check_number, short

P = ParamSpec("P")
R = TypeVar("R")
BUFFER = 256 * 2**20
"""Bytes of records that are held back at most."""
SHARE = 0.1
"""Most of the time that goes into writing."""


@dataclass
class Step:
    """What is going on at a place: an algorithm, a product. `inner`: the number of the next one on the way to it."""

    place: Place
    what: str
    key: Key
    bar: Bar
    noted: bool = False
    inner: int = 0


class LongRun:
    """What `long_run` gives: the steps that are under way, their records in a folder, progress bars."""

    def __init__(self, folder: Path | None, progress: bool, every: float) -> None:
        self.progress, self.every = progress, every
        self.journal = None if folder is None else Journal(folder)
        self.steps: list[Step] = []
        self._done = 0
        self._held: list[tuple[Step, object]] = []
        self._held_bytes = 0
        self._next = time.monotonic() + every

    def check_machine(self) -> None:
        """InputError where what was computed elsewhere is not what would be computed here, bit for bit."""
        if self.journal is not None:
            self.journal.check_run({
                "the version of secondorder": secondorder.__version__,
                "the version of torch": str(torch.__version__),
                "torch.get_num_threads()": torch.get_num_threads(),
                "the processor's kind": torch.backends.cpu.get_cpu_capability(),
            })  # fmt: skip

    def begin(self, what: str, key: Callable[[], Key]) -> Step:
        """The next step; `key` says what it is made from."""
        outer = self.steps[-1] if self.steps else None
        number, place = (self._done, ()) if outer is None else (outer.inner, outer.place)
        if outer is None:
            self._done += 1
        else:
            outer.inner += 1
        whole = {} if self.journal is None else key()
        # What is compared up to rounding belongs to the outermost step.
        exact = {name: value for name, value in whole.items() if not isinstance(value, torch.Tensor)}
        known = whole if outer is None else {"what it is made from": digest(exact)}
        name = ": ".join([*(step.what for step in self.steps), what])
        step = Step((*place, number), what, known, Bar(name, self.progress))
        self.steps.append(step)
        return step

    def end(self, step: Step) -> None:
        """The step is over, whether or not it has a result."""
        step.bar.close()
        self.steps.remove(step)

    def find(self, step: Step, kind: str) -> tuple[bool, Any]:
        """Whether there is a result of the step (RECORD) or what it had so far (BEGUN), and the result."""
        if self.journal is None or not self.journal.has(step.place, kind):
            return False, None
        step.noted = True
        return True, self.journal.read(step.place, kind, step.what, step.key)

    def keep(self, step: Step, value: Any) -> None:
        """Note the result of a step, which may be written later; tensors in it must not change until then: they are `copies`."""
        if self.journal is None:
            return
        place = step.place
        self._held = [(held, v) for held, v in self._held if held.place[: len(place)] != place]
        self._held.append((step, value))
        self._held_bytes = sum(_nbytes(v) for _, v in self._held)
        if self.due():
            self.write()

    def due(self) -> bool:
        """Whether it is time to write."""
        return self.journal is not None and (time.monotonic() >= self._next or self._held_bytes > BUFFER)

    def write(self, begun: Step | None = None, value: object = None) -> None:
        """Write what is held back, and what a step has so far."""
        if self.journal is None:
            return
        started = time.monotonic()
        new = [step for step in self.steps if step is not begun and not step.noted]
        records = [Record(step.place, BEGUN, step.what, step.key, None) for step in new]
        records += [Record(step.place, RECORD, step.what, step.key, found) for step, found in self._held]
        if begun is not None:
            records.append(Record(begun.place, BEGUN, begun.what, begun.key, value))
        self.journal.write(records)
        self._held, self._held_bytes = [], 0
        for step in new:
            step.noted = True
        now = time.monotonic()
        pause = max(self.every, (now - started) / SHARE) if self.every else 0.0
        self._next = now + pause


_active: ContextVar[LongRun | None] = ContextVar("long_run", default=None)
_summing: ContextVar[bool] = ContextVar("summing", default=False)


@contextmanager
def long_run(
    checkpoint: str | os.PathLike[str] | None = None, *, progress: bool = True, every: float = 60.0
) -> Iterator[None]:
    """Inside, curvature shows how far it is, and goes on where it was when its process was killed, equal to the last bit.

    Everything that multiplies with a network counts: products, dense matrices, diagonals, Kronecker factors, spectra, inverses.
    Run the same code again: what was done is read, Lanczos has its vectors, and sums over a data set go on with the next batch;
    batches are read again for their checksums, and not evaluated. Products take as much room in the folder as their vectors,
    until the spectrum that is made of them is known. On leaving the block the folder is removed: save results inside it
    (`save_curvature`). After an exception, Ctrl-C among them, it is kept.

    Args:
        checkpoint: a folder of its own, which is made; None: nothing is kept, and there is the progress alone.
        progress: bars on standard error: what is computed, and how many parts of the data times vectors it takes. Searches for
            eigenvalues end when they have converged: their total is the least.
        every: seconds after which what is new is written, or more, so that writing takes a tenth of the time at most; 0: always.

    Raises:
        InputError: for a folder that cannot be written, has other files, or is in use; for a checkpoint of other parameters,
            buffers, data, settings or code, of another version or number of threads, and for a damaged one: it is named.
    """
    check_flag("progress", progress)
    check_number("every", every, 0, math.inf, hint="; in seconds")
    if _active.get() is not None:
        raise InputError("a long_run within a long_run; one is enough for all that is computed inside")
    try:
        folder = None if checkpoint is None else Path(checkpoint)
    except TypeError as error:
        raise InputError(f"checkpoint must be a path or None, got {short(checkpoint)}") from error
    run = LongRun(folder, progress, every)
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(exclusive(folder, LOCK))
        run.check_machine()
        token = _active.set(run)
        try:
            yield
        except BaseException:
            with suppress(InputError):  # a full disk is no news
                run.write()
            raise
        finally:
            _active.reset(token)
        if run.journal is not None:
            run.journal.clear()
    if folder is not None:
        _remove(folder)


def _remove(folder: Path) -> None:
    """The empty folder, with its lock."""
    (folder / LOCK).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def active() -> LongRun | None:
    """The run that steps belong to now, if any: those within a sum are part of it."""
    return None if _summing.get() else _active.get()


@contextmanager
def within(step_of_sum: bool) -> Iterator[None]:
    """Inside there are no steps: in a sum (True), of which they are part, or because nothing is computed (False)."""
    summing, run = _summing.set(True), _active.set(_active.get() if step_of_sum else None)
    try:
        yield
    finally:
        _active.reset(run)
        _summing.reset(summing)


def kept(what: str, key: Callable[[], Key], compute: Callable[[], R]) -> R:
    """What `compute` returns, or has returned before its process was killed."""
    run = active()
    if run is None:
        return compute()
    step = run.begin(what, key)
    try:
        done, value = run.find(step, RECORD)
        if not done:
            run.find(step, BEGUN)
            value = compute()
            run.keep(step, value)
    finally:
        run.end(step)
    return cast("R", value)


def resumable(function: Callable[P, R]) -> Callable[P, R]:
    """A function of an operator and settings, whose result can be saved, as one step of a `long_run`."""
    signature = inspect.signature(function)

    @wraps(function)
    def as_step(*args: P.args, **kwargs: P.kwargs) -> R:
        if active() is None:
            return function(*args, **kwargs)

        def key() -> Key:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            operator, *settings = bound.arguments.items()
            return fingerprint(operator[1]) | {name: _plain(value) for name, value in settings}

        return kept(function.__name__.lstrip("_"), key, lambda: function(*args, **kwargs))

    return as_step


def fingerprint(operator: Any) -> Key:
    """What an operator is made from; nothing for what is none, which the function itself will refuse."""
    found: Key = operator.fingerprint() if hasattr(operator, "fingerprint") else {}
    return found


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | type(None)) else digest(value)


def planned(vectors: int) -> None:
    """Tell the bar of the present step how many vectors it will multiply, at least."""
    run = active()
    if run is not None and run.steps:
        run.steps[-1].bar.planned = vectors


def watched(items: Iterable[R], what: str, total: int | None) -> Iterator[R]:
    """The items, with a bar of their own in a long run."""
    run = _active.get()
    if run is None or not run.progress:
        yield from items
        return
    with tqdm(items, desc=what, total=total, unit="batch", leave=False) as bar:
        yield from bar


def _nbytes(value: Any) -> int:
    """Bytes of the tensors in dicts and lists; other results are small."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_nbytes, items))
