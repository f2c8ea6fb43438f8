"""One rank of two: saves that fail half-way.   break_save.py RUN_DIR"""

import os
import signal
import sys
from pathlib import Path

import tiny

from mspt.errors import UserError
from mspt.training import checkpoint
from mspt.training.engine import Engine, initialise

run_dir = Path(sys.argv[1])
process = initialise()
engine = Engine(tiny.Tiny(), tiny.settings(zero_stage=1), tiny.SCHEDULE, tiny.STEPS)


def save(step):
    return checkpoint.save(engine, run_dir, step, position={}, seed=0, config={}, extra={})


first, second = save(1), save(2)
assert checkpoint.latest(run_dir) == second

# A byte of rank 1's file flips: every rank goes back to the one before.
if process.rank == 0:
    path = second / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
assert checkpoint.latest(run_dir) == first
# Coming to the same step again replaces the damaged one.
assert save(2) == second and checkpoint.latest(run_dir) == second

# The disk is full on rank 1, in the middle of its file.
write = os.write


def full(descriptor, data):
    write(descriptor, data[:100])
    raise OSError(28, "No space left on device")


def killed(descriptor, data):
    write(descriptor, data[:7])
    os.kill(os.getpid(), signal.SIGKILL)


if process.rank == 1:
    os.write = full
try:
    save(3)
except UserError as error:
    said = str(error)
else:
    said = "nothing"
assert "rank 1 says" in said and "No space left" in said, said
print("refused", flush=True)
os.write = write
assert checkpoint.latest(run_dir) == second

# Rank 1 is killed while its thread writes.
if process.rank == 1:
    os.write = killed
save(4)
