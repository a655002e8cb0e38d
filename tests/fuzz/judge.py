"""Runs one call within a time limit and says whether it was accepted, refused, or is a fault."""

import contextlib
import faulthandler
import re
import resource
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

import torch

from secondorder.errors import InputError

from .call import Call, Generator
from .state import fingerprint, process_state, random_state

LONGEST = 300
"""Characters of an error."""
PYTHONS_OWN = re.compile(
    r"unexpected keyword argument|missing \d+ required|takes (from )?\d+.* positional arguments?|takes exactly|"
    r"multiple values for"
)
"""What Python says of a wrong keyword or number of arguments, which no package need say again."""
EXTRA_BYTES = 6 * 2**30
"""Address space beyond what the process has already: an absurd size is refused by the system, not by a killed process."""


@dataclass(frozen=True)
class Verdict:
    """outcome: "accepted", "refused" or "fault"; of a fault, what is wrong."""

    area: str
    seed: int
    index: int
    outcome: str
    words: str
    fault: str = ""

    @property
    def repeat(self) -> str:
        """The command that makes this call again."""
        return f"python -m tests.fuzz --seed {self.seed} --area {self.area} --only {self.index}"

    def __str__(self) -> str:
        return f"{self.area} {self.index}: {self.words}: {self.fault or self.outcome}"


class Hanging(BaseException):
    """The call took too long; no Exception, so that nothing on the way catches it."""


def judged(area: str, seed: int, index: int, generate: Generator) -> Verdict:
    """The verdict on a call, which depends on (seed, area, index) alone."""
    torch.manual_seed(index)
    try:
        call = generate(Random(f"{seed} {area} {index}"))
    except Exception as error:  # what the call needs cannot be made: a fault too, of the package or of this test
        return Verdict(area, seed, index, "fault", "its preparation", f"{type(error).__name__}: {_line(str(error))}")
    torch.manual_seed(index + 1)
    outcome, fault = _outcome(call)
    return Verdict(area, seed, index, "fault" if fault else outcome, call.words, fault)


def _outcome(call: Call) -> tuple[str, str]:
    """The outcome, and what is wrong with it, or nothing."""
    process, drawn, things = process_state(), random_state(), [fingerprint(thing) for thing in call.watched]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        refusal, fault = _run(call)
    outcome = "accepted" if refusal is None else "refused"
    own = [w for w in warned if "secondorder" in Path(w.filename).parts or "studies" in Path(w.filename).parts]
    loud = [w for w in warned if not issubclass(w.category, DeprecationWarning | FutureWarning)] + own
    if not fault and refusal is not None:
        fault = _message_fault(call, refusal)
    if not fault and loud:
        fault = f"{loud[0].category.__name__}: {_line(str(loud[0].message))}"
    changed = [name for name, value in process_state().items() if value != process[name]]
    if refusal is not None or call.pure:
        changed += [name for name, value in random_state().items() if value != drawn[name]]
        changed += [
            f"{type(thing).__name__} that was passed"
            for thing, before in zip(call.watched, things, strict=True)
            if fingerprint(thing) != before
        ]
    if changed and not fault:
        fault = f"{outcome}, and changed: {', '.join(changed)}"
    if not fault and call.expected not in ("either", {"accepted": "accept", "refused": "refuse"}[outcome]):
        fault = f"{outcome}, must {call.expected}" + (f" ({_line(refusal)})" if refusal else "")
    return outcome, fault


def _run(call: Call) -> tuple[str | None, str]:
    """The message of a refusal or None, and the fault of a call that failed, hung or gave a wrong result."""
    try:
        with time_limit(call.seconds), memory_limit():
            result = call.run()
            wrong = call.check(result)
    except InputError as error:
        return str(error), ""
    except Hanging:
        return None, f"takes more than {call.seconds:g} s"
    except call.raises:
        return None, ""
    except TypeError as error:
        if PYTHONS_OWN.search(str(error)):
            return None, ""
        return None, f"TypeError: {_line(str(error))}"
    except Exception as error:
        return None, f"{type(error).__name__}: {_line(str(error))}"
    return None, wrong or ""


def _message_fault(call: Call, message: str) -> str:
    """What is wrong with the words of a refusal."""
    if "\n" in message or "\r" in message:
        return f"an error of {len(message.splitlines())} lines: {_line(message)}"
    if len(message) > LONGEST:
        return f"an error of {len(message)} characters: {_line(message)}"
    if not message.strip():
        return "an error without a word"
    if call.names and not any(name in message for name in call.names):
        return f"an error that names none of {', '.join(call.names)}: {_line(message)}"
    return ""


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Hanging in the body after so many seconds; what no signal reaches ends the process, with a traceback, much later."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hanging

    before = signal.signal(signal.SIGALRM, late)
    faulthandler.dump_traceback_later(seconds + 100, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """A bound on new memory in the body (Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
