"""Start a script as several ranks on this machine, each a real process."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mspt.training.ports import free_port

ROOT = Path(__file__).parent.parent
# Runs a script and leaves at once when it is done: gloo's threads now and then abort a process that cleans up.
RUN = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Rank:
    """How one rank ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


def launch(script, world_size, *arguments, timeout=600, check=True, grace=60, env=None):
    """Run `python script arguments…` as world_size gloo ranks on the CPU -> a Rank for each.

    timeout: seconds for all of it. After one rank has failed the others have grace seconds to notice, then they are
    killed. check: raise AssertionError with the first failing rank's output unless all end with 0.
    """
    shared = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world_size))
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **(env or {})}
    with tempfile.TemporaryDirectory() as directory:
        files = [[Path(directory, f"{name}-{rank}") for name in ("out", "err")] for rank in range(world_size)]
        processes = []
        for rank, (out, err) in enumerate(files):
            with out.open("wb") as stdout, err.open("wb") as stderr:
                command = [sys.executable, "-c", RUN, str(script), *map(str, arguments)]
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=own, stdout=stdout, stderr=stderr))
        try:
            _wait(processes, time.monotonic() + timeout, grace)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                process.wait()
        ranks = [
            Rank(process.returncode, out.read_text(errors="replace"), err.read_text(errors="replace"))
            for process, (out, err) in zip(processes, files, strict=True)
        ]
    if check:
        for number, rank in enumerate(ranks):
            assert rank.returncode == 0, f"rank {number} ended with {rank.returncode}\n{rank.stdout}\n{rank.stderr}"
    return ranks


def _wait(processes, end, grace):
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            end, grace = min(end, time.monotonic() + grace), float("inf")
        time.sleep(0.05)
