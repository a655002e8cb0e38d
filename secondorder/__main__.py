"""``python -m secondorder``: what is installed, which devices there are, and how to run the studies."""

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator

import torch

from secondorder import __version__
from secondorder.accelerator import accelerators

FOR_USERS = ("studies", "slurm", "ray", "tensorboard")
"""Extras that are no tools of those who work on the package."""


def report() -> Iterator[str]:
    """Lines for a user who has just installed the package."""
    yield f"secondorder {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    yield f"devices: {', '.join([f'cpu ({torch.get_num_threads()} threads)', *map(str, accelerators())])}"
    for extra in FOR_USERS:
        lacking = missing(extra)
        if lacking:
            yield f"extra {extra}: without {', '.join(lacking)}; pip install 'secondorder[{extra}]'"
        else:
            yield f"extra {extra}: {'unknown to pip' if lacking is None else 'complete'}"
    if importlib.util.find_spec("studies") is not None:
        yield "studies: python -m studies --help"
    else:
        yield (
            "studies: not installed with the package; in a clone, or in its unpacked source distribution (secondorder-"
            f"{__version__}.tar.gz): pip install -e '.[studies]' && python -m studies"
        )


def missing(extra: str) -> list[str] | None:
    """The packages of an extra that are not installed; None when pip has not installed this package, or without such an extra."""
    try:
        requirements = importlib.metadata.requires("secondorder") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    of_extra = [r for r in requirements if re.search(rf"""extra == ['"]{extra}['"]""", r)]
    if not of_extra:
        return None
    names = [name[0] for requirement in of_extra if (name := re.match(r"[\w.-]+", requirement))]
    return [name for name in names if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join(report()))
