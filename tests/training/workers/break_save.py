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

# The disk is full on rank 1.
write_part = checkpoint._write_part


def full(engine, path):
    path.write_bytes(b"partial")
    raise OSError(28, "No space left on device")


if process.rank == 1:
    checkpoint._write_part = full
try:
    save(3)
except UserError as error:
    said = str(error)
else:
    said = "nothing"
assert "rank 1 says" in said and "No space left" in said, said
print("refused", flush=True)
assert checkpoint.latest(run_dir) == second


# Rank 1 is killed while it writes.
def killed(engine, path):
    write_part(engine, path)
    with path.open("r+b") as file:
        file.truncate(7)
    os.kill(os.getpid(), signal.SIGKILL)


if process.rank == 1:
    checkpoint._write_part = killed
save(4)
