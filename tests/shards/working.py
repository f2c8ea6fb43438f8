"""Work for the processes of test_pool.py, in a module that they import fast."""

import os
import signal
import sys
import time

from mspt.errors import UserError
from shards.pool import unordered


def work(task):
    """What the word says; a number comes back doubled."""
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "exit":
        os._exit(3)
    if task == "refused":
        raise UserError("fix this")
    if task == "wrong":
        raise KeyError("a bug")
    if task == "deaf":
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    if task == "slow":
        time.sleep(60)
    return 2 * task


if __name__ == "__main__":  # two processes, both at work for long when both have said something
    # Tests in the background of a shell inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for deaf in unordered(work, ["deaf", "deaf", "slow", "slow"], 2):
            print(f"deaf to Ctrl-C: {deaf}", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
