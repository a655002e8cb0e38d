"""Bars on standard error: one for each algorithm, in parts of the data times vectors that they are multiplied with."""

import sys
from typing import Any

from tqdm import tqdm


class Bar:
    """A bar that is there from its first use on; `show` says whether it is to be seen.

    planned: vectors that the algorithm will still multiply, as far as it has said so.
    """

    def __init__(self, name: str, show: bool) -> None:
        self._name, self._show = name, show
        self._bar: tqdm[Any] | None = None
        self.planned = 0

    def expect(self, parts: int, vectors: int) -> None:
        """A loop over so many parts begins, for so many vectors."""
        if not self._show:
            return
        if self._bar is None:
            self._bar = tqdm(desc=self._name, total=0, unit="batch", leave=False, file=sys.stderr)
        self._bar.total = self._bar.n + parts * max(self.planned, vectors)
        self._bar.refresh()
        self.planned -= vectors

    def advance(self, count: int) -> None:
        """So many more parts are done, each for one vector."""
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        """Take it off the screen."""
        if self._bar is not None:
            self._bar.close()
