"""Reports without their figures: drawing takes most of the time of a small study."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure


@contextmanager
def undrawn_figures() -> Iterator[None]:
    """Leave the files of figures empty, for tests that look at tables or messages only; also a decorator of such a test."""

    def empty(figure: Figure, folder: Path, name: str) -> None:
        for suffix in ("svg", "png"):
            (folder / f"{name}.{suffix}").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.report.save", empty)
        yield
