"""Imports inside the library: no circle of modules, and no floor that needs one above it.

Every import counts, inside functions and under TYPE_CHECKING too: a type that needs its user is a circle as well, only a hidden
one. That importing a module runs the `__init__` of its packages does not count.
"""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import secondorder

ROOT = Path(secondorder.__file__).parent
FLOORS = (
    ("errors",),
    ("optional",),
    ("accelerator", "atomic"),
    ("untouched",),
    *(("data",), ("matrix_power",), ("pooling",), ("networks",), ("curvature",)),
    *(("kfac",), ("preconditioning",), ("gauss_newton",), ("training",), ("landscape",), ("robustness",)),
    ("transfer",),
    ("__main__",),
)
"""From the ground up; a module may import its own floor's folder and what is below it (README, Layout)."""
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def imported(source: str, package: str) -> set[str]:
    """The dotted names that a module of the package imports, with those that it takes from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def modules() -> dict[str, Path]:
    paths = {
        ".".join(["secondorder", *path.relative_to(ROOT).with_suffix("").parts]): path for path in ROOT.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in sorted(paths.items())}


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module of the library -> those that it imports."""
    edges: dict[str, set[str]] = {}
    for name, path in modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        candidates = imported(path.read_text(), package)
        edges[name] = {c if c in modules() else c.rpartition(".")[0] for c in candidates} & modules().keys() - {name}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, empty where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upwards(edges: dict[str, set[str]]) -> list[str]:
    """Imports of a floor above, or beside, that of the module."""
    floors = {name: name.split(".")[1] for name in edges if "." in name}
    return [
        f"{name} imports {other}"
        for name, floor in floors.items()
        for other in edges[name] & floors.keys()
        if floors[other] != floor and FLOOR[floors[other]] >= FLOOR[floor]
    ]


def test_every_module_is_on_a_floor() -> None:
    assert {name.split(".")[1] for name in modules() if "." in name} == FLOOR.keys()
    assert sum(map(len, graph().values())) > len(modules())  # the reader sees imports


def test_no_circle() -> None:
    assert circle(graph()) == []


def test_no_arrow_upwards() -> None:
    assert upwards(graph()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from secondorder.kfac import KFAC",
        "import secondorder.kfac.optimizer",
        "def f():\n    from secondorder.kfac import optimizer",
        "if TYPE_CHECKING:\n    from secondorder.kfac.optimizer import KFAC",
        "from ..kfac import optimizer",
    ],
)
def test_every_kind_of_import_is_seen(line: str) -> None:
    assert any(name.startswith("secondorder.kfac") for name in imported(line, "secondorder.pooling"))


def test_circles_and_arrows_upwards_are_found() -> None:
    edges = {"secondorder.pooling.a": {"secondorder.kfac.b"}, "secondorder.kfac.b": {"secondorder.pooling.a"}}
    assert set(circle(edges)) == edges.keys()
    assert upwards(edges) == ["secondorder.pooling.a imports secondorder.kfac.b"]
