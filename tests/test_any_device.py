"""The files of `tests/any_device` in processes of their own, where a pretend device is an accelerator for good.

A device of Python is registered for the whole process, and before its first backward pass: other tests of the process would
find an accelerator there (``auto``, ``nn.DataParallel``, ...).
"""

import os
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from torch.utils import backend_registration

FOLDER = Path(__file__).parent / "any_device"
PARTS = {
    "networks": ["device_networks.py"],
    "optimisers": ["device_optimisers.py"],
    "curvature": ["device_curvature.py"],
    "training": ["device_training.py"],
    "studies": ["device_studies.py", "-k", "not [preconditioning]"],
    "preconditioning study": ["device_studies.py", "-k", "[preconditioning]"],
}
"""What takes some ten seconds each."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch cannot make a device out of Python: torch.utils.backend_registration lacks the hook",
    ),
]


def test_every_file_has_its_part() -> None:
    assert {arguments[0] for arguments in PARTS.values()} == {path.name for path in FOLDER.glob("device_*.py")}


def run_pytest(arguments: list[str], output: Path) -> None:
    """pytest in this process, whose output goes into a file."""
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(FOLDER)
    sys.exit(pytest.main(["-n", "0", "-p", "no:cacheprovider", *arguments]))


@pytest.mark.parametrize("part", PARTS)
def test_on_the_pretend_device(part: str, forkserver: ForkServerContext, tmp_path: Path) -> None:
    process = forkserver.Process(target=run_pytest, args=(PARTS[part], tmp_path / "output"))
    process.start()
    process.join(280)
    process.kill()
    process.join(10)
    assert process.exitcode == 0, (tmp_path / "output").read_text()[-6000:]
