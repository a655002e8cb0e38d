"""Configuration of the documentation: ``sphinx-build -W docs docs/_build``."""

import os
import re
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the studies are not installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

project = "secondorder"
author = "The secondorder developers"
release = version = installed("secondorder")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"secondorder {release}"

# Docstrings are plain words and formulas, their names in single backticks; a name that is documented becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Names of PyTorch, BackPACK and curvlinops become links where there is a network to fetch their inventories from.
if os.environ.get("READTHEDOCS"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "backpack": ("https://docs.backpack.pt/en/master", None),
        "curvlinops": ("https://curvlinops.readthedocs.io/en/stable", None),
    }

myst_heading_anchors = 3
sphinx_gallery_conf = {
    "examples_dirs": "../studies/examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/\w+\.py$",  # all of them are run
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "abort_on_example_error": True,
}

PAGES = {
    "studies/README.md": "studies.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "reports/quick/report.md": "digits.md",
    "reports/cifar10/report.md": "cifar10.md",
} | {str(file.relative_to(ROOT)): f"{file.parent.name}.md" for file in ROOT.glob("secondorder/*/README.md")}
"""Files of the repository that are a page here."""


def links_to_pages(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Make links between files of the repository links between pages; a link to a file without a page keeps its words."""
    place = (Path(app.srcdir) / path).resolve().parent

    def link(found: re.Match[str]) -> str:
        words, target = found.groups()
        file = (place / target.partition("#")[0]).resolve()
        if not file.is_relative_to(ROOT) or not file.exists():
            return found[0]
        page = PAGES.get(str(file.relative_to(ROOT)))
        return words if page is None else f"[{words}](/{page})"

    content[0] = re.sub(r"(?<!!)\[([^]\[]*)\]\(([\w./-]+(?:#[\w-]*)?)\)", link, content[0])


def plain_words(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make docstrings what they look like: indented formulas and code are set apart, bars and asterisks are no markup."""
    shown, apart, section = [], False, False
    for before, line in zip(["", *lines], lines, strict=False):
        section |= bool(re.fullmatch(r"(Args|Returns|Raises|Yields):", line))
        if line and not line.startswith(" "):
            apart = False
        elif line and not (before or apart or section):
            shown += ["::", ""]
            apart = True
        if apart:
            shown.append(line)
            continue
        parts = re.split(r"(``.*?``|`[^`]*`)", line)
        parts[::2] = [re.sub(r"([\\|*]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
        shown.append("".join(parts))
    lines[:] = shown


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("include-read", links_to_pages)
    app.connect("autodoc-process-docstring", plain_words, priority=400)  # before napoleon
