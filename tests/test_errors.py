"""Errors are one bounded line, whatever the values in them."""

import pickle

import numpy as np
import pytest
import torch

from secondorder.errors import LONGEST, InputError, NonFiniteError, check_known, failures_of


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
