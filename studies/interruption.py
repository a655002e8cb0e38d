"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: one line, everything that was kept stays, exit code 128 + the signal's number.

This module imports nothing that takes time, so that its handlers are there before the libraries are loaded.
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""SIGHUP is not everywhere."""


class Interrupted(KeyboardInterrupt):
    """A signal asks the program to end; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruption:
    """Handles SIGNALS as long as it is entered, in the main thread; elsewhere it does nothing.

    Once `orderly` is set, the first signal raises `Interrupted`, so that processes of a pool are ended and locks given back.
    Before, while libraries are imported (which would make an ImportError of it), and from the second signal on, the process
    ends at once; every file is written so that this loses nothing. The line is printed when the signal arrives.

    A signal that is ignored stays ignored: SIGHUP under nohup, SIGINT of a job in the background. Of several processes under
    torchrun only SIGINT is handled: one that waits for the others in C runs no handler, and must end when torchrun says so.
    """

    def __init__(self) -> None:
        self.orderly = False
        self._said = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            for number in SIGNALS if alone else (signal.SIGINT,):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process and not self._said:
            self._said = True
            self._say(signal.Signals(number).name)
            if self.orderly:
                raise Interrupted(number)
        os._exit(128 + number)

    def _say(self, name: str) -> None:
        """One line from the main process; the terminal may be gone."""
        if os.environ.get("RANK", "0") == "0":
            rest = "the same command continues" if self.orderly else "nothing has been computed yet"
            with contextlib.suppress(OSError):
                os.write(2, f"interrupted by {name}; {rest}\n".encode())
