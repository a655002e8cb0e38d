"""The files of `tests/any_device` in processes of their own, where a pretend device is an accelerator for good.

A device of Python is registered for the whole process, and before its first backward pass: other tests of the process would
find an accelerator there (``auto``, ``nn.DataParallel``, ...).
"""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

FOLDER = Path(__file__).parent / "any_device"
PARTS = {
    "networks and curvature": ["device_networks.py", "device_curvature.py"],
    "optimisers and training": ["device_optimisers.py", "device_training.py"],
    "studies": ["device_studies.py", "-k", "not [preconditioning]"],
    "preconditioning study": ["device_studies.py", "-k", "[preconditioning]"],
}
"""What takes some twenty seconds each, eight of them to import the libraries."""

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make a device out of Python: torch.utils.backend_registration lacks the hook",
)


def test_every_file_has_its_part() -> None:
    assert {argument for arguments in PARTS.values() for argument in arguments if argument.endswith(".py")} == {
        path.name for path in FOLDER.glob("device_*.py")
    }


@pytest.mark.parametrize("part", PARTS)
def test_on_the_pretend_device(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *PARTS[part]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=FOLDER)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
