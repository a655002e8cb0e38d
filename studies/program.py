"""The program behind ``python -m studies``: everything is checked, run and reported, and what fails is said in one line."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TextIO

import torch
from threadpoolctl import threadpool_limits

from secondorder.errors import InputError
from secondorder.training import NonFiniteLossError, TensorBoard, distributed, is_main_process, on_main
from secondorder.training.launch import check_environment
from studies.command_line import Command, parse, parse_store
from studies.engine.command import measure, write_pages
from studies.engine.dry_run import dry_run
from studies.engine.figures import write_figures
from studies.engine.store_command import store_command
from studies.machine import git_commit
from studies.messages import one_line
from studies.settings import own_folder
from studies.study import STUDIES

NO_MEMORY = ("out of memory", "can't allocate memory", "Unable to allocate", "bad_alloc")
"""What libraries say when there is no memory: torch on a GPU and on a CPU, numpy, C++."""


def program(arguments: Sequence[str]) -> int:
    """Run a command line. Exit code 0, 1 for a training that failed, 2 for whatever the user can mend; errors on stderr.

    An exception that is none of these is a fault of this package, and goes on with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold bytes that are no text, a terminal lack letters
            stream.reconfigure(errors="backslashreplace")
    try:
        with _checked_output():
            if [*arguments[:1]] == ["store"]:
                print("\n".join(store_command(parse_store(arguments[1:]))), flush=True)
            else:
                run(parse(arguments))
    except Exception as error:
        known = failure(error)
        if known is None:
            raise
        code, words = known
        with contextlib.suppress(OSError):
            print(one_line(f"error: {words}"), file=sys.stderr, flush=True)
        return code
    return 0


def run(command: Command) -> None:
    """Check everything, do what every study asked for wants, and write the page of all results in the folder."""
    common = command.common
    check_environment()
    torch.set_num_threads(common.threads)
    git_commit()  # of the code that is loaded now
    chosen = {name: (STUDIES[name], settings) for name, settings in command.studies.items()}
    if common.dry_run:
        plans = {name: (study, study.context(common, settings)) for name, (study, settings) in chosen.items()}
        for line in dry_run(plans):
            print(line, flush=True)
        return
    if common.tensorboard is not None:
        TensorBoard(common.tensorboard)  # or one line that it is not installed
    with distributed(common.device), threadpool_limits(common.threads), ExitStack() as held:
        on_main(lambda: held.enter_context(own_folder(common.folder)))
        measure(common, chosen)
        if is_main_process():
            markdown, page = write_pages(common.folder, common.preset, STUDIES, must=[*chosen])
            if common.tensorboard is not None:
                write_figures(common.tensorboard, common.folder)
            print(f"report: {markdown}\n        {page}", flush=True)


def failure(error: Exception) -> tuple[int, str] | None:
    """The exit code of an error that the user can act on, and what to say; None for a fault of this package."""
    if isinstance(error, NonFiniteLossError):
        return 1, str(error)
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        reason = str(error).partition("\n")[0] or type(error).__name__
        return (
            2,
            f"out of memory ({reason}); use smaller batches, images or fewer --processes, the same command continues",
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        place = "" if error.filename is None else f"{error.filename}: "
        return 2, f"{place}{reason}; everything is kept, the same command continues once this is mended"
    return None


class _Output:
    """A stream whose failure is an InputError that says so: nobody reads it any more, or the disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise self._lost(error) from None

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            raise self._lost(error) from None

    def _lost(self, error: OSError) -> InputError:
        """What is still in the stream then goes nowhere, without another error at the interpreter's end."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        return InputError(
            f"cannot write to the standard output: {error.strerror or error}; everything is kept, the same command continues"
        )


@contextlib.contextmanager
def _checked_output() -> Iterator[None]:
    """Everything that is printed inside is written at its end, that of --help too; there may be no standard output."""
    if sys.stdout is None:
        yield
        return
    output = _Output(sys.stdout)
    with contextlib.redirect_stdout(output):
        try:
            yield
        finally:
            output.flush()
