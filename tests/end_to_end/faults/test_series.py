"""Faults at random moments, many times, against an uninterrupted run.

MSPT_FAULTS=50 pytest -s tests/end_to_end/faults/test_series.py is the long series (5 minutes); MSPT_SEED repeats one.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter

from mspt.training import checkpoint
from tests.end_to_end.faults.conftest import STEPS
from tests.end_to_end.faults.ranks import Run

FAULTS = int(os.environ.get("MSPT_FAULTS", "7"))
SEED = int(os.environ.get("MSPT_SEED", random.randrange(10**6)))
# From the start of the ranks to the end of a run, on two cores.
SECONDS = 4.0
# Seconds without a step after which the watchdog ends a run.
PATIENCE = 15


def published(folder):
    return sorted((folder / "checkpoints").glob("step-????????"))


def at_a_random_moment(run, random, victims, number):
    """Send a signal to victims() -> whether there still was one."""
    time.sleep(random.uniform(0, SECONDS))
    found = [victim for victim in victims() if victim.is_alive()]
    for victim in found:
        os.kill(victim.pid, number)
    return bool(found)


def kill_a_rank(run, random):
    return at_a_random_moment(run, random, lambda: [random.choice(run.ranks)], signal.SIGKILL)


def kill_all_ranks(run, random):
    return at_a_random_moment(run, random, lambda: run.ranks, signal.SIGKILL)


def kill_a_worker(run, random):
    time.sleep(random.uniform(0, SECONDS))
    workers = run.workers()
    if workers:
        random.choice(workers).kill()
    return bool(workers)


def ask_a_rank_to_end(run, random):
    return at_a_random_moment(run, random, lambda: [random.choice(run.ranks)], signal.SIGTERM)


def wait(run, random):
    """The fault is in a rank already."""
    return True


def damage(folder, random):
    """Spoil the newest of several checkpoints."""
    if len(published(folder)) < 2:
        run = Run(folder, 2, STEPS)
        run.wait_for(8)
        run.send(0, signal.SIGKILL)
        run.end()
    there = published(folder)
    assert len(there) > 1
    file = random.choice(list(there[-1].iterdir()))
    way = random.choice(["delete", "cut", "flip"])
    if way == "delete":
        file.unlink()
    elif way == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        data = bytearray(file.read_bytes())
        # Of the file of numbers beside the shards a byte that matters: its first brace.
        data[0 if file.suffix == ".json" else random.randrange(len(data))] ^= 1
        file.write_bytes(data)


def test_faults_at_random_moments(tmp_path, ends_as_uninterrupted):
    print(f"MSPT_FAULTS={FAULTS} MSPT_SEED={SEED}")
    own, counts, starts, ends, hung = random.Random(SEED), Counter(), 0, 0, 0
    folder = tmp_path / "run"
    kinds = {
        "rank killed": kill_a_rank,
        "all ranks killed": kill_all_ranks,
        "loader worker killed": kill_a_worker,
        "rank killed in a save": wait,
        "rank asked to end": ask_a_rank_to_end,
        "disk full at a save": wait,
        "newest checkpoint damaged": wait,
    }
    order = [kind for _ in range(-(-FAULTS // len(kinds))) for kind in own.sample(list(kinds), len(kinds))]
    while counts.total() < FAULTS or ends == 0:
        kind = order[counts.total()] if counts.total() < FAULTS else None
        damaged = kind == "newest checkpoint damaged"
        if damaged:
            damage(folder, own)
        faults = {}
        if kind == "rank killed in a save":
            # A save makes some 35 changes to the disk on rank 0 and 25 on rank 1, most of them writes of its file.
            faults = own.choice([{0: ("die_in_save", own.randrange(100))}, {1: ("die_in_save", own.randrange(75))}])
        elif kind == "disk full at a save":
            faults = {own.randrange(2): ("full_disk", 20_000)}
        run = Run(folder, 2, STEPS, f"run.hang_timeout={PATIENCE}", faults=faults)
        starts += 1
        happened = kinds[kind](run, own) if kind else False
        codes = run.end(patience=3 * PATIENCE)
        # A worker killed in the middle of a message may leave its rank waiting for the rest: the watchdog ends it.
        hung += 69 in codes
        killed = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT)
        assert all(code in (0, 1, 2, 69, 75, *killed) for code in codes), codes
        if damaged:
            assert "DAMAGED CHECKPOINT" in run.said()
        if kind == "disk full at a save" and codes != [0, 0]:
            assert codes == [2, 2] and "File too large" in run.said(), run.said()
        if published(folder):
            # Nothing half-written under a final name.
            assert checkpoint.latest(folder) == published(folder)[-1]
        if kind and (damaged or (happened and codes != [0, 0])):
            counts[kind] += 1
            print(f"{counts.total()}: {kind}, exit codes {codes}", flush=True)
        if codes == [0, 0]:
            ends_as_uninterrupted(folder, 2)
            ends += 1
            shutil.rmtree(folder)
    print(f"{counts.total()} faults: {dict(counts)}; {starts} starts, {ends} runs to the end, all equal; {hung} hung")
