"""The files of `tests/any_device` in a process of their own, where a pretend device is an accelerator for good."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

FOLDER = Path(__file__).parent / "any_device"
FILES = sorted(path.name for path in FOLDER.glob("device_*.py"))

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make a device out of Python: torch.utils.backend_registration lacks the hook",
)


@pytest.mark.parametrize("file", FILES)
def test_on_the_pretend_device(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(FOLDER / file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=FOLDER.parent.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
