"""Signals as a process begun in a terminal finds them, for tests that send some.

What the tests inherit may be otherwise: `nohup` ignores SIGHUP, a shell SIGINT of background jobs, for all children.
"""

import signal


def signals_of_a_terminal() -> None:
    """To be called in a child before it begins (`preexec_fn`): every signal acts, and none waits."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
