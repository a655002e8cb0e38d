"""Tests for a device that is not the CPU: the pretend one, or the accelerator that SECONDORDER_TEST_DEVICE names.

The files of this folder are not collected by themselves: the pretend device is a device of the whole process, for good.
`tests/test_any_device.py` starts them in a process of their own; by hand:

    python -m pytest -n 0 tests/any_device/device_*.py
    SECONDORDER_TEST_DEVICE=cuda python -m pytest -n 0 tests/any_device/device_*.py
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    """The name of the device."""
    name = os.environ.get("SECONDORDER_TEST_DEVICE", "pretend")
    if name == "pretend":
        import pretend_device  # noqa: F401  makes it a device of torch
    return name


@pytest.fixture
def without_float64(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretend device has no double precision meanwhile, like Apple's MPS."""
    if device != "pretend":
        pytest.skip("only the pretend device can be without double precision for a while")
    monkeypatch.setattr("pretend_device.float64", False)
    monkeypatch.setattr("secondorder.accelerator.WITHOUT_FLOAT64", {device})


@pytest.fixture
def waits(device: str) -> Callable[[], AbstractContextManager[list[str]]]:
    """A context whose list holds, on exit, every moment inside at which the CPU would have waited for the device."""
    if device != "pretend":
        pytest.skip("only the pretend device counts the moments at which the CPU waits for it")
    from pretend_device import counted

    return counted
