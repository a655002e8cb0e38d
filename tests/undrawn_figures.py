"""Reports without their figures: drawing takes most of the time of a small study."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from studies.draw.frame import save


@contextmanager
def undrawn_figures(but: Container[str] = ()) -> Iterator[None]:
    """Leave the files of figures empty, `but` some, for tests that look at tables or messages; also their decorator."""

    def empty(figure: Figure, folder: Path, name: str) -> None:
        if name in but:
            save(figure, folder, name)
            return
        for suffix in ("svg", "png"):
            (folder / f"{name}.{suffix}").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.page.writing.save", empty)
        yield
