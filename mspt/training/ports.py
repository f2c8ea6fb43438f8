"""TCP ports at which the ranks of a run find each other.

Below those that systems give to connections (from 32768 on): seconds pass until rank 0 listens, and one of those would
be taken meanwhile now and then.
"""

import random
import socket

FIRST, COUNT = 10_000, 22_000


def free_port():
    """One that nothing on this machine listens at now."""
    while True:
        port = FIRST + random.randrange(COUNT)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
