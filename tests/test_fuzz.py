"""A slice of the fuzz run, area by area: no call with good, bad or absurd input is a fault.

The whole run, 10,000 calls of any seed, is `python -m tests.fuzz`; a fault names the command that repeats it.
"""

import pytest
from fuzz.areas import AREAS
from fuzz.call import Call
from fuzz.judge import judged

from secondorder.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_no_call_is_a_fault(area: str) -> None:
    verdicts = [judged(area, 0, index, AREAS[area].generate) for index in range(AREAS[area].calls)]
    faults = [f"{verdict}; {verdict.repeat}" for verdict in verdicts if verdict.fault]
    assert not faults, "\n".join(faults)
    outcomes = {verdict.outcome for verdict in verdicts}
    assert outcomes == {"accepted", "refused"}, "calls of one kind only"


def refuse(message: str) -> None:
    raise InputError(message)


def test_the_judge_knows_a_fault() -> None:
    """One call of each kind of fault, and one of each kind that is none."""
    import time
    import warnings

    import torch

    tensor = torch.zeros(2)

    def change_and_refuse() -> None:
        tensor.add_(1)
        refuse("x is wrong")

    def draw_and_refuse() -> None:
        torch.rand(2)
        refuse("x is wrong")

    def of(call: Call) -> str:
        return judged("x", 0, 0, lambda random: call).fault

    assert of(Call("fine", lambda: 1)) == ""
    assert of(Call("refused", lambda: refuse("x is wrong"), names=("x",), expected="refuse", watched=(tensor,))) == ""
    assert of(Call("Python's own", lambda: refuse(x=1))) == ""  # type: ignore[call-arg]
    assert "KeyError" in of(Call("another error", lambda: {}["x"]))
    assert of(Call("the user's own error", lambda: {}["x"], raises=(KeyError,))) == ""
    assert "names none of y" in of(Call("without the name", lambda: refuse("x is wrong"), names=("y",)))
    assert "without a word" in of(Call("no word", lambda: refuse("")))
    assert "must refuse" in of(Call("accepted", lambda: 1, expected="refuse"))
    assert "must accept" in of(Call("refused", lambda: refuse("x"), expected="accept"))
    assert of(Call("wrong", lambda: 1, check=lambda result: f"{result} is wrong")) == "1 is wrong"
    assert "UserWarning: w" in of(Call("a warning", lambda: warnings.warn("w", stacklevel=1)))
    assert "takes more than 0.1 s" in of(Call("hangs", lambda: time.sleep(5), seconds=0.1))
    assert "Tensor that was passed" in of(Call("changes", change_and_refuse, watched=(tensor,)))
    assert "torch's random state" in of(Call("draws", draw_and_refuse))
    assert "torch's random state" in of(Call("draws", lambda: torch.rand(1), pure=True))
