"""``python -m studies [name] [--flags]``: run studies and write their report."""

import gc
import signal
import sys
from collections.abc import Sequence

from studies.interruption import Interrupted, Interruption


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for bad input, 1 for a training that failed, 128 + a signal's number; messages of one line."""
    with Interruption() as interruption:
        return _end(arguments, interruption)


def _end(arguments: Sequence[str] | None, interruption: Interruption) -> int:
    try:
        from studies.program import program  # loads the libraries, which takes seconds

        if arguments is None:  # the process is ours
            gc.freeze()  # the million objects that imports leave are no garbage: each search of them takes a quarter of a second
        interruption.orderly = True
        return program(sys.argv[1:] if arguments is None else arguments)
    except Interrupted as signalled:
        return 128 + signalled.number
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        interruption.orderly = False


if __name__ == "__main__":
    sys.exit(_end(None, Interruption().__enter__()))  # which handles signals until the interpreter is gone
