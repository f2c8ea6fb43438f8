"""Asked to end: the signals of a scheduler and of Ctrl-C.

A signal is only noted. The trainer asks after each step, on all ranks together, since it may have reached some alone.
It stands apart from torch, so that a run listens before the seconds of importing it.
"""

import math
import os
import signal
import time
from contextlib import contextmanager

EXIT_CODE = os.EX_TEMPFAIL  # 75: ended early, the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_since = None  # time.monotonic() of the first signal


class Preempted(Exception):
    """The run ended because it was asked to; the message says what was saved. The command line exits with 75."""


@contextmanager
def listening():
    """Inside, SIGNALS are noted instead of ending the process; a second SIGINT ends it at once."""
    global _since
    _since = None
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked():
    """Whether a signal has reached this process."""
    return _since is not None


def left(grace):
    """Seconds that remain of the grace after the first signal; without a signal or a grace (None) infinitely many."""
    return math.inf if grace is None or _since is None else grace - (time.monotonic() - _since)


def _note(number, _):
    global _since
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
    if _since is None:
        _since = time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            again = "; once more ends it at once, without" if number == signal.SIGINT else ""
            # Not print: the signal may have come in the middle of one.
            os.write(
                2, f"mspt: {signal.Signals(number).name}: ends with a checkpoint after this step{again}\n".encode()
            )
