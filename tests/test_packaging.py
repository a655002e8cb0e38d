"""What a user installs: the wheel, built from the source distribution, works where nothing else of the repository is."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from secondorder import __main__ as command
from secondorder import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md")
NAME = f"secondorder-{__version__}"
EXTRAS = {"studies", "slurm", "ray", "tensorboard", "docs", "test", "dev"}


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(what: str, source: Path, into: Path) -> Path:
    """By setuptools' own backend, as pip calls it, with the setuptools that is here."""
    script = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
    return into / run("-c", script, str(into), cwd=source).split()[-1]


def modules(folder: str, root: Path = ROOT) -> set[str]:
    return {str(path.relative_to(root)) for path in (root / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of the repository: nothing is written into it."""
    copy, dist = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in ("secondorder", "studies", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_build", "gallery"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in ("tests/test_a.py", "reports/a/a.csv"):
        (copy / name).parent.mkdir(parents=True)
        (copy / name).touch()
    return build("sdist", copy, dist)


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())


def test_the_source_distribution_has_the_studies(sdist: Path, unpacked: Path) -> None:
    assert sdist.name == f"{NAME}.tar.gz"
    for folder in ("secondorder", "studies"):
        assert modules(folder, unpacked) == modules(folder)
    there = {path.name for path in unpacked.iterdir()}
    assert there >= {"docs", *FILES}
    assert not there & {"tests", "reports"}
    assert (unpacked / "studies" / "README.md").exists()


def test_the_wheel_has_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names} == {"secondorder", f"{NAME}.dist-info"}
    assert {name for name in names if name.endswith(".py")} == modules("secondorder")
    assert {"secondorder/py.typed", "secondorder/kfac/README.md", f"{NAME}.dist-info/licenses/LICENSE"} <= names


def test_what_is_said_of_it(wheel: Path) -> None:
    said = metadata(wheel)
    assert said["Version"] == __version__
    assert said["License-Expression"] == "MIT"
    assert {*said.get_all("Provides-Extra", [])} == EXTRAS
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert said.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2003.11241"]
    assert (ROOT / "CHANGELOG.md").read_text().splitlines()[2].startswith(f"## {__version__} ")


def test_the_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--no-compile")
    run("-m", "pip", "install", *flags, "--target", str(target), str(wheel), cwd=elsewhere)
    script = (
        f"import sys, runpy, json; sys.path.insert(0, {str(target)!r}); runpy.run_module('secondorder', run_name='__main__'); "
        "import torch; from secondorder.pooling import pooling_head; maps = torch.randn(2, 8, 3, 3); "
        "import secondorder; print(json.dumps([secondorder.__file__, pooling_head('gcp', 8)(maps).shape[1]]))"
    )
    *said, found = run("-I", "-W", "ignore", "-c", script, cwd=elsewhere).splitlines()
    assert json.loads(found) == [str(target / "secondorder" / "__init__.py"), 36]
    assert said[0].startswith(f"secondorder {__version__}, PyTorch ")
    assert said[1].startswith("devices: cpu")
    assert [line.split(":")[0] for line in said[2:6]] == [f"extra {name}" for name in command.FOR_USERS]
    assert f"{NAME}.tar.gz" in said[6]
    assert "pip install -e '.[studies]' && python -m studies" in said[6]


def test_extras_that_are_not_complete_name_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "torch>=2",
        "loky>=3; extra == 'studies'",
        'no-such_thing.x>=1,<2; extra == "studies"',
        "ray; extra == 'ray'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: asked)
    assert command.missing("studies") == ["no-such_thing.x"]
    assert command.missing("slurm") is None
    assert "extra studies: without no-such_thing.x; pip install 'secondorder[studies]'" in [*command.report()]
    assert [*command.report()][-1] == "studies: python -m studies --help"  # the tests run in a clone


def test_a_package_that_pip_did_not_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", none)
    assert [line for line in command.report() if line.startswith("extra")] == ["extra studies: unknown to pip", *[
        f"extra {name}: unknown to pip" for name in command.FOR_USERS[1:]
    ]]  # fmt: skip


def test_the_tools_of_the_tests_are_in_their_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() == EXTRAS
    assert any(requirement.startswith("setuptools") for requirement in extras["test"])
