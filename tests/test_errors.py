"""Errors are one bounded line, whatever the values in them."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from secondorder.errors import (
    LONGEST,
    MOST,
    InputError,
    NonFiniteError,
    check_known,
    check_number,
    check_seed,
    check_whole,
    failures_of,
)


@pytest.mark.parametrize("kind", [InputError, NonFiniteError])
def test_a_long_value_loses_the_middle_of_the_message(kind: type[InputError]) -> None:
    error = kind(f"num_iter must be a whole number, got {'x' * 1000}; use 5")
    assert len(str(error)) == LONGEST
    assert str(error).startswith("num_iter must be a whole number, got xxx")
    assert str(error).endswith("xxx; use 5")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_lines_become_one() -> None:
    assert str(InputError("a tensor([1.,\n        2.]) is wrong\r\n")) == "a tensor([1., 2.]) is wrong"


@pytest.mark.parametrize("value", [[], {}, {1}, np.zeros(2), torch.zeros(2), None, 3, "c", type])
def test_anything_can_be_asked_for(value: object) -> None:
    with pytest.raises(InputError, match=r"^unknown letter .*; choose one of: a, b$"):
        check_known("letter", value, {"a": 1, "b": 2})
    check_known("letter", "a", {"a": 1, "b": 2})


@pytest.mark.parametrize("value", [True, 2.0, "2", None, torch.tensor(2), np.int64(2), -1, -(10**400)])
def test_only_a_whole_number_is_one(value: object) -> None:
    with pytest.raises(InputError, match=r"^size must be a whole number of at least 0, got "):
        check_whole("size", value, 0)


def test_the_interval_of_whole_numbers_is_named() -> None:
    for value, most in ((0, MOST), (9, 9), (10**400, math.inf), (MOST, MOST)):
        check_whole("size", value, 0, most)
    with pytest.raises(InputError, match=r"from 1 to 9, got 10; or None$"):
        check_whole("size", 10, most=9, hint="; or None")
    with pytest.raises(InputError, match=r"from 1 to 2147483647, got 2147483648$"):
        check_whole("size", MOST + 1, most=MOST)
    with pytest.raises(InputError, match=r"of at least 1, got 0$"):
        check_whole("size", 0, most=MOST)
    check_seed(2**63 - 1)
    with pytest.raises(InputError, match=r"^seed must be a whole number from 0 to 2\^63 - 1, got 9223372036854775808$"):
        check_seed(2**63)


@pytest.mark.parametrize(
    ("low", "high", "ends", "inside", "outside", "words"),
    [
        (0, 1, "[)", (0, 0.5), (1, -1e-9), r"a number in \[0, 1\)"),
        (0, 1, "()", (0.5,), (0, 1), r"a number in \(0, 1\)"),
        (-5, 5, "[]", (-5, 5), (6, -(10**400)), r"a number in \[-5, 5\]"),
        (0, math.inf, "()", (1e300,), (0, math.inf, 10**400), r"a finite number above 0"),
        (0, math.inf, "[)", (0,), (-1, math.inf), r"a finite number of at least 0"),
        (0, math.inf, "(]", (math.inf, 10**400), (0, -math.inf), r"a number above 0"),
    ],
)
def test_intervals_of_numbers(
    low: float, high: float, ends: str, inside: tuple[float, ...], outside: tuple[float, ...], words: str
) -> None:
    for value in inside:
        check_number("rate", value, low, high, ends)
    for bad in (*outside, True, math.nan, "1", None, torch.tensor(0.5)):
        with pytest.raises(InputError, match=f"^rate must be {words}, got "):
            check_number("rate", bad, low, high, ends)


def test_errors_need_no_torch() -> None:
    """Processes of a pool import them before anything else."""
    source = "import secondorder.errors, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)


def test_failures_of_torch_are_named_and_others_go_through() -> None:
    with pytest.raises(InputError, match=r"^the model fails: mat1 and mat2 shapes cannot"), failures_of("the model"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"^the model fails: RuntimeError$"), failures_of("the model"):
        raise RuntimeError
    for own in (
        InputError("of mine"),
        TypeError("of the user"),
        torch.OutOfMemoryError("x"),
        torch.linalg.LinAlgError("x"),
    ):
        with pytest.raises(type(own), match=str(own)), failures_of("the model"):
            raise own
