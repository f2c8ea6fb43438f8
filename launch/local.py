"""Start a run on this machine as several processes, one rank each.

    python launch/local.py --processes 2 --config configs/quickstart.yaml training.steps=50

The same as `mspt pretrain` under torchrun, with each rank's threads set to its share of the cores. Signals are passed
on to the ranks. Ends with the exit code of the first rank that failed or that a signal made end early (75), after
killing those that hang then; a message that several ranks print comes once.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time

from mspt.training.ports import free_port


def pretrain(config, overrides):
    """The command of every rank of a run."""
    return [sys.executable, "-m", "mspt.cli", "pretrain", "--config", str(config), *overrides]


def environments(processes):
    """The environment of each rank, as torch.distributed reads it."""
    shared = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(processes))
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run(command, processes):
    """Run command as that many ranks -> exit code."""
    ranks = []
    for environment in environments(processes):
        first = environment["RANK"] == "0"
        errors = None if first else subprocess.PIPE
        # In a process group of their own: Ctrl-C reaches this process alone, and each rank once, through it.
        ranks.append(subprocess.Popen(command, env=environment, stderr=errors, text=True, process_group=0))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: [rank.send_signal(received) for rank in ranks])
    said = [[] for _ in ranks]  # rank 0 speaks for itself; what others say is kept for the end
    readers = [
        threading.Thread(target=lambda pipe=rank.stderr, lines=lines: lines.extend(pipe), daemon=True)
        for rank, lines in zip(ranks[1:], said[1:], strict=True)
    ]
    for reader in readers:
        reader.start()
    codes = [None]
    while None in codes and not any(codes):
        time.sleep(0.1)
        codes = [rank.poll() for rank in ranks]
    _stop(ranks)
    for reader in readers:
        reader.join(timeout=5)
    failed = next(((rank, code) for rank, code in enumerate(codes) if code), None)
    if failed is None:
        return 0
    rank, code = failed
    if rank and not code == ranks[0].returncode == 2:  # else rank 0, which ended a moment later, has said the same
        sys.stderr.write("".join(f"rank {rank}: {line}" for line in said[rank]))
    return code if code > 0 else 128 - code


def _stop(ranks, grace=3.0):
    """Give ranks that have lost a peer a moment to end by themselves and to say why, then kill them."""
    end = time.monotonic() + grace
    for rank in ranks:
        try:
            # A configuration that all ranks refuse is refused within moments of each other.
            rank.wait(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, required=True, help="number of ranks")
    parser.add_argument("--config", required=True)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes is {options.processes}; at least 1 is needed")
    command = pretrain(options.config, options.overrides) + ["--debug"] * options.debug
    sys.exit(run(command, options.processes))


if __name__ == "__main__":
    main()
