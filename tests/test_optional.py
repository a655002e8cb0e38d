"""The base install is enough for secondorder itself, and what needs more says so in one line."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from secondorder import __version__
from secondorder.errors import InputError
from secondorder.optional import OPTIONAL, MissingLibraryError, is_instance, needed_by

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WAY_OUT = "pip install 'secondorder[studies]'"
SAID = {
    "digits": f"the data set digits needs scikit-learn: {WAY_OUT}",
    "image": f"an image file needs pillow: {WAY_OUT}",
    "resnet18": f"the network resnet18 needs torchvision: {WAY_OUT}",
    "jpeg": f"the corruption jpeg_compression needs pillow: {WAY_OUT}",
    "detector": f"a feature pyramid needs torchvision: {WAY_OUT}",
    "probe": f"a linear probe needs scikit-learn: {WAY_OUT}",
    "metrics": f"detection_metrics needs faster-coco-eval: {WAY_OUT}",
    "polygon": f"a mask of a COCO file needs faster-coco-eval: {WAY_OUT}",
    "boxes": f"a transform of boxes and masks needs torchvision: {WAY_OUT}",
    "report": f"the table of a report needs pandas: {WAY_OUT}",
    "summary": f"summary_table needs pandas: {WAY_OUT}",
    "fidelity": f"fidelity_table needs pandas: {WAY_OUT}",
    "soap": f"optimizer 'soap' needs pytorch_optimizer: {WAY_OUT}",
    "shampoo": f"optimizer 'shampoo' needs pytorch_optimizer: {WAY_OUT}",
    "muon": f"optimizer 'muon' needs pytorch_optimizer: {WAY_OUT}",
    "singd": f"optimizer 'singd' needs singd: {WAY_OUT}",
}


def test_without_the_extras() -> None:
    """Every module is imported, a head pools, K-FAC steps, curvature is computed, own data is trained on."""
    script = Path(__file__).parent / "bare_install.py"
    run = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == SAID


def names(requirements: list[str]) -> set[str]:
    return {requirement.partition(">")[0] for requirement in requirements}


def test_the_extras_install_what_is_asked_for() -> None:
    for package, extra in OPTIONAL.values():
        assert package in names(PROJECT["optional-dependencies"][extra])
        assert package not in names(PROJECT["dependencies"])


def test_one_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert PROJECT["dynamic"] == ["version"]  # which setuptools reads from the package
    assert f"version: {__version__}" in citation
    assert f"license: {PROJECT['license']}" in citation


def test_a_missing_library_is_bad_input_and_a_failed_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "singd", None)
    for kind in (InputError, ImportError):
        with (
            pytest.raises(kind, match=r"^a thing needs singd: pip install 'secondorder\[studies\]'$"),
            needed_by("a thing"),
        ):
            import singd.optim  # noqa: F401


@pytest.mark.parametrize("error", [ModuleNotFoundError("no joblib", name="joblib"), ImportError("broken", name="PIL")])
def test_other_failures_go_through(error: ImportError) -> None:
    with pytest.raises(ImportError) as caught, needed_by("a thing"):
        raise error
    assert caught.value is error
    assert not isinstance(caught.value, MissingLibraryError)


def test_instances_of_classes_that_may_not_be_there() -> None:
    assert is_instance(Path(), "pathlib", "PurePath")
    assert not is_instance(1, "pathlib", "PurePath")
    assert not is_instance(1, "pathlib", "NoSuchClass")
    assert not is_instance(1, "no_such_module", "Class")
