"""Every study at its smallest size, from its trainings to its report, on any device."""

from pathlib import Path

import pandas as pd
import pytest

from studies.__main__ import main
from studies.study import STUDIES


@pytest.mark.parametrize("study", STUDIES)
def test_studies(study: str, device: str, tmp_path: Path) -> None:
    flags = ["--preset", "smoke", "--seeds", "1", "--threads", "1", "--no-progress"]
    assert main([study, *flags, "--device", device, "--out", str(tmp_path)]) == 0
    assert len(pd.read_csv(tmp_path / f"{study}.csv")) > 0
    assert f'"device": "{device}' in (tmp_path / f"{study}.json").read_text()
