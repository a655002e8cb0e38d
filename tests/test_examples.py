"""The gallery: every example runs by itself, is short, and every package of the library has a page."""

import ast
import importlib
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "studies" / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs(example: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plt.switch_backend("agg")
    try:
        names = runpy.run_path(str(example))
        losses = names.get("losses")
        assert losses is None or losses[-1] < losses[0]
        assert all(axes.has_data() and axes.get_xlabel() for n in plt.get_fignums() for axes in plt.figure(n).axes)
    finally:
        plt.close("all")


def test_examples_are_short_and_begin_with_a_title() -> None:
    assert len(EXAMPLES) == 9
    for example in EXAMPLES:
        text = example.read_text()
        title, line, *_ = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        assert len(text.splitlines()) <= 40, example
        assert line == "=" * len(title)


def test_every_package_of_the_library_has_a_page() -> None:
    pages = {file.stem: file.read_text() for file in (ROOT / "docs").glob("*.md")}
    index = pages["index"]
    for folder in sorted((ROOT / "secondorder").glob("*/__init__.py")):
        name = folder.parent.name
        assert importlib.import_module(f"secondorder.{name}").__all__
        assert f".. automodule:: secondorder.{name}\n" in pages[name]
        assert re.search(rf"^(.* <{name}>|{name})$", index, re.MULTILINE)
        readme = folder.with_name("README.md")
        assert not readme.exists() or f"{{include}} ../secondorder/{name}/README.md" in pages[name]
