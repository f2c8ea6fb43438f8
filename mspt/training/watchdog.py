"""A run that hangs: who is to blame is said, and it ends instead of holding its nodes for nothing."""

import json
import os
import sys
import threading
import time
from pathlib import Path

from mspt.errors import UserError
from mspt.files import write

EXIT_CODE = os.EX_UNAVAILABLE  # 69: a rank or its data was not there; the same command may be started again


class Watchdog:
    """Threads beside the trainer's, which a blocked collective does not stop.

    Ten times per timeout one writes RUN/heartbeats/rank-00000.json: the step that this rank has reached, and the time.
    After timeout seconds without a new step another, which a file system that hangs does not stop either, says which
    ranks are late or silent, and ends the process with 69. timeout None: nothing is watched.
    """

    def __init__(self, run_dir, process, timeout):
        self.folder, self.process, self.timeout = Path(run_dir) / "heartbeats", process, timeout
        self.step, self.waited = 0, 0.0
        self.closed = threading.Event()
        if timeout is not None:
            self.interval = timeout / 10
            self._beat()
            for task in (self._watch, self._go_on_beating):
                threading.Thread(target=task, daemon=True).start()

    def reached(self, step):
        """This rank has its data for a step, or gets on within one."""
        self.step, self.waited = step, 0.0

    def close(self):
        self.closed.set()
        self._file(self.process.rank).unlink(missing_ok=True)

    def _watch(self):
        while not self.closed.wait(self.interval):
            # Added up and not taken from a clock: while all of a job is stopped (SIGSTOP) no rank is late.
            self.waited += self.interval
            if self.waited > self.timeout:
                print(
                    f"mspt: error (rank {self.process.rank}): no step finished in {self.timeout:g} s "
                    f"(run.hang_timeout): {self._blame()}; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_CODE)

    def _blame(self):
        """late() in words; it is not waited for where the file system hangs."""
        found = [f"the heartbeats in {self.folder} cannot be read"]

        def look():
            found[:] = self.late()

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(self.interval)
        return "; ".join(found) or f"every rank is alive and has reached step {self.step}: see the network"

    def late(self):
        """For each rank that holds up the others: what is known of it."""
        beats = [self._read(rank) for rank in range(self.process.world_size)]
        furthest = max((beat["step"] for beat in beats if beat), default=0)
        found = []
        for rank, beat in enumerate(beats):
            silent = time.time() - beat["time"] if beat else None
            if beat is None:
                found.append(f"rank {rank} has no heartbeat in {self.folder}")
            elif silent > self.timeout / 2:
                found.append(
                    f"rank {rank} on {beat['host']} has been silent for {silent:.0f} s, at step {beat['step']}"
                )
            elif beat["step"] < furthest:
                found.append(f"rank {rank} on {beat['host']} has not reached step {furthest}")
        return found

    def _go_on_beating(self):
        while not self.closed.wait(self.interval):
            self._beat()

    def _beat(self):
        beat = {"step": self.step, "time": time.time(), "host": os.uname().nodename, "pid": os.getpid()}
        try:
            write(self._file(self.process.rank), json.dumps(beat) + "\n")
        except (OSError, UserError) as error:
            # Such as a full disk: the trainer will say so itself once it matters.
            print(f"mspt: no heartbeat written ({error})", file=sys.stderr, flush=True)

    def _read(self, rank):
        try:
            return json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return None

    def _file(self, rank):
        return self.folder / f"rank-{rank:05d}.json"
